"""Files of problems and samples: what is read, what is refused, and what a killed writer leaves."""

import errno
import json
import os

import pytest

from stepkto_kernels.training.records import (
    Problem,
    RowWriter,
    Sample,
    as_row,
    read_problems,
    read_rows,
    read_samples,
)

PROBLEM = {"id": "a", "problem": "2 + 2?", "answer": "4"}
SAMPLE = {"problem_id": "a", "sample": 0, "prompt": "2 + 2?", "completion": "4", "finish": "stop"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_problems_and_samples_come_back(tmp_path):
    problems = [Problem("a", "2 + 2?", "4"), Problem("b", "é?", "", "a solution")]
    path = write(tmp_path / "p.jsonl", *map(as_row, problems))
    assert read_problems(path) == problems
    messages = ({"role": "user", "content": "2 + 2?"},)
    samples = [Sample(**SAMPLE), Sample("a", 1, messages, "5\u2028", "length")]
    assert read_samples(write(tmp_path / "s.jsonl", *map(as_row, samples))) == samples


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id": ""}, "line 2: id: want a string that is not empty"),
        ({"id": 3}, "line 2: id: want a string, got 3"),
        ({"problem": None}, "line 2: problem: want a string"),
        ({"solution": 1}, "line 2: solution: want a string or null"),
        ({"id": "a"}, "line 2: id: want one of its own, got a"),
    ],
)
def test_malformed_problems(tmp_path, change, message):
    path = write(tmp_path / "p.jsonl", PROBLEM, PROBLEM | {"id": "b"} | change)
    with pytest.raises(ValueError, match=message):
        read_problems(path)


def test_a_missing_field_is_named(tmp_path):
    with pytest.raises(ValueError, match="line 1: .*answer"):
        read_problems(write(tmp_path / "p.jsonl", {"id": "a", "problem": "p"}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sample": -1}, "sample: want an int >= 0"),
        ({"finish": "bored"}, "finish: want one of"),
        ({}, "want a pair of its own"),
    ],
)
def test_malformed_samples(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_samples(write(tmp_path / "s.jsonl", SAMPLE, SAMPLE | change))


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\xff"])
def test_a_line_that_is_no_object(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match="p.jsonl, line 2: want a JSON object"):
        list(read_rows(path))


@pytest.mark.parametrize("kept", range(len(json.dumps(SAMPLE)) + 1))
def test_a_torn_last_line_is_cut_off(tmp_path, kept):
    """Killed at any byte of the second row: the first is there once, the second again or not."""
    path = tmp_path / "deep" / "s.jsonl"
    with RowWriter(path) as writer:
        writer.write(SAMPLE)
    whole = path.read_bytes()
    second = json.dumps(SAMPLE | {"sample": 1}).encode() + b"\n"
    path.write_bytes(whole + second[:kept])
    with RowWriter(path) as writer:
        assert writer.rows == [SAMPLE]
        writer.write(SAMPLE | {"sample": 1})
    assert path.read_bytes() == whole + second


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "s.jsonl"
    with RowWriter(path) as writer:
        writer.write(SAMPLE)

        def full(descriptor):
            raise OSError(errno.ENOSPC, "no space left")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="no space"):
                writer.write(SAMPLE | {"sample": 1})
        writer.write(SAMPLE | {"sample": 2})
    assert [row["sample"] for _, row in read_rows(path)] == [0, 2]
