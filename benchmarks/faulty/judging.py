"""Labelling by a judge whose endpoint fails a fifth of all calls, killed at random moments too."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faulty.files import label_words, write_samples
from faulty.judge_server import FAILURES, Server
from faulty.processes import Count, command, kill_until_done
from stepkto_kernels import files
from stepkto_kernels.training.openai_client import ChatClient

SHARE = 0.2  # of the calls
KINDS = [*FAILURES, "slow headers", (429, "1")]
HANG = 2.0  # seconds, longer than the client waits


@contextmanager
def serve(share: float, port_file: Path, seed: int = 0) -> Iterator[Callable[[], dict[str, Any]]]:
    """A judge in a process of its own; gives what asks for its counts."""
    pid = os.fork()
    if pid == 0:
        try:
            rng = random.Random(seed)
            fail = lambda name, times: rng.choice(KINDS) if rng.random() < share else None
            server = Server(fail)
            server.hang = HANG
            files.write_text(port_file, server.url)
            signal.pause()
        finally:
            os._exit(0)
    try:
        while not port_file.exists():
            time.sleep(0.01)
        url = port_file.read_text()

        def counts() -> dict[str, Any]:
            with urllib.request.urlopen(url, timeout=60) as reply:
                found: dict[str, Any] = json.load(reply)
                return found

        yield counts
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        port_file.unlink(missing_ok=True)


def hurry() -> None:
    """Retries after hundredths of a second, which no flag asks for."""
    defaults = ChatClient.__init__.__kwdefaults__
    assert defaults is not None
    defaults["backoff"] = 0.01


def judge_words(folder: Path, samples: Path, output: Path, port_file: Path) -> list[str]:
    words = [*label_words(folder, samples, output), "--process", "judge", "--judge-model", "m"]
    words += ["--judge-url", port_file.read_text(), "--judge-key-env", "none"]
    words += ["--judge-timeout", "1", "--judge-concurrency", "16", "--chunk", "32"]
    return [*words, "--judge-retries", "8", "--judge-attempts", "8"]


def fail_calls(folder: Path, samples: int, kills: int = 0, seed: int = 0) -> Count:
    """Every failed call is a fault, and every kill; the labels have to be those of a good judge.

    Where nothing is killed no verdict may be paid for twice.
    """
    count, file, port = Count(), write_samples(folder, samples), folder / "url"
    whole = folder / "whole.jsonl"
    with serve(0.0, port):
        done = command(judge_words(folder, file, whole, port), before=hurry)
        assert done.status == 0, done.text
    settings = {"share of calls": SHARE, "samples": samples}
    with serve(SHARE, port, seed) as counts:
        out = folder / "labelled.jsonl"
        done = command(judge_words(folder, file, out, port), before=hurry)
        problem = same_labels(out, whole, samples) if done.status == 0 else done.text[-2000:]
        found = counts()
        paid = found["calls"] - found["failed"]
        if problem is None and paid != samples:
            problem = f"{paid} verdicts were paid for"
        for _ in range(found["failed"]):
            count.add("survived", problem is None, str(problem))
        count.notes |= settings | {"calls": found["calls"], "failed calls": found["failed"]}
        if kills:
            kill_until_done(
                count,
                kills,
                lambda run: judge_words(folder, file, run, port),
                lambda n: folder / f"killed_{n}.jsonl",
                lambda run: same_labels(run, whole, samples),
                random.Random(f"{seed} judge"),
                done.seconds,
                before=hurry,
            )
            count.notes["kills"] = kills
    return count


def same_labels(path: Path, whole: Path, samples: int) -> str | None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keys = {(row["problem_id"], row["sample"]) for row in rows}
    if len(rows) != samples or len(keys) != samples:
        return f"{len(keys)} samples in {len(rows)} rows"
    return None if path.read_bytes() == whole.read_bytes() else "labels differ"
