"""Which labelled solutions are trained on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stepkto_kernels import checks

Row = Mapping[str, Any]


def deduplicate(rows: Iterable[Row]) -> list[Row]:
    """The first of each problem's solutions whose texts differ in whitespace only, in order.

    Args:
        rows: labelled rows, as label.py makes them.
    """
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        text = " ".join("".join(row["completions"]).split())
        first.setdefault((row["problem_id"], text), row)
    return list(first.values())


def balance(rows: Sequence[Row], per_problem: int, *, seed: int, fill: bool = False) -> list[Row]:
    """At most `per_problem` solutions of each problem, half of them right and half wrong.

    Which ones is drawn at random, and depends on the seed, the problem's id and its rows only. Rows
    without an outcome label are left out.

    Args:
        rows: labelled rows, as label.py makes them.
        per_problem: >= 1, and >= 2 without `fill`; of an odd number, `fill` takes one more right.
        seed: of the choice.
        fill: where a problem has too few right or too few wrong solutions, take more of the others.
            Without, a problem gives as many right as wrong ones, and none where all are alike.
    Returns:
        The chosen rows, in the order of `rows`.
    Raises:
        ValueError: an argument outside of the above.
    """
    checks.integer("per_problem", per_problem, low=1 if fill else 2)
    checks.integer("seed", seed, low=0)
    by_problem: dict[str, dict[bool, list[int]]] = {}
    for i, row in enumerate(rows):
        if row["label"] is not None:
            found = by_problem.setdefault(row["problem_id"], {True: [], False: []})
            found[row["label"]].append(i)
    chosen: list[int] = []
    for problem_id, found in by_problem.items():
        draw = random.Random(f"{seed} {problem_id}")
        right, wrong = _numbers(len(found[True]), len(found[False]), per_problem, fill)
        chosen += draw.sample(found[True], right) + draw.sample(found[False], wrong)
    return [rows[i] for i in sorted(chosen)]


def _numbers(right: int, wrong: int, most: int, fill: bool) -> tuple[int, int]:
    """How many of so many right and wrong ones to take, `most` at most in all."""
    if not fill:
        each = min(right, wrong, most // 2)
        return each, each
    take_wrong = min(wrong, max(most // 2, most - right))
    return min(right, most - take_wrong), take_wrong
