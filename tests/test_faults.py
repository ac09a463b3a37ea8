"""Training and labelling under faults: the result to the bit, or a clear error; nothing lost.

The short version of `make faults`, in a process of its own: it forks, so nothing in it may have
started a thread.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("yaml")

SCRIPT = Path(__file__).parents[1] / "benchmarks/faults.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    result = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--result", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.exists(), done.stderr
    return json.loads(result.read_text())["faults"]


@pytest.mark.parametrize(
    ("fault", "injected", "outcome"),
    [
        ("SIGKILL of stepkto train", 2, "survived"),
        ("SIGKILL of stepkto iterate", 2, "survived"),
        ("checkpoint of another training", 13, "stopped"),
        ("disk full", 4, "stopped"),
        ("corrupt line", 6, "stopped"),
    ],
)
def test_fault(found, fault, injected, outcome):
    assert found[fault]["problems"] == []
    assert found[fault]["injected"] == found[fault][outcome] == injected


def test_a_damaged_checkpoint_is_passed_by_or_refused(found):
    count = found["checkpoint file damaged"]
    assert count["problems"] == []
    assert (count["survived"], count["stopped"]) == (3, 1)


def test_a_judge_that_fails_a_fifth_of_all_calls_changes_no_label(found):
    count = found["judge fails, SIGKILL of stepkto label"]
    assert count["problems"] == []
    assert count["injected"] == count["survived"] == count["notes"]["failed calls"] + 2
    assert count["notes"]["failed calls"] > 10


LOCKED = """
import os, signal, sys

sys.path[:0] = [sys.argv[1], sys.argv[1] + "/benchmarks"]
from faulty import processes
from tqdm.auto import tqdm

tqdm.get_lock()  # before the forks, so that all of them have it

def die():
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)

assert processes.command(["doctor"], before=die).status is None
print(processes.command(["doctor"], 60, before=lambda: tqdm.get_lock().acquire()).status)
"""


def test_a_command_killed_in_the_lock_of_a_progress_bar_locks_no_other():
    command = [sys.executable, "-c", LOCKED, str(SCRIPT.parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "0", done.stderr
