"""How fast a row could be at most: the device's GEMM rate and copy rate, and what must be moved.

The two ceilings are measured in the run that they are compared with: the best bare GEMM that was
timed, for each dtype, and a large copy within the device's memory.
Letters: N tokens, n of them scored, H hidden size, V vocabulary, B sequences, S steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from stepkto_kernels.bench.options import Row
from stepkto_kernels.bench.problems import DTYPES, STEPS, Shape, scored_tokens, sequence_length
from stepkto_kernels.plan import MIB

INDEX, FP32, LABEL = 8, 4, 1  # bytes of a target, of a statistic, of a segment's label
LAYOUT = 4  # bytes of a token's sequence index, and of its step index
COPIES = 7  # the best of so many
# Bytes of one of the two buffers of a copy: far more than any cache.
COPY_BYTES = {"cpu": 256 * MIB, "cuda": 2048 * MIB}


@dataclass
class Roofline:
    """What the device has been seen to do in this run."""

    copy_gb_s: float | None = None  # 1e9 bytes read and written, a second
    gemm_tflops: dict[str, float] = field(default_factory=dict)  # dtype -> 1e12 operations a second

    def see(self, row: Row) -> None:
        """Take the rate of a bare GEMM's row, if it is one and the best of its dtype."""
        if row["name"] == "gemm" and row.get("ms_best"):
            rate = gemm_flops(row["units"], Shape(row["N"], row["H"], row["V"])) / row["ms_best"]
            known = self.gemm_tflops.get(row["dtype"], 0.0)
            self.gemm_tflops[row["dtype"]] = max(known, rate / 1e9)

    def header(self) -> dict[str, object]:
        short = lambda rate: float(f"{rate:.5g}")  # as in the rows
        rates = {dtype: short(rate) for dtype, rate in self.gemm_tflops.items()}
        copy = None if self.copy_gb_s is None else short(self.copy_gb_s)
        return {"gemm_tflops": rates, "copy_gb_s": copy}

    def columns(self, row: Row) -> Row:
        """floor_ms and of_floor of a row with a "bytes" column, gb_s of one without GEMMs.

        A row without a time has neither of_floor nor gb_s, nothing has a floor before the ceilings
        are known.
        """
        moved, ms = row.get("bytes"), row.get("ms_best")
        if moved is None:
            return {}
        units, gemm = row.get("units", 0), self.gemm_tflops.get(row["dtype"])
        floor = None
        if self.copy_gb_s is not None and (gemm is not None or not units):
            flops = gemm_flops(units, Shape(row["N"], row["H"], row["V"])) if units else 0.0
            floor = floor_ms(flops, moved, gemm or 1.0, self.copy_gb_s)
        found: Row = {"floor_ms": floor, "of_floor": ms / floor if ms and floor else None}
        if not units:
            found["gb_s"] = moved / ms / 1e6 if ms else None
        return found


def gemm_flops(units: float, shape: Shape) -> float:
    """Floating-point operations of so many passes of the head."""
    return 2.0 * units * shape.N * shape.H * shape.V


def floor_ms(flops: float, moved: float, gemm_tflops: float, copy_gb_s: float) -> float:
    """Milliseconds below which no code gets: what must be multiplied, or what must be moved."""
    return max(flops / gemm_tflops / 1e9, moved / copy_gb_s / 1e6)


def fewest_bytes(
    suite: str, path: str, shape: Shape, itemsize: int, needs: tuple[str, ...] = ()
) -> int:
    """The fewest bytes that a path must move: inputs read once, outputs and gradients written once.

    Tokens that are ignored have neither hidden states nor log-probs to be read, but a gradient
    (zeros) to be written.

    Args:
        itemsize: bytes of an element of hidden and weight.
        needs: "hidden", "weight": of which there are gradients.
    """
    N, H, V = shape
    T = sequence_length(N)
    B, S = N // T, N // T * min(STEPS, T)
    if suite == "segments":
        layout = 2 * LAYOUT * N
        sums = FP32 * (B + S)
        if path == "segment_sums":  # ratios; both sums, read again as the gradient; gradient
            return FP32 * N + layout + 2 * sums + FP32 * N
        # log-probs of policy and reference; labels; the step's sequence; loss; gradient
        return 2 * FP32 * N + layout + LABEL * (B + S) + LAYOUT * S + FP32 + FP32 * N
    n = scored_tokens(N, path)
    moved = n * H * itemsize + V * H * itemsize + N * INDEX
    moved += N * H * itemsize if "hidden" in needs else 0
    moved += V * H * itemsize if "weight" in needs else 0
    if suite == "head":
        return moved + N * FP32 + (N * FP32 if needs else 0)  # log-probs; upstream gradient
    # the reference's log-probs, or the hidden states that give them
    moved += N * H * itemsize if path == "kto+ref" else N * FP32
    return moved + 2 * LAYOUT * N + LABEL * (B + S) + LAYOUT * S + FP32


def path_bytes(suite: str, path: str, shape: Shape, dtype: str, needs: Mapping[str, tuple]) -> int:
    """The same for a row of a suite. needs: path -> what has a gradient."""
    return fewest_bytes(suite, path, shape, DTYPES[dtype].itemsize, needs.get(path, ()))


def measure_copy(device: str, size: int | None = None) -> float:
    """1e9 bytes read and written a second, by the best of COPIES copies within the device's memory.

    Random bytes, as a memory that compresses would copy zeros faster.
    """
    size = COPY_BYTES[device] if size is None else size
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        size = min(size, free // 4)
    generator = torch.Generator(device).manual_seed(0)
    source = torch.randint(
        -(2**31), 2**31, (max(size // 4, 1),), generator=generator, device=device, dtype=torch.int32
    )
    copy = torch.empty_like(source)
    best = min(_copy_seconds(source, copy) for _ in range(COPIES))
    return 2 * source.nbytes / best / 1e9


def _copy_seconds(source: torch.Tensor, copy: torch.Tensor) -> float:
    if source.device.type != "cuda":
        begin = time.perf_counter()
        copy.copy_(source)
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    copy.copy_(source)  # keeps the device busy while the next one is queued, and warms it up
    start.record()
    copy.copy_(source)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
