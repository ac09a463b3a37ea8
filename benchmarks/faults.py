"""Training, rounds and labelling under faults: how many were survived, stopped, lost.

    python benchmarks/faults.py    # some ten minutes on one core
    python benchmarks/faults.py --quick    # as in the tests

survived: the result equals that of the undisturbed run to the bit. stopped: one line says what is
wrong, and what was there is unharmed. lost: neither, or a row that is missing or there twice.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the package need not be installed
os.environ["OMP_NUM_THREADS"] = "1"  # no threads before a fork
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from faulty import files, judging, kills  # noqa: E402
from faulty.processes import Count  # noqa: E402

from stepkto_kernels.bench.environment import environment  # noqa: E402

RESULT = ROOT / "benchmarks/results/faults.json"


class Amount(NamedTuple):
    """How many faults of each kind.

    kills: of each command. damages: of a checkpoint's files, None for each file in every way.
    sizes: where the disk is full, in bytes. corruptions: of a line, of `lines`. samples: for the
    judge.
    """

    kills: int
    damages: int | None
    sizes: list[int]
    corruptions: list[str]
    lines: int
    samples: int


SIZES = [10_000, 60_000, 200_000, 360_000, 500_000, 700_000]
FULL = Amount(50, None, SIZES, list(files.CORRUPTIONS), 100_000, 1000)
QUICK = Amount(2, 3, [100_000, 500_000], ["cut in half", "no end of line"], 2000, 100)

FAULTS: dict[str, Callable[[Path, Path, Amount], Count]] = {
    "SIGKILL of stepkto train": lambda i, f, n: kills.kill_training(i, f, n.kills),
    "SIGKILL of stepkto iterate": lambda i, f, n: kills.kill_rounds(i, f, n.kills),
    "checkpoint file damaged": lambda i, f, n: files.damage_checkpoints(i, f, n.damages),
    "checkpoint of another training": lambda i, f, n: files.other_trainings(i, f),
    "disk full": lambda i, f, n: files.fill_disks(i, f, n.sizes),
    "corrupt line": lambda i, f, n: files.corrupt_lines(i, f, n.corruptions, n.lines),
    "judge fails, SIGKILL of stepkto label": lambda i, f, n: judging.fail_calls(
        f, n.samples, n.kills
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few of each, as in the tests")
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON file")
    args = parser.parse_args()
    amount = QUICK if args.quick else FULL
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch) / "inputs"
        inputs.mkdir()
        kills.make_inputs(inputs)
        for number, name in enumerate(args.only):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            start = time.monotonic()
            found[name] = FAULTS[name](inputs, folder, amount).as_dict()
            found[name]["seconds"] = round(time.monotonic() - start, 1)
            print(name, json.dumps(found[name]), flush=True)
            problems = [text.replace(scratch, "") for text in found[name]["problems"]]
            found[name]["problems"] = sorted(set(problems))
    result = {"environment": environment("cpu", "python benchmarks/faults.py"), "faults": found}
    args.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if any(each["lost"] for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
