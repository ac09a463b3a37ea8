"""StepKTOTrainer on two processes, DDP and FSDP2: the gradient of one process with all of a batch.

accelerate does not offer FSDP to CPU processes. A child that is to have it passes for one of
several GPUs while accelerate looks at it; what then shards and trains is the real thing.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM  # noqa: E402

from stepkto_kernels.training.tiny import make_data, make_model  # noqa: E402

ROOT = Path(__file__).parents[1]
# A child answers and leaves by os._exit: how a process group ends is not what is tested here.
CHILD = """
import json, os, sys, torch
from accelerate import state
from accelerate.utils import DistributedType
from transformers import TrainerCallback
from stepkto_kernels.training import StepKTOArguments, StepKTOTrainer

folder, options = sys.argv[1], json.loads(sys.argv[2])
found = {"gradients": [], "logs": []}
full = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x

if "ACCELERATE_USE_FSDP" in os.environ:
    before = state.PartialState.__init__

    def as_gpu(self, *args, **kwargs):
        before(self, *args, **kwargs)
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    state.PartialState.__init__ = as_gpu

class Recorder(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {n.removeprefix("module."): p for n, p in model.named_parameters()}
        found["gradients"].append({n: full(p.grad).clone() for n, p in named.items()})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            found["logs"].append(dict(logs))

args = StepKTOArguments(
    folder + "/out", learning_rate=1e-2, optim="sgd", max_grad_norm=0.0, max_steps=2,
    logging_steps=1,
    train_sampling_strategy="sequential", save_strategy="no", report_to=[], disable_tqdm=True,
    use_cpu=True, **options)
trainer = StepKTOTrainer(folder + "/model", args=args, train_dataset=folder + "/data.jsonl",
                         callbacks=[Recorder()])
trainer.train()
found["parameters"] = [full(p.detach()).clone() for p in trainer.model_wrapped.parameters()]
found["sharded"] = [hasattr(p, "full_tensor") for p in trainer.model_wrapped.parameters()]
if not any(found["sharded"]):  # full state dicts of DTensors on a CPU come without being waited for
    trainer.save_model(folder + "/saved")
torch.save(found, f"{folder}/found_{os.environ.get('RANK', 'alone')}.pt")
os._exit(0)
"""


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def start(
    folder: Path, options: dict, rank: int | None = None, port: int = 0, more: dict | None = None
) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
    if rank is not None:
        settings |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | (more or {})
    words = [sys.executable, "-c", CHILD, str(folder), json.dumps(options)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=os.environ | settings, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen) -> None:
    try:
        _, stderr = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("a process hangs")
    assert process.returncode == 0, stderr[-3000:]


def train(
    folder: Path, batch: int, split: int, ranks: int, options: dict, more: dict | None = None
) -> list[dict]:
    options = options | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": split}
    if ranks == 1:
        finish(start(folder, options))
        return [torch.load(folder / "found_alone.pt")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for process in [start(folder, options, rank, port, more) for rank in range(2)]:
        finish(process)
    return [torch.load(folder / f"found_{rank}.pt") for rank in range(2)]


@pytest.fixture
def folder(tmp_path):
    """16 rows, of which the second process's first four have no labels and none is desirable."""
    make_model(tmp_path / "model")
    rows = [json.loads(line) for line in make_data(tmp_path / "all.jsonl", 16).open()]
    for row in rows[4:8]:
        row["labels"], row["label"] = [None] * len(row["labels"]), None
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    "split, options",
    [
        (1, {}),
        (1, {"reference_point": "matched"}),
        (2, {"reference_point": "zero", "precompute_ref_log_probs": True}),
    ],
    ids=["mismatched", "matched", "accumulated, cached"],
)
@pytest.mark.parametrize("more", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_two_processes_have_the_gradient_of_one(folder, split, options, more):
    """TRL 7245, 5282: a gradient that is not synchronised. TRL 1396: a rank without desirable
    examples neither hangs nor skews. FSDP2: ranks' contributions to the head's gradient are
    summed, which full_tensor() would lose."""
    (alone,) = train(folder, 8, 1, 1, options)
    both = train(folder, 4 // split, split, 2, options, more)
    for found in both:
        assert all(found["sharded"]) == bool(more) and not any(alone["sharded"])
        assert len(found["gradients"]) == len(found["logs"]) == 2
        for got, want in zip(found["gradients"], alone["gradients"], strict=True):
            assert got.keys() == want.keys()
            largest = max(float(g.abs().max()) for g in want.values())
            for name in want:  # fp32 sums in another order
                torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-5 * largest)
    for name in ("loss", "outcome_loss", "step/loss", "kl", "step/kl", "tokens"):
        for k in range(2):
            want = alone["logs"][k][name]
            assert both[0]["logs"][k][name] == pytest.approx(want, rel=1e-4, abs=1e-5)
    for mine, other in zip(both[0]["parameters"], both[1]["parameters"], strict=True):
        assert torch.equal(mine, other)
    if more:
        return
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved")
    for mine, other in zip(both[0]["parameters"], saved.parameters(), strict=True):
        assert torch.equal(mine, other)
