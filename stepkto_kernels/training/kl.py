"""Reference points whose sums add up over micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from stepkto_kernels.config import StepKTOConfig
from stepkto_kernels.segment_loss import SegmentBatch, SegmentIndex, mean_over
from stepkto_kernels.segments import StepSegments
from stepkto_kernels.step_kto import KLBaseline


@torch.no_grad()
def kl_totals(
    logps: Tensor, ref_logps: Tensor, segments: StepSegments, config: StepKTOConfig
) -> Tensor:
    """Sum and number of log-ratios, of sequences and then of steps: (4,) fp64.

    Of all that have tokens; of the labelled ones only with reference_point "matched".
    """
    index = SegmentIndex.of(segments)
    batch = SegmentBatch(index, config.segment_options())
    batch.add(logps.reshape(-1), ref_logps.reshape(-1))
    counted = [tokens > 0 for tokens in batch.tokens]
    if config.reference_point == "matched":
        counted = [index.outcome_label >= 0, index.labelled_steps()]
    parts = [mean_over(batch.r(level), counted[level]) for level in (0, 1)]
    return torch.stack([value for part in parts for value in part])


def kl_baseline_of(totals: Tensor) -> KLBaseline:
    """Mean log-ratios, at least 0."""
    z = (totals[0::2] / totals[1::2].clamp(min=1)).clamp(min=0)
    return KLBaseline(z[0], z[1])
