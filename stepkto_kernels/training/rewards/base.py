"""What a reward is: a verdict on an answer, or on every step of a solution.

A verdict is True right, False wrong, or None where it cannot be had: never a guess.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stepkto_kernels import checks
from stepkto_kernels.training.data import Prompt
from stepkto_kernels.training.records import Problem

AFTER_ERROR = ("keep", "wrong", "unlabelled")
Label = bool | None


@dataclass(frozen=True)
class Solution:
    """Reasoning steps that were written for a problem, or a prefix of them.

    Args:
        problem: what is solved.
        steps: in order; joined by nothing they are the text. The line that only states the answer
            is none of them.
        prompt: what the model was given; None where nobody needs it.
    """

    problem: Problem
    steps: tuple[str, ...]
    prompt: Prompt | None = None

    @property
    def text(self) -> str:
        return "".join(self.steps)


class OutcomeReward(Protocol):
    """Judges whether a completion ends in the right answer, however it was reached."""

    def __call__(self, problem: Problem, completion: str) -> Label: ...


class ProcessReward(Protocol):
    """Judges every step of every solution: a list of verdicts for each, one a step.

    One that knows how many steps there should be has a method `missing_steps(solution) -> int`.
    """

    def __call__(self, solutions: Sequence[Solution]) -> list[list[Label]]: ...


def after_first_error(labels: Sequence[Label], what: str) -> list[Label]:
    """Step labels with what follows the first wrong one as asked.

    Args:
        labels: verdicts of a solution's steps, in order.
        what: "keep" changes nothing; "wrong" marks every later step wrong, also where its verdict
            is not known; "unlabelled" takes the later labels away.
    Raises:
        ValueError: `what` is none of these.
    """
    checks.choice("after_error", what, AFTER_ERROR)
    if what == "keep" or False not in labels:
        return list(labels)
    kept = list(labels).index(False) + 1
    later = False if what == "wrong" else None
    return [*labels[:kept], *[later] * (len(labels) - kept)]


def check_label(name: str, label: Any) -> Label:
    """The label itself.

    Raises:
        ValueError: it is none of True, False and None; 1, 0 and scores are not taken for labels.
    """
    is_label = label is None or isinstance(label, bool)
    checks.require(is_label, name, "True, False or None", reprlib.repr(label))
    return label


def judge_steps(reward: ProcessReward, solutions: Sequence[Solution]) -> list[list[Label]]:
    """The reward's verdicts, checked.

    Raises:
        ValueError: not one list for each solution, not one verdict for each step, or no verdicts.
    """
    verdicts = reward(solutions) if solutions else []
    want = f"a list for each of {len(solutions)} solutions"
    checks.require(len(verdicts) == len(solutions), "process reward", want, len(verdicts))
    for i, (solution, labels) in enumerate(zip(solutions, verdicts, strict=True)):
        want = f"one for each of {len(solution.steps)} steps"
        fits = len(labels) == len(solution.steps)
        checks.require(fits, f"process reward: verdicts of solution {i}", want, len(labels))
        for k, label in enumerate(labels):
            check_label(f"process reward: solution {i}, step {k}", label)
    return [list(labels) for labels in verdicts]
