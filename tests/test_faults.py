"""Training and labelling under faults: the result to the bit, or a clear error; nothing lost.

The short version of benchmarks/faults.py, which `make faults` runs.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("yaml")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from faulty import kills  # noqa: E402


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
