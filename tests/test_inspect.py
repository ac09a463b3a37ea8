"""stepkto inspect: what it reads, what it refuses, and that no text leaves its place."""

import base64
import hashlib
import json
import math
import pathlib
import re
from html.parser import HTMLParser

import pytest
from inspect_helpers import HOSTILE, make_run, solution, write

from stepkto_kernels.cli import main
from stepkto_kernels.training.inspect_charts import Line, Point, line_chart
from stepkto_kernels.training.inspect_page import render_page
from stepkto_kernels.training.inspect_run import Metric, read_runs, shown_and_left_out

ROOT = pathlib.Path(__file__).parent.parent
VOID = {"meta", "input", "br", "wbr"}


class Page(HTMLParser):
    """A page's elements and texts; fails where tags do not close in order."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))

    def text(self, tag):
        return [text for where, text in self.texts if where == tag]

    @property
    def data(self):
        return json.loads(self.text("script")[0])


def inspect(*paths, solutions=1000):
    return Page(render_page(read_runs(paths, solutions=solutions)))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "RUN")


def test_reads_a_run(run):
    (found,) = read_runs([run], solutions=1000)
    assert (found.name, found.method) == ("RUN", "step_kto")
    assert [each.number for each in found.rounds] == [0, 1, 2]
    assert found.rounds[1].metrics["pass@1"] == Metric(0.5, 0.4, 0.6)
    assert [record["loss"] for record in found.rounds[1].log] == [1 / 2, 1 / 3, 1 / 4, 1 / 5]
    names = [[file.name for file in each.files] for each in found.rounds]
    assert names == [["greedy", "sampled"], *[["training", "greedy", "sampled"]] * 2]
    training = found.rounds[1].files[0].solutions
    assert [s.trained for s in training] == [True, True] + [False] * 6
    assert (training[1].problem_id, training[1].sample) == ("p0", 1)
    assert training[1].ratios == (0.5, -0.25, 1e-6)
    assert training[1].example.labels == (True, False, None)
    assert all(s.ratios is None and s.trained is None for s in found.rounds[0].files[0].solutions)
    assert all(each.notes == [] for each in found.rounds)


def test_the_page_has_every_number_and_every_solution(run):
    page = inspect(run)
    cells = page.text("td") + page.text("small")
    assert {"40.0%", "50.0%", "60.0%", "30.0%", "20.0%"} <= set(cells)
    assert "30.0% to 50.0%" in cells and "+0.250" in cells and "-0.250" in cells
    captions = page.text("figcaption")
    assert captions == ["pass@1", "step_errors_in_correct", "loss"]
    rows = page.data["solutions"]
    assert len(rows) == 40
    trained = [row for row in rows if row["set"] == "training" and row["round"] == 2]
    assert trained[1] == {
        "run": 0,
        "round": 2,
        "set": "training",
        "prompt": trained[0]["prompt"],
        "label": 0,
        "steps": ["2 + 2 = 4\n"] * 3,
        "labels": [1, 0, -1],
        "id": "p0",
        "sample": 1,
        "ratios": [0.5, -0.25, 0.0],
        "trained": True,
    }
    assert page.data["prompts"][trained[1]["prompt"]] == "What is problem 0?\n"


def test_a_run_under_way(run):
    for part in ("metrics.json", "log_ratios.jsonl", "selected.jsonl", "model/trainer_state.json"):
        (run / "round_2" / part).unlink()
    (run / "round_1" / "labelled.jsonl").rename(run / "round_1" / "samples.jsonl")
    (run / "config.yaml").unlink()
    (run / "round_3").mkdir()
    (run / "round_1.tmp").mkdir()
    (found,) = read_runs([run], solutions=1000)
    assert [each.number for each in found.rounds] == [0, 1, 2, 3]
    assert found.rounds[1].notes == ["8 samples are not labelled yet"]
    assert found.rounds[2].notes == ["not evaluated yet", "no log-ratios against the reference"]
    assert found.rounds[3].notes == ["not evaluated yet"]
    assert found.method == "step_kto" and found.settings == ""
    assert found.rounds[2].files[0].solutions[0].trained is None
    assert "round 1: 8 samples are not labelled yet" in inspect(run).text("th")


def test_an_evaluation_alone(run):
    page = inspect(run / "round_0")
    assert len(page.data["solutions"]) == 8
    assert page.text("figcaption") == ["pass@1", "step_errors_in_correct"]


def test_a_file_of_rows(tmp_path, capsys):
    kto_row = {"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": "4", "label": True}
    write(tmp_path / "rows.jsonl", solution(0), kto_row)
    assert main(["inspect", str(tmp_path / "rows.jsonl")]) == 0
    assert "2 solutions, 0 left out" in capsys.readouterr().out
    page = Page((tmp_path / "rows.jsonl.html").read_text())
    assert page.data["prompts"] == ["What is problem 0?\n", "[user]\n2 + 2?"]
    assert page.data["solutions"][1]["labels"] == []
    assert "No round was evaluated yet." in page.text("p")


def test_runs_side_by_side(tmp_path):
    runs = [make_run(tmp_path / name / "RUN", method=name) for name in ("kto", "sft")]
    page = inspect(*runs)
    assert page.data["runs"] == ["kto/RUN", "sft/RUN"]
    assert {row["run"] for row in page.data["solutions"]} == {0, 1}
    lines = [a["class"] for tag, a in page.elements if tag == "polyline"]
    assert lines == ["line s0", "line s1"] * 3
    bands = [a["class"] for tag, a in page.elements if tag == "polygon"]
    assert bands == ["band s0", "band s1"] * 2


@pytest.mark.parametrize("cap", [0, 7, 39, 40])
def test_what_is_left_out_is_told(run, cap):
    runs = read_runs([run], solutions=cap)
    assert shown_and_left_out(runs) == (cap, 40 - cap)
    sizes = [len(file.solutions) for _, file in runs[0].files]
    spread = [size for size in sizes if size != 4]  # 4: a whole small file
    assert cap == 40 or max(sizes) - min(sizes) <= 1 or max(spread) - min(spread) <= 1
    page = Page(render_page(runs))
    assert len(page.data["solutions"]) == cap
    told = " ".join(page.text("p"))
    assert (f"{cap} of 40" in told and f"{40 - cap} were left out" in told) == (cap < 40)


SPELLED_OUT = HOSTILE.translate({ord(c): f"[U+{ord(c):04X}]" for c in "\u2028\u2029\u202e\x00\x1b"})


def test_names_in_the_page_cannot_leave_their_place(tmp_path):
    name = "<img src=x onerror=alert(1)>&amp;\"'"
    run = make_run(tmp_path / name, method=name, rounds=1)
    metrics = {"metrics": {HOSTILE: {"value": 0.5, "low": 0.4, "high": 0.6}}, "method": HOSTILE}
    write(run / "round_0" / "metrics.json", metrics)
    (run / "config.yaml").write_bytes(HOSTILE.encode() + b"\xff$script")
    log = [{"step": 1, HOSTILE: 0.5}, {"step": 2, HOSTILE: math.nan}]
    write(run / "round_1" / "model" / "trainer_state.json", {"log_history": log})
    page = inspect(run)
    check_elements(page)
    assert page.text("h1") == [f"Step-KTO: {name}"]
    captions = page.text("figcaption")
    assert captions == [SPELLED_OUT, "pass@1", "step_errors_in_correct", SPELLED_OUT]
    assert page.text("pre") == [f"{SPELLED_OUT}\ufffd$script"]


def check_elements(page):
    """Nothing but the page's own: two scripts, one style, no handler, no address."""
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and tags.count("style") == 1
    assert not {"img", "iframe", "link", "object", "embed", "base", "b"} & set(tags)
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "style", "srcdoc"), name
            assert name != "href" or (tag, value) == ("a", "#solutions")


