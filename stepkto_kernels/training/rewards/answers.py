"""Outcome rewards that compare answers as text, or ask a function."""

from __future__ import annotations

import re
from collections.abc import Callable

from stepkto_kernels.training.records import Problem
from stepkto_kernels.training.rewards.base import Label, check_label
from stepkto_kernels.training.steps import split_solution

# Each repeat is bounded by what it takes; none can backtrack into another.
_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\{([^{}]*)\}")
_SPACES = re.compile(r"\\[,;:!> ]|\\q?quad(?![A-Za-z])|~|\s+")
_SIZES = re.compile(r"\\(?:left|right|big|Big|bigg|Bigg)(?![A-Za-z])")
_SHORT_FRACTION = re.compile(r"\\frac([0-9])([0-9])")
_DEGREES = re.compile(r"\^(?:\\circ|\{\\circ\})")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_NUMBER = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?")
_WORDS = re.compile(r"[A-Za-z]{2,}")


def normalise_answer(answer: str) -> str:
    """An answer in one spelling: the same for answers that differ in typesetting only.

    Math delimiters, spaces, sizes of brackets, \\text and its like, degree signs, dollar signs and
    a period at the end go; \\dfrac is \\frac; a number loses thousands separators, a plus sign and
    zeros that say nothing ("+1,200.50" is "1200.5"); a plain word is in lower case. Nothing is
    computed: 1/2 and 0.5 stay different.
    """
    text = answer.replace("\u2212", "-").replace("\\$", "").replace("$", "")
    for delimiter in ("\\(", "\\)", "\\[", "\\]"):
        text = text.replace(delimiter, "")
    text = _SIZES.sub("", text)
    text = _WRAPPED.sub(r"\1", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\%", "%")
    text = _DEGREES.sub("", _SPACES.sub("", text))
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text).removesuffix(".")
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    number = _NUMBER.fullmatch(text)
    if number and (number[2] or number[3]):
        sign, whole, decimals = number[1], number[2].lstrip("0") or "0", number[3] or ""
        decimals = decimals.rstrip("0")
        value = whole + ("." + decimals if decimals else "")
        return "-" + value if sign == "-" and value != "0" else value
    return text.lower() if _WORDS.fullmatch(text) else text


def reference_answer(problem: Problem) -> str:
    """The answer to compare with, out of its \\boxed{...} where it stands in one; "" for none."""
    answer = problem.answer.strip()
    if "\\boxed" in answer:
        return split_solution(answer).answer or ""
    return answer


class ExactMatch:
    """Right where the completion's answer is the reference answer, both normalised.

    The answer is what `split_solution` finds. A completion without one is wrong; without a
    reference answer the verdict is None.
    """

    def __call__(self, problem: Problem, completion: str) -> Label:
        wanted = reference_answer(problem)
        if not wanted:
            return None
        found = split_solution(completion).answer
        return found is not None and normalise_answer(found) == normalise_answer(wanted)


class CallableOutcome:
    """A function as an outcome reward.

    Args:
        function: called as function(problem, completion), gives True, False or None.
    Raises:
        ValueError: when called: the function gave something else.
    """

    def __init__(self, function: Callable[[Problem, str], Label]):
        self.function = function

    def __call__(self, problem: Problem, completion: str) -> Label:
        return check_label("outcome reward", self.function(problem, completion))
