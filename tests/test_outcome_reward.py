"""Outcome rewards: which answers are equal, and that no answer can hold the process up."""

import os
import threading
import time

import pytest

from stepkto_kernels.training.records import Problem
from stepkto_kernels.training.rewards.answers import CallableOutcome, ExactMatch, normalise_answer
from stepkto_kernels.training.rewards.base import Solution, after_first_error, judge_steps
from stepkto_kernels.training.rewards.symbolic import MIB, MathVerify


def problem(answer: str) -> Problem:
    return Problem("p", "What is it?", answer)


def boxed(answer: str) -> str:
    return f"Some reasoning.\n\\boxed{{{answer}}}"


@pytest.fixture(scope="module")
def math():
    pytest.importorskip("math_verify")
    with MathVerify(timeout=1.0) as reward:
        yield reward


# ---- symbolic equality ------------------------------------------------------------------------

EQUAL = [
    ("\\frac{1}{2}", "0.5"),
    ("1/2", "\\frac{2}{4}"),
    ("x^2 + 2x + 1", "(x+1)^2"),
    ("3\\sqrt{2}", "\\sqrt{18}"),
    ("\\{1, 2\\}", "\\{2, 1\\}"),
    ("(1, 2)", "\\left(1,\\,2\\right)"),
    ("\\text{(C)}", "(C)"),
    ("The result is \\boxed{12}", "12.0"),
    ("10^{18}", "1000000000000000000"),
]
DIFFERENT = [
    ("\\frac{1}{2}", "0.49"),
    ("4", "14"),
    ("4", "4x"),
    ("(1, 2)", "(2, 1)"),
    ("[0, 1)", "[0, 1]"),
    ("4", ""),
    ("4", "\\frac{"),
    ("4", "\x00"),
    ("4", "\ud800"),
    ("4", "5" * 20_000),
]
HOSTILE = ["9^{9^{9^{9}}}", "9**9**9**9", "9999999999!", "10!!!!!", "(" * 3000, "x^{" * 300]


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_equal_answers(math, reference, answer):
    assert math(problem(reference), boxed(answer)) is True


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_different_answers(math, reference, answer):
    assert math(problem(reference), boxed(answer)) is False


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda text: text[:12])
def test_hostile_answers_are_bounded(math, answer):
    """Not right, in bounded time, and the next comparison is none the worse."""
    start = time.monotonic()
    assert math(problem("4"), f"Answer: {answer}") in (False, None)
    assert time.monotonic() - start < 4 * 1.0 + 5
    assert math(problem("\\frac{1}{2}"), boxed("0.5")) is True


def test_an_answer_is_never_run(math, tmp_path):
    path = tmp_path / "made"
    for call in (f"__import__('os').mkdir('{path}')", f"open('{path}', 'w')"):
        assert math(problem("4"), f"Answer: {call}") is not True
    assert not path.exists()


@pytest.mark.parametrize("text", ["5} \\boxed{4", "5} or 4{", "}4{", "{4"])
def test_an_answer_cannot_leave_its_box(math, text):
    assert math(problem("4"), f"Answer: {text}") is False


def test_what_passes_a_limit_is_counted_and_unlabelled(math):
    before = math.undecided
    assert math(problem("4"), boxed("9^{9^{9^{9}}}")) is None
    assert math.undecided == before + 1


def test_a_worker_that_dies_is_started_again(math):
    assert math(problem("2"), boxed("\\sqrt{4}")) is True
    process = math.workers[0].process
    process.kill()
    process.wait()
    assert math(problem("2"), boxed("\\sqrt{4}")) is True
    assert math.workers[0].process.pid != process.pid


def test_no_worker_outlives_its_reward():
    pytest.importorskip("math_verify")
    with MathVerify() as reward:
        assert reward(problem("2"), boxed("\\sqrt{4}")) is True
        pid = reward.workers[0].process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_threads_get_their_own_verdicts(math):
    pairs = [(str(n), f"\\sqrt{{{m * m}}}") for n in range(1, 5) for m in range(1, 5)]
    found = {}

    def ask(pair):
        found[pair] = math(problem(pair[0]), boxed(pair[1]))

    threads = [threading.Thread(target=ask, args=(pair,)) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(n, root): root == f"\\sqrt{{{int(n) ** 2}}}" for n, root in pairs}


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"memory": MIB}, {"workers": 0}, {"longest": 0}], ids=str
)
def test_limits_outside_of_their_range(options):
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match=next(iter(options))):
        MathVerify(**options)


# ---- text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("$1{,}000$", "$1{,}000$."),
        ("1,200.50", "+1200.5"),
        ("\\dfrac12", "\\frac{1}{2}"),
        ("90^\\circ", "90^{\\circ}"),
        ("\\text{Monday}", "monday"),
        ("-0.0", "0"),
        ("\\left( 1, 2 \\right)", "(1,2)"),
    ],
)
def test_spellings_that_are_one(one, other):
    assert normalise_answer(one) == normalise_answer(other)


@pytest.mark.parametrize(("one", "other"), [("1/2", "0.5"), ("1,2", "12"), ("x", "X"), ("1", "-1")])
def test_spellings_that_are_two(one, other):
    assert normalise_answer(one) != normalise_answer(other)


def test_exact_match():
    reward = ExactMatch()
    assert reward(problem("1,000"), "a\nAnswer: 1000.") is True
    assert reward(problem("1000"), "a\nAnswer: 100") is False
    assert reward(problem("1000"), "no answer at all") is False
    assert reward(problem(""), "Answer: 1") is None


def test_a_function_as_a_reward():
    reward = CallableOutcome(lambda problem, text: None if not text else problem.answer in text)
    assert [reward(problem("4"), text) for text in ("4", "5", "")] == [True, False, None]
    with pytest.raises(ValueError, match="outcome reward: want True, False or None, got 1"):
        CallableOutcome(lambda problem, text: 1)(problem("4"), "4")


# ---- step labels ------------------------------------------------------------------------------

T, F, N = True, False, None


@pytest.mark.parametrize(
    ("labels", "wrong", "unlabelled"),
    [
        ([], [], []),
        ([T, N, T], [T, N, T], [T, N, T]),
        ([T, F, T, N, F], [T, F, F, F, F], [T, F, N, N, N]),
        ([F], [F], [F]),
        ([N, F, T], [N, F, F], [N, F, N]),
    ],
)
def test_what_follows_a_first_error(labels, wrong, unlabelled):
    before = list(labels)
    assert after_first_error(labels, "keep") == before
    assert after_first_error(labels, "wrong") == wrong
    assert after_first_error(labels, "unlabelled") == unlabelled
    assert labels == before
    with pytest.raises(ValueError, match="after_error: want one of 'keep'"):
        after_first_error(labels, "drop")


@pytest.mark.parametrize("verdicts", [[], [[T]], [[T, F, N]], [[T, 1]], [[T, 0.3]]], ids=str)
def test_verdicts_that_do_not_fit_are_refused(verdicts):
    with pytest.raises(ValueError, match="process reward"):
        judge_steps(lambda solutions: verdicts, [Solution(problem("4"), ("a\n", "b"))])
