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
    batch = SegmentBatch(SegmentIndex.of(segments), config.segment_options())
    batch.add(logps.reshape(-1), ref_logps.reshape(-1))
    parts = [mean_over(batch.r(level), batch.tokens[level] > 0) for level in (0, 1)]
    return torch.stack([value for part in parts for value in part])


def kl_baseline_of(totals: Tensor) -> KLBaseline:
    z = (totals[0::2] / totals[1::2].clamp(min=1)).clamp(min=0)
    return KLBaseline(z[0], z[1])
