"""The reproduction's results: comparisons over seeds, JSON, Markdown tables and the plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from stepkto_kernels.bench.environment import environment
from stepkto_kernels.training.report import markdown_table, percent, with_tables

from . import statistics, study
from .study import Row

NAMES = {"kto": "KTO", "step_kto": "Step-KTO", "rft": "rejection sampling"}
COLOURS = {"kto": "tab:orange", "step_kto": "tab:blue", "rft": "tab:gray"}
SHOWN = ("errors", "errors_greedy", "pass@1", "maj@8", "accuracy", "step_accuracy", "format")
POINTS = 100  # percentage points of a share
Rates = dict[tuple[str, str], float]


def write(rows: Sequence[Row], rates: Rates, size: study.Size, result: Path) -> None:
    """Write JSON, plot and the page docs/REPRODUCTION.md's tables from the runs that are there."""
    found = collect(rows, rates, size)
    result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, result.with_suffix(".png"))
    page = Path(__file__).resolve().parents[2] / "docs/REPRODUCTION.md"
    if result.parent.parent == page.parent.parent / "benchmarks":
        text = page.read_text(encoding="utf-8")
        page.write_text(with_tables(text, tables(found)), encoding="utf-8")


def collect(rows: Sequence[Row], rates: Rates, size: study.Size) -> dict[str, Any]:
    """All that is reported; JSON of the result."""
    tasks = list(dict.fromkeys(task for task, _ in rates))
    by_key = {study.key(row): row for row in rows}
    wanted = study.reported_runs(tasks, rates)
    reported = [by_key[study.key(run)] for run in wanted if study.key(run) in by_key]
    controls = study.control_runs(rates) if (study.CONTROL_TASK, "step_kto") in rates else []
    control_rows = [by_key[study.key(run)] for run in controls if study.key(run) in by_key]
    comparisons = [compare(reported, task) for task in tasks]
    adjust(comparisons)
    return {
        "benchmark": "reproduction",
        **environment("cpu", "make reproduce"),
        "threads": 1,
        "size": asdict(size),
        "missing_runs": len(wanted) - len(reported),
        "rates": [{"task": t, "method": m, "rate": rate} for (t, m), rate in rates.items()],
        "tuning": study.tuning_table(rows),
        "summary": summary(reported),
        "comparisons": comparisons,
        "controls": [control(group) for group in _grouped(control_rows, "method", "rate")],
        "runs": [_slim(row) for row in reported + control_rows],
    }


def _slim(row: Row) -> Row:
    rounded = lambda values: {
        name: rounded(value) if isinstance(value, dict) else round(value, 5)
        for name, value in values.items()
    }
    rounds = [rounded(each) for each in row["rounds"]]
    return {name: row[name] for name in ("task", "method", "rate", "seed", "seconds")} | {
        "rounds": rounds
    }


def _grouped(rows: Iterable[Row], *names: str) -> list[list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.values())


def summary(rows: Sequence[Row]) -> list[Row]:
    """Mean and 95 % interval over seeds of every metric, by task, method and round."""
    found = []
    for group in _grouped(rows, "task", "method"):
        for number in range(study.ROUNDS + 1):
            metrics = {
                name: statistics.mean_interval([row["rounds"][number][name] for row in group])
                for name in SHOWN
            }
            head = {name: group[0][name] for name in ("task", "method", "rate")}
            found.append(head | {"round": number, "seeds": len(group), "metrics": metrics})
    return found


def compare(rows: Sequence[Row], task: str) -> Row:
    """Step-KTO less KTO, seed by seed."""
    by_seed = {
        method: {r["seed"]: r["rounds"] for r in rows if (r["task"], r["method"]) == (task, method)}
        for method in ("kto", "step_kto")
    }
    seeds = sorted(by_seed["kto"].keys() & by_seed["step_kto"].keys())
    pairs = [(by_seed["step_kto"][seed], by_seed["kto"][seed]) for seed in seeds]
    by_round = []
    for number in range(1, study.ROUNDS + 1):
        differences = {
            name: [ours[number][name] - other[number][name] for ours, other in pairs]
            for name in ("errors", "pass@1", "accuracy")
        }
        tested = {name: test(values) for name, values in differences.items()}
        by_round.append({"round": number} | tested)
    trajectory = lambda rounds: [(r["accuracy"], r["errors"]) for r in rounds]
    matched = [statistics.matched_difference(trajectory(a), trajectory(b)) for a, b in pairs]
    kept = [value for value in matched if value is not None]
    return {"task": task, "seeds": len(seeds), "rounds": by_round, "matched": test(kept)}


def test(differences: Sequence[float]) -> Row:
    """Mean, interval and both p-values of paired differences."""
    if len(differences) < 2:
        return {"n": len(differences)}
    mean, low, high = statistics.mean_interval(differences)
    t, p = statistics.paired_t(differences)
    flips = statistics.sign_flip(differences)
    return {"n": len(differences), "mean": mean, "low": low, "high": high, "t": t, "p": p,
            "p_sign_flip": flips}  # fmt: skip


def adjust(comparisons: Sequence[Row]) -> None:
    """Holm over H1 (errors at M3) and H2 (matched accuracy) of all tasks."""
    tests = [c["rounds"][-1]["errors"] for c in comparisons] + [c["matched"] for c in comparisons]
    tests = [each for each in tests if not math.isnan(each.get("p", math.nan))]
    for each, p in zip(tests, statistics.holm([each["p"] for each in tests]), strict=True):
        each["p_holm"] = p


