"""Options of StepKTOTrainer: transformers' TrainingArguments, the loss, the data, the reference."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from stepkto_kernels import checks
from stepkto_kernels.backend import BACKENDS
from stepkto_kernels.config import StepKTOConfig

LOSS_OPTIONS = tuple(f.name for f in fields(StepKTOConfig))
NONFINITE = ("stop", "skip")


@dataclass
class StepKTOArguments(TrainingArguments):
    """TrainingArguments and what Step-KTO needs beyond them.

    Defaults that differ from TrainingArguments': learning_rate 1e-6, as TRL's KTO;
    logging_nan_inf_filter off, so that a NaN is seen and stops the run; remove_unused_columns off.
    With use_liger_kernel, Liger's layers are used and its losses are not.

    Args:
        beta, step_beta, step_weight, desirable_weight, undesirable_weight, step_desirable_weight,
        step_undesirable_weight, step_reduction, loss_type, reference_point, ratio_clip,
        length_normalize, ema_decay: see StepKTOConfig. A reference_point that is a number may be
            given as text.
        max_length: most tokens of prompt and completion; the end of the completion is cut off.
        step_separator: text between the steps of a completion.
        add_eos: append the tokenizer's EOS token to completions that lack it.
        padding_free: pack a batch into one row; needs a model that honours position_ids.
        pad_to_multiple_of: round padded or packed lengths up to a multiple of this.
        precompute_ref_log_probs: run the reference model once over the datasets, before training,
            and keep its log-probs of every token; with reference_point "zero", "matched", "ema" or
            a number it is then not needed again.
        ref_logps_cache: folder for those log-probs; None: output_dir. A file there is used if model
            weights, tokens and precision are the ones it was made with, and is not otherwise.
        nonfinite: "stop" ends the run, before the weights are changed, when a loss, a log-prob or
            a gradient is a NaN or an infinity. "skip" runs the step again without the rows whose
            policy or reference log-probs, or whose mismatched pair, are not finite, as if they had
            no labels; logs their number as `skipped`; and stops where that does not help.
        disable_dropout: switch off dropout in policy and reference.
        memory_budget: bytes for the logits that the loss holds at once; None: its default.
        gradient_bound: see fused_linear_step_kto_loss.
        backend: of the head; see available_backends.
        model_init_kwargs: for from_pretrained, where a model is given by name.
    Raises:
        ValueError: an option of the loss is out of range.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "initial learning rate"})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "hide NaN losses from the log"}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must be False: batches hold more than model inputs"}
    )
    beta: float = field(default=0.1, metadata={"help": "slope of the outcome sigmoid, per nat"})
    step_beta: float | None = field(
        default=None, metadata={"help": "slope of the step sigmoid; default: beta"}
    )
    step_weight: float = field(
        default=1.0, metadata={"help": "weight of the process term; 0 is plain KTO"}
    )
    desirable_weight: float = field(default=1.0, metadata={"help": "weight of right answers"})
    undesirable_weight: float = field(default=1.0, metadata={"help": "weight of wrong answers"})
    step_desirable_weight: float = field(default=1.0, metadata={"help": "weight of right steps"})
    step_undesirable_weight: float = field(default=1.0, metadata={"help": "weight of wrong steps"})
    step_reduction: str = field(
        default="sequence_mean", metadata={"help": "of step losses: sequence_mean, mean or sum"}
    )
    loss_type: str = field(default="kto", metadata={"help": "kto or apo_zero"})
    reference_point: str = field(
        default="mismatched",
        metadata={"help": "KL reference point: mismatched, zero, matched, ema, or nats"},
    )
    ratio_clip: list[float] | None = field(
        default=None, metadata={"help": "low and high: clip every token's log-ratio to these"}
    )
    length_normalize: bool = field(
        default=False, metadata={"help": "divide a segment's log-ratio by its number of tokens"}
    )
    ema_decay: float = field(default=0.9, metadata={"help": "of the running reference points"})
    max_length: int | None = field(
        default=2048, metadata={"help": "most tokens of an example; completions are cut to it"}
    )
    step_separator: str = field(default="", metadata={"help": "text between steps"})
    add_eos: bool = field(default=True, metadata={"help": "end completions with the EOS token"})
    padding_free: bool = field(
        default=False, metadata={"help": "pack a batch into one row instead of padding it"}
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "round lengths up to a multiple of this"}
    )
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "run the reference model once, before training"}
    )
    ref_logps_cache: str | None = field(
        default=None, metadata={"help": "folder for those log-probs; default: output_dir"}
    )
    nonfinite: str = field(
        default="stop",
        metadata={"help": "rows with log-probs that are no finite numbers: stop, or skip them"},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "no dropout in the models"})
    memory_budget: int | None = field(
        default=None, metadata={"help": "bytes for the logits that the loss holds at once"}
    )
    gradient_bound: float = field(
        default=0.0, metadata={"help": "drop tokens of at most this gradient; 0 is exact"}
    )
    backend: str = field(default="auto", metadata={"help": "of the head: " + ", ".join(BACKENDS)})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON object with arguments of from_pretrained"}
    )

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "liger_kernel_config",
        "model_init_kwargs",
    ]

    def __post_init__(self) -> None:
        super().__post_init__()  # parses what was given as JSON text
        if self.use_liger_kernel:  # its losses are on where nothing is said of them
            given = self.liger_kernel_config or {}
            losses = ("cross_entropy", "fused_linear_cross_entropy")
            asked = [name for name in losses if given.get(name)]
            checks.require(not asked, "liger_kernel_config", "layers, no losses", asked)
            self.liger_kernel_config = given | dict.fromkeys(losses, False)
        smoothing = self.label_smoothing_factor
        checks.require(smoothing == 0, "label_smoothing_factor", "0", smoothing)
        self.step_kto_config()
        if self.max_length is not None:
            checks.integer("max_length", self.max_length, low=2)
        checks.memory_budget(self.memory_budget)
        checks.number("gradient_bound", self.gradient_bound, low=0)
        checks.choice("backend", self.backend, BACKENDS)
        checks.choice("nonfinite", self.nonfinite, NONFINITE)
        columns = self.remove_unused_columns
        checks.require(not columns, "remove_unused_columns", "False", columns)

    def step_kto_config(self) -> StepKTOConfig:
        """The loss these arguments ask for."""
        values = {name: getattr(self, name) for name in LOSS_OPTIONS}
        values["reference_point"] = number_or_name(self.reference_point)
        if self.ratio_clip is not None:
            values["ratio_clip"] = tuple(self.ratio_clip)
        return StepKTOConfig(**values)


def number_or_name(value: Any) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