HOSTILE_TEXTS = [
    HOSTILE,
    "</SCRIPT ><!--",
    "]]>--><svg onload=alert(1)>",
    "\\u003c/script> \\\" ' \\",
    "".join(map(chr, range(32))) + "\x7f\x85",
    "\U0001f600 \u202e \ufeff \ufffe",
]


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_texts_of_models_come_back_as_they_were(tmp_path, text):
    row = solution(0, text=text) | {"prompt": text, "problem_id": text}
    write(tmp_path / "rows.jsonl", row)
    html = render_page(read_runs([tmp_path / "rows.jsonl"], solutions=10))
    assert html.isascii()
    page = Page(html)
    check_elements(page)
    (found,) = page.data["solutions"]
    assert found["steps"] == [text] * 3 and found["id"] == text
    assert page.data["prompts"] == [text]
    raw = page.text("script")[0]
    assert not set("<>&\x00\x1b") & set(raw)


def test_half_a_surrogate_pair_is_spelled_out(tmp_path):
    write(tmp_path / "rows.jsonl", solution(0, text="a \ud800 b"))
    (found,) = inspect(tmp_path / "rows.jsonl").data["solutions"]
    assert found["steps"] == ["a \\ud800 b"] * 3


def test_the_policy_names_what_the_page_holds(run):
    page = inspect(run)
    policies = [a["content"] for tag, a in page.elements if "http-equiv" in a]
    (policy,) = policies
    digest = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'",
        "script-src": f"'sha256-{digest(page.text('script')[1])}'",
        "style-src": f"'sha256-{digest(page.text('style')[0])}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    own = page.text("script")[1] + page.text("style")[0]
    assert not re.search(r"https?:|innerHTML|\beval\b|Function\(|url\(|@import", own)


