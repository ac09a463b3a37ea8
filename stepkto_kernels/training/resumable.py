"""transformers' Trainer with checkpoints that are whole or not used, and of this training."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from stepkto_kernels import checks
from stepkto_kernels.integrations.transformers import causal_lm
from stepkto_kernels.training import checkpoints
from stepkto_kernels.training.arguments import LOSS_OPTIONS
from stepkto_kernels.training.dataset import StepKTODataset

# Options that decide what the weights become, beside the loss's. Those of the optimizer would be
# taken from the checkpoint, whatever is asked for.
OPTIONS = (
    *LOSS_OPTIONS,
    *("max_length", "step_separator", "add_eos", "bf16", "fp16", "seed", "data_seed"),
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "gradient_bound"),
)
SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
# of torch.save, where the disk is full
WRITE_ERRORS = ("PytorchStreamWriter", "unexpected pos")


class ResumableTrainer(Trainer):
    """Trainer whose checkpoints are used only where they are whole and of the same training."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kw: Any) -> Any:
        """As Trainer.train; True goes on from the newest whole checkpoint of output_dir.

        Raises:
            ValueError: a checkpoint is not whole, of another training, or has a pickle of something
                else than numbers in it; names what differs.
            OSError: a checkpoint cannot be written.
        """
        if resume_from_checkpoint:
            folder = self._whole_checkpoint(resume_from_checkpoint)
            checkpoints.check_settings(folder, self.checkpoint_settings())
            resume_from_checkpoint = str(folder)
        try:
            return super().train(resume_from_checkpoint, *args, **kw)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))  # torch's advice is to run it
            got = f"a pickle that wants {found[1]}" if found else "another pickle"
            want = "only numbers and tensors in its files"
            raise ValueError(f"{resume_from_checkpoint}: want {want}, got {got}") from None

    def _whole_checkpoint(self, asked: str | bool) -> Path:
        if isinstance(asked, bool):
            output = Path(str(self.args.output_dir))
            found = checkpoints.newest(output)
            if found is None:
                raise ValueError(f"{output}: want a whole checkpoint in it, got none")
            return found
        folder = Path(asked)
        why = checkpoints.flaw(folder)
        checks.require(why is None, str(folder), "a whole checkpoint", f"one where {why}")
        return folder

    def checkpoint_settings(self) -> dict[str, Any]:
        """What a training that goes on from a checkpoint has to have in common with it."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        config = causal_lm(model).config
        found = {name: getattr(args, name) for name in OPTIONS}
        found["trainer"] = type(self).__name__
        found["optim"] = str(getattr(args.optim, "value", args.optim))
        found |= {name: getattr(config, name, None) for name in SHAPE}
        found["dtype"] = str(next(causal_lm(model).parameters()).dtype).removeprefix("torch.")
        found["adapter"] = adapter(model)
        # what is passed over when data is read again is counted in these
        sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
        found["sequences_per_step"] = sequences * args.world_size
        if isinstance(self.train_dataset, StepKTODataset):
            found["examples"] = len(self.train_dataset)
            found["data"] = self.train_dataset.content
        return found

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As Trainer's."""
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            # accelerate keeps every loader that it prepared, and each evaluation has one of its own
            kept = self.accelerator._dataloaders
            kept[:] = [each for each in kept if each is not dataloader]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output = Path(self._get_output_dir(trial=trial))
        folder = output / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():  # of a run that was killed in writing it
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        with writing(folder):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:  # once more, with what was written behind the seal
                checkpoints.seal(folder, self.checkpoint_settings(), with_state=True)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which takes a step too many where a training ended within an epoch."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        # the last that all ranks write; behind it come trainer_state.json and the removal of old
        # checkpoints
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.seal(Path(output_dir), self.checkpoint_settings())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with writing(Path(str(output_dir or self.args.output_dir))):
            super().save_model(output_dir, _internal_call)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Errors of a disk as OSError, whichever library wrote."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        is_write = isinstance(error, SafetensorError) or any(x in str(error) for x in WRITE_ERRORS)
        if not is_write:
            raise
        free = shutil.disk_usage(folder).free // 2**20 if os.path.exists(folder) else 0
        text = f"{folder}: cannot be written, with {free} MiB free: {error}"
        raise OSError(text) from error


def adapter(model: nn.Module) -> dict[str, list[Any]] | None:
    """Kind, rank and scale of a PEFT adapter; None where there is none."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return None
    names = ("peft_type", "r", "lora_alpha")
    values = {key: [getattr(each, name, None) for name in names] for key, each in configs.items()}
    return {
        key: [getattr(value, "value", value) for value in found] for key, found in values.items()
    }
