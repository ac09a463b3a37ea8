"""Step-KTO losses (arXiv 2501.10799) on an lm_head, without ever holding the full logits."""

from stepkto_kernels import parallel, reference
from stepkto_kernels.backend import available_backends
from stepkto_kernels.config import StepKTOConfig
from stepkto_kernels.fused_step_kto import fused_linear_step_kto_loss
from stepkto_kernels.linear_logprobs import (
    LogprobStats,
    linear_logprobs,
    linear_logprobs_with_stats,
)
from stepkto_kernels.metrics import StepKTOMetrics
from stepkto_kernels.module import StepKTOLoss
from stepkto_kernels.segments import StepSegments, segment_sums
from stepkto_kernels.step_kto import (
    KLBaseline,
    KLTotals,
    LossNormalizer,
    kl_baseline,
    kl_totals,
    loss_normalizer,
    step_kto_loss,
)
from stepkto_kernels.token_logprobs import token_logprobs

__version__ = "0.1.0.dev0"

__all__ = [
    "KLBaseline",
    "KLTotals",
    "LogprobStats",
    "LossNormalizer",
    "StepKTOConfig",
    "StepKTOLoss",
    "StepKTOMetrics",
    "StepSegments",
    "available_backends",
    "fused_linear_step_kto_loss",
    "kl_baseline",
    "kl_totals",
    "linear_logprobs",
    "linear_logprobs_with_stats",
    "loss_normalizer",
    "parallel",
    "reference",
    "segment_sums",
    "step_kto_loss",
    "token_logprobs",
]
