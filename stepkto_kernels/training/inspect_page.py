"""Runs as one HTML page that needs no network, and that runs no text of a model.

Every text is escaped where it stands in HTML; solutions are JSON in ASCII, in which no "<" is left,
and the page's script only ever sets them as text. The Content-Security-Policy allows the page's own
script and style by their hashes and nothing else, so that nothing external can be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

from stepkto_kernels.training.data import LABEL_CODES, Prompt
from stepkto_kernels.training.inspect_charts import COLOURS, Line, Point, line_chart
from stepkto_kernels.training.inspect_run import (
    Metric,
    Round,
    Run,
    Solution,
    all_solutions,
    is_finite,
    shown_and_left_out,
)
from stepkto_kernels.training.inspect_text import as_html

# Of the trainer's log: no curve.
UNTOLD = re.compile(r"epoch|step|total_flos|(train|eval)_(runtime|.*_per_second)")
MOST_POINTS = 400  # of a training curve
MOST_OPEN = 12  # charts of the training log, beyond which they are folded away


def render_page(runs: Sequence[Run]) -> str:
    """The page, in ASCII; runs stand side by side in curves and tables."""
    part = lambda name: resources.files(__package__).joinpath(f"inspect_page.{name}").read_text()
    style, script = part("css"), part("js")
    shown, left_out = shown_and_left_out(runs)
    page = Template(part("html")).substitute(
        title=as_html("Step-KTO: " + ", ".join(run.name for run in runs)),
        policy=as_html(policy(style, script)),
        style=style,
        script=script,
        runs=run_table(runs),
        curves=curves(runs),
        metrics=metric_table(runs),
        training=training_curves(runs),
        solutions=solution_table(runs),
        told=told(shown, left_out),
        data=data_json(runs),
    )
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def policy(style: str, script: str) -> str:
    """Nothing but this style and this script."""
    digest = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest(script)}'; "
        f"style-src 'sha256-{digest(style)}'; base-uri 'none'; form-action 'none'"
    )


def told(shown: int, left_out: int) -> str:
    if not left_out:
        return f"All {shown:,} solutions are in this page."
    return (
        f"{shown:,} of {shown + left_out:,} solutions are in this page, the first of each file; "
        f"{left_out:,} were left out. --solutions N takes in more."
    )


def table(name: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int) -> str:
    """A table that scrolls by itself where it is too wide.

    Args:
        name: for screen readers.
        header: HTML of the header's cells.
        rows: HTML of each row's cells.
        texts: how many columns, from the first, are left-aligned and head their row.
    """
    head = "".join(
        f'<th scope="col"{"" if i < texts else number_class}>{cell}</th>'
        for i, cell in enumerate(header)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{cell}</th>' if i < texts else f"<td{number_class}>{cell}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


number_class = ' class="n"'


def run_table(runs: Sequence[Run]) -> str:
    """Names and colours, methods, what is missing, and the settings."""
    rows = []
    for i, run in enumerate(runs):
        notes = [f"round {each.number}: {note}" for each in run.rounds for note in each.notes]
        settings = ""
        if run.settings:
            settings = (
                "<details><summary>config.yaml</summary>"
                f"<pre>{as_html(run.settings)}</pre></details>"
            )
        rows.append(
            [
                swatch(i, run),
                as_html(run.method) or "-",
                ", ".join(str(each.number) for each in run.rounds),
                "<br>".join(map(as_html, notes)) or "-",
                settings or "-",
            ]
        )
    return table("Runs", ["run", "method", "rounds", "not there", "settings"], rows, texts=5)


def swatch(index: int, run: Run) -> str:
    colour = f'<span class="swatch s{index % COLOURS}"></span>'
    return f'<span class="run">{colour}{as_html(run.name)}</span>'


def legend(runs: Sequence[Run]) -> str:
    """Whose colour is which, where there is more than one."""
    if len(runs) == 1:
        return ""
    names = "".join(f"<span>{swatch(i, run)}</span>" for i, run in enumerate(runs))
    return f'<p class="legend">{names}</p>'


def metric_names(runs: Sequence[Run]) -> list[str]:
    """In the order of the files, each once."""
    return list(dict.fromkeys(m for run in runs for each in run.rounds for m in each.metrics))


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def short(value: float) -> str:
    return f"{value:.3g}"


def curves(runs: Sequence[Run]) -> str:
    """One chart a metric, one line a run."""
    charts = []
    for name in metric_names(runs):
        lines = []
        for i, run in enumerate(runs):
            found = [
                (each.number, each.metrics[name]) for each in run.rounds if name in each.metrics
            ]
            points = [Point(t, m.value, m.low, m.high) for t, m in found if m.value is not None]
            lines.append(Line(run.name, i, points))
        points = [point for line in lines for point in line.points]
        if not points:
            continue
        values = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
        is_share = 0 <= min(values) and max(values) <= 1
        charts.append(
            line_chart(
                name,
                lines,
                x_name="round",
                format_y=(lambda y: f"{100 * y:.3g}%") if is_share else short,
                limits=(0.0, 1.0) if is_share else None,
            )
        )
    if not charts:
        return "<p>No round was evaluated yet.</p>"
    return f'{legend(runs)}<div class="charts">{"".join(charts)}</div>'


def metric_table(runs: Sequence[Run]) -> str:
    """A row a round and run, a column a metric."""
    names = metric_names(runs)
    if not names:
        return ""
    # rounds of the same number below each other, for methods to be compared
    measured = [(r.number, i, r) for i, run in enumerate(runs) for r in run.rounds if r.metrics]
    rows = [
        [str(t), swatch(i, runs[i]), *(cell(each.metrics.get(name)) for name in names)]
        for t, i, each in sorted(measured, key=lambda found: found[:2])
    ]
    # a long name may be broken at its underscores
    header = [as_html(name).replace("_", "_<wbr>") for name in names]
    return table("Metrics by round", ["round", "run", *header], rows, texts=2)


def cell(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return "-"
    form = percent if 0 <= metric.value <= 1 else short
    if metric.low is None or metric.high is None:
        return form(metric.value)
    return f"{form(metric.value)}<small>{form(metric.low)} to {form(metric.high)}</small>"


def training_curves(runs: Sequence[Run]) -> str:
    """The trainer's log, the rounds of a run one behind the other."""
    names = sorted(
        {
            name
            for run in runs
            for each in run.rounds
            for record in each.log
            for name, value in record.items()
            if not UNTOLD.fullmatch(name) and is_finite(value)
        }
    )
    names.sort(key=lambda name: name != "loss")
    charts = []
    ends = [round_ends(run) for run in runs]
    for name in names:
        lines = []
        for i, run in enumerate(runs):
            points = [
                Point(start + record["step"], record[name])
                for start, each in zip([0, *ends[i]], run.rounds, strict=False)
                for record in each.log
                if is_finite(record.get(name))
            ]
            every = max(1, math.ceil(len(points) / MOST_POINTS))
            lines.append(Line(run.name, i, points[::every]))
        marks = ends[0][:-1] if len(runs) == 1 else []
        charts.append(
            line_chart(name, lines, x_name="step", format_y=short, dots=False, marks=marks)
        )
    if not charts:
        return "<p>No round has a log of its training.</p>"
    is_open = " open" if len(charts) <= MOST_OPEN else ""
    return (
        f"<details{is_open}><summary>The trainer's log ({len(charts)}), the rounds one behind "
        f"the other</summary>{legend(runs)}"
        f'<div class="charts">{"".join(charts)}</div></details>'
    )


