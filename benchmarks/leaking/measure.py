"""What a process holds, and whether it grows with the number of calls.

A quantity is flat where the upper 99% bound of its slope, over calls, is below LIMITS. Whatever
grows by as much as a limit has that as its slope, so it cannot pass; the controls of calls.py,
which leak on purpose, are there to show it.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import statistics
import sys
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from stepkto_kernels.bench.memory import LIBC, trim

# A call: the smallest malloc, a cache line, is 64 bytes; of objects half a one. A leak of one
# tensor a call is 1 tensor, 1 storage, 2 objects and at least 64 + 64 bytes of malloc.
LIMITS = {
    "resident": 64.0,
    "malloc": 32.0,
    "blocks": 0.5,
    "objects": 0.5,
    "tensors": 0.5,
    "storages": 0.5,
}
Z_99 = statistics.NormalDist().inv_cdf(0.99)


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


HAS_MALLINFO = hasattr(LIBC, "mallinfo2")  # glibc 2.33
if HAS_MALLINFO:
    LIBC.mallinfo2.restype = _MallInfo


class Held(NamedTuple):
    """By a process.

    resident: bytes of it in memory, freed pages given back first. malloc: bytes that C and C++ did
    not free, tensors' among them; 0 where the C library does not tell. blocks: of Python's own
    allocator, which malloc does not see. objects: that Python's collector knows, without those from
    before the first look. tensors, and storages behind them.
    """

    resident: int
    malloc: int
    blocks: int
    objects: int
    tensors: int
    storages: int


class Looks:
    """What is held at moments that follow each other, noted in memory that does not grow."""

    def __init__(self, most: int):
        self._numbers = array("q", bytes(8 * most * len(Held._fields)))
        self._looks = 0
        held()  # its own first use
        gc.collect()
        gc.freeze()  # what is there now is not looked through again and again

    def look(self) -> None:
        at = self._looks * len(Held._fields)
        for i, value in enumerate(held()):
            self._numbers[at + i] = value
        self._looks += 1

    @property
    def found(self) -> list[Held]:
        size = len(Held._fields)
        return [Held(*self._numbers[i * size : (i + 1) * size]) for i in range(self._looks)]


def held() -> Held:
    for _ in range(2):  # what a finalizer let go
        gc.collect()
    trim()
    blocks = sys.getallocatedblocks()
    objects = gc.get_objects()
    tensors = [each for each in objects if issubclass(type(each), torch.Tensor)]
    plain = [each for each in tensors if type(each) is torch.Tensor and each.numel()]
    storages = {each.untyped_storage().data_ptr() for each in plain}
    counts = len(objects), len(tensors), len(storages)
    del objects, tensors, plain, storages
    malloc = 0
    if HAS_MALLINFO:
        info = LIBC.mallinfo2()
        malloc = info.uordblks + info.hblkhd
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Held(resident, malloc, blocks, *counts)


def repeat(call: Callable[[], object], calls: int, warm_up: int, samples: int) -> list[Held]:
    """What is held after `warm_up` calls, and at `samples` even distances over `calls` more."""
    looks = Looks(samples + 1)
    for _ in range(warm_up):
        call()
    looks.look()
    for i in range(samples):
        for _ in range(calls * (i + 1) // samples - calls * i // samples):
            call()
        looks.look()
    return looks.found


def slope(values: Sequence[float], at: Sequence[float]) -> tuple[float, float]:
    """Theil and Sen's slope of values over `at`, and its upper 99% bound (Sen 1968).

    The median of the slopes between all pairs: a page that is touched late, once, does not move it.
    """
    n = len(values)
    slopes = sorted(
        (values[j] - values[i]) / (at[j] - at[i]) for i in range(n) for j in range(i + 1, n)
    )
    width = Z_99 * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    upper = min(len(slopes) - 1, math.ceil((len(slopes) + width) / 2))
    return statistics.median(slopes), slopes[upper]


def judge(found: Sequence[Held], calls: int) -> dict[str, object]:
    """What grew: by quantity its slope a call, the bound of that, and its first and last value."""
    at = [calls * i / (len(found) - 1) for i in range(len(found))]
    result: dict[str, object] = {"calls": calls}
    grew = []
    for name, limit in LIMITS.items():
        values = [getattr(each, name) for each in found]
        middle, upper = slope(values, at)
        if not upper < limit:
            grew.append(name)
        result[name] = {
            "first": values[0],
            "last": values[-1],
            "a call": round(middle, 4),
            "at most": round(upper, 4),
        }
    return result | {"grew": grew}


def judge_few(found: Sequence[Held], calls: int) -> dict[str, object]:
    """What grew in every window between two looks, by one object or by LIMITS's bytes.

    What is set up late is in one window only. Pages of resident memory are too coarse for a few
    calls, and Python's blocks settle after thousands only.
    """
    least = {}
    for name in LIMITS:
        values = [getattr(each, name) for each in found]
        least[name] = min(b - a for a, b in zip(values, values[1:], strict=False))
    window = calls / (len(found) - 1)
    grew = [name for name in ("objects", "tensors", "storages") if least[name] > 0]
    grew += ["malloc"] if least["malloc"] >= LIMITS["malloc"] * window else []
    return {"calls": calls, "least": least, "grew": grew}
