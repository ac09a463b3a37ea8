"""Batches for the trainer: padded, or packed into one row, and the mismatched pairs of KTO.

Letters: B examples of a batch, T padded length, N tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stepkto_kernels import checks
from stepkto_kernels.segments import StepSegments
from stepkto_kernels.training.data import NO_STEP, UNLABELLED, EncodedExample

IGNORED = -100  # target of a token that nothing is predicted from
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
VARLEN_INPUTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class TrainerCollator:
    """Make what StepKTOTrainer takes of encoded examples.

    Args:
        pad_token_id: id of the padding in input_ids, >= 0.
        padding_free: lay the examples end to end in one row instead of padding them, position_ids
            starting again with each.
        varlen: with padding_free, also give FlashAttention's arguments for such a row.
        pad_to_multiple_of: round T, or N, up to a multiple of this, > 0. A packed row's padding is
            a sequence of its own.
    Raises:
        ValueError: one of these is out of range.
    """

    pad_token_id: int
    padding_free: bool = False
    varlen: bool = False
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        checks.integer("pad_token_id", self.pad_token_id, low=0)
        if self.pad_to_multiple_of is not None:
            checks.integer("pad_to_multiple_of", self.pad_to_multiple_of, low=1)

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Any]:
        """Collate at least one example.

        Returns:
            input_ids: (B, T) int64, or (1, N).
            attention_mask: (B, T) int64, 0 on padding; or position_ids: (1, N) int64, and with
                `varlen` the arguments VARLEN_INPUTS.
            target: (B, T) or (1, N) int64, the token that follows where it is of the completion,
                else IGNORED.
            segments: StepSegments of those targets, on the CPU.
            ref_logps: (B, T) or (1, N) fp32 log-probs of the targets under the reference, nats, 0
                where ignored; only if all examples have them.
            examples: the examples themselves, for mismatched pairs.
        Raises:
            ValueError: no examples, or one that is no EncodedExample.
        """
        checks.require(len(examples) > 0, "examples", "at least one", "none")
        for index, example in enumerate(examples):
            where = f"examples[{index}]"
            checks.instance(where, example, EncodedExample)
            # the first completion token is predicted from the one before it
            checks.require(example.completion_start > 0, where, "a prompt of a token at least", 0)
        batch = self._packed(examples) if self.padding_free else self._padded(examples)
        return batch | {"examples": list(examples)}

    def _length(self, tokens: int) -> int:
        return tokens + -tokens % (self.pad_to_multiple_of or 1)

    def _padded(self, examples: Sequence[EncodedExample]) -> dict[str, Any]:
        length = self._length(max(len(example.input_ids) for example in examples))
        most_steps = max(len(example.step_labels) for example in examples)
        rows = lambda values, fill: torch.tensor([pad(v, length, fill) for v in values])
        shifted = [shift(example) for example in examples]
        target = rows([s.target for s in shifted], IGNORED)
        labels = [pad(example.step_labels, most_steps, UNLABELLED) for example in examples]
        batch: dict[str, Any] = {
            "input_ids": rows([example.input_ids for example in examples], self.pad_token_id),
            "attention_mask": rows([[1] * len(example.input_ids) for example in examples], 0),
            "target": target,
            "segments": StepSegments.from_padded(
                rows([s.step_ids for s in shifted], NO_STEP),
                target != IGNORED,
                torch.tensor([example.outcome_label for example in examples]),
                torch.tensor(labels, dtype=torch.int64).view(len(examples), most_steps),
            ),
        }
        if all(example.ref_logps is not None for example in examples):
            batch["ref_logps"] = rows([s.ref_logps for s in shifted], 0.0)
        return batch

    def _packed(self, examples: Sequence[EncodedExample]) -> dict[str, Any]:
        lengths = [len(example.input_ids) for example in examples]
        total = sum(lengths)
        padding = self._length(total) - total
        row = lambda parts, fill: torch.tensor([pad(sum(parts, []), total + padding, fill)])
        shifted = [shift(example) for example in examples]
        step_index, first = [], 0  # steps are counted over the row
        for example, s in zip(examples, shifted, strict=True):
            step_index.append([NO_STEP if step == NO_STEP else first + step for step in s.step_ids])
            first += len(example.step_labels)
        target = row([s.target for s in shifted], IGNORED)
        starts = torch.tensor([0, *lengths]).cumsum(0)
        labels = sum((example.step_labels for example in examples), [])
        parts = [*lengths, padding] if padding else lengths
        batch: dict[str, Any] = {
            "input_ids": row([example.input_ids for example in examples], self.pad_token_id),
            "position_ids": torch.cat([torch.arange(length) for length in parts])[None],
            "target": target,
            "segments": StepSegments.from_packed(
                starts,
                row(step_index, NO_STEP)[0],
                torch.tensor([example.outcome_label for example in examples]),
                torch.tensor(labels, dtype=torch.int64),
                target[0] != IGNORED,
            ),
        }
        if self.varlen:
            ends = torch.tensor([0, *parts]).cumsum(0).int()
            values = (ends, ends, max(parts), max(parts))
            batch |= dict(zip(VARLEN_INPUTS, values, strict=True))
        if all(example.ref_logps is not None for example in examples):
            batch["ref_logps"] = row([s.ref_logps for s in shifted], 0.0)
        return batch


@dataclass(frozen=True)
class Shifted:
    """What each token of an example predicts: target, its step and its reference log-prob."""

    target: list[int]
    step_ids: list[int]
    ref_logps: list[float]


def shift(example: EncodedExample) -> Shifted:
    """Move everything that is said of a completion token to the token before it."""
    start, length = example.completion_start, len(example.input_ids)
    before = start - 1
    completion = example.input_ids[start:]
    logps = [0.0] * len(completion) if example.ref_logps is None else list(example.ref_logps)
    end = length - before - len(completion)
    return Shifted(
        [IGNORED] * before + completion + [IGNORED] * end,
        [NO_STEP] * before + example.step_ids[start:] + [NO_STEP] * end,
        [0.0] * before + logps + [0.0] * end,
    )


def pad(values: list[Any], length: int, fill: Any) -> list[Any]:
    return values + [fill] * (length - len(values))


def unlabelled(example: EncodedExample) -> EncodedExample:
    """The same tokens, out of the loss."""
    return replace(
        example, outcome_label=UNLABELLED, step_labels=[UNLABELLED] * len(example.step_labels)
    )


def mismatched_pair(
    prompt: EncodedExample, completion: EncodedExample, max_length: int | None
) -> EncodedExample:
    """The tokens of one example's prompt, then those of another's completion.

    Cut at max_length, for a long prompt may meet a long completion; what is left of a step that was
    cut is in no step, as part of a log-ratio would bias the steps' mean.

    Raises:
        ValueError: the prompt leaves no room.
    """
    start = prompt.completion_start
    fits = max_length is None or start < max_length
    checks.require(fits, "max_length", f"more than a prompt's {start} tokens", max_length)
    input_ids = prompt.input_ids[:start] + completion.input_ids[completion.completion_start :]
    step_ids = [NO_STEP] * start + completion.step_ids[completion.completion_start :]
    cut_steps = set(step_ids[max_length:]) if max_length is not None else set()
    kept = [NO_STEP if step in cut_steps else step for step in step_ids[:max_length]]
    return replace(
        completion,
        input_ids=input_ids[:max_length],
        completion_start=start,
        step_ids=kept,
        ref_logps=None,
    )


def mismatched_pairs(
    examples: Sequence[EncodedExample],
    after: EncodedExample | None = None,
    max_length: int | None = None,
) -> list[EncodedExample]:
    """Every example's prompt with the completion of the next one, of the last with `after`'s.

    after: None closes the ring with the first example. No pairs where an example would meet itself.
    """
    if after is None:
        if len(examples) < 2:
            return []
        after = examples[0]
    pairs = zip(examples, [*examples[1:], after], strict=True)
    return [mismatched_pair(prompt, completion, max_length) for prompt, completion in pairs]
