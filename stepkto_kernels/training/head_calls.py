"""A routed model on a batch of TrainerCollator: its log-probs, or its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepkto_kernels.integrations.transformers import HeadFunction, HeadOutput, evaluating
from stepkto_kernels.linear_logprobs import linear_logprobs
from stepkto_kernels.training.batch import MODEL_INPUTS, VARLEN_INPUTS


def run(model: nn.Module, batch: dict[str, Any], head_fn: HeadFunction) -> HeadOutput:
    """The backbone, and head_fn on all of its hidden states."""
    inputs = {name: batch[name] for name in MODEL_INPUTS + VARLEN_INPUTS if name in batch}
    return model(**inputs, head_fn=head_fn)


@torch.no_grad()
def token_logps(model: nn.Module, batch: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """Log-probs of the targets, nats, in their shape, 0 where ignored; fp32. Without dropout.

    options: keyword arguments of linear_logprobs.
    """
    head_fn = lambda hidden, weight, bias: linear_logprobs(
        hidden, weight, batch["target"], bias, **options
    )
    with evaluating(model):
        return run(model, batch, head_fn).value
