"""Training and labelling under faults: the result to the bit, or a clear error; nothing lost.

The short version of benchmarks/faults.py, which `make faults` runs.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("yaml")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from faulty import files, judging, kills  # noqa: E402


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return kills.make_inputs(tmp_path_factory.mktemp("inputs"))


def check(count, injected):
    assert count.problems == [] and count.lost == 0
    assert count.injected == injected == count.survived + count.stopped


def test_killed_training_ends_with_the_same_weights_and_log(inputs, tmp_path):
    check(kills.kill_training(inputs, tmp_path, 3), 3)


def test_killed_rounds_end_with_the_same_files(inputs, tmp_path):
    check(kills.kill_rounds(inputs, tmp_path, 2), 2)


def test_a_damaged_checkpoint_is_passed_by_or_refused(inputs, tmp_path):
    check(files.damage_checkpoints(inputs, tmp_path, 3), 4)


def test_a_checkpoint_of_another_training_is_refused_by_what_differs(inputs, tmp_path):
    check(files.other_trainings(inputs, tmp_path), 13)


def test_a_full_disk_stops_and_loses_nothing(inputs, tmp_path):
    check(files.fill_disks(inputs, tmp_path, [100_000, 500_000]), 4)


def test_a_corrupt_line_is_named(inputs, tmp_path):
    check(files.corrupt_lines(inputs, tmp_path, ["cut in half", "no end of line"], 2000), 6)


def test_a_judge_that_fails_a_fifth_of_all_calls_changes_no_label(tmp_path):
    count = judging.fail_calls(tmp_path, 100)
    check(count, count.notes["failed calls"])
    assert count.injected > 10
