"""What a run of the suites is asked for, and what a row of a result is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stepkto_kernels.bench.contenders import Contender
from stepkto_kernels.bench.problems import Shape

Row = dict[str, Any]

OUT_OF_MEMORY = "out of memory"  # how such a status begins

_HEAD_SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": (Shape(2048, 1024, 32000), Shape(4096, 512, 128256)),
    "cuda": tuple(Shape(8192, H, V) for H in (4096, 2048) for V in (131072, 151936)),
}
_TOKENS = tuple(Shape(n * 1024, 1, 1) for n in (8, 16, 32, 64))
_MEMORY_SIZES = {  # (N, V)
    "cpu": ((1024, 16384), (4096, 16384), (1024, 65536), (4096, 65536)),
    "cuda": ((2048, 32768), (8192, 32768), (2048, 131072), (8192, 131072)),
}
DEFAULT_SHAPES: dict[str, dict[str, tuple[Shape, ...]]] = {
    "head": _HEAD_SHAPES,
    "loss": _HEAD_SHAPES,
    "segments": {"cpu": _TOKENS, "cuda": _TOKENS},
    "memory": {
        "cpu": tuple(Shape(N, 256, V) for N, V in _MEMORY_SIZES["cpu"]),
        "cuda": tuple(Shape(N, 4096, V) for N, V in _MEMORY_SIZES["cuda"]),
    },
    "accuracy": {"cpu": (Shape(512, 512, 32000),), "cuda": (Shape(2048, 4096, 131072),)},
}


@dataclass(frozen=True)
class Options:
    """None takes the defaults of the suite."""

    device: str = "cpu"
    peers: tuple[str, ...] = ()
    shapes: tuple[Shape, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    paths: tuple[str, ...] | None = None
    backends: tuple[str, ...] | None = None  # of this library
    repeats: int = 5
    memory: bool = True  # whether heads and losses are run again for their memory
    note: Callable[[str], None] = lambda text: None  # told what comes next

    def shapes_of(self, suite: str) -> tuple[Shape, ...]:
        return self.shapes or DEFAULT_SHAPES[suite][self.device]

    def dtypes_of(self, suite: str) -> tuple[str, ...]:
        if suite == "accuracy":
            return self.dtypes or ("float32", "bfloat16")
        return self.dtypes or (("float32",) if self.device == "cpu" else ("bfloat16",))

    def takes(self, contender: Contender) -> bool:
        ours = contender.name == "ours"
        return not ours or self.backends is None or contender.backend in self.backends

    def wants(self, path: str) -> bool:
        return self.paths is None or path in self.paths


def new_row(suite: str, path: str, contender: Contender, shape: Shape, dtype: str) -> Row:
    return {
        "suite": suite,
        "path": path,
        "name": contender.name,
        "who": contender.who,
        "backend": contender.backend,
        **shape._asdict(),
        "dtype": dtype,
        "status": "ok",
    }


def failure(error: Exception) -> str:
    """What an exception says in the status of a row; out of memory is told apart."""
    # torch's own class only knows the device's memory; a CPU allocation fails as a RuntimeError
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
        return f"{OUT_OF_MEMORY}: {one_line(error)}"
    return f"failed: {one_line(error)}"


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
