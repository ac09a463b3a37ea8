"""Peak memory of one call in a fresh process, beyond what was there before and the gradients.

On the CPU the kernel's peak of the resident size, on CUDA the allocator's. `python -m
stepkto_kernels.bench.memory CASE` is that process; CASE is a Case as JSON.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from dataclasses import asdict, dataclass

import torch

from stepkto_kernels.bench.contenders import Contender, execute, warm_up
from stepkto_kernels.bench.peers import find
from stepkto_kernels.bench.problems import DTYPES, Shape, make_problem, on_path
from stepkto_kernels.plan import MIB

STATUS = pathlib.Path("/proc/self/status")
# glibc keeps freed blocks below a threshold that grows with what is freed. With a fixed one, what
# is resident is what is live: memory that the making of the problem left free hides nothing.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


@dataclass(frozen=True)
class Case:
    suite: str  # "head" or "loss"
    path: str
    key: str  # of the contender
    shape: tuple[int, int, int]
    dtype: str
    device: str
    budget: int | None = None  # bytes, of the modes that take one; None: every row


class Failed(RuntimeError):
    """The case raised, or ran out of memory."""


def in_fresh_process(case: Case) -> float:
    """MiB of extra memory at the peak.

    It runs on as many threads as this process.

    Raises:
        Failed: with the last line of what went wrong.
    """
    argument = json.dumps({**asdict(case), "threads": torch.get_num_threads()})
    done = subprocess.run(
        [sys.executable, "-m", "stepkto_kernels.bench.memory", argument],
        capture_output=True,
        text=True,
        env={**os.environ, **MALLOC},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise Failed(lines[-1] if lines else f"ended by signal or status {done.returncode}")
    return round(float(done.stdout.splitlines()[-1]), 1)


def measure(case: Case, contender: Contender) -> float:
    """The same in this process."""

    shape, dtype = Shape(*case.shape), DTYPES[case.dtype]
    problem = on_path(make_problem(case.suite, shape, dtype, case.device), case.path)
    warm_up(contender, problem, case.path)
    before = _start(case.device)
    outcome = execute(contender, problem, case.path)
    gradients = sum(x.nbytes for x in (outcome.dhidden, outcome.dweight) if x is not None)
    return (_peak(case.device) - before - gradients) / MIB


def _start(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    (STATUS.parent / "clear_refs").write_text("5")  # peak resident size := resident size
    return _resident("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


def main() -> None:
    argument = json.loads(sys.argv[1])
    torch.set_num_threads(argument.pop("threads"))
    case = Case(**argument)
    print(measure(case, find(case.suite, case.key, case.device, case.budget)))


if __name__ == "__main__":
    main()