BAD = [
    ("round_1/metrics.json", b"{", "metrics.json: want a JSON object"),
    ("round_1/metrics.json", b"[]", "metrics.json: want a JSON object, got list"),
    ("round_1/metrics.json", b"{}", "metrics.json: metrics: want objects by name"),
    ("round_1/metrics.json", b'{"metrics": {"a": {"low": 1}}}', "metrics.a: want a value"),
    ("round_1/metrics.json", b'{"metrics": {"a": {"value": "1"}}}', "a.value: want a number"),
    ("round_1/model/trainer_state.json", b'{"log_history": {}}', "log_history: want a list"),
    ("round_1/labelled.jsonl", b'{"prompt": "a"}\n{"prom', "line 1: label: want"),
    ("round_1/labelled.jsonl", b'\n{"prom\n', "labelled.jsonl, line 2: want a JSON object"),
    ("round_1/labelled.jsonl", b"\xff\n", "labelled.jsonl, line 1: want a JSON object"),
    ("round_1/selected.jsonl", b'{"problem_id": 1}\n', "line 1: problem_id: want a string"),
    ("round_1/log_ratios.jsonl", b"{}\n", "line 1: want problem_id and sample"),
    ("round_1/labelled.jsonl", b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}\n", "line 1: want"),
    ("round_1/labelled.jsonl", b'{"a":' + b"[" * 900 + b"]" * 900 + b"}\n", "line 1: "),
    (
        "round_1/log_ratios.jsonl",
        b'{"problem_id": "p0", "sample": 0, "steps": [1]}\n',
        "log_ratios.jsonl: steps of ('p0', 0): want 3 numbers, got 1",
    ),
    (
        "round_1/log_ratios.jsonl",
        b'{"problem_id": "p0", "sample": 0, "steps": ["1"]}\n',
        "line 1: steps: want a list of numbers",
    ),
    (
        "round_1/log_ratios.jsonl",
        b'{"problem_id": "p0", "sample": 0, "steps": []}\n' * 2,
        "line 2: problem_id and sample: want a pair of its own",
    ),
]


@pytest.mark.parametrize(("part", "content", "message"), BAD, ids=lambda x: str(x)[:40])
def test_a_malformed_file_is_named(run, part, content, message, capsys):
    (run / part).write_bytes(content)
    assert main(["inspect", str(run)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (run / "report.html").exists()


def test_what_is_no_run_is_refused(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    output = ["--output", str(tmp_path / "page.html")]
    for arguments, message in [
        ([tmp_path / "nowhere"], "nowhere: want a folder"),
        ([tmp_path / "empty"], "empty: want a folder"),
        ([run, run / "round_0"], "--output: want a file to write"),
        ([run, run, *output], "paths: want each run once"),
        ([run, "--solutions", "-1"], "--solutions: want an int >= 0"),
        ([run / "config.yaml", "--output", run / "config.yaml"], "--output: want another file"),
    ]:
        assert main(["inspect", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err


def test_a_chart_stays_in_its_frame_and_takes_equal_values():
    one = Line("one", 0, [Point(0, 0.5, 0.5, 0.5)])
    flat = Line("flat", 9, [Point(t, 1.0, 1.0, 1.0) for t in range(3)])
    for lines in ([one], [flat], [one, flat], [one, Line("none", 1, [])]):
        svg = line_chart("a", lines, x_name="x", format_y=str, limits=(0.0, 1.0))
        numbers = re.findall(r'(?:points|x1|x2|y1|y2|cx|cy|x|y)="([^"]+)"', svg)
        values = [float(v) for n in numbers for v in re.split("[ ,]", n)]
        assert min(values) >= 0 and max(values) <= 340
        Page(svg)
    assert 'class="line s1"' in line_chart("a", [flat], x_name="x", format_y=str)


def test_axes_have_round_numbers():
    points = [Point(x, 0.013 * x) for x in (5, 1200, 2985)]
    page = Page(line_chart("a", [Line("a", 0, points)], x_name="step", format_y=lambda y: f"{y:g}"))
    assert page.text("text") == ["0", "20", "40", *"500 1000 1500 2000 2500".split(), "step"]


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 10**400, 1e308], ids=lambda v: str(v)[:4]
)
def test_numbers_that_no_chart_can_hold(run, value):
    metrics = {"metrics": {"pass@1": {"value": value, "low": -1, "high": value}}}
    write(run / "round_1" / "metrics.json", metrics)
    log = [{"step": 1, "loss": value}, {"step": 2, "loss": 0.5}, {"step": value, "loss": 9}]
    write(run / "round_1" / "model" / "trainer_state.json", {"log_history": log})
    ratios = {"problem_id": "p0", "sample": 0, "steps": [value, 0.5, value]}
    write(run / "round_1" / "log_ratios.jsonl", ratios)
    page = inspect(run)
    told = "nan" if value != value else "inf" if value > 0 else "-inf"
    first = next(row for row in page.data["solutions"] if row["set"] == "training")
    assert first["ratios"] == [told, 0.5, told]
    drawn = [a["points"] for tag, a in page.elements if tag == "polyline"]
    assert len(drawn[0].split()) == 2  # of three rounds
    assert not re.search("nan|inf", " ".join(drawn))


def test_the_files_of_the_page_are_package_data():
    setuptools = pytest.importorskip("setuptools")
    built = setuptools.Distribution()
    built.parse_config_files([str(ROOT / "pyproject.toml")])
    found = built.package_data["stepkto_kernels.training"]
    folder = ROOT / "stepkto_kernels" / "training"
    there = {path.name for path in folder.iterdir() if path.suffix in (".html", ".css", ".js")}
    assert set(found) == there
