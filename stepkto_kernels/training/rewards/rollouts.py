"""Process reward by Monte Carlo: a prefix is right where enough of its continuations end right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stepkto_kernels import checks
from stepkto_kernels.training.rewards.base import Label, OutcomeReward, Solution, check_label

# Called as sampler(prefixes, number, drawn): `number` continuations of each, what comes after the
# prefix, None for one that cannot be had. `drawn` is how many of each there were before.
Sampler = Callable[[Sequence[Solution], int, int], list[list[str | None]]]


@dataclass
class _Prefix:
    solution: Solution  # up to and with the step that is judged
    at: tuple[int, int]  # solution and step
    right: int = 0
    unknown: int = 0
    drawn: int = 0


class MonteCarlo:
    """A step is right where the share of right answers from behind it is >= `threshold`.

    Rollouts of a prefix stop as soon as the rest cannot change its verdict. A rollout whose outcome
    is None counts as neither; where it would decide, the step has no verdict. `drawn` counts
    rollouts, `unknown` those without an outcome.

    Args:
        sampler: gives continuations of a solution's prefix.
        outcome: judges prefix and continuation together.
        rollouts: of a prefix at most, >= 1.
        threshold: in (0, 1].
        at_once: rollouts of a prefix between two looks at the verdict, >= 1.
        stop_at_error: leave the steps after a first wrong one without rollouts and verdict.
    Raises:
        ValueError: an argument outside of the above; when called: the sampler gave another number
            of continuations.
    """

    def __init__(
        self,
        sampler: Sampler,
        outcome: OutcomeReward,
        *,
        rollouts: int = 8,
        threshold: float = 0.5,
        at_once: int = 4,
        stop_at_error: bool = False,
    ):
        checks.integer("rollouts", rollouts, low=1)
        checks.number("threshold", threshold, low=0, high=1, low_open=True)
        checks.integer("at_once", at_once, low=1)
        self.sampler, self.outcome = sampler, outcome
        self.rollouts, self.at_once, self.stop_at_error = rollouts, at_once, stop_at_error
        # by division, as the share is: 0.3 * 10 rounds to more than 3
        self.needed = next(n for n in range(rollouts + 1) if n / rollouts >= threshold)
        self.drawn = self.unknown = 0

    def __call__(self, solutions: Sequence[Solution]) -> list[list[Label]]:
        labels: list[list[Label]] = [[None] * len(each.steps) for each in solutions]
        if not self.stop_at_error:
            every = [(i, k) for i, each in enumerate(labels) for k in range(len(each))]
            self._judge([self._prefix(solutions, i, k) for i, k in every], labels)
            return labels
        alive = list(range(len(solutions)))
        for step in range(max((len(each) for each in labels), default=0)):
            alive = [i for i in alive if step < len(labels[i])]
            self._judge([self._prefix(solutions, i, step) for i in alive], labels)
            alive = [i for i in alive if labels[i][step] is not False]
        return labels

    def _prefix(self, solutions: Sequence[Solution], i: int, step: int) -> _Prefix:
        whole = solutions[i]
        return _Prefix(Solution(whole.problem, whole.steps[: step + 1], whole.prompt), (i, step))

    def _judge(self, prefixes: list[_Prefix], labels: list[list[Label]]) -> None:
        while prefixes:
            before = prefixes[0].drawn  # the same for all
            number = min(self.at_once, self.rollouts - before)
            found = self.sampler([prefix.solution for prefix in prefixes], number, before)
            fits = len(found) == len(prefixes) and all(len(texts) == number for texts in found)
            want = f"{number} continuations of each of {len(prefixes)} prefixes"
            checks.require(fits, "sampler", want, [len(texts) for texts in found])
            for prefix, texts in zip(prefixes, found, strict=True):
                self._count(prefix, texts)
                labels[prefix.at[0]][prefix.at[1]] = self._verdict(prefix)
            self.drawn += number * len(prefixes)
            prefixes = [each for each in prefixes if self._is_open(each)]

    def _count(self, prefix: _Prefix, texts: Sequence[str | None]) -> None:
        solution = prefix.solution
        for text in texts:
            found = None if text is None else self.outcome(solution.problem, solution.text + text)
            label = check_label("outcome reward", found)
            prefix.right += label is True
            prefix.unknown += label is None
            self.unknown += label is None
        prefix.drawn += len(texts)

    def _verdict(self, prefix: _Prefix) -> Label:
        if prefix.right >= self.needed:
            return True
        most = prefix.right + prefix.unknown + self.rollouts - prefix.drawn
        return False if most < self.needed else None

    def _is_open(self, prefix: _Prefix) -> bool:
        return self._verdict(prefix) is None and prefix.drawn < self.rollouts
