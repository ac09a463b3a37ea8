"""Everything that wants a GPU, in one visit of under ten minutes.

python benchmarks/gpu_visit.py                          # tests, then benchmarks
python benchmarks/gpu_visit.py --parts tests head       # only these
python benchmarks/gpu_visit.py --parts sanitize         # compute-sanitizer over a few tests

Each part is a process with a time limit. One that fails or is cut off does not keep the next from
running; the exit status is 1 then. Everything goes under $STEPKTO_GPU_OUT (default out/gpu):
junit.xml, the JSON and PNG of every suite, tuned.json of the part tune, log.txt with all output.
A short table comes last.
Needs torch and pytest beside this checkout, nothing installed and no network.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed

from stepkto_kernels.training.report import markdown_table  # noqa: E402

LIMIT = 540  # seconds
GRACE = 5.0  # seconds between asking a part to end and ending it
PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "-q")
BENCH = (PYTHON, "-m", "stepkto_kernels.cli", "bench", "--device", "cuda", "--output", "{out}")
WIDE, NARROW = "8192x4096x131072", "8192x2048x131072"


@dataclass(frozen=True)
class Part:
    """{out} in a command is the folder that everything is written to."""

    command: tuple[str, ...]
    seconds: int  # its share of the limit
    env: dict[str, str] = field(default_factory=dict)
    needs: str | None = None  # a program without which it cannot run


PARTS = {
    "doctor": Part((PYTHON, "-m", "stepkto_kernels.cli", "doctor"), 20),
    "tests": Part((*PYTEST, "--junitxml", "{out}/junit.xml"), 210),
    "head": Part((*BENCH, "--suite", "head", "--shapes", WIDE, NARROW), 160),
    "loss": Part((*BENCH, "--suite", "loss", "--shapes", WIDE, "--repeats", "3"), 90),
    "segments": Part((*BENCH, "--suite", "segments"), 40),
    # on request
    "shapes": Part((*BENCH, "--suite", "head", "--no-memory", "--output", "{out}/shapes"), 300),
    "memory": Part((*BENCH, "--suite", "memory"), 300),
    "accuracy": Part((*BENCH, "--suite", "accuracy"), 120),
    "tune": Part(
        (PYTHON, "-m", "stepkto_kernels.cli", "tune", "--output", "{out}/tuned.json")
        + ("--shapes", WIDE, NARROW),
        300,
    ),
    "sanitize": Part(
        ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *PYTEST, "-x")
        + ("-k", "dispatch_on_a_gpu or on_a_gpu and bf16"),
        LIMIT,
        # or torch hands out parts of large blocks, and reading past one is not out of bounds
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        needs="compute-sanitizer",
    ),
}
USUAL = ("doctor", "tests", "head", "loss", "segments")


def allowance(shares: Sequence[float], left: float) -> float:
    """Seconds for the first of the parts with these shares, of which the others need theirs.

    What earlier parts did not use is the next one's; where too little is left for all, everybody
    gets in proportion to the share.
    """
    return max(left - sum(shares[1:]), left * shares[0] / sum(shares))


class Log:
    """Lines on the terminal and in a file."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str) -> None:
        for stream in (sys.stdout, self.file):
            stream.write(text)
            stream.flush()


def run_part(part: Part, seconds: float, out: pathlib.Path, log: Log) -> str:
    """Run it for so long at most. Returns "ok", or what happened."""
    if part.needs and shutil.which(part.needs) is None:
        return f"not run: {part.needs} is not on the PATH (it comes with the CUDA toolkit)"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [word.replace("{out}", str(out)) for word in part.command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **part.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own, so that its children end with it
    )
    assert process.stdout is not None
    lines: Iterable[str] = process.stdout
    reader = threading.Thread(target=lambda: [log.write(line) for line in lines], daemon=True)
    reader.start()
    try:
        status = process.wait(seconds)
        result = "ok" if status == 0 else f"failed: exit status {status}"
    except subprocess.TimeoutExpired:
        result = f"cut off after {seconds:.0f} s"
    except BaseException:
        _end(process)
        raise
    _end(process)
    reader.join(GRACE)
    return result


