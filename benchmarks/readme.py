"""Write the tables of README.md from benchmarks/results/*.json.

python benchmarks/readme.py            # rewrites what stands between the begin and end marks
python benchmarks/readme.py --check    # exits with 1 where README.md differs from the results

A result without marks, or a table without its result, is an error; for marks with neither, the
command that measures it is printed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from stepkto_kernels.training.report import markdown_table, percent

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results"

Result = dict[str, Any]


def footer(result: Result) -> str:
    versions = [f"torch {result['torch']}"]
    versions += [f"{name} {version}" for name, version in result["versions"].items()]
    return (
        f"{result['device']}, {result['threads']} threads; {', '.join(versions)}; "
        f"{result['date']}, commit {result['commit']}. `{result['command']}`\n"
    )


def who(row: Result) -> str:
    return row["who"] if row["backend"] == "-" else f"{row['who']}, {row['backend']}"


def shape(row: Result) -> str:
    return f"{row['N']} x {row['H']} x {row['V']}, {row['dtype']}"


def unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def ratio_table(result: Result) -> str:
    """A table for each shape: who by path, time over the bare GEMM and extra MiB."""
    parts = []
    for size in unique(map(shape, result["rows"])):
        rows = [row for row in result["rows"] if shape(row) == size]
        paths = unique(row["path"] for row in rows)
        cells = {(who(row), row["path"]): ratio_cell(row) for row in rows if row["name"] != "gemm"}
        table = [
            [name, *(cells.get((name, path), "") for path in paths)]
            for name in unique(name for name, _ in cells)
        ]
        bare = min(row["ms_best"] for row in rows if row["name"] == "gemm")
        parts.append(markdown_table([size, *paths], table))
        parts.append(f"\nThe bare GEMM of 3 units took {bare / 1000:.3g} s.\n\n")
    return "".join(parts) + footer(result)


def ratio_cell(row: Result) -> str:
    if row["ratio"] is None:
        return row["status"].partition(":")[0]
    memory = "" if row["extra_mib"] is None else f", {max(row['extra_mib'], 0):.0f} MiB"
    return f"{row['ratio']:.2f}{memory}"


def memory_table(result: Result) -> str:
    sizes = unique((row["N"], row["V"]) for row in result["rows"])
    by_mode: dict[str, dict[tuple[int, int], str]] = {}
    for row in result["rows"]:
        label = row["path"] if row["name"] == "ours" else row["who"]
        if row["budget_mib"] is not None:
            label += f", budget {row['budget_mib']} MiB"
        cell = "failed" if row["extra_mib"] is None else f"{max(row['extra_mib'], 0):.0f}"
        by_mode.setdefault(label, {})[row["N"], row["V"]] = cell
    table = markdown_table(
        ["MiB", *(f"N = {N}, V = {V}" for N, V in sizes)],
        [[mode, *(cells.get(size, "") for size in sizes)] for mode, cells in by_mode.items()],
    )
    return f"{table}\n{footer(result)}"


def accuracy_table(result: Result) -> str:
    """The worst of all paths of each contender, by dtype."""
    dtypes = unique(row["dtype"] for row in result["rows"])
    worst: dict[tuple[str, str], tuple[float, float]] = {}
    for row in result["rows"]:
        key = who(row), row["dtype"]
        gradient = max(row["dhidden_error"] or 0, row["dweight_error"] or 0)
        before = worst.get(key, (0.0, 0.0))
        worst[key] = max(before[0], row["max_dlogp"] or 0), max(before[1], gradient)
    rows = []
    for name in unique(name for name, _ in worst):
        cells = [f"{value:.1e}" for dtype in dtypes for value in worst.get((name, dtype), ())]
        rows.append([name, *cells])
    header = ["error", *(f"{dtype} {what}" for dtype in dtypes for what in ("logp", "gradients"))]
    return f"{markdown_table(header, rows)}\n{footer(result)}"


def demo_table(result: Result) -> str:
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


def reproduction_table(result: Result) -> str:
    """M0 and M3 of each method: mean and half of the 95 % interval over seeds."""
    columns = {
        "errors": "step errors in correct solutions",
        "pass@1": "Pass@1",
        "maj@8": "Maj@8",
    }
    names = {"kto": "KTO", "step_kto": "Step-KTO", "rft": "rejection sampling"}
    last = max(row["round"] for row in result["summary"])
    rows = []
    for task in unique(row["task"] for row in result["summary"]):
        found = [row for row in result["summary"] if row["task"] == task]
        for row in [found[0], *(row for row in found if row["round"] == last)]:
            name = names[row["method"]] if row["round"] else "M0"
            cells = [interval_cell(row["metrics"][key]) for key in columns]
            rows.append([f"{task}, {name}", *cells])
    seeds = min(row["seeds"] for row in result["summary"])
    return (
        f"{markdown_table([f'%, after round {last}', *columns.values()], rows)}\n{seeds} seeds.\n"
    )


def interval_cell(values: list[float]) -> str:
    mean, low, high = values
    return f"{percent(mean)} ± {percent((high - low) / 2)}"


def trainer_table(result: Result) -> str:
    """Whole steps: seconds, how often faster than the slowest, memory."""
    slowest = max(row["step_seconds_best"] for row in result["rows"])
    table = markdown_table(
        ["", "s a step", "times as fast", "peak, GB"],
        [
            [
                row["who"],
                f"{row['step_seconds_best']:.1f}",
                f"{slowest / row['step_seconds_best']:.1f}",
                f"{row['peak_mib'] * 2**20 / 1e9:.1f}",
            ]
            for row in result["rows"]
        ],
    )
    return f"{table}\n{footer(result)}"


def trust_table(
    fuzz: Result, faults: Result, sanitize: Result, leaks: Result, matrix: Result
) -> str:
    """What was tried and how it ended, a row a kind."""
    rows = [["random cases against fp64", fuzz["cases"], fuzz["cases"], 0, len(fuzz["failures"])]]
    for name, count in faults["faults"].items():
        rows.append([name, *(count[k] for k in ("injected", "survived", "stopped", "lost"))])
    for row in sanitize["rows"]:
        passed, wrong = outcome(row)
        kind = {"undefined": "UndefinedBehavior"}.get(row["sanitizer"], row["sanitizer"].title())
        name = f"tests under {kind}Sanitizer"
        rows.append([name, passed + wrong, passed, 0, wrong + row["reports"]])
    calls = [*leaks["calls"].values(), *leaks["trainings"].values()]
    grew = sum(bool(case["grew"]) for case in calls)
    rows.append(["is memory flat? ops and trainings", len(calls), len(calls) - grew, 0, grew])
    for row in matrix["rows"]:
        if "left_out" in row:
            rows.append([f"tests {row['leg']}: {row['left_out']}", 0, 0, 0, 0])
            continue
        passed, wrong = outcome(row)
        name = f"tests {row['leg']}" if row["leg"].startswith("with") else f"tests, {row['leg']}"
        rows.append([name, passed + wrong, passed, 0, wrong])
    table = [[name, *(f"{number:,}" for number in numbers)] for name, *numbers in rows]
    parts = [markdown_table(["", "tried", "survived", "stopped", "lost"], table), "\n"]
    for result in (fuzz, faults, sanitize, leaks, matrix):
        found = result["environment"]
        note = f" ({found['note']})" if "note" in found else ""
        parts.append(f"`{found['command']}`: {found['date']}, commit {found['commit']}{note}.\n")
    return "".join(parts) + f"{fuzz['environment']['device']}.\n"


def outcome(row: Result) -> tuple[int, int]:
    """Tests that passed and that did not, of those that were not skipped."""
    wrong = row["failures"] + row["errors"]
    return row["tests"] - row["skipped"] - wrong, wrong


SUITES: dict[str, Callable[[Result], str]] = {
    "head": ratio_table,
    "loss": ratio_table,
    "memory": memory_table,
    "accuracy": accuracy_table,
}
TABLES: dict[str, Callable[..., str]] = {
    f"{suite}_{d}": table for d in ("cpu", "cuda") for suite, table in SUITES.items()
}
TABLES["demo"] = demo_table
TABLES["trainer_cpu"] = trainer_table
TABLES["reproduction"] = reproduction_table
TABLES["trust"] = trust_table
SOURCES = {"trust": ("fuzz", "faults", "sanitize", "leaks", "matrix")}  # else the table's own name


def command(name: str) -> str:
    suite, _, device = name.partition("_")
    if name in SOURCES:
        return " && ".join(f"make {source}" for source in SOURCES[name])
    if not device:
        return "make reproduce" if suite == "reproduction" else "make results"
    if suite == "trainer":
        return "python benchmarks/trainer.py"
    return f"python benchmarks/run.py --suite {suite} --device {device}"


def rewritten(text: str) -> tuple[str, list[str]]:
    """The text with its tables, and what stands in the way of that."""
    problems = []
    for name, table in TABLES.items():
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        marked = begin in text and end in text
        before, _, rest = text.partition(begin)
        old, _, after = rest.partition(end)
        paths = [RESULTS / f"{source}.json" for source in SOURCES.get(name, (name,))]
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            if marked and old:
                problems.append(f"the table {name} has no result; measure it: {command(name)}")
            elif marked:
                print(f"no {', '.join(missing)} yet; measure it: {command(name)}")
        elif not marked:
            problems.append(f"README.md has no marks for {name}; add\n{begin}{end}")
        else:
            results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            text = before + begin + table(*results) + end + after
    return text, problems


def main() -> int:
    parser = argparse.ArgumentParser(description="tables of README.md from the results")
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new, problems = rewritten(old)
    for problem in problems:
        print(problem, file=sys.stderr)
    if args.check:
        return int(new != old or bool(problems))
    README.write_text(new, encoding="utf-8")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
