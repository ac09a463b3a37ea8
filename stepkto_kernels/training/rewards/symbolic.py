"""Outcome by symbolic equality, with math-verify in processes of its own.

Text that a model wrote goes through a parser and a computer algebra system, which can take forever
or all memory (9**9**9**9, a thousand open braces). So none of it is parsed here: a worker does it,
with limits that the kernel enforces, and is started again where it dies.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from stepkto_kernels import checks
from stepkto_kernels.training.records import Problem
from stepkto_kernels.training.rewards.answers import normalise_answer, reference_answer
from stepkto_kernels.training.rewards.base import Label
from stepkto_kernels.training.steps import split_solution

WORKER = Path(__file__).with_name("math_worker.py")
START_SECONDS = 120.0  # imports sympy, on a machine that may be busy
WALL_FACTOR = 4  # wall-clock seconds for one of processor time, before the worker is killed
MIB = 2**20
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


class MathVerify:
    """Right where the completion's answer is symbolically equal to the reference answer.

    The answer is what `split_solution` finds; a completion without one is wrong. The verdict is
    None without a reference answer, and where the comparison passes a limit; `undecided` counts
    the latter. Safe to call from several threads; a context manager, as its workers are processes.

    Args:
        timeout: processor seconds for a comparison, > 0; in wall-clock time it is at most 4 times
            as many.
        memory: bytes of address space of a worker, >= 128 MiB.
        workers: processes, >= 1; started when first needed.
        longest: characters of an answer that is looked at, >= 1; a longer one is wrong.
    Raises:
        ValueError: an argument outside of the above.
        ImportError: math-verify is not installed (extra `rewards`).
    """

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        memory: int = 1024 * MIB,
        workers: int = 1,
        longest: int = 10_000,
    ):
        checks.number("timeout", timeout, low=0, low_open=True)
        checks.integer("memory", memory, low=128 * MIB)
        checks.integer("workers", workers, low=1)
        checks.integer("longest", longest, low=1)
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "math-verify is not installed: pip install 'stepkto_kernels[rewards]'"
            )
        self.longest = longest
        self.workers = [_Worker(timeout, memory) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self._idle.put(worker)

    @property
    def undecided(self) -> int:
        """Comparisons that passed a limit."""
        return sum(worker.undecided for worker in self.workers)

    def __call__(self, problem: Problem, completion: str) -> Label:
        wanted = reference_answer(problem)
        if not wanted:
            return None
        found = split_solution(completion).answer
        if found is None or len(found) > self.longest:
            return False
        if normalise_answer(found) == normalise_answer(wanted):
            return True
        if "\\boxed" in found or not _braces_balance(found):
            return False  # "5} \\boxed{4" would leave the box that it is put into
        worker = self._idle.get()
        try:
            return worker.compare(wanted, found)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the workers; a call after it starts them again."""
        for worker in self.workers:
            worker.stop()

    def __enter__(self) -> MathVerify:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _braces_balance(text: str) -> bool:
    depth = 0
    for brace in _BRACE.findall(text):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0


class _Worker:
    """One process; `compare` is called by one thread at a time."""

    def __init__(self, timeout: float, memory: int):
        self.timeout, self.memory = timeout, memory
        self.undecided = 0
        self.process: subprocess.Popen[bytes] | None = None

    def compare(self, reference: str, answer: str) -> Label:
        process = self._started()
        reply = b""
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps([reference, answer]).encode() + b"\n")
            process.stdin.flush()
            reply = _read_line(process, WALL_FACTOR * self.timeout)
        except BrokenPipeError:
            pass
        except BaseException:  # Ctrl-C: its answer must not be taken for the next one's
            self.stop()
            raise
        verdict = {b"true\n": True, b"false\n": False}.get(reply)
        if verdict is None:
            self.undecided += 1
            self.stop()  # killed by a limit, too slow, or out of memory and in an unknown state
        return verdict

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.stop()
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(self.timeout), str(self.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if _read_line(self.process, START_SECONDS) != b"ready\n":
            self.stop()
            want = "room for sympy and math-verify in a worker"
            raise ValueError(f"memory: want {want}, got {self.memory} bytes and no start")
        return self.process

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()  # type: ignore[union-attr]
            except BrokenPipeError:  # what was not yet written
                pass
        process.wait()


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """What the process writes up to a line's end; cut short where it ends or time is over."""
    assert process.stdout is not None
    line, deadline = b"", time.monotonic() + seconds
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            break
        # past the buffer of the file object, into which select cannot see
        part = process.stdout.raw.read(4096)  # type: ignore[attr-defined]
        if not part:
            break
        line += part
    return line
