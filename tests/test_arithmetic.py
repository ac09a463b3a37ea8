"""The word problems, the annotator and the tokenizer; the checkers against a second opinion."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from stepkto_kernels.training.rewards import arithmetic
from stepkto_kernels.training.rewards.arithmetic import (
    Operation,
    Problem,
    SloppyAnnotator,
    build_tokenizer,
    check_outcome,
    check_steps,
    extract_answer,
    format_step,
    make_problem,
    split_lines,
)

EXACT = {
    "+": lambda a, b: (a + b) % 7,
    "-": lambda a, b: (a + 7 - b) % 7,
    "max": lambda a, b: b if a < b else a,
    "min": lambda a, b: b if a > b else a,
}
SYMBOLS, OPERANDS, VALUES = tuple(EXACT), range(2, 7), range(7)


def problems(number: int, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    return [make_problem(rng) for _ in range(number)]


def gold_solution(problem: Problem) -> str:
    text, value = "", problem.start
    for number, operation in enumerate(problem.operations, start=1):
        result = EXACT[operation.symbol](value, operation.operand)
        text += f"Step {number}: {value} {operation.symbol} {operation.operand} = {result}\n"
        value = result
    return text + f"Answer: {value}"


def small_problem() -> Problem:
    """3 + 4 = 0, 0 max 5 = 5, 5 - 2 = 3."""
    operations = (Operation("+", 4), Operation("max", 5), Operation("-", 2))
    return Problem("irrelevant\n", 3, operations, 3)


# ---- problems ---------------------------------------------------------------------------------


def test_operations_are_exact():
    for symbol, operand, value in itertools.product(SYMBOLS, OPERANDS, VALUES):
        assert Operation(symbol, operand).apply(value) == EXACT[symbol](value, operand)


@pytest.mark.parametrize("symbol, operand", [("*", 2), ("", 2), ("+", 1), ("+", 7), ("+", "2")])
def test_operation_refuses_what_the_task_has_not(symbol, operand):
    with pytest.raises(ValueError, match="symbol|operand"):
        Operation(symbol, operand)


def test_problems_are_as_described():
    drawn = problems(2000)
    for problem in drawn:
        assert problem.start in VALUES and problem.answer in VALUES
        assert len(problem.operations) in (4, 5)
        assert extract_answer(gold_solution(problem)) == str(problem.answer)
    symbols = [operation.symbol for problem in drawn for operation in problem.operations]
    share = {symbol: symbols.count(symbol) / len(symbols) for symbol in SYMBOLS}
    assert share == pytest.approx({"+": 0.35, "-": 0.35, "max": 0.15, "min": 0.15}, abs=0.02)
    assert {o.operand for p in drawn for o in p.operations} == set(OPERANDS)


def test_problem_depends_on_the_generator_only():
    assert problems(20, seed=3) == problems(20, seed=3)
    assert problems(20, seed=3) != problems(20, seed=4)
    before = random.getstate()
    problems(5)
    assert random.getstate() == before


def test_text_tells_the_problem():
    """The numbers of the text are 7, the start and the operands; its words name the operations."""
    words = {
        "+": ("forward", "s on "),
        "-": (" back ",),
        "max": ("below", "rises", "climbs"),
        "min": ("above", "drops"),
    }
    for problem in problems(500):
        assert problem.text.endswith("?\n") and "{" not in problem.text
        opening, *sentences = re.split(
            r" (?:First|Second|Third|Fourth|Fifth),", problem.text.rsplit(".", 1)[0]
        )
        assert sorted(re.findall(r"[0-9]", opening)) == sorted(["7", str(problem.start)])
        assert len(sentences) == len(problem.operations)
        for sentence, operation in zip(sentences, problem.operations, strict=True):
            assert re.findall(r"[0-9]", sentence) == [str(operation.operand)]
            named = {s for s, keys in words.items() if any(key in sentence for key in keys)}
            assert named == {operation.symbol}


# ---- the annotator ----------------------------------------------------------------------------


def test_annotator_writes_well_formed_chains():
    rng = random.Random(0)
    annotator = SloppyAnnotator(rng)
    for problem in problems(300):
        text = annotator.solve(problem, rng)
        assert len(check_steps(problem, text)) == len(problem.operations)
        steps, rest = split_lines(text)
        # It goes on from what it wrote, and that is its answer.
        values = [str(problem.start)] + [step.split()[-1] for step in steps]
        assert [step.split()[2] for step in steps] == values[:-1]
        assert rest == f"Answer: {values[-1]}"


def test_annotator_errs_as_often_as_described():
    rng = random.Random(0)
    annotator = SloppyAnnotator(rng)
    wrong_share = {}
    for symbol, operand, value in itertools.product(SYMBOLS, OPERANDS, VALUES):
        operation = Operation(symbol, operand)
        problem = Problem("", value, (operation,), operation.apply(value))
        wrong = sum(not check_steps(problem, annotator.solve(problem, rng))[0] for _ in range(300))
        wrong_share[symbol, operand, value] = wrong / 300
    for symbol in SYMBOLS:
        shares = sorted(s for key, s in wrong_share.items() if key[0] == symbol)
        assert len(shares) == 35
        assert max(shares[:23]) < 0.08  # a slip of 0.02, 6 times in 7 to a wrong result
        assert shares[23:] == pytest.approx([0.3 + 0.6 * i / 11 for i in range(12)], abs=0.13)


def test_annotators_mistakes_are_its_own():
    problem = problems(1)[0]

    def solutions(seed: int) -> list[str]:
        annotator, rng = SloppyAnnotator(random.Random(seed)), random.Random(0)
        return [annotator.solve(problem, rng) for _ in range(20)]

    assert solutions(0) == solutions(0)
    assert any(solutions(0) != solutions(seed) for seed in range(1, 5))


# ---- checkers ---------------------------------------------------------------------------------


def test_gold_solutions_pass():
    for problem in problems(300):
        text = gold_solution(problem)
        assert check_outcome(problem, text) and check_outcome(problem, text + "\n")
        assert check_steps(problem, text) == [True] * len(problem.operations)


def test_every_fact_against_brute_force():
    """All 4 * 5 * 7 * 7 claims `value symbol operand = result`: right for one result of seven."""
    for symbol, operand, value, result in itertools.product(SYMBOLS, OPERANDS, VALUES, VALUES):
        operation = Operation(symbol, operand)
        problem = Problem("", value, (operation,), EXACT[symbol](value, operand))
        text = format_step(1, value, operation, result) + f"Answer: {result}"
        right = result == EXACT[symbol](value, operand)
        assert check_steps(problem, text) == [right]
        assert check_outcome(problem, text) == right


def test_every_change_of_one_character():
    """A solution with one character replaced has the labels that an independent parser gives."""

    def labels(problem: Problem, text: str) -> list[bool]:
        right, previous = [], str(problem.start)
        for i, line in enumerate(text.split("\nAnswer:")[0].split("\n")):
            words = line.split(" ")
            o = problem.operations[i] if i < len(problem.operations) else None
            expected = ["Step", f"{i + 1}:", previous]
            expected += [o.symbol, str(o.operand), "="] if o else []
            result = str(EXACT[o.symbol](int(previous), o.operand)) if o and previous else None
            right.append(words == [*expected, result])
            well_formed = re.match(r"^Step [1-9]: [0-6] (\+|-|max|min) [2-6] = [0-6]$", line)
            previous = words[-1] if well_formed else ""
        return right

    problem = small_problem()
    gold = gold_solution(problem)
    end = gold.index("\nAnswer:")
    for i in range(end):
        for character in "0123456789+-=:max nS":
            text = gold[:i] + character + gold[i + 1 :]
            assert check_steps(problem, text) == labels(problem, text), text
            assert check_outcome(problem, text)


@pytest.mark.parametrize(
    "text, steps, outcome",
    [
        # A wrong result is one wrong step; what goes on from it is right by itself.
        ("Step 1: 3 + 4 = 1\nStep 2: 1 max 5 = 5\nStep 3: 5 - 2 = 3\nAnswer: 3", "-++", True),
        # The next step must start from what was written, not from what would have been right.
        ("Step 1: 3 + 4 = 1\nStep 2: 0 max 5 = 5\nStep 3: 5 - 2 = 3\nAnswer: 3", "--+", True),
        # Another operation, operand or number.
        ("Step 1: 3 - 4 = 6\nStep 2: 6 max 6 = 6\nStep 4: 6 - 2 = 4\nAnswer: 4", "---", False),
        # Right steps, wrong answer.
        ("Step 1: 3 + 4 = 0\nStep 2: 0 max 5 = 5\nStep 3: 5 - 2 = 3\nAnswer: 5", "+++", False),
        # Stops early: fewer verdicts than operations.
        ("Step 1: 3 + 4 = 0\nAnswer: 3", "+", True),
        ("Answer: 3", "", True),
        ("", "", False),
        # One step too many.
        (gold_solution(small_problem()).replace("Ans", "Step 4: 3 + 4 = 0\nAns"), "+++-", True),
        # A malformed line has no value that the next could start from; the one after it has.
        ("nonsense\nStep 2: 0 max 5 = 5\nStep 3: 5 - 2 = 3\nAnswer: 3", "--+", True),
        # A blank line takes a step's place.
        ("Step 1: 3 + 4 = 0\n\nStep 2: 0 max 5 = 5\nAnswer: 3", "+--", True),
        # No answer, several, or one with something behind it.
        ("Step 1: 3 + 4 = 0", "+", False),
        ("Step 1: 3 + 4 = 0\nAnswer: 3\nAnswer: 3", "+", False),
        ("Step 1: 3 + 4 = 0\nAnswer: 3 or 4", "+", False),
        ("Step 1: 3 + 4 = 0\nAnswer: 3\nStep 2: 0 max 5 = 5", "+", False),
        ("Step 1: 3 + 4 = 0 Answer: 3", "-", False),
        ("Answer: 10", "", False),
        ("Answer: -4", "", False),
        ("Answer:3", "", False),
        # Looks like digits, is none of ours.
        ("Step 1: \u0663 + 4 = 0\nAnswer: \u0663", "-", False),
        ("Step 1: 3 + 4 = 7\nAnswer: 3", "-", True),
        ("Step 01: 3 + 4 = 0\nAnswer: 3", "-", True),
        # Other line ends cut no line.
        ("Step 1: 3 + 4 = 0\rStep 2: 0 max 5 = 5\u2028Answer: 3", "-", False),
        # Nothing is ever evaluated.
        ("Step 1: __import__('os').abort() + 4 = 0\nAnswer: 1/0", "-", False),
    ],
)
def test_checkers_on_chosen_texts(text, steps, outcome):
    problem = small_problem()
    assert check_steps(problem, text) == [mark == "+" for mark in steps]
    assert check_outcome(problem, text) is outcome


def test_checkers_take_any_text():
    problem = small_problem()
    rng = random.Random(0)
    pieces = "Step |Answer:|1:|3|4| |=|+|max|\n|\r|\x00|\x0b|\u2028|é|🙂|\ud800|<unk>|9".split("|")
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(40)))
        steps, rest = split_lines(text)
        assert "".join(steps) + rest == text
        assert len(check_steps(problem, text)) == len(steps)
        assert check_outcome(problem, text) in (True, False)
    long = "Step 1: " * 100_000 + "3" * 100_000
    assert check_steps(problem, long) == [False]


def test_random_solutions_are_almost_never_right():
    """Labels are not handed out for form: well-formed random results are right 1 time in 7."""
    rng = random.Random(0)
    right = []
    for problem in problems(2000):
        text, value = "", problem.start
        for i, operation in enumerate(problem.operations, start=1):
            result = rng.randrange(7)
            text += format_step(i, value, operation, result)
            value = result
        right += check_steps(problem, text)
    assert sum(right) / len(right) == pytest.approx(1 / 7, abs=0.015)


# ---- the tokenizer ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_tokenizer_gives_the_text_back(tokenizer):
    rng = random.Random(0)
    annotator = SloppyAnnotator(rng)
    for problem in problems(500):
        for text in (problem.text, annotator.solve(problem, rng)):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_prompt_and_solution_are_tokenized_alike_apart_and_joined(tokenizer):
    for problem in problems(50):
        solution = gold_solution(problem)
        apart = tokenizer(problem.text)["input_ids"] + tokenizer(solution)["input_ids"]
        assert tokenizer(problem.text + solution)["input_ids"] == apart


def test_steps_begin_at_token_borders(tokenizer):
    text = gold_solution(small_problem())
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    starts, position = {start for start, _ in offsets}, 0
    for step in split_lines(text)[0]:
        assert position in starts
        position += len(step)


def test_tokenizer_vocabulary_is_stable_and_lean(tokenizer):
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == len(arithmetic._vocabulary()) + 3 < 150
    assert tokenizer("Step 9: what\t?")["input_ids"].count(tokenizer.unk_token_id) > 0
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
