"""Times in milliseconds, taken in turns so that a slow minute of the machine hits everybody alike.

On CUDA events take the time. Before each measurement the L2 cache is emptied: a call that finds its
inputs there, or what the call before it wrote, is faster than one in the middle of a training step.
That also keeps the device busy while the first kernels of the call are queued behind it, so what is
timed is the device and not how long Python takes to reach the first launch.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from stepkto_kernels.bench.problems import HeadProblem
from stepkto_kernels.plan import MIB, cut

GEMM_UNITS = 3  # of the bare GEMM that everything is compared with
# Overwritten before a measurement on CUDA: several times any L2, over half a millisecond in all.
FLUSH_BYTES, FLUSHES = 512 * MIB, 4


class Times(NamedTuple):
    """Milliseconds a call."""

    best: float
    median: float


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str,
    calls: int = 1,
    failed: Callable[[str, Exception], None] | None = None,
) -> dict[str, Times]:
    """Time each of `runs`, `repeats` rounds in turns, each round beginning with another one.

    On CUDA a round that is not timed comes first: clocks rise and the allocator gets its blocks.

    Args:
        calls: calls that are timed as one; for what is over in microseconds.
        failed: told the name and the error of what raises, which is then left out of the rest and
            of what is returned; None: raise. What ran once can still run out of memory here, with
            the memory of the others' rounds around it.
    """
    measure = _cuda_timer() if device == "cuda" else _wall_clock
    untimed = 1 if device == "cuda" else 0
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(-untimed, repeats):
        gc.collect()
        names = list(taken)
        start = i % max(len(names), 1)
        for name in names[start:] + names[:start]:
            try:
                ms = measure(runs[name], calls) / calls
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                del taken[name]
            else:
                if i >= 0:
                    taken[name].append(ms)
            if name not in taken:  # outside of `except`, where its traceback holds its tensors
                release(device)
    return {name: Times(min(ms), statistics.median(ms)) for name, ms in taken.items()}


def release(device: str) -> None:
    """Give memory that nothing uses back to the device: other processes and mem_get_info see it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _wall_clock(run: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) * 1e3


def _cuda_timer() -> Callable[[Callable[[], object], int], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def measure(run: Callable[[], object], calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(FLUSHES):
            flush.zero_()
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return measure


def ratios(ms: float, gemm_ms: float, units: int) -> tuple[float, float]:
    """Time over that of the bare GEMM of GEMM_UNITS units, and over that of `units` units."""
    ratio = ms / gemm_ms
    return ratio, ratio * GEMM_UNITS / units


class BareGemm:
    """Logits, dhidden and dweight as three GEMMs by the vendor, without what lies between them.

    Of the whole problem at once, or of the widest vocabulary chunks of which the logits fit a
    quarter of the free memory. On the CPU in fp32 for every dtype: narrower GEMMs would round the
    logits, and are slower where the machine has no instructions for them.
    """

    def __init__(self, problem: HeadProblem):
        dtype = torch.float32 if problem.hidden.device.type == "cpu" else problem.hidden.dtype
        self.hidden, self.weight = problem.hidden.to(dtype), problem.weight.to(dtype)
        self.dhidden, self.dweight = torch.empty_like(self.hidden), torch.empty_like(self.weight)
        N, _, V = problem.shape
        release(self.hidden.device.type)
        chunks = 1
        while chunks < V and N * -(-V // chunks) * dtype.itemsize > free_bytes(self.hidden) // 4:
            chunks *= 2
        self.vocab = cut(V, -(-V // chunks))
        self.logits = self.hidden.new_zeros(N * self.vocab[0].stop)

    def run(self) -> Tensor:
        """Returns dweight."""
        for i, vocab in enumerate(self.vocab):
            w, dw = self.weight[vocab], self.dweight[vocab]
            logits = self.logits[: len(self.hidden) * len(w)].view(-1, len(w))
            torch.mm(self.hidden, w.T, out=logits)
            if i == 0:
                torch.mm(logits, w, out=self.dhidden)
            else:
                self.dhidden.addmm_(logits, w)
            torch.mm(logits.T, self.hidden, out=dw)
        return self.dweight


def free_bytes(like: Tensor) -> int:
    if like.device.type == "cuda":
        return torch.cuda.mem_get_info(like.device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
