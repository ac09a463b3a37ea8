"""What plan.py chooses for a call, and the memory that follows from it; tables for people.

Letters: N tokens, H hidden size, V vocabulary, R cached rows.
"""

from __future__ import annotations

from typing import NamedTuple

from stepkto_kernels import plan
from stepkto_kernels.bench.contenders import MODES, PATHS
from stepkto_kernels.bench.problems import Shape

PLANNED_PATHS = (*MODES, "fused")


class PathPlan(NamedTuple):
    path: str
    mode: str
    units: float  # GEMM units
    token_chunk: int  # of a logits tile
    vocab_chunk: int
    rows: int  # whose logits, or what became of them, are held: cached, or a block of the loss
    workspace: int  # bytes: a logits tile, rows that are held, (N, H) numbers that are kept


def describe(path: str, shape: Shape, itemsize: int, device: str, budget: int | None) -> PathPlan:
    """The plan of one of PLANNED_PATHS; itemsize: bytes of an element of hidden and weight."""
    N, H, V = shape
    tokens, columns = min(plan.token_chunk(device), N), plan.vocab_chunk(V, device)
    tile = tokens * columns * plan.FP32_BYTES
    if path == "fused":
        rows = min(plan.fused_rows(V, budget, device), N)
        return PathPlan(path, "fused", 3, tokens, columns, rows, tile + rows * V * plan.FP32_BYTES)
    needs = PATHS["head"][path]
    head = plan.plan_head(
        N,
        V,
        itemsize,
        device,
        needs_hidden="hidden" in needs,
        needs_weight="weight" in needs,
        memory_budget=budget if path == "cached" else None,
    )
    units = {"forward": 1.0, "frozen": 2.0, "recompute": 4.0}.get(head.mode)
    if units is None:
        units = 4 - head.cached_rows / N
    held = head.cached_rows * V * itemsize
    if head.mode == "frozen":
        held += N * H * plan.FP32_BYTES
    return PathPlan(path, head.mode, units, tokens, columns, head.cached_rows, tile + held)
