"""Write the tables of README.md from benchmarks/results/*.json.

python benchmarks/readme.py            # rewrites what stands between the begin and end marks
python benchmarks/readme.py --check    # exits with 1 where README.md differs from the results
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from stepkto_kernels.training.report import markdown_table, percent

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results"


def memory_table(result: dict[str, Any]) -> str:
    sizes = list(dict.fromkeys((row["N"], row["V"]) for row in result["rows"]))
    by_mode: dict[str, list[str]] = {}
    for row in result["rows"]:
        by_mode.setdefault(row["mode"], []).append(f"{row['extra_mib']:.0f}")
    table = markdown_table(
        ["MiB", *(f"N = {N}, V = {V}" for N, V in sizes)],
        [[mode, *cells] for mode, cells in by_mode.items()],
    )
    return (
        f"{table}\n`cached` and `fused` were given a budget of {result['budget_mib']} MiB. "
        f"{result['device']}, torch {result['torch']}, {result['date']}, "
        f"commit {result['commit']}.\n"
    )


def demo_table(result: dict[str, Any]) -> str:
    samples = result["settings"]["samples"]
    columns = {
        "pass@1": "Pass@1",
        f"maj@{samples}": f"Maj@{samples}",
        "step_errors_in_correct": "step errors in correct solutions",
    }
    rows = [
        [name, *(percent(metrics[key]) for key in columns)]
        for name, metrics in result["rounds"].items()
    ]
    problems = result["settings"]["eval_problems"]
    return (
        f"{markdown_table(['%', *columns.values()], rows)}\n"
        f"One seed, {problems} held-out problems, {samples} samples of each.\n"
    )


TABLES = {"memory_cpu": memory_table, "demo": demo_table}


def rewritten(text: str) -> str:
    for name, table in TABLES.items():
        result = json.loads((RESULTS / f"{name}.json").read_text())
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        if begin not in text or end not in text:
            sys.exit(f"README.md has no marks for the table {name}")
        before, _, rest = text.partition(begin)
        text = before + begin + table(result) + end + rest.partition(end)[2]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description="tables of README.md from the results")
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    old = README.read_text()
    new = rewritten(old)
    if args.check:
        return int(new != old)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
