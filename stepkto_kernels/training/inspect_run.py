"""What a report shows of a run: metrics by round, training logs, and solutions with their labels.

A run is a folder of `stepkto iterate`, also one that has not finished; the folder of one evaluation
(metrics.json and evaluation/); or a file of labelled rows. Of a round, every file may be missing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from stepkto_kernels import checks
from stepkto_kernels.training.data import StepKTOExample, parse_row
from stepkto_kernels.training.inspect_text import without_surrogates
from stepkto_kernels.training.records import read_rows

# Name of a set of solutions -> its file in the folder of a round.
SETS = {
    "training": "labelled.jsonl",
    "greedy": "evaluation/greedy.jsonl",
    "sampled": "evaluation/sampled.jsonl",
}
_ROUND = re.compile(r"round_(0|[1-9][0-9]{0,8})")
_METHOD = re.compile(r"^method:[ \t]*([^\s#]+)", re.MULTILINE)
LARGEST = 1e100  # from here on a number counts as infinite: charts take differences and ratios

Key = tuple[str, int]


@dataclass(frozen=True)
class Metric:
    """A value with the ends of its interval; None where there is no finite number."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Solution:
    """A labelled solution.

    Args:
        example: prompt, pieces and labels.
        problem_id, sample: which one it is, None where the file does not say.
        ratios: log-ratio of each piece against the reference, nats; None where it is not known.
        trained: whether the round's model was trained on it; None where that is not known.
    """

    example: StepKTOExample
    problem_id: str | None
    sample: int | None
    ratios: tuple[float, ...] | None = None
    trained: bool | None = None


@dataclass
class SolutionFile:
    """A file of solutions, read in part: `rows` is all that it holds."""

    name: str
    path: Path
    rows: int
    solutions: list[Solution] = field(default_factory=list)