def round_ends(run: Run) -> list[float]:
    """The steps that were taken up to the end of each round."""
    ends: list[float] = []
    for each in run.rounds:
        before = ends[-1] if ends else 0
        ends.append(before + max((record["step"] for record in each.log), default=0))
    return ends


def solution_table(runs: Sequence[Run]) -> str:
    """Counts over the solutions of the page, a row a file."""
    rows = []
    for i, run in enumerate(runs):
        for each, file in run.files:
            counts = count(file.solutions)
            numbers = [f"{len(file.solutions):,}", f"{file.rows:,}", *counts]
            rows.append([swatch(i, run), str(each.number), file.name, *numbers])
    header = ["run", "round", "set", "in this page", "in the file", "right answer"]
    header += ["wrong step among right answers", "right steps"]
    header += ["log-ratio, right steps", "log-ratio, wrong steps"]
    return table("Counts by file", header, rows, texts=3)


def count(solutions: Sequence[Solution]) -> list[str]:
    """Shares among what is labelled, and mean log-ratios of steps in nats; "-" for none."""
    answers, errors, steps = [], [], []
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for each in solutions:
        labels = [label for label in each.example.labels if label is not None]
        steps += labels
        if each.example.label is not None:
            answers.append(each.example.label)
        if each.example.label and labels:
            errors.append(not all(labels))
        for label, ratio in zip(each.example.labels, each.ratios or (), strict=False):
            if label is not None and math.isfinite(ratio):
                ratios[label].append(ratio)
    mean = lambda values: sum(values) / len(values)
    shares = [percent(mean(values)) if values else "-" for values in (answers, errors, steps)]
    return shares + [f"{mean(ratios[k]):+.3f}" if ratios[k] else "-" for k in (True, False)]


def data_json(runs: Sequence[Run]) -> str:
    """The solutions, as JSON for a script element: ASCII, without "<", ">" and "&"."""
    prompts: dict[str, int] = {}
    rows = [
        row(index, each, file.name, solution, prompts)
        for index, each, file, solution in all_solutions(runs)
    ]
    data = {"runs": [run.name for run in runs], "prompts": list(prompts), "solutions": rows}
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def row(
    index: int, each: Round, name: str, solution: Solution, prompts: dict[str, int]
) -> Mapping[str, Any]:
    """A solution as inspect_page.js reads it. Labels are 1 right, 0 wrong, -1 unlabelled."""
    example = solution.example
    prompt = prompt_text(example.prompt)
    found: dict[str, Any] = {
        "run": index,
        "round": each.number,
        "set": name,
        "prompt": prompts.setdefault(prompt, len(prompts)),
        "label": LABEL_CODES[example.label],
        "steps": example.completions,
        "labels": [LABEL_CODES[label] for label in example.labels],
    }
    if solution.problem_id is not None:
        found |= {"id": solution.problem_id, "sample": solution.sample}
    if solution.ratios is not None:
        # JSON has no NaN and no infinity: as strings
        told = [round(r, 5) if math.isfinite(r) else str(r) for r in solution.ratios]
        found["ratios"] = told
    if solution.trained is not None:
        found["trained"] = solution.trained
    return found


def prompt_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)