def control(group: Sequence[Row]) -> Row:
    """Means of M3 of one control, and the seeds' interval of the errors."""
    last = [row["rounds"][-1] for row in group]
    means = {name: fmean(each[name] for each in last) for name in SHOWN}
    errors = statistics.mean_interval([each["errors"] for each in last])
    head = {name: group[0][name] for name in ("task", "method", "rate")}
    return head | {"seeds": len(group), "metrics": means, "errors_interval": errors}


def tables(found: Row) -> dict[str, str]:
    """The tables of docs/REPRODUCTION.md by name."""
    page = {"tuning": tuning_table(found), "controls": control_table(found)}
    page["comparisons"] = comparison_table(found)
    for task in dict.fromkeys(row["task"] for row in found["summary"]):
        page[f"rounds {task}"] = round_table(found, task)
    return page


def spread(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{percent(mean)} ± {percent((high - low) / 2)}"


def round_table(found: Row, task: str) -> str:
    rows = [row for row in found["summary"] if row["task"] == task]
    first = next(row for row in rows if row["round"] == 0)
    body = [["M0", ""] + [spread(first["metrics"][name]) for name in COLUMNS]]
    for row in rows:
        if row["round"] > 0:
            cells = [spread(row["metrics"][name]) for name in COLUMNS]
            body.append([f"{NAMES[row['method']]} M{row['round']}", f"{row['rate']:g}", *cells])
    return markdown_table(["model", "learning rate", *COLUMNS.values()], body)


COLUMNS = {
    "errors": "errors in correct, sampled",
    "errors_greedy": "the same, greedy",
    "pass@1": "Pass@1",
    "maj@8": "Maj@8",
    "accuracy": "accuracy, sampled",
    "step_accuracy": "step accuracy",
}


def comparison_table(found: Row) -> str:
    body = []
    for comparison in found["comparisons"]:
        task = comparison["task"]
        for each in comparison["rounds"]:
            for name, told in (("errors", "errors in correct"), ("pass@1", "Pass@1")):
                body.append([f"{task} M{each['round']}: {told}", *test_cells(each[name])])
        body.append([f"{task}: errors at matched accuracy", *test_cells(comparison["matched"])])
    header = ["Step-KTO less KTO, points", "mean", "95 % interval", "t", "p", "p, sign flips",
              "p, Holm", "seeds"]  # fmt: skip
    return markdown_table(header, body)


def test_cells(each: Row) -> list[str]:
    if "mean" not in each:
        return ["-"] * 6 + [str(each["n"])]
    p = lambda value: f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"
    interval = f"{percent(each['low'])} to {percent(each['high'])}"
    holm = p(each["p_holm"]) if "p_holm" in each else ""
    return [percent(each["mean"]), interval, f"{each['t']:.1f}", p(each["p"]),
            p(each["p_sign_flip"]), holm, str(each["n"])]  # fmt: skip


def tuning_table(found: Row) -> str:
    chosen = {(r["task"], r["method"], r["rate"]) for r in found["rates"]}
    body = []
    for row in found["tuning"]:
        mark = "chosen" if (row["task"], row["method"], row["rate"]) in chosen else ""
        name = f"{row['task']}, {NAMES[row['method']]}, {row['rate']:g}"
        body.append([name, *(percent(row[k]) for k in ("pass@1", "errors", "format")), mark])
    return markdown_table(["at M3", "Pass@1", "errors in correct", "least format", ""], body)


def control_table(found: Row) -> str:
    body = []
    for row in found["controls"]:
        name = f"{NAMES.get(row['method'], row['method'])}, {row['rate']:g}"
        cells = [percent(row["metrics"][key]) for key in ("pass@1", "maj@8", "format")]
        body.append([name, spread(row["errors_interval"]), *cells, row["seeds"]])
    header = ["at M3", "errors in correct, sampled", "Pass@1", "Maj@8", "format", "seeds"]
    return markdown_table(header, body)


def plot(found: Row, path: Path) -> None:
    """Errors in correct solutions against accuracy: a curve a method, a panel a task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in found["summary"]))
    figure = Figure(figsize=(5.2 * max(1, len(tasks)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(tasks)), squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=False):
        for method, name in NAMES.items():
            rows = [r for r in found["summary"] if (r["task"], r["method"]) == (task, method)]
            if rows:
                _curve(axis, [row["metrics"] for row in rows], name, COLOURS[method])
        axis.set_title(f"{task}, M0 to M{study.ROUNDS}", fontsize=10)
        axis.set_xlabel("right answers among samples, %")
        axis.set_ylabel("errors in correct solutions, %")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=130)


def _curve(axis: Any, metrics: Sequence[Row], name: str, colour: str) -> None:
    columns = {}
    for key in ("accuracy", "errors"):
        means = [POINTS * each[key][0] for each in metrics]
        halves = [POINTS * (each[key][2] - each[key][1]) / 2 for each in metrics]
        columns[key] = means, [0.0 if math.isnan(half) else half for half in halves]
    (x, dx), (y, dy) = columns["accuracy"], columns["errors"]
    axis.errorbar(x, y, xerr=dx, yerr=dy, marker="o", label=name, color=colour, capsize=2)
    for number in range(1, len(x)):
        axis.annotate(f"M{number}", (x[number], y[number]), (4, 4), textcoords="offset points",
                      fontsize=7, color=colour)  # fmt: skip
