"""Metrics of judged solutions: Pass@1, Maj@k, and step errors in solutions whose answer is right.

The metrics are pure functions of verdicts; who samples and who judges is up to the caller.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from stepkto_kernels import checks

ProblemT = TypeVar("ProblemT")


@dataclass(frozen=True)
class Verdict:
    """What a checker says of one solution.

    Args:
        correct: whether the answer is right, however it was reached.
        answer: as a string, the same for equal answers; None if the solution has none.
        steps: whether each step that was written is right.
        missing_steps: steps that the solution should have and has not, >= 0.
    """

    correct: bool
    answer: str | None
    steps: tuple[bool, ...] = ()
    missing_steps: int = 0

    def __post_init__(self) -> None:
        checks.require(self.missing_steps >= 0, "missing_steps", ">= 0", self.missing_steps)

    @property
    def has_step_error(self) -> bool:
        """Whether a step is wrong or missing."""
        return self.missing_steps > 0 or not all(self.steps)


@dataclass(frozen=True)
class Evaluation:
    """The solutions of one evaluation and what was said of them; the outer index is the problem."""

    greedy_solutions: list[str]
    greedy: list[Verdict]
    sampled_solutions: list[list[str]]
    sampled: list[list[Verdict]]

    def metrics(self) -> dict[str, float]:
        """Shares in [0, 1], NaN for a share of nothing; k is the number of samples a problem.

        pass@1: problems that the greedy solution answers rightly. maj@k: problems whose most
        frequent sampled answer is right. sample_accuracy: right answers among all samples.
        step_errors_in_correct and its _greedy twin: see `step_errors_in_correct`. step_accuracy:
        see there. answered: samples that have an answer at all.
        """
        samples = [verdict for verdicts in self.sampled for verdict in verdicts]
        k = len(self.sampled[0]) if self.sampled else 0
        return {
            "pass@1": accuracy(self.greedy),
            f"maj@{k}": majority_accuracy(self.sampled),
            "sample_accuracy": accuracy(samples),
            "step_errors_in_correct": step_errors_in_correct(samples),
            "step_errors_in_correct_greedy": step_errors_in_correct(self.greedy),
            "step_accuracy": step_accuracy(samples),
            "answered": _share(sum(v.answer is not None for v in samples), len(samples)),
        }


def accuracy(verdicts: Sequence[Verdict]) -> float:
    """Share of solutions with the right answer: Pass@1 for one solution a problem. NaN for none."""
    return _share(sum(verdict.correct for verdict in verdicts), len(verdicts))


def majority_answer(verdicts: Sequence[Verdict]) -> str | None:
    """The most frequent answer, of equally frequent ones the first to occur; None without any."""
    # Counter keeps the order of first occurrence, and most_common sorts stably.
    votes = Counter(verdict.answer for verdict in verdicts if verdict.answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def majority_accuracy(sampled: Sequence[Sequence[Verdict]]) -> float:
    """Maj@k: share of problems whose majority answer is right. NaN without problems.

    Solutions without an answer do not vote; a problem that no solution answers counts as wrong.
    """
    return _share(sum(_majority_is_correct(verdicts) for verdicts in sampled), len(sampled))


def _majority_is_correct(verdicts: Sequence[Verdict]) -> bool:
    winner = majority_answer(verdicts)
    return any(v.correct for v in verdicts if winner is not None and v.answer == winner)


def step_errors_in_correct(verdicts: Sequence[Verdict]) -> float:
    """Share of solutions with a wrong or missing step among those with a right answer, or NaN."""
    correct = [verdict for verdict in verdicts if verdict.correct]
    return _share(sum(verdict.has_step_error for verdict in correct), len(correct))


def step_accuracy(verdicts: Sequence[Verdict]) -> float:
    """Share of right steps among all that were written or are missing, or NaN."""
    right = sum(sum(verdict.steps) for verdict in verdicts)
    return _share(right, sum(len(v.steps) + v.missing_steps for v in verdicts))


def evaluate(
    problems: Sequence[ProblemT],
    sample: Callable[[Sequence[ProblemT], int, float], list[list[str]]],
    judge: Callable[[ProblemT, str], Verdict],
    *,
    num_samples: int = 8,
    temperature: float = 1.0,
) -> Evaluation:
    """Sample one greedy and `num_samples` random solutions of each problem and judge all of them.

    Args:
        problems: whatever `sample` and `judge` understand.
        sample: called as sample(problems, number, temperature), gives `number` solutions of each
            problem; temperature 0 asks for greedy ones.
        judge: called as judge(problem, solution).
        num_samples: k of Maj@k, >= 1.
        temperature: of the random solutions, > 0.
    Raises:
        ValueError: an argument outside of the above, or `sample` gave another number of solutions.
    """
    checks.number("num_samples", num_samples, low=1)
    checks.number("temperature", temperature, low=0, low_open=True)
    greedy = [texts[0] for texts in _sample(sample, problems, 1, 0.0)]
    sampled = _sample(sample, problems, num_samples, temperature)
    return Evaluation(
        greedy_solutions=greedy,
        greedy=[judge(problem, text) for problem, text in zip(problems, greedy, strict=True)],
        sampled_solutions=sampled,
        sampled=[
            [judge(problem, text) for text in texts]
            for problem, texts in zip(problems, sampled, strict=True)
        ],
    )


def _sample(
    sample: Callable[[Sequence[ProblemT], int, float], list[list[str]]],
    problems: Sequence[ProblemT],
    number: int,
    temperature: float,
) -> list[list[str]]:
    solutions = sample(problems, number, temperature)
    shape_is_right = len(solutions) == len(problems) and all(len(s) == number for s in solutions)
    want = f"{number} solutions of each of {len(problems)} problems"
    got = f"{len(solutions)} lists of lengths {sorted({len(s) for s in solutions})}"
    checks.require(shape_is_right, "sample", want, got)
    return solutions


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
