"""Hundreds of calls of each op leave nothing behind; the short version of `make leaks`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def measure():
    path = BENCHMARKS / "leaking/measure.py"
    spec = importlib.util.spec_from_file_location("leaking_measure", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """In a process of its own: what other tests left would be collected in between."""
    result = tmp_path_factory.mktemp("leaks") / "leaks.json"
    command = [sys.executable, str(BENCHMARKS / "leaks.py"), "--quick", "--result", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text())


def test_no_op_keeps_an_object_or_32_bytes(found):
    assert len(found["calls"]) > 40
    grew = {name: each for name, each in found["calls"].items() if each["grew"]}
    assert grew == {}


def test_what_leaks_on_purpose_is_found(found):
    """A float's tensor a call, 64 bytes of malloc, and more; bytes of Python's take `make leaks`"""
    for name, each in found["controls"].items():
        expected = set(found["expected"][name]) - {"resident", "blocks"}
        assert expected <= set(each["grew"]), name
        assert expected or name == "64 bytes of Python's"


def test_slopes_and_their_bounds(measure):
    """A late page does not count, steady growth does, and noise widens the bound."""
    at = list(range(0, 2500, 100))
    flat = [4096.0 * (t >= 2100) for t in at]
    middle, upper = measure.slope(flat, at)
    assert middle == 0 and 0 <= upper < 10
    steady = [64.0 * t + 4096 * (t % 300 == 0) for t in at]
    middle, upper = measure.slope(steady, at)
    assert upper >= 64 and abs(middle - 64) < 10
    noise = [4096.0 * ((7 * t // 100) % 5) for t in at]
    assert measure.slope(noise, at)[1] > measure.slope(flat, at)[1] >= 0


def test_an_evaluation_leaves_no_loader_behind(tiny_model, tokenizer, row, tmp_path):
    """accelerate keeps every loader that it prepares, and Trainer makes one an evaluation."""
    pytest.importorskip("transformers")
    from stepkto_kernels.training import StepKTOArguments, StepKTOTrainer

    args = StepKTOArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    rows = [row(i) for i in range(4)]
    trainer = StepKTOTrainer(
        tiny_model(), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    for _ in range(3):
        trainer.evaluate()
        assert trainer.accelerator._dataloaders == []
