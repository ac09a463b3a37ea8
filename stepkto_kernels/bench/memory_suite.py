"""Suite memory: the peak of every mode and peer against N, V and budget.

Ours must stay within what plan.py plans, plus SLACK.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from stepkto_kernels.bench import plans
from stepkto_kernels.bench.contenders import PATHS, Contender, Skip
from stepkto_kernels.bench.memory import Case, Failed, in_fresh_process
from stepkto_kernels.bench.options import Options, Row, new_row
from stepkto_kernels.bench.peers import contenders
from stepkto_kernels.bench.problems import DTYPES
from stepkto_kernels.plan import MIB

SLACK = 48  # MiB: weight chunk, partial sums, the vendor GEMM's own buffers
BUDGETS = (64 * MIB, 128 * MIB, 256 * MIB)  # of the modes that take one


class Mode(NamedTuple):
    label: str  # path in the rows
    suite: str
    path: str
    contender: Contender
    budget: int | None = None


def memory(options: Options) -> Iterator[Row | Skip]:
    modes, skipped = _modes(options)
    yield from skipped
    for dtype in options.dtypes_of("memory"):
        for mode in modes:
            for shape in options.shapes_of("memory"):
                if not options.wants(mode.label):
                    continue
                row = new_row("memory", mode.label, mode.contender, shape, dtype)
                row["budget_mib"] = None if mode.budget is None else mode.budget // MIB
                row["planned_mib"] = None
                if mode.contender.name == "ours":
                    size = DTYPES[dtype].itemsize
                    plan = plans.describe(mode.label, shape, size, options.device, mode.budget)
                    row["planned_mib"] = round(plan.workspace / MIB, 1)
                case = Case(
                    mode.suite,
                    mode.path,
                    mode.contender.key,
                    shape,
                    dtype,
                    options.device,
                    mode.budget,
                )
                options.note(f"memory {shape} {dtype} {mode.label}: {mode.contender.key}")
                try:
                    row["extra_mib"] = in_fresh_process(case)
                    row["status"] = verdict(row["extra_mib"], row["planned_mib"])
                except Failed as error:
                    row["extra_mib"], row["status"] = None, f"failed: {error}"
                yield row


def verdict(extra_mib: float, planned_mib: float | None) -> str:
    if planned_mib is None or extra_mib <= planned_mib + SLACK:
        return "ok"
    return f"wrong: more than {planned_mib} MiB planned and {SLACK} MiB slack"


def _modes(options: Options) -> tuple[list[Mode], list[Skip]]:
    """Our paths with the fastest backend, then every peer's leanest way to train the head."""
    heads, skipped = contenders("head", options.device, options.peers)
    losses, _ = contenders("loss", options.device, options.peers)
    modes = []
    ours = next((c for c in heads if c.name == "ours" and options.takes(c)), None)
    if ours is not None:
        for path in PATHS["head"]:
            budgets = BUDGETS if path == "cached" else (None,)
            modes += [Mode(path, "head", path, ours, budget) for budget in budgets]
        fused = next(c for c in losses if (c.name, c.backend) == ("ours", ours.backend))
        modes += [Mode("fused", "loss", "kto", fused, budget) for budget in BUDGETS]
    for peer in heads:
        if peer.name != "ours":
            path = "recompute" if "recompute" in peer.units else "cached"
            modes.append(Mode(path, "head", path, peer))
    with_head = {c.name for c in heads}
    modes += [Mode("fused", "loss", "kto", c) for c in losses if c.name not in with_head]
    in_table = {mode.contender.who for mode in modes}
    return modes, [s for s in skipped if not any(who.startswith(s.who) for who in in_table)]
