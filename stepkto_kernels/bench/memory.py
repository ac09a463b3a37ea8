"""Peak memory of one call in a fresh process, beyond what was there before and the gradients.

On the CPU the kernel's peak of the resident size, a process for each case. On CUDA the allocator's,
which can be reset and counts what is live, so that one process serves several cases: starting one
takes longer than measuring. `python -m stepkto_kernels.bench.memory JOB` is that process; JOB is
JSON, {"threads", "cases": a list of Case}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from stepkto_kernels.bench.contenders import Contender, execute, warm_up
from stepkto_kernels.bench.options import failure
from stepkto_kernels.bench.peers import find
from stepkto_kernels.bench.problems import DTYPES, Shape, make_problem, on_path
from stepkto_kernels.bench.timing import release
from stepkto_kernels.plan import MIB

ROOT = pathlib.Path(__file__).parents[2]
ANSWER = "peak: "  # begins a line of the fresh process; what peers print may stand around it
STATUS = pathlib.Path("/proc/self/status")
LIBC = ctypes.CDLL(None)
# glibc keeps freed blocks below a threshold that grows with what is freed. With a fixed one, what
# is resident is what is live, so that what is freed during a call hides nothing made later in it.
# What was free before the call is handed back by `trim`, in any process.
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


# MiB of extra memory at the peak, or why there is no such number: the status of a row
Peak = float | str


def in_fresh_process(cases: Sequence[Case]) -> Iterator[Peak]:
    """The peak of each case, in a process of its own on the CPU and in one for all on CUDA.

    It runs on as many threads as this process.
    """
    together = all(case.device == "cuda" for case in cases)
    jobs = [list(cases)] if together and cases else [[case] for case in cases]
    for job in jobs:
        yield from _peaks(job)


def _peaks(cases: list[Case]) -> list[Peak]:
    release(cases[0].device)  # or what this process has cached is missing there
    job = {"threads": torch.get_num_threads(), "cases": [asdict(case) for case in cases]}
    # it need not be installed
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "stepkto_kernels.bench.memory", json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, **MALLOC, "PYTHONPATH": path},
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    peaks: list[Peak] = [json.loads(line.removeprefix(ANSWER)) for line in answers]
    # a process that was ended early has not answered for the rest
    lines = done.stderr.strip().splitlines()
    why = lines[-1] if lines else f"ended by signal or status {done.returncode}"
    return peaks + [f"failed: {why}"] * (len(cases) - len(peaks))


def measure(case: Case, contender: Contender) -> float:
    """MiB of extra memory at the peak, in this process."""
    shape, dtype = Shape(*case.shape), DTYPES[case.dtype]
    problem = on_path(make_problem(case.suite, shape, dtype, case.device), case.path)
    warm_up(contender, problem, case.path)
    if case.device == "cuda":
        # kernels compiled for this shape, autotuning buffers, the vendor's workspace
        execute(contender, problem, case.path)
        release(case.device)
    gc.collect()  # or what is freed on the way hides as much
    before = _start(case.device)
    outcome = execute(contender, problem, case.path)
    if case.device == "cuda":
        torch.cuda.synchronize()  # what went wrong there is raised here
    gradients = sum(x.nbytes for x in (outcome.dhidden, outcome.dweight) if x is not None)
    return (_peak(case.device) - before - gradients) / MIB


def trim() -> None:
    """Hand the pages of freed blocks back to the kernel, where the C library can."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def _start(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    trim()  # or the call fills what is free here, and the resident size does not grow
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
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    for case in (Case(**case) for case in job["cases"]):
        peak: Peak
        try:
            contender = find(case.suite, case.key, case.device, case.budget)
            peak = round(measure(case, contender), 1)
        except Exception as error:  # whatever somebody else's code raises is a row of the table
            peak = failure(error)
        print(ANSWER + json.dumps(peak), flush=True)
        release(case.device)


if __name__ == "__main__":
    main()
