"""Encoded examples as a torch dataset, with reference log-probs where those are known."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepkto_kernels import checks
from stepkto_kernels.training.data import (
    EncodedExample,
    FilePath,
    encode_example,
    read_examples,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StepKTODataset(Dataset[EncodedExample]):
    """Encoded examples.

    Args:
        examples: at least one, each with a prompt of at least one token.
        ref_logps: (completion tokens of all examples,) fp32, in their order: log-probs under the
            reference model, nats. None: not known.
    Raises:
        ValueError: no examples, or a tensor of another size or dtype.
    """

    def __init__(self, examples: Sequence[EncodedExample], ref_logps: Tensor | None = None):
        checks.require(len(examples) > 0, "dataset", "at least one example", "none")
        for index, example in enumerate(examples):
            checks.instance(f"dataset[{index}]", example, EncodedExample)
        self.examples = examples
        lengths = (len(e.input_ids) - e.completion_start for e in examples)
        self.starts = list(accumulate(lengths, initial=0))
        if ref_logps is not None:
            checks.tensor("ref_logps", ref_logps, dtypes=(torch.float32,))
            checks.shape("ref_logps", ref_logps, (self.starts[-1],), "(completion tokens,)")
        self.ref_logps = ref_logps

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> EncodedExample:
        example = replace(self.examples[index], row=index)
        if self.ref_logps is None:
            return example
        logps = self.ref_logps[self.starts[index] : self.starts[index + 1]]
        return replace(example, ref_logps=logps.tolist())

    @property
    def completion_tokens(self) -> int:
        return self.starts[-1]

    def fingerprint(self) -> str:
        """SHA-256 of what log-probs depend on: the tokens and where completions start."""
        digest = hashlib.sha256()
        for example in self.examples:
            row = torch.tensor([len(example.input_ids), example.completion_start])
            digest.update(torch.cat([row, torch.tensor(example.input_ids)]).numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def content(self) -> str:
        """SHA-256 of all that is learnt from: tokens, steps and labels."""
        found = hashlib.sha256()
        for each in self.examples:
            sizes = [len(each.input_ids), each.completion_start, len(each.step_labels)]
            labels = [each.outcome_label, *each.step_labels]
            found.update(array("q", [*sizes, *each.input_ids, *each.step_ids, *labels]).tobytes())
        return found.hexdigest()


def encode_dataset(
    source: FilePath | Iterable[Mapping[str, Any]] | StepKTODataset | Sequence[EncodedExample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    step_separator: str = "",
    add_eos: bool = True,
) -> StepKTODataset:
    """Read and tokenize a dataset; of one that is encoded already, a copy that shares its data.

    Args:
        source: JSON-lines file, or rows, in one of the formats of data.py.
        tokenizer, max_length, step_separator, add_eos: as `encode_example`.
    Raises:
        ValueError: a row is malformed or cannot be encoded; names it and the field.
        OSError: the file cannot be read.
    """
    if isinstance(source, StepKTODataset):
        return StepKTODataset(source.examples, source.ref_logps)
    if isinstance(source, Sequence) and source and isinstance(source[0], EncodedExample):
        return StepKTODataset(source)  # type: ignore[arg-type]
    encoded = []
    for index, example in enumerate(read_examples(source)):  # type: ignore[arg-type]
        try:
            encoded.append(
                encode_example(
                    example,
                    tokenizer,
                    max_length=max_length,
                    step_separator=step_separator,
                    add_eos=add_eos,
                )
            )
        except ValueError as error:
            raise ValueError(f"example {index}: {error}") from None
    return StepKTODataset(encoded)
