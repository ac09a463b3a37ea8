"""Problem sets by name, from the hub or from a file that was downloaded before.

    math500     HuggingFaceH4/MATH-500        problem, solution, answer, unique_id
    amc23       math-ai/amc23                 id, question, answer
    aime24      HuggingFaceH4/aime_2024       id, problem, solution, answer
    gsm8k       openai/gsm8k                  question, answer ("... #### 42")
    numinamath  AI-MO/NuminaMath-CoT          problem, solution (the answer in \\boxed{...})

A file is JSON (a list of objects), JSON lines or Parquet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepkto_kernels import checks
from stepkto_kernels.training.data import FilePath
from stepkto_kernels.training.records import Problem, make, read_rows
from stepkto_kernels.training.steps import split_solution

Row = Mapping[str, Any]
SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Source:
    """Where a set is on the hub, and how a row of it becomes a Problem.

    Args:
        hub: name of the dataset.
        config: its configuration, None for the only one.
        split: taken unless another is asked for.
        parse: gives id ("" for none), problem, answer and solution of a row.
    """

    hub: str
    config: str | None
    split: str
    parse: Callable[[Row], tuple[str, str, str, str | None]]


def _text(row: Row, *names: str) -> str:
    """The first of these fields that is there, as text; numbers are written out."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            whole = isinstance(value, float) and value.is_integer()
            return str(int(value) if whole else value)
    got = ", ".join(sorted(map(str, row))) or "none"
    raise ValueError(f"{names[0]}: want a text in this field, got the fields {got}")


def _optional(row: Row, *names: str) -> str | None:
    return _text(row, *names) if any(row.get(name) is not None for name in names) else None


def _competition(row: Row) -> tuple[str, str, str, str | None]:
    """Of MATH-500, AMC23 and AIME24; copies on the hub differ in the names of their fields."""
    return (
        _optional(row, "unique_id", "id", "ID", "url") or "",
        _text(row, "problem", "question", "Problem"),
        _text(row, "answer", "Answer"),
        _optional(row, "solution", "Solution"),
    )


def _gsm8k(row: Row) -> tuple[str, str, str, str | None]:
    solution = _text(row, "answer")
    _, marker, answer = solution.rpartition("####")
    checks.require(bool(marker), "answer", "a solution with #### before its answer", repr(solution))
    return _optional(row, "id") or "", _text(row, "question"), answer.strip(), solution


def _numinamath(row: Row) -> tuple[str, str, str, str | None]:
    solution = _text(row, "solution")
    boxed = "\\boxed" in solution or "\\fbox" in solution
    answer = split_solution(solution).answer if boxed else None
    return _optional(row, "id") or "", _text(row, "problem"), answer or "", solution


SOURCES = {
    "math500": Source("HuggingFaceH4/MATH-500", None, "test", _competition),
    "amc23": Source("math-ai/amc23", None, "test", _competition),
    "aime24": Source("HuggingFaceH4/aime_2024", None, "train", _competition),
    "gsm8k": Source("openai/gsm8k", "main", "test", _gsm8k),
    "numinamath": Source("AI-MO/NuminaMath-CoT", None, "train", _numinamath),
}


def load_problems(
    source: FilePath,
    layout: str | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
) -> list[Problem]:
    """Read problems: of a set by its name, or of a file.

    A row without an id gets the set's name and its number, such as gsm8k-7. Proofs and other
    rows of NuminaMath without a boxed answer have the answer "".

    Args:
        source: one of SOURCES, loaded from the hub, or a file.
        layout: one of SOURCES, whose fields a file has; None for those of records.Problem.
        split: of the hub's dataset; None for the usual one.
        limit: problems to take, from the first; None for all.
    Raises:
        ValueError: an argument outside of the above, a row that does not fit, or an id twice; names
            the place and the field.
        OSError: the file or the dataset cannot be read.
        ImportError: the package datasets, or pyarrow for Parquet, is not installed.
    """
    if layout is not None:
        checks.choice("layout", layout, tuple(SOURCES))
    if limit is not None:
        checks.integer("limit", limit, low=1)
    name = str(source)
    is_set = name in SOURCES
    if is_set:
        fits = layout in (None, name)
        checks.require(fits, "layout", f"none with the set {name}", repr(layout))
        layout, rows = name, _hub_rows(SOURCES[name], split)
    else:
        fits = split is None
        checks.require(fits, "split", "none with a file", repr(split))
        rows = file_rows(source)
    problems: dict[str, Problem] = {}
    for number, (where, row) in enumerate(rows):
        if limit is not None and number >= limit:
            break
        problem = make_problem(row, layout, number, where)
        checks.require(problem.id not in problems, f"{where}: id", "one of its own", problem.id)
        problems[problem.id] = problem
    return list(problems.values())


def make_problem(row: Row, layout: str | None, number: int, where: str) -> Problem:
    """The Problem of a row; ValueError names the place and the field that does not fit."""
    if layout is None:
        problem: Problem = make(Problem, row, where)
        return problem
    try:
        id, text, answer, solution = SOURCES[layout].parse(row)
        return Problem(id or f"{layout}-{number}", text, answer, solution)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _hub_rows(source: Source, split: str | None) -> Iterator[tuple[str, Row]]:
    from datasets import load_dataset

    rows: Iterable[Any] = load_dataset(source.hub, source.config, split=split or source.split)
    for number, row in enumerate(rows):
        yield f"{source.hub}, row {number}", row


def file_rows(path: FilePath) -> Iterator[tuple[str, Row]]:
    """The rows of a JSON, JSON-lines or Parquet file, each with its place.

    Raises:
        ValueError: another kind of file, or one that is not what its name says.
        OSError: the file cannot be read.
    """
    suffix = Path(path).suffix
    is_file = suffix in SUFFIXES
    want = f"one of {', '.join(SOURCES)}, or a file that ends in {', '.join(SUFFIXES)}"
    checks.require(is_file, "problems", want, repr(str(path)))
    if suffix == ".jsonl":
        yield from read_rows(path)
        return
    rows = _parquet(path) if suffix == ".parquet" else _json(path)
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        checks.require(isinstance(row, dict), where, "an object", type(row).__name__)
        yield where, row


def _json(path: FilePath) -> list[Any]:
    try:
        found = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: want JSON, but {error}") from None
    checks.require(isinstance(found, list), str(path), "a list of objects", type(found).__name__)
    return list(found)


def _parquet(path: FilePath) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: want a Parquet file, but {error}") from None
