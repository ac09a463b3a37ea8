"""What `stepkto train` shows: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SHOWN = (  # of the metrics: what says whether a run is healthy
    "loss",
    "eval_loss",
    "kl",
    "rewards/margins",
    "step/rewards/margins",
    "saturated",
    "grad_norm",
    "skipped",
    "learning_rate",
)


def progress() -> TrainerCallback:
    """The bar where standard output is a terminal and rich is installed, else lines."""
    if sys.stdout.isatty():
        try:
            return Bar()
        except ImportError:
            pass
    return Lines()


def healthy(logs: dict[str, Any]) -> str:
    """The metrics that are shown, as `name value`."""
    return ", ".join(f"{name} {logs[name]:.4g}" for name in SHOWN if name in logs)


class Lines(TrainerCallback):
    """A line for every log of the main process."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **unused: Any,
    ) -> None:
        text = healthy(logs or {})
        if text and state.is_world_process_zero:
            print(f"step {state.global_step}/{state.max_steps}: {text}", flush=True)


class Bar(TrainerCallback):
    """rich's bar, and the metrics of the last log beside it.

    Raises:
        ImportError: rich is not installed.
    """

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}"))
        self.bar = Progress(*columns)
        self.task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        if state.is_world_process_zero:
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **unused: Any,
    ) -> None:
        text = healthy(logs or {})
        if text and self.task is not None:
            self.bar.update(self.task, description=text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        self.bar.stop()
