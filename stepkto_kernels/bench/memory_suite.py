"""Suite memory: the peak of every mode and peer against N, V and budget.

Ours must stay within what plan.py plans, plus SLACK.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from stepkto_kernels.bench import plans
from stepkto_kernels.bench.contenders import MODES, Contender, Skip
from stepkto_kernels.bench.memory import Case, Peak, in_fresh_process
from stepkto_kernels.bench.options import Options, Row, new_row
from stepkto_kernels.bench.peers import contenders
from stepkto_kernels.bench.problems import DTYPES, Shape
from stepkto_kernels.plan import FP32_BYTES, MIB

SLACK = 48  # MiB: weight chunk, partial sums, the vendor GEMM's own buffers
CUDA_TILES = 2  # more of the size of a logits tile on CUDA: row kernels in torch are not in place
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
            if options.wants(mode.label):
                yield from _rows(mode, dtype, options)


def _rows(mode: Mode, dtype: str, options: Options) -> Iterator[Row]:
    """A row for each shape; on CUDA one process measures them all."""
    shapes = options.shapes_of("memory")
    cases = [
        Case(mode.suite, mode.path, mode.contender.key, shape, dtype, options.device, mode.budget)
        for shape in shapes
    ]
    options.note(f"memory {dtype} {mode.label}: {mode.contender.key}")
    for shape, peak in zip(shapes, in_fresh_process(cases), strict=True):
        yield _row(mode, shape, dtype, options.device, peak)


def _row(mode: Mode, shape: Shape, dtype: str, device: str, peak: Peak) -> Row:
    row = new_row("memory", mode.label, mode.contender, shape, dtype)
    row["budget_mib"] = None if mode.budget is None else mode.budget // MIB
    row["planned_mib"] = None
    slack = float(SLACK)
    if mode.contender.name == "ours":
        size = DTYPES[dtype].itemsize
        plan = plans.describe(mode.label, shape, size, device, mode.budget)
        row["planned_mib"] = round(plan.workspace / MIB, 1)
        slack += cuda_slack(plan, shape, size) / MIB if device == "cuda" else 0.0
    if isinstance(peak, str):
        row["extra_mib"], row["status"] = None, peak
    else:
        row["extra_mib"], row["status"] = peak, verdict(peak, row["planned_mib"], slack)
    return row


def cuda_slack(plan: plans.PathPlan, shape: Shape, itemsize: int) -> int:
    """Bytes beside the tiles on CUDA, on paper: no GPU has confirmed it yet.

    fp32 sums of the gradients with the product that is added to them, dlogits in the dtype of the
    GEMM, and what the row kernels in torch make on their way.
    """
    columns = min(plan.vocab_chunk, shape.V)
    tile = min(plan.token_chunk, shape.N) * columns * FP32_BYTES
    sums = 2 * (shape.N + columns) * shape.H * FP32_BYTES
    if plan.mode == "fused":  # it adds up all of dweight
        sums += shape.V * shape.H * FP32_BYTES
    return CUDA_TILES * tile + tile * itemsize // FP32_BYTES + sums


def verdict(extra_mib: float, planned_mib: float | None, slack: float = SLACK) -> str:
    if planned_mib is None or extra_mib <= planned_mib + slack:
        return "ok"
    return f"wrong: more than {planned_mib} MiB planned and {slack:.0f} MiB slack"


def _modes(options: Options) -> tuple[list[Mode], list[Skip]]:
    """Our paths with the fastest backend, then every peer's leanest way to train the head."""
    heads, skipped = contenders("head", options.device, options.peers)
    losses, _ = contenders("loss", options.device, options.peers)
    modes = []
    ours = next((c for c in heads if c.name == "ours" and options.takes(c)), None)
    if ours is not None:
        for path in MODES:
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
