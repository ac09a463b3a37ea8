"""Which mode a call runs in, and in which chunks: arithmetic on shapes, no tensors.

A unit is one pass of the lm_head GEMM, 2 * N * H * V floating-point operations.
Letters: N tokens, H hidden size, V vocabulary, R cached rows.
The one thing that is looked up rather than given is the size of the CPU's last-level cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Mode = Literal["forward", "frozen", "cached", "recompute"]

MIB = 2**20
FP32_BYTES = 4
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 32 * MIB


def last_level_cache(caches: Path = CACHES) -> int:
    """Bytes of this CPU's last-level cache; UNKNOWN_CACHE where the system does not say.

    From Linux's sysfs, which names what one group of cores shares; sysconf gives some CPUs' sum.
    """
    units = {"K": 2**10, "M": MIB}
    try:
        sizes = [path.read_text().strip() for path in caches.glob("index*/size")]
        return max(int(size[:-1]) * units[size[-1]] for size in sizes)
    except (OSError, ValueError, KeyError, IndexError):
        return UNKNOWN_CACHE


def cpu_tile(cache_bytes: int) -> tuple[int, int]:
    """Tokens and vocabulary columns of a logits tile that is worked on while it is in the cache.

    Its fp32 logits take a quarter, the rest is for the rows of hidden and weight behind it and the
    panels that a GEMM packs. Twice as many tokens as columns, as every tile of tokens reads and
    writes a chunk of dweight. Powers of two. A 32 MiB cache gives 2048 x 1024.
    """
    columns = 2 ** int(math.log2(math.sqrt(max(cache_bytes, MIB) / 4 / FP32_BYTES / 2)))
    columns = min(max(columns, 256), 2048)
    return 2 * columns, columns


MIN_FUSED_ROWS = 16

CPU_TILE = cpu_tile(last_level_cache())
# Tokens and vocabulary columns of a logits tile; on a GPU the GEMM has to fill the device.
TOKEN_CHUNK = {"cpu": CPU_TILE[0], "cuda": 4096}
VOCAB_CHUNK = {"cpu": CPU_TILE[1], "cuda": 8192}
# Default scratch of the fused loss: fp32 logits of the tokens that are worked on at once.
FUSED_BYTES = {"cpu": 256 * MIB, "cuda": 1024 * MIB}
# ... but at least of so many tokens, as every block reads and writes all of dweight.
FUSED_ROWS = {"cpu": 1024, "cuda": 2048}

# GPU figures behind epilogue_pays: an H200's bf16 GEMM and copy rates. The rate of our own GEMM
# over the vendor's is an assumption until it is measured (benchmarks/ROOFLINE.md).
GEMM_FLOPS, COPY_BYTES = 790e12, 4.3e12
OWN_GEMM_RATE = 0.9
# Tokens and vocabulary columns of one launch that computes dlogits: 268 MB of bf16. In the forward
# pass as many tokens and the whole vocabulary: 8 bytes a token and tile are 33 MB at V = 131072.
EPILOGUE_TILE = 8192, 16384


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


def even_chunk(length: int, widest: int, multiple: int = 1) -> int:
    """Size of the fewest pieces of at most `widest`, as even as `multiple` lets them be."""
    pieces = max(-(-length // widest), 1)
    return round_up(max(-(-length // pieces), 1), multiple)


def vocab_chunk(V: int, device_type: str) -> int:
    """Columns of a logits tile.

    A function of V alone on one machine, never of N, mode or budget: a token's log-prob is folded
    tile by tile, and its bits must not depend on what else is in the batch. Even but for rounding
    to 64.
    """
    widest = VOCAB_CHUNK.get(device_type, VOCAB_CHUNK["cuda"])
    return max(V, 1) if V <= widest else even_chunk(V, widest, multiple=64)


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


def epilogue_pays(H: int, itemsize: int) -> bool:
    """Whether the row work belongs into the epilogue of our own GEMM rather than after torch's.

    fp32 logits that are written and read again move 8 bytes each, for which the vendor's faster
    GEMM has to make up. Tensor cores have no exact fp32, so fp32 operands go to the vendor.
    """
    if itemsize == FP32_BYTES:
        return False
    gemm = 2 * H / GEMM_FLOPS  # seconds a logit
    return gemm / OWN_GEMM_RATE < gemm + 2 * FP32_BYTES / COPY_BYTES


def fused_rows(V: int, memory_budget: int | None, device_type: str) -> int:
    """Tokens whose fp32 logits the fused loss holds at once."""
    row_bytes = max(V, 1) * FP32_BYTES
    if memory_budget is None:
        known = device_type if device_type in FUSED_BYTES else "cuda"
        memory_budget = max(FUSED_BYTES[known], FUSED_ROWS[known] * row_bytes)
    return max(memory_budget // row_bytes, MIN_FUSED_ROWS)
