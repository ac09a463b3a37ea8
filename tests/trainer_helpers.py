"""Trainers that record what they do, in this process and in one for each rank."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from rank_helpers import NO_MEANS

from stepkto_kernels.training import StepKTOArguments, StepKTOTrainer

ROOT = Path(__file__).parents[1]
# Small steps, all seen: in order, without clipping, which comes before gradients are recorded.
PLAIN = {
    "train_sampling_strategy": "sequential",
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


class Recorder(transformers.TrainerCallback):
    """Gradients before every optimizer step, and what was logged."""

    def __init__(self):
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
        self.gradients.append({n: full(g).clone() for n, g in named.items() if g is not None})

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    @property
    def steps(self) -> list[dict[str, float]]:
        return [logs for logs in self.logs if "loss" in logs]


def full(x: torch.Tensor) -> torch.Tensor:
    """The whole of what may be a DTensor."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def recorded_trainer(
    model, ref, rows, output: Path, *, kind=StepKTOTrainer, batch=8, split=1, extra=None, **options
):
    """Trainer of one epoch, one step of `batch` rows in `split` parts, with `.recorder`."""
    defaults = {
        "output_dir": str(output),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": split,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "save_strategy": "no",
    }
    recorder = Recorder()
    trainer = kind(
        model,
        ref,
        StepKTOArguments(**PLAIN | defaults | options),
        train_dataset=rows,
        callbacks=[recorder],
        **(extra or {}),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.recorder = recorder
    return trainer


# ---- a process for each rank ------------------------------------------------------------------

# It answers in a file and leaves by os._exit: how a process group ends is not what is tested.
# Under FSDP2 CPU processes pass for GPUs while accelerate looks.
CHILD = """
import json, os, sys, torch
from accelerate import state
from accelerate.utils import DistributedType

sys.path.insert(0, sys.argv[1])
from stepkto_kernels.training import StepKTOArguments, StepKTOTrainer
from rank_helpers import takes_means
from trainer_helpers import PLAIN, Recorder, full

folder, options, given = sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])

if "ACCELERATE_USE_FSDP" in os.environ:
    before = state.PartialState.__init__

    def as_gpu(self, *args, **kwargs):
        before(self, *args, **kwargs)
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    state.PartialState.__init__ = as_gpu

data, recorder = folder + "/data.jsonl", Recorder()
defaults = dict(PLAIN, optim="sgd", max_steps=2)
trainer = StepKTOTrainer(
    folder + "/model",
    args=StepKTOArguments(folder + "/out", **defaults | options),
    train_dataset=data,
    eval_dataset=data if "eval_strategy" in options else None,
    callbacks=[recorder],
)
sharded = "ACCELERATE_USE_FSDP" in os.environ
found = {"means": not sharded or takes_means(torch.distributed.group.WORLD)}
%s
names = {name.removeprefix("module.") for name, _ in trainer.model.named_parameters()}
assert all(gradients.keys() == names for gradients in recorder.gradients)
found |= {"gradients": recorder.gradients, "logs": recorder.steps}
torch.save(found, f"{folder}/found_{os.environ.get('RANK', 'alone')}.pt")
os._exit(0)
"""


def train_ranks(code: str, folder: Path, ranks: int, options: dict, *, given=None, settings=None):
    """What each process found: `code` with a `trainer` of folder/model and folder/data.jsonl.

    Gradients, logs and what `code` puts into `found`. given: passed on as JSON. settings: more of
    the environment of several processes.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    common = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
    words = [sys.executable, "-c", CHILD % code, str(ROOT / "tests"), str(folder)]
    words += [json.dumps(options), json.dumps(given)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    names = ["alone"] if ranks == 1 else [str(rank) for rank in range(ranks)]
    processes = []
    for name in names:
        own = dict(common)
        if ranks > 1:
            own |= {"RANK": name, "LOCAL_RANK": name, "WORLD_SIZE": str(ranks)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | (settings or {})
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(words, env=os.environ | own, stdout=pipe, stderr=pipe, text=True)
        )
    for process in processes:
        try:
            _, stderr = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            pytest.fail("a process hangs")
        assert process.returncode == 0, stderr[-3000:]
    found = [torch.load(folder / f"found_{name}.pt") for name in names]
    if not all(each["means"] for each in found):
        pytest.skip(NO_MEANS)
    return found
