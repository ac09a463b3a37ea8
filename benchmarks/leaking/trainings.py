"""Thousands of optimizer steps of training, looked at on the way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from leaking.measure import Held, Looks
from stepkto_kernels.training import StepKTOArguments, StepKTOTrainer
from stepkto_kernels.training.tiny import make_data, make_model

ROOT = Path(__file__).resolve().parents[2]


class Steps:
    """Called after every step; looks after the warm-up, and at even distances from then."""

    def __init__(self, steps: int, warm_up: int, samples: int):
        self.at = {warm_up + (steps - warm_up) * i // samples for i in range(samples + 1)}
        self.looks = Looks(samples + 1)
        self.step = 0

    def __call__(self) -> None:
        self.step += 1
        if self.step in self.at:
            self.looks.look()


class LookCallback(TrainerCallback):
    """Looks, and keeps the last ten lines of the log only: it grows by design, a line a time."""

    def __init__(self, steps: Steps):
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        del state.log_history[:-10]
        self.steps()


def trainer(folder: Path, steps: int, warm_up: int, samples: int) -> list[Held]:
    """Mismatched reference points, two micro-batches a step, logs, checkpoints and evaluation."""
    after_step = Steps(steps, warm_up, samples)
    args = StepKTOArguments(
        output_dir=str(folder / "out"),
        use_cpu=True,
        max_steps=steps,
        learning_rate=1e-4,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=5,
        save_steps=20,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=20,
        report_to="none",
        disable_tqdm=True,
    )
    model = make_model(folder / "model")
    StepKTOTrainer(
        str(model),
        args=args,
        train_dataset=str(make_data(folder / "train.jsonl", 64)),
        eval_dataset=str(make_data(folder / "eval.jsonl", 8, seed=1)),
        callbacks=[LookCallback(after_step)],
    ).train()
    return after_step.looks.found


def custom_loop(folder: Path, steps: int, warm_up: int, samples: int) -> list[Held]:
    """The example's own loop; it prints once a step, which is where it is looked at."""
    sys.path.insert(0, str(ROOT / "examples"))
    import custom_loop as example

    after_step = Steps(steps, warm_up, samples)
    example.print = lambda text: after_step()  # type: ignore[attr-defined]
    sys.argv[1:] = ["--output", str(folder), "--steps", str(steps)]
    example.main()
    return after_step.looks.found


TRAININGS: dict[str, Callable[[Path, int, int, int], list[Held]]] = {
    "StepKTOTrainer": trainer,
    "examples/custom_loop.py": custom_loop,
}
