"""Tables, and plots that are looked at through matplotlib's own objects."""

from __future__ import annotations

import builtins
import json
import math

import pytest

from stepkto_kernels.training import report


def test_percent():
    assert [report.percent(x) for x in (0.0, 0.1234, 1.0, math.nan)] == [
        "0.0",
        "12.3",
        "100.0",
        "-",
    ]


def test_markdown_table():
    table = report.markdown_table(["model", "a"], [["M0", 1], ["a|b", "12345"]])
    assert table == (
        "| model |     a |\n"
        "| ----- | ----: |\n"
        "| M0    |     1 |\n"
        "| a\\|b  | 12345 |\n"
    )  # fmt: skip
    assert report.markdown_table(["a"], []) == "| a   |\n| --- |\n"


def test_markdown_table_refuses_ragged_rows():
    with pytest.raises(ValueError, match=r"rows\[1\]: want 2 cells, got 1"):
        report.markdown_table(["a", "b"], [[1, 2], [1]])


def write_lines(path, records) -> None:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")


def test_read_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": 1}, {"step": 2, "loss": 0.5}])
    assert report.read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 0.5}]


@pytest.mark.parametrize("line", ["{", "[1]", "3"])
def test_read_metrics_names_file_and_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: want a JSON object, got"):
        report.read_metrics(path)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    kept = []
    save = report._save

    def keep(figure, png_path, title):
        kept.append(figure)
        save(figure, png_path, title)

    monkeypatch.setattr(report, "_save", keep)
    return kept


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def lines_by_panel(figure) -> dict[str, dict[str, list[tuple[float, float]]]]:
    return {
        axis.get_title(): {
            line.get_label(): list(map(tuple, line.get_xydata())) for line in axis.get_lines()
        }
        for axis in figure.axes
        if axis.get_lines()
    }


def test_training_curves(tmp_path, figures):
    path, png = tmp_path / "metrics.jsonl", tmp_path / "new" / "curves.png"
    write_lines(
        path,
        [
            {"step": 1, "loss": 3.0, "outcome_loss": 1.0, "step/loss": 2.0, "kl": 0, "note": "a"},
            {"step": 2, "loss": 1.5, "outcome_loss": 0.5, "step/loss": 1.0, "step/kl": 1},
            {"step": 3, "loss": math.nan, "epoch": 1.0, "done": True},
            {"seconds": 12.0},
        ],
    )
    report.plot_training_curves(path, png, title="a title")
    assert is_png(png)
    panels = lines_by_panel(figures[0])
    assert list(panels) == ["kl", "loss", "loss by level"]
    assert list(panels["loss"].values()) == [[(1, 3.0), (2, 1.5)]]
    assert panels["loss by level"] == {
        "outcome": [(1, 1.0), (2, 0.5)],
        "steps": [(1, 2.0), (2, 1.0)],
    }
    assert panels["kl"] == {"outcome": [(1, 0.0)], "steps": [(2, 1.0)]}


def test_training_curves_over_another_x(tmp_path, figures):
    write_lines(tmp_path / "metrics.jsonl", [{"tokens": 10, "step/loss": 1.0}])
    report.plot_training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", x="tokens")
    assert lines_by_panel(figures[0]) == {"loss": {"steps": [(10, 1.0)]}}


@pytest.mark.parametrize("records", [[], [{"loss": 1.0}], [{"step": 1, "note": "a"}]])
def test_training_curves_want_numbers(tmp_path, records):
    write_lines(tmp_path / "metrics.jsonl", records)
    with pytest.raises(ValueError, match="metrics_path: want lines with 'step' and other numbers"):
        report.plot_training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


ROUNDS = {
    "M0": {"pass@1": 0.4, "errors": math.nan, "other": 1.0},
    "M1": {"pass@1": 0.6, "errors": 0.25, "other": 1.0},
}
SERIES = {"pass@1": "Pass@1", "errors": "step errors"}


def test_rounds(tmp_path, figures):
    report.plot_rounds(ROUNDS, tmp_path / "rounds.png", series=SERIES)
    assert is_png(tmp_path / "rounds.png")
    (axis,) = figures[0].axes
    curves = {line.get_label(): line.get_ydata().tolist() for line in axis.get_lines()}
    assert curves["Pass@1"] == [40.0, 60.0]
    assert curves["step errors"] == pytest.approx([math.nan, 25.0], nan_ok=True)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["M0", "M1"]
    assert sorted(text.get_text() for text in axis.texts) == ["25.0", "40.0", "60.0"]


def test_rounds_refuse_missing_metrics(tmp_path):
    with pytest.raises(ValueError, match=r"rounds: want at least one round"):
        report.plot_rounds({}, tmp_path / "rounds.png", series=SERIES)
    with pytest.raises(ValueError, match=r"rounds\['M0'\]: want metrics .*, got no \['errors'\]"):
        report.plot_rounds({"M0": {"pass@1": 1.0}}, tmp_path / "rounds.png", series=SERIES)


def test_plots_without_matplotlib_say_what_to_install(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name}")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match="pip install"):
        report.plot_rounds(ROUNDS, tmp_path / "rounds.png", series=SERIES)
