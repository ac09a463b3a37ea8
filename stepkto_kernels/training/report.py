"""Tables and plots of a training run. Plots are PNG and need matplotlib (pip extra `train`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepkto_kernels import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of metrics of the process level, and of those of the outcome level that need one to be told from
# the total ("loss", "outcome_loss", "step/loss").
STEP_PREFIX, OUTCOME_PREFIX = "step/", "outcome_"


def percent(value: float) -> str:
    """A share in [0, 1] as a percentage with one decimal; "-" for NaN, a share of nothing."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, padded so that it reads as plain text too; first column left, others right.

    Raises:
        ValueError: a row is not as long as the header.
    """
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    for i, row in enumerate(cells[1:]):
        checks.require(len(row) == len(header), f"rows[{i}]", f"{len(header)} cells", len(row))
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(aligned) + " |\n"

    rule = [
        "-" * width if column == 0 else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    return "".join(map(line, [cells[0], rule, *cells[1:]]))


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A page with its tables written between `<!-- begin: name -->` and `<!-- end: name -->`.

    Raises:
        ValueError: it lacks the marks of a table.
    """
    for name, table in tables.items():
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        marks = f"the marks {begin.strip()} and {end}"
        checks.require(bool(found and closed), "text", marks, "neither or one")
        text = before + begin + table + end + after
    return text


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, blank lines left out.

    Raises:
        ValueError: a line is no JSON object; the message names file and line.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: want a JSON object, got {error}") from None
        checks.require(
            isinstance(record, dict),
            f"{path}, line {number}",
            "a JSON object",
            type(record).__name__,
        )
        records.append(record)
    return records


def plot_training_curves(
    metrics_path: str | Path, png_path: str | Path, *, x: str = "step", title: str = ""
) -> None:
    """Plot every numeric metric of a JSON-lines file over `x`, one panel for each name.

    The two levels of Step-KTO share a panel: `step/name` and `outcome_name`, or else `name`.
    Records without `x` (a summary, say) are left out, and so are values that are not finite.

    Raises:
        ValueError: no record has `x` and a number besides it.
        ImportError: matplotlib is missing.
    """
    records = [r for r in read_metrics(metrics_path) if _is_number(r.get(x))]
    names = {k for r in records for k, v in r.items() if k not in (x, "epoch") and _is_number(v)}
    checks.require(bool(names), "metrics_path", f"lines with {x!r} and other numbers", metrics_path)
    panels = _panels(names)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _new_figure(4.2 * columns, 2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (panel, lines) in zip(axes, panels.items(), strict=False):
        for name, label in lines.items():
            points = [(r[x], r[name]) for r in records if _is_number(r.get(name))]
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
        if any(lines.values()):
            axis.legend(fontsize=7)
        axis.set_title(panel, fontsize=9)
        axis.set_xlabel(x, fontsize=7)
        axis.tick_params(labelsize=7)
        _tidy(axis)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    _save(figure, png_path, title)


def _panels(names: set[str]) -> dict[str, dict[str, str]]:
    """Panel title -> {metric name: label of its line}, titles sorted. "" is no label."""
    panels: dict[str, dict[str, str]] = {}
    paired: set[str] = set()
    for name in sorted(names):
        if name.startswith(STEP_PREFIX):
            what = name.removeprefix(STEP_PREFIX)
            twin = OUTCOME_PREFIX + what if OUTCOME_PREFIX + what in names else what
            lines = {twin: "outcome"} if twin in names else {}
            panels[f"{what} by level" if twin != what else what] = lines | {name: "steps"}
            paired |= {twin, name}
    for name in names - paired:
        panels[name] = {name: ""}
    return dict(sorted(panels.items()))


def plot_rounds(
    rounds: Mapping[str, Mapping[str, float]],
    png_path: str | Path,
    *,
    series: Mapping[str, str],
    title: str = "",
) -> None:
    """Plot metrics by round, as percentages in one panel.

    Args:
        rounds: round name (M0, M1, ..., in order) -> metric name -> share in [0, 1].
        png_path: where the PNG goes.
        series: metric name -> label; what is drawn, in order.
        title: above the panel.
    Raises:
        ValueError: `rounds` is empty, or a round lacks a metric of `series`.
        ImportError: matplotlib is missing.
    """
    checks.require(bool(rounds), "rounds", "at least one round", "none")
    for name, metrics in rounds.items():
        missing = [key for key in series if key not in metrics]
        checks.require(not missing, f"rounds[{name!r}]", f"metrics {list(series)}", f"no {missing}")
    figure = _new_figure(6.0, 4.0)
    axis = figure.subplots()
    for key, label in series.items():
        values = [100 * metrics[key] for metrics in rounds.values()]
        axis.plot(range(len(values)), values, marker="o", label=label)
        for i, value in enumerate(values):
            if math.isfinite(value):
                axis.annotate(
                    f"{value:.1f}", (i, value), (0, 6), textcoords="offset points", ha="center"
                )
    axis.set_xticks(range(len(rounds)), list(rounds))
    axis.set_ylim(0, 105)
    axis.set_ylabel("%")
    axis.legend()
    _tidy(axis)
    _save(figure, png_path, title)


def _is_number(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def _new_figure(width: float, height: float) -> Figure:
    """A figure of its own with the Agg canvas: pyplot's global state and backend stay untouched."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install 'stepkto_kernels[train]' or matplotlib"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, png_path: str | Path, title: str) -> None:
    if title:
        figure.suptitle(title)
    Path(png_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=130)
