"""How much likelier each piece of a solution is under one model than under another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepkto_kernels import checks
from stepkto_kernels.integrations.transformers import logit_options, route_head
from stepkto_kernels.training import head_calls, reference_logps
from stepkto_kernels.training.batch import TrainerCollator
from stepkto_kernels.training.data import NO_STEP
from stepkto_kernels.training.dataset import StepKTODataset, encode_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def completion_logps(model: PreTrainedModel, dataset: StepKTODataset, batch_size: int) -> Tensor:
    """Log-probs of all completion tokens, in order: (dataset.completion_tokens,) fp32, nats.

    Never holds full logits. The model's head is routed, and its config says what pads.
    """
    checks.integer("batch_size", batch_size, low=1)
    route_head(model)
    options = logit_options(model.config)
    collate = TrainerCollator(pad_token_id=0)  # padding is masked: any id does

    def log_probs(batch: dict[str, Any]) -> Tensor:
        move = lambda value: value.to(model.device) if hasattr(value, "to") else value
        return head_calls.token_logps(model, {k: move(v) for k, v in batch.items()}, options)

    return reference_logps.compute(dataset, collate, log_probs, batch_size)


def piece_sums(dataset: StepKTODataset, values: Tensor) -> list[list[float]]:
    """Sums of values of completion tokens over the pieces of each example, in fp64.

    The token that ends a sequence is in no piece. A piece without tokens has the sum 0.

    Args:
        values: (dataset.completion_tokens,) float.
    """
    found = []
    for i, example in enumerate(dataset.examples):
        steps = torch.tensor(example.step_ids[example.completion_start :])
        own = values[dataset.starts[i] : dataset.starts[i + 1]].double()
        kept = steps != NO_STEP
        sums = torch.zeros(len(example.step_labels), dtype=torch.float64)
        found.append(sums.index_add_(0, steps[kept], own[kept]).tolist())
    return found


def log_ratios(
    rows: Sequence[Mapping[str, Any]],
    models: Iterable[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Log-ratio sums of the pieces of labelled rows, nats.

    Args:
        rows: of label.py, at least one.
        models: the model and the one it is compared with, one after the other: an iterator may load
            each when it is asked for.
        tokenizer: of both.
        batch_size: sequences at once, >= 1.
    Returns:
        For each row {"problem_id", "sample", "steps": [sum of each piece]}.
    Raises:
        ValueError: not two models, or a row that cannot be encoded.
    """
    dataset = encode_dataset(rows, tokenizer)
    logps = [completion_logps(model, dataset, batch_size) for model in models]
    checks.require(len(logps) == 2, "models", "two", len(logps))
    sums = piece_sums(dataset, logps[0].double() - logps[1].double())
    return [
        {"problem_id": row["problem_id"], "sample": row["sample"], "steps": steps}
        for row, steps in zip(rows, sums, strict=True)
    ]
