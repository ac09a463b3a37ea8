"""Metrics of judged rows with bootstrap intervals: Pass@1, Pass@k, Maj@k and step errors.

The rows are those of label.py, greedy and sampled ones of the same problems. An outcome that could
not be judged counts as wrong; a step without a verdict does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepkto_kernels import checks
from stepkto_kernels.training.bootstrap import Estimate, ratio_estimates
from stepkto_kernels.training.evaluate import Verdict, majority_answer
from stepkto_kernels.training.rewards.answers import normalise_answer
from stepkto_kernels.training.steps import split_solution

Row = Mapping[str, Any]
Equal = Callable[[str, str], bool]
RIGHT = "right"  # the class of answers that the outcome reward found right; others begin with "="


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k samples is right, without bias from `samples` (Chen et al. 2021).

    1 - C(samples - correct, k) / C(samples, k): of all ways to choose k, those with a right one.

    Raises:
        ValueError: not 0 <= correct <= samples, or not 1 <= k <= samples.
    """
    checks.require(0 <= correct <= samples, "correct", f"in [0, {samples}]", correct)
    checks.require(1 <= k <= samples, "k", f"in [1, {samples}]", k)
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def verdicts(rows: Sequence[Row], equal: Equal | None = None) -> list[Verdict]:
    """What the labels of one problem's rows say, equal answers under one name.

    Answers that the outcome reward found right are one class, as all of them equal the reference;
    others are in one where their normalised texts are the same, or where `equal` says so.

    Args:
        rows: of label.py, of one problem.
        equal: called as equal(answer, other); None compares normalised texts only.
    """
    classes: list[str] = []
    found = []
    for row in rows:
        text = "".join(row["completions"])
        answer = split_solution(text).answer
        steps = tuple(label for label in row["labels"] if label is not None)
        name = None
        if answer is not None:
            name = RIGHT if row["label"] is True else _class_of(answer, classes, equal)
        missing = row.get("missing_steps", 0)
        found.append(Verdict(row["label"] is True, name, steps, missing))
    return found


def _class_of(answer: str, classes: list[str], equal: Equal | None) -> str:
    name = normalise_answer(answer)
    if name not in classes:
        for other in classes if equal is not None else ():
            if equal is not None and equal(other, name):
                return f"={other}"
        classes.append(name)
    return f"={name}"


def estimates(
    greedy: Sequence[Row],
    sampled: Sequence[Row],
    *,
    equal: Equal | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The metrics of an evaluation; shares in [0, 1].

    pass@1: greedy solutions with the right answer. pass@k for k = 2, 4, 8, ... and for all samples
    of a problem: see `pass_at_k`. maj@k: problems whose most frequent sampled answer is right.
    sample_accuracy: right answers among all samples. step_errors_in_correct and its _greedy twin:
    solutions with a wrong or missing step among those with the right answer. step_accuracy: right
    steps among all that were sampled or are missing. answered: samples with an answer. Step metrics
    are left out where no step has a verdict.

    Args:
        greedy: one row for each problem.
        sampled: as many rows for each problem.
        equal: as `verdicts`.
        resamples, level, seed: as `ratio_estimates`.
    Raises:
        ValueError: the rows are not of the same problems, or not as many for each.
    """
    by_problem = group(sampled)
    one_each = group(greedy)
    checks.require(by_problem.keys() == one_each.keys(), "greedy", "the problems of sampled", "not")
    single = all(len(rows) == 1 for rows in one_each.values())
    checks.require(single, "greedy", "one row for each problem", "more")
    sizes = {len(rows) for rows in by_problem.values()} or {0}
    checks.require(len(sizes) == 1, "sampled", "as many rows for each problem", sorted(sizes))
    k = sizes.pop()
    counts = [_counts(one_each[i], verdicts(by_problem[i], equal), k) for i in by_problem]
    names = list(counts[0]) if counts else []
    if not any(label is not None for row in (*greedy, *sampled) for label in row["labels"]):
        names = [name for name in names if not name.startswith("step_")]
    table: NDArray[np.float64] = np.array([[c[name] for name in names] for c in counts])
    table = table.reshape(len(counts), len(names), 2)
    found = ratio_estimates(
        table[..., 0], table[..., 1], resamples=resamples, level=level, seed=seed
    )
    return dict(zip(names, found, strict=True))


def _counts(greedy: Sequence[Row], sampled: list[Verdict], k: int) -> dict[str, tuple[float, int]]:
    """What a problem adds to both sides of each ratio."""
    one = verdicts(greedy)[0]
    right = [verdict for verdict in sampled if verdict.correct]
    winner = majority_answer(sampled)
    counts: dict[str, tuple[float, int]] = {"pass@1": (one.correct, 1)}
    for each in powers_of_two(k):
        counts[f"pass@{each}"] = (pass_at_k(k, len(right), each), 1)
    counts[f"maj@{k}"] = (any(v.answer == winner for v in right if winner is not None), 1)
    counts["sample_accuracy"] = (len(right), k)
    counts["step_errors_in_correct"] = (sum(v.has_step_error for v in right), len(right))
    counts["step_errors_in_correct_greedy"] = (one.correct and one.has_step_error, one.correct)
    steps = [step for verdict in sampled for step in verdict.steps]
    missing = sum(verdict.missing_steps for verdict in sampled)
    counts["step_accuracy"] = (sum(steps), len(steps) + missing)
    counts["answered"] = (sum(v.answer is not None for v in sampled), k)
    return counts


def powers_of_two(k: int) -> list[int]:
    """2, 4, 8, ... below k, and k itself where it is more than 1."""
    return [*(2**i for i in range(1, k.bit_length()) if 2**i < k), *([k] if k > 1 else [])]


def group(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by problem, both in the order in which they occur."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["problem_id"], []).append(row)
    return found


def as_json(found: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """Estimates as they are written; null for NaN, which JSON has not."""
    plain = lambda value: None if math.isnan(value) else value
    return {
        name: {key: plain(value) for key, value in asdict(estimate).items()}
        for name, estimate in found.items()
    }
