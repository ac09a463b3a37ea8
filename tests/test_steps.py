"""split_solution: what is cut where, and that cutting loses nothing."""

import random
import time
from dataclasses import dataclass

import pytest

from stepkto_kernels.training.steps import STYLES, SplitSolution, split_solution

PIECES = (
    *("\n", "\n\n", "\r\n", " ", "\t", "word", "é", "x = 3.", "**", "- ", "{", "}", "\\", "\x0c"),
    *("Step 1: ", "**Step 2:** ", "Step 3.", "## Step 4", "### **Step 5: go**", "step 6)"),
    *("\\[", "\\]", "$$", "$", "\\begin{align}", "\\end{align}", "```", "~~~", "\\\\[2pt]"),
    *("Answer: ", "**Final answer:** ", "The answer is ", "\\boxed{", "\\boxed{7}", "\u2028"),
)


@dataclass(frozen=True)
class Case:
    """Steps that their concatenation, split in this style, must give back."""

    steps: tuple[str, ...]
    style: str = "auto"
    answer: str | None = None
    ends_with_answer: bool = False


CASES = {
    "empty": Case(()),
    "blank": Case(("\n \n",)),
    "one line": Case(("2 + 2 = 4",)),
    "lines": Case(("\n a\n\n\n", "b \n", "  c"), style="line"),
    "carriage returns": Case(("a\r\n\r\n", "b\r\n"), style="line"),
    "paragraphs": Case(("a\nb\n \t\n", "c\n\n"), style="paragraph"),
    "auto takes lines": Case(("\n\na\n", "b\n\n")),
    "auto takes paragraphs": Case(("a\nb\n\n", "c")),
    "auto ignores the blank line before the answer": Case(
        ("a\n", "b\n\n", "Answer: 5"), answer="5", ends_with_answer=True
    ),
    "prefix": Case(("Step 1: a\n\nmore\n", "Step 2: b")),
    "prefix, bold": Case(("**Step 1:** a\n", "**Step 2**: b\n", "**Step 3: c**\n")),
    "prefix, other signs": Case(
        ("step 1. a\n", "- STEP 2) b\n", "Step 3 - c\n", "Step 4\nd\n", "  Step 5\r\ne")
    ),
    "prefix, not in prose": Case(
        ("Step 1: a\nStep 1 gave 5 and Step 2: no\nStep 1.5 too\nStepping 2: no",)
    ),
    "prefix, none there": Case(("a\n\nb",), style="step_prefix"),
    "introduction joins the first step": Case(("Let us think.\n\nStep 1: a\n", "Step 2: b")),
    "heading": Case(("## Step 1: a\nStep 1: x\n\n", "###Step 2 - b\n", "# **Step 3** c")),
    "heading, not another one": Case(("# Steps\n## 1\n",), style="heading"),
    "display is not cut": Case(("a\n", "\\[\nx\n\ny\n\\]\n", "b"), style="line"),
    "display is not cut by paragraphs": Case(("a\n$$\nx\n\ny\n$$ b\n\n", "c")),
    "environment is not cut, not even nested": Case(
        ("\\begin{a}\n\\begin{a}\n\\end{a}\n\nx\\end{a}\n", "b"), style="line"
    ),
    "code is not cut": Case(
        ("a\n", "  ````python\nStep 1: x\n```\n\n$$\n````\n", "b\n", "$$"), style="line"
    ),
    "code in a fence too short to close another": Case(
        ("````\n", "a\n", "```\n\nb\n```\n", "c"), style="line"
    ),
    "markers in a block are text": Case(("Step 1: a\n```\nStep 2: b\n```\n\\[\n## Step 3\n\\]\n",)),
    "an open block protects nothing": Case(
        ("\\[\n", "a\n", "$$\n", "```py\n", "b\n", "\\begin{c}\n", "~~~\n", "d"), style="line"
    ),
    "escapes open nothing": Case(
        ("a \\\\[2pt]\n", "b\n", "\\]\n", "\\$$\n", "c\n", "\\$$"), style="line"
    ),
    "answer": Case(("a\n", "Answer: 5.\n"), answer="5", ends_with_answer=True),
    "answer alone": Case(("\n\nanswer: 5",), answer="5", ends_with_answer=True),
    "answer, bold": Case(("a\n", "**Final Answer:** 5"), answer="5", ends_with_answer=True),
    "answer, all bold": Case(("a\n", "**Answer: 5.**"), answer="5", ends_with_answer=True),
    "answer, sentence": Case(
        ("a\n", "The answer is 5."), style="line", answer="5", ends_with_answer=True
    ),
    "answer, heading": Case(
        ("Step 1: a\n\n", "## Final Answer\n\n42\n"), answer="42", ends_with_answer=True
    ),
    "answer in a display": Case(
        ("a\n", "Final answer:\n$$\n5\n$$\n"), answer="$$\n5\n$$", ends_with_answer=True
    ),
    "answer followed by more is no step": Case(("a\nAnswer: 5\nb",), style="paragraph", answer="5"),
    "the last answer counts": Case(
        ("Answer: 4\n", "no\n", "Answer: 5"), style="line", answer="5", ends_with_answer=True
    ),
    "answer without content": Case(("a\n", "Answer:"), ends_with_answer=True),
    "answer inside of a line": Case(("so the answer is 5",)),
    "answer in prose": Case(("The\n", "answer\n", "is 5"), style="line"),
    "answer in code": Case(("```\nAnswer: 5\n```",), style="line"),
    "boxed": Case(("so $x = \\boxed{5}$.",), answer="5"),
    "boxed, nested": Case(("\\boxed{\\frac{1}{{2}}} b",), answer="\\frac{1}{{2}}"),
    "boxed, escaped braces": Case(("= \\boxed{\\{1\\}\\}}",), answer="\\{1\\}\\}"),
    "boxed, the last that is closed": Case(("a \\boxed{1} \\boxed {2.} {\\boxed{3",), answer="2"),
    "boxed goes before the answer line": Case(
        ("a \\boxed{5}\n", "Answer: five"), answer="5", ends_with_answer=True
    ),
    "boxed in the answer line": Case(
        ("a\n", "The final answer is: $\\boxed{5}$."), answer="5", ends_with_answer=True
    ),
    "boxed line": Case(("a\n", " **$\\boxed{5}$.**\n"), answer="5", ends_with_answer=True),
    "boxed display": Case(("a\n", "\\[\n\\boxed{5}\n\\]"), answer="5", ends_with_answer=True),
    "boxed after a display": Case(
        ("a\n$$5$$\n", "\\boxed{5}"), style="paragraph", answer="5", ends_with_answer=True
    ),
    "boxed in an equation": Case(("a\n", "\\[\nx = \\boxed{5}\n\\]"), answer="5"),
    "boxed, empty": Case(("a \\boxed{ }",)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cases(case: Case) -> None:
    split = split_solution("".join(case.steps), case.style)
    assert split == SplitSolution(case.steps, case.answer, case.ends_with_answer)


@pytest.mark.parametrize("style", STYLES)
def test_random_text_round_trips(style: str) -> None:
    rng = random.Random(0)
    cut_texts = 0
    for _ in range(1500):
        text = "".join(rng.choices(PIECES, k=rng.randrange(40)))
        split = split_solution(text, style)
        assert "".join(split.steps) == split.text == text
        assert all(step.endswith("\n") for step in split.steps[:-1])
        assert all(step.strip() for step in split.steps) or not text.strip()
        assert split.steps == split.reasoning_steps + split.steps[len(split.reasoning_steps) :]
        assert len(split.steps) - len(split.reasoning_steps) == split.ends_with_answer
        assert split.answer is None or split.answer == split.answer.strip() != ""
        cut_texts += len(split.steps) > 1
    assert cut_texts > 100  # the texts are such that there is something to cut


BLOCKS = ("\\[\nx\n\n= 1\n\\]", "$$\n\nx$$", "\\begin{align}\n\n\\end{align}")
MARKERS = {
    "step_prefix": ("Step {}: ", "**Step {}:** ", "Step {}.\n"),
    "heading": ("## Step {}: ", "### Step {}\n", "# **Step {}.** "),
    "line": ("",),
    "paragraph": ("",),
}
# What may stand between the parts of a step, and at its end.
JOINTS = {"line": (" ",), "paragraph": (" ", "\n")}
ENDS = {"line": ("\n",), "paragraph": ("\n\n", "\r\n \r\n")}


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("style", MARKERS)
def test_recovers_the_steps_that_a_text_was_made_of(style: str, auto: bool) -> None:
    rng = random.Random(1)
    for _ in range(200):
        steps = []
        for number in range(2, 4 + rng.randrange(5)):
            parts = rng.choices(("so", "$x$", "y = 2.", *BLOCKS), k=rng.randint(1, 5))
            inside = rng.choice(JOINTS.get(style, ("\n", "\n\n"))).join(parts)
            end = rng.choice(ENDS.get(style, ("\n", "\n\n\n")))
            steps.append(rng.choice(MARKERS[style]).format(number) + inside + end)
        split = split_solution("".join(steps), "auto" if auto else style)
        assert split == SplitSolution(tuple(steps), None, False)


def test_recovers_steps_with_code() -> None:
    code = "```py\nx = 1\n\nStep 9: no\n```\n"
    steps = (f"Step 1: a\n{code}\n", f"Step 2: b\n{code}", code + "\\boxed{5}")
    assert split_solution("".join(steps[:2])).steps == steps[:2]
    assert split_solution(steps[2], "line").steps == (code, "\\boxed{5}")


HOSTILE = (
    *("\n", "{", " ", "\t\n", "`", "```a\n", "~~~\n```\n", "$$", "\\[", "\\begin{a}", "\\", "*"),
    *("\\boxed{", "\\boxed{}", "Answer:\n", "Step 1\n", "Step ", "#", "1", "a\n\n"),
)


@pytest.mark.parametrize("unit", HOSTILE)
def test_linear_on_repetition(unit: str) -> None:
    text = unit * (2**20 // len(unit))
    start = time.perf_counter()
    split = split_solution(text)
    # Takes below 1 s; anything quadratic would take hours.
    assert time.perf_counter() - start < 20
    assert split.text == text


@pytest.mark.parametrize(
    "head", ["Step 1", "Answer: ", "answer", "## ", "\\boxed", "\\boxed{", "**"]
)
def test_linear_on_a_long_line(head: str) -> None:
    text = head + " " * 2**20 + "x"
    start = time.perf_counter()
    assert split_solution(text).steps == (text,)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("text", "style", "message"),
    [
        (None, "auto", "text: want a string, got NoneType"),
        (b"a", "auto", "text: want a string, got bytes"),
        ("a", "sentence", "style: want one of 'auto', .* got 'sentence'"),
        ("a", None, "style: want one of"),
    ],
)
def test_bad_arguments(text: object, style: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_solution(text, style)
