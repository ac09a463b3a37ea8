"""Problem sets: the schemas of the hub on small files of our own, and what does not fit."""

import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest

from stepkto_kernels.training.problems import SOURCES, load_problems
from stepkto_kernels.training.records import Problem
from stepkto_kernels.training.rewards.answers import ExactMatch

# For each layout rows in the hub's schema, and the problems that they are.
ROWS = {
    "math500": [
        {
            "problem": "What is $1+1$?",
            "solution": "It is $\\boxed{2}$.",
            "answer": "2",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "test/algebra/1.json",
        },
        {
            "problem": "Half of 1?",
            "solution": "\\boxed{\\frac{1}{2}}",
            "answer": "\\frac{1}{2}",
            "subject": "Prealgebra",
            "level": 2,
            "unique_id": "test/prealgebra/2.json",
        },
    ],
    "amc23": [
        {"id": 0, "question": "How many miles?", "answer": 27.0, "url": "https://example.org/0"},
        {"id": 1, "question": "How far?", "answer": "2.5", "url": "https://example.org/1"},
    ],
    "aime24": [
        {
            "id": 60,
            "problem": "Find it.",
            "solution": "So \\boxed{033}.",
            "answer": "033",
            "url": "https://example.org",
            "year": "2024",
        }
    ],
    "gsm8k": [
        {"question": "Tom has 40 + 2?", "answer": "40 + 2 = <<40+2=42>>42\n#### 42"},
        {"question": "And 1000?", "answer": "So #### is a marker\n#### 1,000 "},
    ],
    "numinamath": [
        {"source": "cn_k12", "problem": "Solve.", "solution": "First 1. So $\\boxed{\\{3\\}}$"},
        {"source": "olympiads", "problem": "Prove it.", "solution": "Clear. Answer: none."},
    ],
}
ANSWERS = {
    "math500": [("test/algebra/1.json", "2"), ("test/prealgebra/2.json", "\\frac{1}{2}")],
    "amc23": [("0", "27"), ("1", "2.5")],
    "aime24": [("60", "033")],
    "gsm8k": [("gsm8k-0", "42"), ("gsm8k-1", "1,000")],
    "numinamath": [("numinamath-0", "\\{3\\}"), ("numinamath-1", "")],
}


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(layout, problems):
    assert [(each.id, each.answer) for each in problems] == ANSWERS[layout]
    for problem, row in zip(problems, ROWS[layout], strict=True):
        assert problem.problem == row.get("problem", row.get("question"))
        in_answer = layout == "gsm8k"
        assert problem.solution == row.get("answer" if in_answer else "solution")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("layout", list(SOURCES))
def test_layouts_from_files(tmp_path, layout, suffix):
    rows = ROWS[layout]
    if layout == "amc23" and suffix == ".parquet":
        rows = [row | {"answer": float(row["answer"])} for row in rows]  # a column has one type
    check(layout, load_problems(write(tmp_path / f"f{suffix}", rows), layout))


@pytest.mark.parametrize("layout", list(SOURCES))
def test_sets_from_the_hub(monkeypatch, layout):
    asked = []
    module = types.ModuleType("datasets")
    module.load_dataset = lambda *args, **options: asked.append((args, options)) or ROWS[layout]
    monkeypatch.setitem(sys.modules, "datasets", module)
    check(layout, load_problems(layout))
    source = SOURCES[layout]
    assert asked == [((source.hub, source.config), {"split": source.split})]
    load_problems(layout, split="validation")
    assert asked[1][1] == {"split": "validation"}


def test_answers_are_compared_as_they_should():
    """A set's answer and a model's completion, by the exact match."""
    problem = Problem("a", "?", "1,000")
    assert ExactMatch()(problem, "So it is\nThe final answer is: $\\boxed{1000}$")


def test_own_files_and_limits(tmp_path):
    rows = [{"id": str(i), "problem": f"{i}?", "answer": str(i)} for i in range(4)]
    path = write(tmp_path / "p.jsonl", rows)
    assert load_problems(path, limit=2) == [Problem("0", "0?", "0"), Problem("1", "1?", "1")]
    assert len(load_problems(str(path))) == len(load_problems(path, limit=9)) == 4


@pytest.mark.parametrize(
    "name, rows, layout, message",
    [
        ("f.json", [{"question": "?"}], "amc23", r"f.json, row 0: answer: want a text in this fi"),
        ("f.jsonl", [{"answer": "1"}], "math500", r"f.jsonl, line 1: problem: want .* fields ans"),
        ("f.jsonl", [{"problem": None, "answer": "1"}], "math500", "line 1: problem: want a text"),
        ("f.jsonl", [{"problem": ["x"], "answer": "1"}], "math500", "line 1: problem: want a text"),
        ("f.jsonl", [{"problem": "x", "answer": True}], "math500", "line 1: answer: want a text"),
        (
            "f.json",
            [{"question": "?", "answer": "42"}],
            "gsm8k",
            "answer: want a solution with ###",
        ),
        ("f.json", [1], "gsm8k", "f.json, row 0: want an object, got int"),
        ("f.json", {"a": 1}, None, "f.json: want a list of objects, got dict"),
        ("f.jsonl", ROWS["math500"][:1] * 2, "math500", "line 2: id: want one of its own"),
        ("f.jsonl", ROWS["gsm8k"], None, "line 1: .*'id'"),
        ("f.txt", None, None, "problems: want one of math500, .* that ends in .json"),
        ("math-500", None, None, "problems: want one of math500"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, name, rows, layout, message):
    path = tmp_path / name
    if rows is not None:
        path.write_text(json.dumps(rows))
    if rows is not None and path.suffix == ".jsonl":
        write(path, rows)
    with pytest.raises(ValueError, match=message):
        load_problems(path, layout)


def test_files_that_are_not_what_their_name_says(tmp_path):
    for name in ("f.json", "f.parquet"):
        (tmp_path / name).write_text("no")
        with pytest.raises(ValueError, match=f"{name}: want"):
            load_problems(tmp_path / name, "gsm8k")
    with pytest.raises(OSError):
        load_problems(tmp_path / "none.parquet", "gsm8k")


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("gsm8k", "math500"), {}, "layout: want none with the set gsm8k, got 'math500'"),
        (("f.json", "other"), {}, "layout: want one of 'math500'"),
        (("f.json",), {"split": "test"}, "split: want none with a file, got 'test'"),
        (("f.json",), {"limit": 0}, "limit: want an int >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        load_problems(*arguments, **options)
