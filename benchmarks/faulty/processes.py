"""Commands in forked processes: what is loaded is loaded once, and any of them can be killed.

Nothing may run on several threads before the fork, so that no lock is held in the child.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import tqdm

from stepkto_kernels.cli import main
from stepkto_kernels.training import launch

STEP = 0.001  # seconds between two looks at a child
PATIENCE = 600.0  # seconds until a command that is not to be killed is said to hang


class Done(NamedTuple):
    """How a command ended; status: None where it was killed."""

    status: int | None
    text: str
    seconds: float


@dataclass
class Count:
    """Of one kind of fault.

    survived: the result is that of the undisturbed run, to the bit. stopped: a clear error, and
    what was there is unharmed. lost: neither, or a row that is missing or there twice.
    """

    injected: int = 0
    survived: int = 0
    stopped: int = 0
    lost: int = 0
    notes: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, kind: str, is_so: bool, problem: str) -> None:
        """One more fault; kind: "survived" or "stopped", which it is if is_so."""
        self.injected += 1
        if is_so:
            setattr(self, kind, getattr(self, kind) + 1)
        else:
            self.lost += 1
            self.problems.append(problem)

    def as_dict(self) -> dict:
        return asdict(self)


def command(
    words: Sequence[str],
    seconds: float | None = None,
    before: Callable[[], None] = lambda: None,
) -> Done:
    """`stepkto WORDS` in a process of its own, its training in the same one.

    Args:
        seconds: when it is killed, None for never.
        before: called in the process first.
    Raises:
        TimeoutError: it was not to be killed and does not end.
    """
    with tempfile.TemporaryFile() as log:
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(words, log.fileno(), before)
        status = _wait(pid, None if seconds is None else start + seconds)
        took = time.monotonic() - start
        log.seek(0)
        return Done(status, log.read().decode(errors="replace"), took)


def _child(words: Sequence[str], log: int, before: Callable[[], None]) -> None:
    status = 70
    try:
        _own_progress_lock()
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        launch.run = _train_here
        warnings.simplefilter("default")  # and not to whoever collects them in this process
        warnings.showwarning = lambda message, *where: print(message, file=sys.stderr)
        before()
        status = main(list(words))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _own_progress_lock() -> None:
    """tqdm's is a semaphore that forked processes share: one killed in it leaves it locked."""
    lock, classes = threading.RLock(), [tqdm.std.tqdm]
    for cls in classes:
        cls.set_lock(lock)
        classes += cls.__subclasses__()


def _train_here(words: list[str]) -> None:
    assert words[: len(launch.TRAIN)] == launch.TRAIN
    status = main(words[2:])
    if status != 0:
        raise OSError(f"{' '.join(words)}: want exit status 0, got {status}")


def _wait(pid: int, end: float | None) -> int | None:
    last = time.monotonic() + PATIENCE if end is None else end
    while time.monotonic() < last:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return _status(status)
        time.sleep(STEP)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if end is None:
        raise TimeoutError(f"a command does not end within {PATIENCE:.0f} seconds")
    return _status(status)


def _status(status: int) -> int | None:
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else None


def succeed(words: Sequence[str]) -> Done:
    """A command that nothing disturbs.

    Raises:
        RuntimeError: it failed.
    """
    done = command(words)
    if done.status != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.status}\n{done.text}")
    return done


def kill_until_done(
    count: Count,
    kills: int,
    words: Callable[[Path], Sequence[str]],
    folders: Callable[[int], Path],
    equal: Callable[[Path], str | None],
    rng: random.Random,
    longest: float,
    look: Callable[[Path], None] = lambda folder: None,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Runs that are killed at random moments and started again with the same words, until done.

    Args:
        count: gets the kills; all of a run are survived where its result is equal.
        words: of the command, for a folder.
        folders: of the n-th run.
        equal: says what differs from the undisturbed run, None where nothing does.
        longest: seconds, of a run that nothing disturbs.
        look: called after each kill.
        before: called in each process first.
    """
    killed = runs = 0
    while killed < kills:
        folder, in_this = folders(runs), 0
        runs += 1
        while True:
            seconds = rng.uniform(0, longest) if killed < kills else None
            done = command(words(folder), seconds, before)
            if done.status is not None:
                break
            killed, in_this = killed + 1, in_this + 1
            look(folder)
        problem = equal(folder) if done.status == 0 else done.text[-2000:]
        for _ in range(in_this):
            count.add("survived", problem is None, str(problem))
    count.notes["runs"] = count.notes.get("runs", 0) + runs
