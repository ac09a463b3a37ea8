"""CompletionTrainer: cross-entropy on completions, for rejection sampling and first models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepkto_kernels import checks
from stepkto_kernels.linear_logprobs import linear_logprobs
from stepkto_kernels.step_kto import KLTotals
from stepkto_kernels.training.batch import IGNORED
from stepkto_kernels.training.data import EncodedExample
from stepkto_kernels.training.finite_trainer import Batch, StepContext
from stepkto_kernels.training.trainer import StepKTOTrainer


class CompletionTrainer(StepKTOTrainer):
    """StepKTOTrainer's data, head and checks, with the mean negative log-prob as the loss.

    The mean is over the completion tokens of an optimizer step, over all of its micro-batches and
    ranks. Labels do not matter: give it the rows to be learnt. There is no reference model. The
    loss of an evaluation is the mean over its batches.

    Args:
        as StepKTOTrainer.
    Raises:
        ValueError: as StepKTOTrainer; in training and evaluation: a ref_model was given.
    """

    _tag_names = ["sft"]

    def _prepare_reference(self) -> None:
        has_one = self.reference.model is not None
        checks.require(not has_one, "ref_model", "None: nothing is compared with it", "a model")

    @torch.no_grad()
    def _step_context(
        self, model: nn.Module, batches: Sequence[Batch], pairs: KLTotals | None = None
    ) -> StepContext:
        counts = [(batch["target"] != IGNORED).sum() for batch in batches]
        self._tokens = self._sum_over_ranks(torch.stack(counts).sum())
        return StepContext(None, None, len(batches))

    def _pairs(self, batches: Sequence[Batch]) -> list[EncodedExample]:
        return []

    def _reference_logps(self, model: nn.Module, batch: Batch) -> Tensor | None:
        return None

    def _scored(self, batch: Batch) -> Tensor:
        return batch["target"] != IGNORED

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """A micro-batch's share of the step's loss, as StepKTOTrainer's."""
        total, aux_loss = self._negative_log_probs(model, inputs)
        loss = total / self._tokens * self.args.world_size  # the ranks' gradients are averaged
        if aux_loss is not None:
            loss = loss + aux_loss / self._context.micro_batches
        return (loss, None) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(inputs)
            total, _ = self._negative_log_probs(model, inputs)
            loss = total / (inputs["target"] != IGNORED).sum()
        self._saw(model, inputs, loss)
        return loss, None, None

    def _negative_log_probs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Of all completion tokens, summed, nats; and the model's auxiliary loss."""
        options = self._logit_options | {"memory_budget": self.args.memory_budget}

        def head_fn(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return linear_logprobs(hidden, weight, batch["target"], bias, **options)

        output = self._run_head(model, batch, head_fn)
        return -output.value.sum(), output.aux_loss
