"""Sampled solutions become labelled rows: cut into steps, outcome and steps judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stepkto_kernels import checks
from stepkto_kernels.training.data import parse_row
from stepkto_kernels.training.records import Problem, RowWriter, Sample
from stepkto_kernels.training.rewards.base import (
    AFTER_ERROR,
    Label,
    OutcomeReward,
    ProcessReward,
    Solution,
    after_first_error,
    check_label,
    judge_steps,
)
from stepkto_kernels.training.steps import STYLES, split_solution

Row = dict[str, Any]
NAMES = {True: "right", False: "wrong", None: "unlabelled"}


class Labeller:
    """Makes rows of the data format, with `problem_id` and `sample` beside.

    The line that only states the answer is a piece of the row and has no step label. A completion
    without text is one empty piece.

    Args:
        problems: by id.
        outcome: None leaves outcomes unlabelled; has to be safe for `workers` threads.
        process: None leaves steps unlabelled.
        after_error: what becomes of the verdicts behind a first wrong step, as after_first_error.
        style: where a step starts, as split_solution.
        workers: outcomes judged at the same time, >= 1.
    Raises:
        ValueError: an argument outside of the above.
    """

    def __init__(
        self,
        problems: Mapping[str, Problem],
        outcome: OutcomeReward | None,
        process: ProcessReward | None,
        *,
        after_error: str = "keep",
        style: str = "auto",
        workers: int = 1,
    ):
        checks.choice("after_error", after_error, AFTER_ERROR)
        checks.choice("style", style, STYLES)
        checks.integer("workers", workers, low=1)
        self.problems, self.outcome, self.process = problems, outcome, process
        self.after_error, self.style, self.workers = after_error, style, workers

    def __call__(self, samples: Sequence[Sample]) -> list[Row]:
        """A row for each sample, in order.

        Raises:
            ValueError: a problem is not known, a reward does not keep to its interface, or a text
                cannot be written as UTF-8.
        """
        problems = [self._problem(sample) for sample in samples]
        splits = [split_solution(sample.completion, self.style) for sample in samples]
        steps: list[list[Label]] = [[None] * len(split.reasoning_steps) for split in splits]
        if self.process is not None:
            solutions = [
                Solution(problem, split.reasoning_steps, sample.prompt)
                for problem, split, sample in zip(problems, splits, samples, strict=True)
            ]
            steps = judge_steps(self.process, solutions)
        outcomes = self._outcomes(problems, samples)
        rows = []
        for i, sample in enumerate(samples):
            pieces = list(splits[i].steps) or [""]
            labels = after_first_error(steps[i], self.after_error)
            labels += [None] * (len(pieces) - len(labels))
            row = {
                "problem_id": sample.problem_id,
                "sample": sample.sample,
                "prompt": sample.prompt,
                "completions": pieces,
                "labels": labels,
                "label": outcomes[i],
            }
            parse_row(row, f"problem {sample.problem_id!r}, sample {sample.sample}")
            rows.append(row)
        return rows

    def _problem(self, sample: Sample) -> Problem:
        known = sample.problem_id in self.problems
        checks.require(known, "problem_id", "one of the problems", repr(sample.problem_id))
        return self.problems[sample.problem_id]

    def _outcomes(self, problems: Sequence[Problem], samples: Sequence[Sample]) -> list[Label]:
        if self.outcome is None:
            return [None] * len(samples)
        texts = [sample.completion for sample in samples]
        with ThreadPoolExecutor(self.workers) as threads:
            labels = list(threads.map(self.outcome, problems, texts))
        return [check_label("outcome reward", label) for label in labels]


def label_into(
    writer: RowWriter, samples: Sequence[Sample], labeller: Labeller, *, chunk: int = 64
) -> Iterable[int]:
    """Label what the file does not have yet, in order; gives the number of rows after each chunk.

    Args:
        writer: of the labelled file, opened anew.
        samples: all of them, each once.
        labeller: makes the rows.
        chunk: samples that are labelled, and lost by a kill, together, >= 1.
    Raises:
        ValueError: the file has rows of other samples; as Labeller.
        OSError: the file cannot be written.
    """
    checks.integer("chunk", chunk, low=1)
    for sample in samples:  # before anything is paid for
        labeller._problem(sample)
    done = already_labelled(writer, samples)
    todo = [sample for sample in samples if sample.key not in done]
    for first in range(0, len(todo), chunk):
        for row in labeller(todo[first : first + chunk]):
            writer.write(row)
            writer.rows.append(row)
        yield len(writer.rows)


def already_labelled(writer: RowWriter, samples: Sequence[Sample]) -> set[tuple[str, int]]:
    """Keys of the rows that are there.

    Raises:
        ValueError: a row is there twice, or of no sample, or of one with another text.
    """
    by_key = {sample.key: sample for sample in samples}
    done: set[tuple[str, int]] = set()
    for number, row in enumerate(writer.rows, start=1):
        where = f"{writer.path}, row {number}"
        example = parse_row(row, where)
        name, sample_number = row.get("problem_id"), row.get("sample")
        is_key = isinstance(name, str) and isinstance(sample_number, int)
        key = (str(name), sample_number if isinstance(sample_number, int) else -1)
        checks.require(is_key and key in by_key, where, "a row of one of the samples", key)
        sample = by_key[key]
        same = "".join(example.completions) == sample.completion and example.prompt == sample.prompt
        checks.require(same, where, "the text of its sample", f"another for {key}")
        checks.require(key not in done, where, "each sample once", f"{key} again")
        done.add(key)
    return done


def count_labels(rows: Iterable[Row]) -> tuple[Counter[str], Counter[str]]:
    """How many outcomes and how many pieces are right, wrong and unlabelled."""
    outcomes: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    for row in rows:
        outcomes[NAMES[row["label"]]] += 1
        steps.update(NAMES[label] for label in row["labels"])
    return outcomes, steps
