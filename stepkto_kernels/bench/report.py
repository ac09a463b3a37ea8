"""Rows on the terminal as they come, and the JSON beside the plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stepkto_kernels import files
from stepkto_kernels.bench.options import Row


class Column(NamedTuple):
    title: str
    key: str
    width: int
    form: str = ""  # format of a number


_HEAD = [
    Column("path", "path", -11),
    Column("who", "who", -26),
    Column("backend", "backend", -7),
    Column("dtype", "dtype", -8),
    Column("N", "N", 6),
    Column("H", "H", 5),
    Column("V", "V", 7),
]
_MS = [Column("ms best", "ms_best", 10, ".1f"), Column("median", "ms_median", 10, ".1f")]
_RATIOS = [
    Column("/3 units", "ratio", 8, ".3f"),
    Column("units", "units", 5, "d"),
    Column("/own", "ratio_own", 6, ".3f"),
    Column("/floor", "of_floor", 6, ".3f"),
    Column("extra MiB", "extra_mib", 9, ".0f"),
]
_GRADIENTS = [
    Column("dhidden", "dhidden_error", 8, ".1e"),
    Column("dweight", "dweight_error", 8, ".1e"),
]
_MAX_DLOGP = Column("max dlogp", "max_dlogp", 9, ".1e")
_STATUS = Column("status", "status", -2)
COLUMNS: dict[str, list[Column]] = {
    "head": [*_HEAD, *_MS, *_RATIOS, _MAX_DLOGP, _STATUS],
    "loss": [*_HEAD, *_MS, *_RATIOS, Column("dloss", "loss_error", 8, ".1e"), _STATUS],
    "segments": [
        Column("path", "path", -14),
        Column("who", "who", -16),
        Column("N", "N", 7),
        Column("ms best", "ms_best", 9, ".3f"),
        Column("median", "ms_median", 9, ".3f"),
        Column("/plain", "ratio_to_plain", 7, ".3f"),
        Column("GB/s", "gb_s", 8, ".1f"),
        Column("/floor", "of_floor", 8, ".1f"),
        _STATUS,
    ],
    "memory": [
        *_HEAD,
        Column("budget", "budget_mib", 7, ".0f"),
        Column("extra MiB", "extra_mib", 9, ".1f"),
        Column("planned", "planned_mib", 8, ".1f"),
        _STATUS,
    ],
    "accuracy": [
        *_HEAD,
        _MAX_DLOGP,
        Column("mean", "mean_dlogp", 8, ".1e"),
        *_GRADIENTS,
        _STATUS,
    ],
}


def header(suite: str) -> str:
    return _line(COLUMNS[suite], [column.title for column in COLUMNS[suite]])


def line(row: Row) -> str:
    columns = COLUMNS[row["suite"]]
    return _line(columns, [cell(row.get(column.key), column.form) for column in columns])


def cell(value: Any, form: str = "") -> str:
    """A number in `form`, "-" for None."""
    return "-" if value is None else format(value, form)


def _line(columns: Sequence[Column], cells: Sequence[str]) -> str:
    aligned = [
        text.ljust(-column.width) if column.width < 0 else text.rjust(column.width)
        for column, text in zip(columns, cells, strict=True)
    ]
    return "  ".join(aligned).rstrip()


def write_json(result: dict[str, Any], path: Path) -> None:
    rounded = {**result, "rows": [_rounded(row) for row in result["rows"]]}
    files.write_text(path, json.dumps(rounded, indent=1, allow_nan=False) + "\n")


def _rounded(row: Row) -> Row:
    """Five significant digits, more are noise; None for what JSON has no word for."""

    def short(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return float(f"{value:.5g}") if math.isfinite(value) else None

    return {key: short(value) for key, value in row.items()}


def summary(rows: Sequence[Row]) -> str:
    """For each shape and path of head or loss, how much longer each peer takes than our fastest."""
    lines = []
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["ratio"] is not None:
            size = f"{row['N']}x{row['H']}x{row['V']} {row['dtype']} {row['path']}"
            groups.setdefault(size, []).append(row)
    for size, here in groups.items():
        ours = min((r["ratio"] for r in here if r["name"] == "ours"), default=None)
        peers = [r for r in here if r["name"] not in ("ours", "gemm")]
        if ours is not None and peers:
            times = ", ".join(f"{r['who']} {r['ratio'] / ours:.2f}x" for r in peers)
            lines.append(f"{size}: ours {ours:.3f} of 3 units; {times}")
    return "\n".join(lines)