@dataclass
class Round:
    """What is there of a round.

    Args:
        number: t; the first model is round 0.
        metrics: by name, {} where it was not evaluated.
        log: records of the trainer, each with "step".
        files: of solutions.
        notes: sentences on what is missing.
    """

    number: int
    metrics: dict[str, Metric] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    files: list[SolutionFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Run:
    """A run, as `read_runs` finds it. settings: the text of config.yaml, "" without one."""

    name: str
    path: Path
    method: str
    settings: str
    rounds: list[Round]

    @property
    def files(self) -> list[tuple[Round, SolutionFile]]:
        return [(each, file) for each in self.rounds for file in each.files]


def read_runs(paths: Sequence[str | Path], *, solutions: int) -> list[Run]:
    """Read runs, and of their solutions as many as were asked for.

    Args:
        paths: folders of runs or files of labelled rows, at least one, none twice.
        solutions: most solutions of all runs together, >= 0. Every file gives an equal share, from
            its first row on, and what small files leave over goes to the larger ones.
    Raises:
        ValueError: a path is no run, or a file is malformed; names file, line and field. Rows of
            solutions beyond the share are counted only.
        OSError: a file cannot be read.
    """
    checks.require(bool(paths), "paths", "at least one", "none")
    checks.integer("solutions", solutions, low=0)
    found = [Path(path) for path in paths]
    places = [path.resolve() for path in found]
    twice = [
        str(path) for path, place in zip(found, places, strict=True) if places.count(place) > 1
    ]
    checks.require(not twice, "paths", "each run once", f"{twice[:1]} twice")
    runs = [_read(path, name) for path, name in zip(found, _names(places), strict=True)]
    files = [(each, file) for run in runs for each, file in run.files]
    shares = _shares([file.rows for _, file in files], solutions)
    for (each, file), share in zip(files, shares, strict=True):
        _read_solutions(file, share, each.notes)
    return runs


def _names(places: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell them apart."""
    for length in range(1, 1 + max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-length:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def _shares(sizes: Sequence[int], total: int) -> list[int]:
    """Parts of `total`, as equal as sizes allow; the smallest files are served first."""
    shares = [0] * len(sizes)
    for done, index in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        shares[index] = min(sizes[index], total // (len(sizes) - done))
        total -= shares[index]
    return shares


def _read(path: Path, name: str) -> Run:
    if path.is_file():
        alone = Round(0, files=[SolutionFile("labelled", path, _count(path))])
        return Run(name, path, "", "", [alone])
    want = "a folder of `stepkto iterate` or a file of labelled rows"
    checks.require(path.is_dir(), str(path), want, "nothing there")
    numbered = ((_ROUND.fullmatch(each.name), each) for each in path.iterdir() if each.is_dir())
    folders = sorted((int(match[1]), each) for match, each in numbered if match)
    if not folders and any((path / part).exists() for part in ("metrics.json", "evaluation")):
        folders = [(0, path)]
    checks.require(bool(folders), str(path), want, "a folder without round_0, round_1, ...")
    settings = path / "config.yaml"
    text = settings.read_text("utf-8", errors="replace") if settings.is_file() else ""
    rounds, methods = [], set()
    for number, folder in folders:
        each, method = _read_round(number, folder)
        rounds.append(each)
        methods.add(method)
    line = _METHOD.search(text)
    methods.discard("")
    return Run(name, path, line[1] if line else ", ".join(sorted(methods)), text, rounds)


def _read_round(number: int, folder: Path) -> tuple[Round, str]:
    """What is in the folder of a round, solutions left out, and the method it names."""
    each, method = Round(number), ""
    path = folder / "metrics.json"
    if path.is_file():
        each.metrics, method = _read_metrics(path)
    else:
        each.notes.append("not evaluated yet")
    state = folder / "model" / "trainer_state.json"
    if state.is_file():
        each.log = _read_log(state)
    for name, part in SETS.items():
        if (folder / part).is_file():
            each.files.append(SolutionFile(name, folder / part, _count(folder / part)))
    if (folder / "samples.jsonl").is_file() and not (folder / SETS["training"]).is_file():
        samples = _count(folder / "samples.jsonl")
        each.notes.append(f"{samples} samples are not labelled yet")
    return each, method


def _count(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: want a JSON object, but {error}") from None
    checks.require(isinstance(found, dict), str(path), "a JSON object", type(found).__name__)
    return found


def _read_metrics(path: Path) -> tuple[dict[str, Metric], str]:
    found = _read_object(path)
    metrics = found.get("metrics")
    is_table = isinstance(metrics, dict) and all(isinstance(m, dict) for m in metrics.values())
    want = 'objects by name, {"value": x, "low": a, "high": b}'
    checks.require(is_table, f"{path}: metrics", want, repr(metrics)[:80])
    assert isinstance(metrics, dict)
    table = {}
    for name, metric in metrics.items():
        checks.require("value" in metric, f"{path}: metrics.{name}", "a value", list(metric))
        ends = ("value", "low", "high")
        table[name] = Metric(*(_number(metric.get(k), f"{path}: {name}.{k}") for k in ends))
    return table, str(found.get("method", ""))


def _number(value: object, where: str) -> float | None:
    """A finite number, or None for null and for NaN, a share of nothing."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    checks.require(value is None or is_number, where, "a number or null", repr(value))
    return float(value) if is_finite(value) else None  # type: ignore[arg-type]


def is_finite(value: object) -> bool:
    """Whether it is a number, and one with which a chart can calculate."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < LARGEST  # type: ignore[arg-type]


def _read_log(path: Path) -> list[dict[str, Any]]:
    log = _read_object(path).get("log_history")
    is_log = isinstance(log, list) and all(isinstance(record, dict) for record in log)
    checks.require(is_log, f"{path}: log_history", "a list of objects", repr(log)[:80])
    assert isinstance(log, list)
    return [record for record in log if is_finite(record.get("step"))]


def _read_solutions(file: SolutionFile, share: int, notes: list[str]) -> None:
    folder = file.path.parent
    ratios: dict[Key, tuple[float, ...]] = {}
    chosen: set[Key] | None = None
    if share and file.name == "training":
        if (folder / "log_ratios.jsonl").is_file():
            ratios = _read_ratios(folder / "log_ratios.jsonl")
        if (folder / "selected.jsonl").is_file():
            rows = read_rows(folder / "selected.jsonl")
            chosen = {key for where, row in rows if (key := _key(row, where))}
    for where, row in islice(read_rows(file.path), share):
        try:
            row = _clean(row)
        except RecursionError:
            raise ValueError(f"{where}: want fewer levels, got hundreds") from None
        key = _key(row, where)
        problem_id, sample = key if key else (None, None)
        example = parse_row(row, where)
        own = ratios.get(key) if key else None
        if own is not None:
            name, pieces = (
                f"{folder / 'log_ratios.jsonl'}: steps of {key}",
                len(example.completions),
            )
            checks.require(len(own) == pieces, name, f"{pieces} numbers", len(own))
        trained = None if chosen is None or key is None else key in chosen
        file.solutions.append(Solution(example, problem_id, sample, own, trained))
    if share and file.name == "training" and not ratios:
        notes.append("no log-ratios against the reference")


def _read_ratios(path: Path) -> dict[Key, tuple[float, ...]]:
    found: dict[Key, tuple[float, ...]] = {}
    for where, row in read_rows(path):
        key, steps = _key(row, where), row.get("steps")
        checks.require(key is not None, where, "problem_id and sample", sorted(row))
        is_list = isinstance(steps, list) and all(
            isinstance(step, (int, float)) and not isinstance(step, bool) for step in steps
        )
        checks.require(is_list, f"{where}: steps", "a list of numbers", repr(steps)[:80])
        assert key is not None and isinstance(steps, list)
        checks.require(
            key not in found, f"{where}: problem_id and sample", "a pair of its own", key
        )
        found[key] = tuple(map(_ratio, steps))
    return found


def _ratio(value: float) -> float:
    """Too large is infinite: float() would refuse an integer of 400 digits."""
    if is_finite(value) or value != value:
        return float(value)
    return math.inf if value > 0 else -math.inf


def _key(row: Mapping[str, Any], where: str) -> Key | None:
    """Which sample a row is, None where neither field is there."""
    problem_id, sample = row.get("problem_id"), row.get("sample")
    if problem_id is None and sample is None:
        return None
    is_text = isinstance(problem_id, str)
    checks.require(is_text, f"{where}: problem_id", "a string", repr(problem_id))
    is_number = isinstance(sample, int) and not isinstance(sample, bool)
    checks.require(is_number, f"{where}: sample", "an integer", repr(sample))
    return without_surrogates(problem_id), sample  # type: ignore[arg-type,return-value]


def _clean(value: Any) -> Any:
    """JSON with its strings as `without_surrogates` leaves them."""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, list):
        return [_clean(each) for each in value]
    if isinstance(value, dict):
        return {key: _clean(each) for key, each in value.items()}
    return value


def shown_and_left_out(runs: Sequence[Run]) -> tuple[int, int]:
    """How many solutions were read, and how many more the files hold."""
    files = [file for run in runs for _, file in run.files]
    shown = sum(len(file.solutions) for file in files)
    return shown, sum(file.rows for file in files) - shown


def all_solutions(runs: Sequence[Run]) -> Iterator[tuple[int, Round, SolutionFile, Solution]]:
    """Every solution that was read, with the index of its run."""
    for index, run in enumerate(runs):
        for each, file in run.files:
            for solution in file.solutions:
                yield index, each, file, solution
