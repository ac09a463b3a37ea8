"""Every script of examples/ runs on a tiny model, and the custom loop's two versions agree."""

import difflib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"
TESTED_ELSEWHERE = {"demo.py": "test_demo", "train_step_kto.py": "test_train_example"}
TESTED_ELSEWHERE["trl_kto.py"] = "test_trl"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a script here, with its output in tmp_path; gives what it printed."""

    def run(name: str, *words: str) -> str:
        monkeypatch.setenv("TQDM_DISABLE", "1")
        arguments = [name, "--output", str(tmp_path / "out"), "--steps", "2", *words]
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def losses(printed: str) -> list[float]:
    return [float(v) for v in re.findall(r"(?:\{.loss.: .|: loss )([0-9.]+)", printed)]


def test_every_example_is_tested():
    text = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.name in TESTED_ELSEWHERE or f'"{path.name}"' in text, path


def test_custom_loop_differs_from_the_one_with_logits_in_a_few_lines(run):
    before, after = "custom_loop_before.py", "custom_loop.py"
    read = lambda name: (EXAMPLES / name).read_text().splitlines()[5:]  # below the docstring
    changed = [
        line for line in difflib.ndiff(read(before), read(after)) if line.startswith(("+ ", "- "))
    ]
    assert len(changed) <= 20
    first, second = losses(run(before)), losses(run(after))
    assert len(first) == 2 and first == pytest.approx(second, rel=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["lm_head"]], ids=" ".join)
def test_lora(run, tmp_path, targets):
    pytest.importorskip("peft")
    assert len(losses(run("lora.py", "--targets", *targets))) == 2
    assert (tmp_path / "out/adapter_model.safetensors").exists()


def test_packing(run, tmp_path):
    printed = run("packing.py")
    assert "would be padding" in printed and len(losses(printed)) == 2
    assert (tmp_path / "out/model.safetensors").exists()


def test_fsdp2_alone(run, tmp_path):
    """The script as one process: accelerate has no FSDP on a CPU."""
    assert len(losses(run("fsdp2.py"))) == 2
    assert (tmp_path / "out/trained/model.safetensors").exists()


def test_fsdp2_on_two_processes(tmp_path):
    """With data parallelism, as accelerate has no FSDP on a CPU."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(EXAMPLES / "fsdp2.py"), "--output", str(tmp_path / "out"), "--steps", "2"]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    path = os.pathsep.join(filter(None, (str(EXAMPLES.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *launch, *script],
        env=os.environ | settings | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(done.stdout)) == 2
    assert (tmp_path / "out/trained/model.safetensors").exists()
