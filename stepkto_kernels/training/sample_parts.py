"""Many processes fill one file of samples: each writes a part of its own, the last one joins them.

The parts of OUTPUT are OUTPUT.rank0, OUTPUT.rank1, ... beside it. No process waits for another, and
a part stays until all are complete: after a kill any number of processes can go on.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from stepkto_kernels import checks, files
from stepkto_kernels.training.records import Problem
from stepkto_kernels.training.run_folder import write_rows
from stepkto_kernels.training.sample import Key, make_sample

Row = dict[str, Any]


class Ranks(NamedTuple):
    """This process among those of one run."""

    rank: int
    world_size: int
    local_rank: int


def ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """What accelerate launch and torchrun say; 0 of 1 without them.

    Raises:
        ValueError: a variable is no number.
    """
    found = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = environment.get(name, default)
        checks.require(text.isdigit(), name, "a number in this environment variable", repr(text))
        found.append(int(text))
    return Ranks(*found)


def part_path(output: Path, rank: int) -> Path:
    return output.with_name(f"{output.name}.rank{rank}")


def parts(output: Path) -> list[Path]:
    """The parts that are there, with or without rows."""
    found = output.parent.glob(f"{output.name}.rank*")
    return sorted(path for path in found if path.name.rpartition(".rank")[2].isdigit())


@contextmanager
def lock(output: Path) -> Iterator[None]:
    """One process at a time looks at all the parts, or joins them."""
    with open(output.with_name(output.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed
        yield


def rows_of(paths: Sequence[Path]) -> list[Row]:
    """Rows of files that others may be writing: a last line that is not complete is left out."""
    rows = []
    for path in paths:
        content = path.read_bytes() if path.exists() else b""
        rows += [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    return rows


def key(row: Row) -> Key:
    """Raises ValueError where the row is no sample."""
    return make_sample(row, "samples").key


def join(output: Path, problems: Sequence[Problem], num_samples: int) -> bool:
    """Write the output in the problems' order and remove the parts, where they are complete.

    Returns:
        False where samples are missing, and then nothing is changed.
    Raises:
        OSError: the output cannot be written.
    """
    wanted = [(problem.id, k) for problem in problems for k in range(num_samples)]
    with lock(output):
        old = parts(output)
        rows = {key(row): row for row in rows_of([output, *old])}
        if any(each not in rows for each in wanted):
            return False
        with files.replacing(output) as temporary:
            write_rows(temporary, (rows[each] for each in wanted))
        for path in old:
            path.unlink()
            path.with_name(path.name + ".settings.json").unlink(missing_ok=True)
        return True
