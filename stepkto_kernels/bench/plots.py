"""PNG plots of results; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepkto_kernels.bench.options import Row
from stepkto_kernels.bench.timing import GEMM_UNITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the result of a suite.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    _PLOTS[result["benchmark"]](figure, result["rows"])
    figure.suptitle(f"{result['benchmark']}, {result['device']}", fontsize=10)
    figure.savefig(path, dpi=130)


def _ratios(figure: Figure, rows: list[Row]) -> None:
    """Bars of the time ratio, a panel for each shape and dtype, a group for each path."""
    rows = [row for row in rows if row["name"] != "gemm" and row["ratio"] is not None]
    groups = _grouped(rows, lambda row: f"{row['N']} x {row['H']} x {row['V']}, {row['dtype']}")
    axes = _panels(figure, len(groups), 0.27 * max(map(len, groups.values()), default=1) + 1.2)
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        group = list(reversed(group))
        names = [f"{row['path']}: {_who(row)}" for row in group]
        colors = ["tab:blue" if row["name"] == "ours" else "tab:gray" for row in group]
        places = list(range(len(group)))
        axis.barh(places, [row["ratio"] for row in group], color=colors, height=0.7)
        for place, row in zip(places, group, strict=True):
            axis.plot([row["units"] / GEMM_UNITS] * 2, [place - 0.4, place + 0.4], color="black")
            axis.annotate(f" {row['ratio']:.2f}", (row["ratio"], place), va="center", fontsize=7)
        axis.set_yticks(places, names, fontsize=7)
        axis.set_xlabel("time over the bare GEMM of 3 units; black: the path's own units")
        axis.set_title(title, fontsize=9)
        _tidy(axis)


def _memory(figure: Figure, rows: list[Row]) -> None:
    """Extra memory against N at the largest V, and against V at the largest N."""
    from matplotlib import colormaps

    rows = [row for row in rows if row["extra_mib"] is not None]
    axes = _panels(figure, 2, 5.0)
    for axis, x, other in zip(axes, "NV", "VN", strict=True):
        axis.set_prop_cycle(color=colormaps["tab20"](range(20)))
        largest = max((row[other] for row in rows), default=0)
        lines = _grouped((row for row in rows if row[other] == largest), _memory_label)
        for label, points in lines.items():
            points = sorted(points, key=lambda row: row[x])
            ours = points[0]["name"] == "ours"
            axis.plot(
                [row[x] for row in points],
                [max(row["extra_mib"], 0.1) for row in points],
                marker="o",
                linestyle="-" if ours else "--",
                label=label,
            )
        axis.set_xlabel(f"{x}, {other} = {largest}")
        axis.set_ylabel("MiB beyond inputs and gradients")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.legend(fontsize=6)
        _tidy(axis)


def _segments(figure: Figure, rows: list[Row]) -> None:
    """Milliseconds against N, a panel for each op."""
    groups = _grouped((row for row in rows if row["ms_best"]), lambda row: row["path"])
    for axis, (title, group) in zip(_panels(figure, len(groups), 4.0), groups.items(), strict=True):
        for who, points in _grouped(group, _who).items():
            axis.plot(
                [row["N"] for row in points],
                [row["ms_best"] for row in points],
                marker="o",
                label=who,
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("N, tokens")
        axis.set_ylabel("ms, forward + backward")
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=7)
        _tidy(axis)


def _accuracy(figure: Figure, rows: list[Row]) -> None:
    """Largest error of log-probs and of gradients, a panel for each dtype and shape."""
    rows = [row for row in rows if row["max_dlogp"] is not None]
    groups = _grouped(rows, lambda row: f"{row['N']} x {row['H']} x {row['V']}, {row['dtype']}")
    axes = _panels(figure, len(groups), 0.35 * max(map(len, groups.values()), default=1) + 1.2)
    marks = {"max_dlogp": "o", "dhidden_error": "s", "dweight_error": "^"}
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        group = list(reversed(group))
        places = list(range(len(group)))
        for key, mark in marks.items():
            points = [(row[key], place) for place, row in enumerate(group) if row[key]]
            axis.plot(*zip(*points, strict=True), mark, label=key) if points else None
        axis.set_yticks(places, [f"{row['path']}: {_who(row)}" for row in group], fontsize=7)
        axis.set_xscale("log")
        axis.set_xlabel("error against fp64: nats; relative to the largest element")
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=7)
        _tidy(axis)


_PLOTS: dict[str, Callable[[Figure, list[Row]], None]] = {
    "head": _ratios,
    "loss": _ratios,
    "segments": _segments,
    "memory": _memory,
    "accuracy": _accuracy,
}


def _who(row: Row) -> str:
    return row["who"] if row["backend"] == "-" else f"{row['who']} ({row['backend']})"


def _memory_label(row: Row) -> str:
    if row["name"] != "ours":
        return row["who"]
    return f"{row['path']}, {row['budget_mib']} MiB" if row["budget_mib"] else row["path"]


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _panels(figure: Figure, count: int, height: float) -> list[Axes]:
    figure.set_size_inches(7.5 * max(count, 1), max(height, 3.0))
    return list(figure.subplots(1, max(count, 1), squeeze=False).flatten())[:count]


def _tidy(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
