"""Make a padded batch of encoded examples, with the mismatched pairs that KTO's KL estimate needs.

Letters: B examples of a batch, T padded length, K most steps of an example of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepkto_kernels import checks
from stepkto_kernels.training.batch import mismatched_pairs, pad
from stepkto_kernels.training.data import NO_STEP, UNLABELLED, EncodedExample


@dataclass(frozen=True)
class StepKTOCollator:
    """Right-pad a batch and pair every prompt with another example's completion.

    Prompt i goes with completion (i + 1) % B of the batch as it was drawn, so any sampler, any
    number of loader workers and any batch size work, and no state or random number is involved. An
    example is never paired with itself: a batch of one has no mismatched tensors.

    Args:
        pad_token_id: id of the padding in input_ids, >= 0.
        pad_to_multiple_of: round each padded length T up to a multiple of this, > 0.
        max_length: most tokens of a mismatched sequence, > 0: a long prompt may meet a long
            completion. Its end is cut off, and what is left of a step that was cut is in no step:
            part of a log-ratio would bias the steps' mean. The examples themselves are never cut.
    Raises:
        ValueError: one of these is out of range.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        checks.integer("pad_token_id", self.pad_token_id, low=0)
        for name in ("pad_to_multiple_of", "max_length"):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), low=1)

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """Collate a batch of at least one example.

        Returns:
            input_ids: (B, T) int64.
            attention_mask: (B, T) int64, 0 on padding.
            completion_mask: (B, T) bool, True on completion tokens.
            step_ids: (B, T) int64, step within the example, -1 = in no step.
            outcome_label: (B,) int8, 1 right, 0 wrong, -1 unlabelled.
            step_labels: (B, K) int8, the same for steps, padded with -1; K can be 0.
            For B > 1 also the first four for the mismatched sequences, with a T of their own, as
            `mismatched_input_ids` and so on. Row i's step ids count the steps of example
            (i + 1) % B, so its labels are row i of `step_labels.roll(-1, 0)`.
        Raises:
            ValueError: no examples, one that is no EncodedExample, or a prompt that leaves no room
                for a completion within max_length.
        """
        checks.require(len(examples) > 0, "examples", "at least one", "none")
        for index, example in enumerate(examples):
            is_encoded = isinstance(example, EncodedExample)
            checks.require(
                is_encoded, f"examples[{index}]", "an EncodedExample", type(example).__name__
            )
        most_steps = max(len(example.step_labels) for example in examples)
        step_labels = [pad(example.step_labels, most_steps, UNLABELLED) for example in examples]
        batch = self._token_tensors(examples)
        batch["outcome_label"] = torch.tensor(
            [example.outcome_label for example in examples], dtype=torch.int8
        )
        batch["step_labels"] = torch.tensor(step_labels, dtype=torch.int8)
        if len(examples) > 1:
            pairs = mismatched_pairs(examples, max_length=self.max_length)
            for name, tensor in self._token_tensors(pairs).items():
                batch[f"mismatched_{name}"] = tensor
        return batch

    def _token_tensors(self, examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
        length = max(len(example.input_ids) for example in examples)
        if self.pad_to_multiple_of is not None:
            length += -length % self.pad_to_multiple_of
        position = torch.arange(length)  # (T,)
        start = torch.tensor([[example.completion_start] for example in examples])  # (B, 1)
        end = torch.tensor([[len(example.input_ids)] for example in examples])  # (B, 1)
        input_ids = [pad(example.input_ids, length, self.pad_token_id) for example in examples]
        step_ids = [pad(example.step_ids, length, NO_STEP) for example in examples]
        return {
            "input_ids": torch.tensor(input_ids, dtype=torch.int64),
            "attention_mask": (position < end).long(),
            "completion_mask": (start <= position) & (position < end),
            "step_ids": torch.tensor(step_ids, dtype=torch.int64),
        }
