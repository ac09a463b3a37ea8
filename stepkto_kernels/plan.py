"""Which mode a call runs in, and in which chunks: arithmetic on shapes, no tensors.

A unit is one pass of the lm_head GEMM, 2 * N * H * V floating-point operations.
Letters: N tokens, H hidden size, V vocabulary, R cached rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["forward", "frozen", "cached", "recompute"]

MIB = 2**20
# Vocabulary columns and tokens of a logits tile. On the CPU a tile and the weight rows behind it
# are to stay in the last-level cache; on a GPU the GEMM has to fill the device.
VOCAB_CHUNK = {"cpu": 2048, "cuda": 8192}
TOKEN_CHUNK = {"cpu": 512, "cuda": 4096}
# Default scratch of the fused loss: fp32 logits of the tokens that are worked on at once.
FUSED_BYTES = {"cpu": 256 * MIB, "cuda": 1024 * MIB}
FP32_BYTES = 4
MIN_FUSED_ROWS = 16


@dataclass(frozen=True)
class HeadPlan:
    """How linear_logprobs runs one call.

    mode: "forward" 1 unit, no gradient; "frozen" 2 units, only hidden needs a gradient;
    "cached" 3 to 4 units; "recompute" 1 unit more than there are GEMMs left to do in backward.
    """

    mode: Mode
    cached_rows: int = 0  # R, rows of (onehot - p) kept for the backward pass


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def cut(length: int, chunk: int) -> list[slice]:
    """[0, length) in pieces of `chunk`, the last one shorter."""
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def vocab_chunk(V: int, device_type: str) -> int:
    """Columns of a logits tile.

    A function of V alone, never of N, mode or budget: a token's log-prob is folded tile by tile,
    and its bits must not depend on what else is in the batch. Even but for rounding to 64.
    """
    widest = VOCAB_CHUNK.get(device_type, VOCAB_CHUNK["cuda"])
    if V <= widest:
        return max(V, 1)
    chunks = -(-V // widest)
    return round_up(-(-V // chunks), 64)


def token_chunk(device_type: str) -> int:
    return TOKEN_CHUNK.get(device_type, TOKEN_CHUNK["cuda"])


def cached_rows(N: int, V: int, itemsize: int, memory_budget: int, device_type: str) -> int:
    """Rows of (onehot - p) that fit in `memory_budget` bytes, the scratch to make them included."""
    # fp32 logits become (onehot - p) in place; narrower dtypes need fp32 logits of one token chunk
    row_bytes = max(V, 1) * itemsize
    scratch = 0 if itemsize == FP32_BYTES else token_chunk(device_type) * V * FP32_BYTES
    rows = (memory_budget - scratch) // row_bytes
    if rows <= 0:
        return 0
    return min(N, rows)


def plan_head(
    N: int,
    V: int,
    itemsize: int,
    device_type: str,
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_entropy: bool = False,
    memory_budget: int | None = None,
) -> HeadPlan:
    """Choose the mode of one call of linear_logprobs.

    Args:
        itemsize: bytes of one element of hidden and weight.
        needs_hidden, needs_weight: whether a gradient is wanted; `needs_weight` covers the bias.
        needs_entropy: whether the entropy is wanted with its gradient, which needs p itself and so
            rules out what keeps (onehot - p) only.
        memory_budget: bytes that may be kept from forward to backward; None: nothing of size V.
    """
    if not (needs_hidden or needs_weight):
        return HeadPlan("forward")
    if needs_entropy:
        return HeadPlan("recompute")
    if not needs_weight:
        return HeadPlan("frozen")
    rows = 0
    if memory_budget is not None:
        rows = cached_rows(N, V, itemsize, memory_budget, device_type)
    return HeadPlan("cached", rows) if rows else HeadPlan("recompute")


def fused_rows(V: int, memory_budget: int | None, device_type: str) -> int:
    """Tokens whose fp32 logits the fused loss holds at once."""
    default = FUSED_BYTES.get(device_type, FUSED_BYTES["cuda"])
    budget = default if memory_budget is None else memory_budget
    return max(budget // (max(V, 1) * FP32_BYTES), MIN_FUSED_ROWS)