def _end(process: subprocess.Popen[str]) -> None:
    """End what is left of a part: an interrupt first, so that pytest still writes its report."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run_parts(
    names: Sequence[str], parts: dict[str, Part], limit: float, out: pathlib.Path, log: Log
) -> dict[str, str]:
    """Run the parts in this order. Returns name -> "ok" or what happened, with the seconds."""
    begin = time.monotonic()
    results = {}
    for i, name in enumerate(names):
        left = limit - (time.monotonic() - begin)
        seconds = allowance([parts[n].seconds for n in names[i:]], left)
        if seconds <= 0:
            results[name] = "not run: no time left"
            continue
        log.write(f"\n==== {name}, at most {seconds:.0f} s\n")
        start = time.monotonic()
        try:
            result = run_part(parts[name], seconds, out, log)
        except OSError as error:
            result = f"failed: {error}"
        log.write(f"==== {name}: {result}, {time.monotonic() - start:.0f} s\n")
        results[name] = result
    return results


def read_rows(out: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of the heads and losses that were written there."""
    files = [file for suite in ("head", "loss") for file in out.rglob(f"{suite}_cuda.json")]
    return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For each path and shape our fastest row beside the fastest peer; then what went wrong."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        size = f"{row['N']}x{row['H']}x{row['V']}"
        groups.setdefault((row["path"], size, row["dtype"]), []).append(row)
    lines, wrong = [], []
    for (path, size, dtype), here in groups.items():
        timed = sorted((r for r in here if r["ms_best"]), key=lambda r: r["ms_best"])
        ours = next((r for r in timed if r["name"] == "ours"), None)
        peer = next((r for r in timed if r["name"] not in ("ours", "gemm")), None)
        best = "-" if peer is None else f"{peer['who']} {peer['ms_best']:.2f} ms"
        if ours is None:
            lines.append([path, f"{size} {dtype}", "-", "-", "-", "-", "-", best])
        else:
            lines.append(
                [
                    path,
                    f"{size} {dtype}",
                    f"{ours['who'].removeprefix('stepkto_kernels ')}, {ours['backend']}",
                    _cell(ours["ms_best"], ".2f"),
                    _cell(ours["ratio_own"], ".3f"),
                    _cell(ours.get("of_floor"), ".3f"),
                    _cell(ours["extra_mib"], ".0f"),
                    best,
                ]
            )
        for row in here:
            if row["status"] != "ok":
                wrong.append(f"{path} {size} {row['who']}/{row['backend']}: {row['status']}\n")
    header = ["path", "shape", "ours", "ms", "ratio", "of_floor", "extra MiB", "best peer"]
    return markdown_table(header, lines) + "".join(wrong)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="tests and benchmarks on a GPU, in one visit")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        default=list(USUAL),
        metavar="PART",
        help=f"some of {', '.join(PARTS)}; default {' '.join(USUAL)}",
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds (default {LIMIT})")
    args = parser.parse_args(argv)
    out = pathlib.Path(os.environ.get("STEPKTO_GPU_OUT") or ROOT / "out/gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.rglob("*_cuda.json"), *out.rglob("*_cuda.png"), out / "junit.xml"):
        old.unlink(missing_ok=True)  # the table is of this visit
    with open(out / "log.txt", "w", encoding="utf-8") as file:
        log = Log(file)
        results = run_parts(list(dict.fromkeys(args.parts)), PARTS, args.limit, out, log)
        log.write("\n" + "".join(f"{name}: {result}\n" for name, result in results.items()))
        rows = read_rows(out)
        if rows:
            log.write("\nratio: time over the bare GEMM of the path's own units\n")
            log.write(table(rows))
    return int(any(result != "ok" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
