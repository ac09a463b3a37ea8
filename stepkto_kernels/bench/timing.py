"""Times in milliseconds, taken in turns so that a slow minute of the machine hits everybody alike.

On CUDA the L2 cache is emptied before each call and events take the time.
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
from stepkto_kernels.plan import cut

GEMM_UNITS = 3  # of the bare GEMM that everything is compared with


class Times(NamedTuple):
    """Milliseconds a call."""

    best: float
    median: float


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: str, calls: int = 1
) -> dict[str, Times]:
    """Time each of `runs`, `repeats` rounds in turns, each round beginning with another one.

    calls: calls that are timed as one; for what is over in microseconds.
    """
    measure = _cuda_timer() if device == "cuda" else _wall_clock
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(repeats):
        gc.collect()
        start = i % len(names)
        for name in names[start:] + names[:start]:
            taken[name].append(measure(runs[name], calls) / calls)
    return {name: Times(min(ms), statistics.median(ms)) for name, ms in taken.items()}


def _wall_clock(run: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) * 1e3


def _cuda_timer() -> Callable[[Callable[[], object], int], float]:
    size = torch.cuda.get_device_properties("cuda").L2_cache_size
    flush = torch.empty(2 * size, dtype=torch.int8, device="cuda")

    def measure(run: Callable[[], object], calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
