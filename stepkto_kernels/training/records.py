"""Problems and sampled solutions, as JSON lines that a killed run can go on from.

    problems   {"id", "problem", "answer", "solution"}
    samples    {"problem_id", "sample", "prompt", "completion", "finish"}

A labelled solution is a row of data.py with `problem_id` and `sample` beside its fields, so that
`stepkto train` takes the file as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from stepkto_kernels import checks
from stepkto_kernels.training.data import FilePath, Prompt

FINISHES = ("stop", "length")


@dataclass(frozen=True)
class Problem:
    """A problem and what is known of its answer.

    Args:
        id: names it in a set of problems, not empty.
        problem: its text.
        answer: the reference answer, "" where there is none.
        solution: a reference solution, for a judge to see; None where there is none.
    """

    id: str
    problem: str
    answer: str
    solution: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "problem", "answer"):
            value = getattr(self, name)
            checks.require(isinstance(value, str), name, "a string", repr(value))
        checks.require(bool(self.id), "id", "a string that is not empty", repr(self.id))
        is_text = self.solution is None or isinstance(self.solution, str)
        checks.require(is_text, "solution", "a string or null", repr(self.solution))
        for name, value in vars(self).items():
            _check_writable(name, value)


@dataclass(frozen=True)
class Sample:
    """A solution that a model wrote.

    Args:
        problem_id: of its Problem.
        sample: number among the problem's samples, from 0.
        prompt: what the model was given, a string or messages.
        completion: what it wrote, special tokens left out.
        finish: "stop" where it ended by itself, "length" where it was cut off.
    """

    problem_id: str
    sample: int
    prompt: Prompt
    completion: str
    finish: str

    def __post_init__(self) -> None:
        for name in ("problem_id", "completion"):
            value = getattr(self, name)
            checks.require(isinstance(value, str), name, "a string", repr(value))
        checks.integer("sample", self.sample, low=0)
        checks.choice("finish", self.finish, FINISHES)
        for name in ("problem_id", "prompt", "completion"):
            _check_writable(name, getattr(self, name))

    @property
    def key(self) -> tuple[str, int]:
        return self.problem_id, self.sample


def _check_writable(name: str, value: Any) -> None:
    """That files and tokenizers can hold it: JSON can spell half of a surrogate pair."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            want = "text without lone surrogates"
            raise ValueError(f"{name}: want {want}, got {value[:80]!r}") from None
    elif isinstance(value, Mapping):
        for each in value.values():
            _check_writable(name, each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _check_writable(name, each)


def read_problems(path: FilePath) -> list[Problem]:
    """Read a file of problems.

    Raises:
        ValueError: a line is malformed, or an id is there twice; names file, line and field.
        OSError: the file cannot be read.
    """
    problems: dict[str, Problem] = {}
    for where, row in read_rows(path):
        problem = make(Problem, row, where)
        checks.require(problem.id not in problems, f"{where}: id", "one of its own", problem.id)
        problems[problem.id] = problem
    return list(problems.values())


def read_samples(path: FilePath) -> list[Sample]:
    """Read a file of samples; errors as read_problems, for a problem_id and sample there twice."""
    samples: dict[tuple[str, int], Sample] = {}
    for where, row in read_rows(path):
        if isinstance(row.get("prompt"), list):
            row["prompt"] = tuple(row["prompt"])
        sample = make(Sample, row, where)
        is_new = sample.key not in samples
        checks.require(is_new, f"{where}: problem_id and sample", "a pair of its own", sample.key)
        samples[sample.key] = sample
    return list(samples.values())


def make(kind: type, row: Mapping[str, Any], where: str) -> Any:
    """A dataclass of a row's fields; fields that it does not have are ignored.

    Raises:
        ValueError: a field is missing or has another type; names it.
    """
    names = kind.__dataclass_fields__  # type: ignore[attr-defined]
    try:
        return kind(**{name: row[name] for name in names if name in row})
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_rows(path: FilePath) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place, such as "samples.jsonl, line 3".

    Raises:
        ValueError: a line is no JSON object.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:  # in binary, only "\n" ends a line
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{os.fspath(path)}, line {number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: want a JSON object, but {error}") from None
                checks.require(isinstance(row, dict), where, "a JSON object", type(row).__name__)
                yield where, row


class RowWriter:
    """Appends rows to a JSON-lines file, on disk when `write` or `write_all` returns.

    A process that is killed while writing leaves at most a part of its last line; that is cut off
    when the file is opened again, and `rows` are those that were complete.

        with RowWriter("samples.jsonl") as writer:
            done = {(row["problem_id"], row["sample"]) for row in writer.rows}
    """

    def __init__(self, path: FilePath):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut_torn_line()
        self.rows = [row for _, row in read_rows(self.path)] if self.path.exists() else []
        # without a buffer: what a full disk did not take would be written with what comes next
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115, closed by __exit__

    def _cut_torn_line(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb+") as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                file.truncate(end)

    def write(self, row: Mapping[str, Any]) -> None:
        """As write_all with one row."""
        self.write_all([row])

    def write_all(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, with one wait for the disk: it may take milliseconds.

        Raises:
            OSError: the disk is full; the file is then as it was before.
        """
        lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
        left = memoryview(b"".join(lines))
        before = os.fstat(self._file.fileno()).st_size
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError:
            os.truncate(self.path, before)
            raise

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def as_row(record: Problem | Sample) -> dict[str, Any]:
    """The fields of a record, as they are written."""
    return asdict(record)
