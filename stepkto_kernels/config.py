"""Options of the loss and of the logits, checked when they are made.

Custom ops take tensors and scalars only, so each of the two can turn itself into a flat tuple of
floats (`pack`) that the op turns back (`unpack`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stepkto_kernels import checks

LOSS_TYPES = ("kto", "apo_zero")
STEP_REDUCTIONS = ("sequence_mean", "mean", "sum")
REFERENCE_POINTS = ("mismatched", "zero", "matched", "ema")


@dataclass(frozen=True)
class StepKTOConfig:
    """Options of the Step-KTO loss (arXiv 2501.10799; KTO itself is arXiv 2402.01306).

    Args:
        beta: slope of the outcome sigmoid, per nat of log-ratio, > 0.
        step_beta: the same for steps; None takes `beta`.
        step_weight: weight of the process term, >= 0. 0 is exactly KTO.
        desirable_weight, undesirable_weight: weights of right and wrong outcomes, >= 0.
        step_desirable_weight, step_undesirable_weight: weights of right and wrong steps, >= 0.
        step_reduction: how step losses l_s become one number:
            "sequence_mean" mean over a sequence's labelled steps, then over sequences with any;
            "mean" mean over all labelled steps;
            "sum" sum over a sequence's labelled steps, then mean over sequences with any.
        loss_type: "kto", or "apo_zero": KTO with both reference points 0 (APO-zero, 2408.06266).
        reference_point: where z_o and z_s come from: "mismatched" (KTO: the caller passes
            `baseline=kl_baseline(...)` of mismatched prompt and completion pairs), "zero",
            "matched" (mean log-ratio of the batch's labelled segments, clamped at 0), "ema"
            (running mean of matched batches, kept by StepKTOLoss), or one number for both.
        ratio_clip: (low, high) in nats: log-ratios are clamped per token before they are summed,
            and clamped tokens get no gradient (humanline clipping of HALOs). None: no clipping.
        length_normalize: use the mean log-ratio of a segment's tokens instead of their sum.
        ema_decay: weight of the past in StepKTOLoss's running reference points, in [0, 1).
    Raises:
        ValueError: a value outside of the above.
    """

    beta: float = 0.1
    step_beta: float | None = None
    step_weight: float = 1.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    step_desirable_weight: float = 1.0
    step_undesirable_weight: float = 1.0
    step_reduction: str = "sequence_mean"
    loss_type: str = "kto"
    reference_point: str | float = "mismatched"
    ratio_clip: tuple[float, float] | None = None
    length_normalize: bool = False
    ema_decay: float = 0.9

    def __post_init__(self) -> None:
        checks.number("beta", self.beta, low=0, low_open=True)
        if self.step_beta is not None:
            checks.number("step_beta", self.step_beta, low=0, low_open=True)
        for name in (
            "step_weight",
            "desirable_weight",
            "undesirable_weight",
            "step_desirable_weight",
            "step_undesirable_weight",
        ):
            checks.number(name, getattr(self, name), low=0)
        checks.choice("step_reduction", self.step_reduction, STEP_REDUCTIONS)
        checks.choice("loss_type", self.loss_type, LOSS_TYPES)
        if isinstance(self.reference_point, str):
            checks.choice("reference_point", self.reference_point, REFERENCE_POINTS)
        else:
            checks.number("reference_point", self.reference_point)
        if self.loss_type == "apo_zero":
            default_or_zero = self.reference_point in ("mismatched", "zero", 0)
            checks.require(
                default_or_zero, "reference_point", "'zero' with apo_zero", self.reference_point
            )
        if self.ratio_clip is not None:
            pair = isinstance(self.ratio_clip, (tuple, list)) and len(self.ratio_clip) == 2
            checks.require(pair, "ratio_clip", "a pair (low, high) or None", self.ratio_clip)
            low, high = self.ratio_clip
            checks.number("ratio_clip[0]", low)
            checks.number("ratio_clip[1]", high, low=low)
        checks.boolean("length_normalize", self.length_normalize)
        checks.number("ema_decay", self.ema_decay, low=0, high=1, high_open=True)

    @property
    def fixed_reference_point(self) -> float | None:
        """The number that z_o and z_s are fixed to, or None where they come from log-ratios."""
        if self.loss_type == "apo_zero" or self.reference_point == "zero":
            return 0.0
        return None if isinstance(self.reference_point, str) else float(self.reference_point)

    def segment_options(self) -> SegmentOptions:
        low, high = self.ratio_clip or (-math.inf, math.inf)
        return SegmentOptions(
            beta=self.beta,
            step_beta=self.beta if self.step_beta is None else self.step_beta,
            step_weight=self.step_weight,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            step_desirable_weight=self.step_desirable_weight,
            step_undesirable_weight=self.step_undesirable_weight,
            step_reduction=STEP_REDUCTIONS.index(self.step_reduction),
            clip_low=low,
            clip_high=high,
            length_normalize=self.length_normalize,
        )


class SegmentOptions(NamedTuple):
    """What the loss of one batch needs of StepKTOConfig, every default resolved."""

    beta: float
    step_beta: float
    step_weight: float
    desirable_weight: float
    undesirable_weight: float
    step_desirable_weight: float
    step_undesirable_weight: float
    step_reduction: float  # index into STEP_REDUCTIONS
    clip_low: float
    clip_high: float
    length_normalize: float  # 0 or 1

    def pack(self) -> list[float]:
        return [float(value) for value in self]

    @classmethod
    def unpack(cls, packed: Sequence[float]) -> SegmentOptions:
        return cls(*packed)


@dataclass(frozen=True)
class LogitOptions:
    """z = cap(logit_scale * logits) / temperature, cap(x) = softcap * tanh(x / softcap)."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100

    def __post_init__(self) -> None:
        checks.number("temperature", self.temperature, low=0, low_open=True)
        checks.number("logit_scale", self.logit_scale)
        if self.softcap is not None:
            checks.number("softcap", self.softcap, low=0, low_open=True)
        is_int = isinstance(self.ignore_index, int) and not isinstance(self.ignore_index, bool)
        checks.require(is_int, "ignore_index", "an int", repr(self.ignore_index))
        small = abs(self.ignore_index) < 2**53  # custom ops take it as a float, see `pack`
        checks.require(small, "ignore_index", "an int below 2**53", repr(self.ignore_index))

    def pack(self) -> list[float]:
        """Floats for a custom op, no softcap as 0."""
        return [self.temperature, self.logit_scale, self.softcap or 0.0, float(self.ignore_index)]

    @classmethod
    def unpack(cls, packed: Sequence[float]) -> LogitOptions:
        temperature, logit_scale, softcap, ignore_index = packed
        return cls(temperature, logit_scale, softcap or None, int(ignore_index))
