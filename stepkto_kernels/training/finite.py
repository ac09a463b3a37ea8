"""Where a number that is not finite comes from: the tensor, and the rows of the dataset.

A training step only counts, on the device, whether anything was not finite. What is here runs once
that is known: forward passes without gradient over the same examples, which tell which of them are
bad and why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from stepkto_kernels.integrations.transformers import HeadOutput, evaluating
from stepkto_kernels.linear_logprobs import linear_logprobs
from stepkto_kernels.segments import SegmentIndex, StepSegments
from stepkto_kernels.training import head_calls
from stepkto_kernels.training.data import EncodedExample

HIDDEN, WEIGHT, BIAS = "hidden states", "lm_head weight", "lm_head bias"
REFERENCE, LOGITS = "reference log-probs", "logits"
PAIR = "log-probs of a mismatched pair"
AUX_LOSS = "load-balancing loss"
LISTED = 5  # names in a message; the rest is counted
WEIGHT_ROWS = 8192  # looked at at once
T = TypeVar("T")


def not_finite(*values: Tensor) -> Tensor:
    """() fp64 on the device of the first: the number of tensors with a NaN or an infinity."""
    return torch.stack([~value.detach().isfinite().all() for value in values]).double().sum()


def hidden_fault(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """() fp32: NaN if the hidden state of a token is not finite, else 0; padding is no token.

    Args:
        hidden: (B, T, H).
        attention_mask: (B, T), nonzero where there is a token; None: everywhere.
    """
    bad = ~hidden.detach().isfinite().all(-1)
    if attention_mask is not None:
        bad &= attention_mask.bool()
    return torch.zeros((), device=hidden.device).masked_fill(bad.any(), torch.nan)


def local(value: Any) -> Tensor:
    """This rank's part of a parameter or gradient, which FSDP has as a DTensor."""
    return value.to_local() if hasattr(value, "to_local") else value


def gradient_norm(model: nn.Module) -> Tensor | None:
    """2-norm of this rank's part of all gradients, as clipping computes it; None without any."""
    found = [local(p.grad) for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(found) if found else None


def bad_gradients(model: nn.Module) -> list[str]:
    """Names of parameters whose gradient, or the norm of it, is not finite."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = [(name, torch.linalg.vector_norm(local(grad))) for name, grad in named]
    found = [name for name, norm in norms if not bool(norm.isfinite())]
    total = gradient_norm(model)
    overflow = not found and total is not None and not bool(total.isfinite())
    return ["all parameters together"] if overflow else found


def bad_parameters(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if not bool(local(p.detach()).isfinite().all())]


class Place(NamedTuple):
    """Where an example is."""

    row: int | None  # of the dataset; None: the batches were not made of a StepKTODataset
    rank: int
    batch: int  # micro-batch of the step, or batch of an evaluation
    position: int  # in the batch


class Fault(NamedTuple):
    """What of an example is not finite."""

    tensor: str
    place: Place
    detail: str = ""


@dataclass
class Findings:
    """What a rank found, or all of them together.

    rows: a fault for each bad example; names: of a tensor that all examples share, the parts that
    are not finite; gradients, parameters: names.
    """

    rows: list[Fault] = field(default_factory=list)
    names: dict[str, set[str]] = field(default_factory=dict)
    gradients: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    examples: int = 0  # that were looked at

    def add(self, tensor: str, names: Iterable[str]) -> None:
        found = set(names)
        if found:
            self.names.setdefault(tensor, set()).update(found)

    def merge(self, other: Findings) -> None:
        self.rows += [fault for fault in other.rows if fault not in self.rows]
        for tensor, names in other.names.items():
            self.add(tensor, names)
        self.gradients += [name for name in other.gradients if name not in self.gradients]
        self.parameters += [name for name in other.parameters if name not in self.parameters]
        self.examples += other.examples

    @property
    def can_skip(self) -> bool:
        """Whether leaving the bad examples out leaves something, and is of use."""
        return not self.names and 0 < len(self.rows) < self.examples

    def text(self, ranks: int, batch: str) -> str:
        """Tensors and rows; batch: what a batch is called."""
        parts = []
        for tensor, names in self.names.items():
            parts.append(f"{tensor}{_listed(sorted(names, key=_by_number))}")
        for tensor in dict.fromkeys(fault.tensor for fault in self.rows):
            faults = [fault for fault in self.rows if fault.tensor == tensor]
            parts.append(f"{tensor}{_listed([_told(fault, ranks, batch) for fault in faults])}")
        if not parts:
            parts = [f"gradient of {_listed(self.gradients)[2:]}"] if self.gradients else []
        elif self.parameters:
            parts.append(f"parameters{_listed(self.parameters)}")
        if not parts:
            return "not finite, but finite when it was run again"
        return "not finite: " + "; ".join(parts)


def rows_text(rows: Iterable[int | None]) -> str:
    """ ": row 3, row 7", of rows of a dataset."""
    known = sorted({row for row in rows if row is not None})
    return _listed([f"row {row}" for row in known])


def gather(value: T, world_size: int) -> list[T]:
    """The value of each rank, in order."""
    if world_size == 1:
        return [value]
    found: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(found, value)
    return found


def _by_number(name: str) -> tuple[int, str]:
    last = name.rpartition(" ")[2]
    return (int(last), name) if last.isdigit() else (0, name)


def _listed(names: Sequence[str]) -> str:
    """ ": a, b and 3 more"; nothing for a tensor without parts."""
    names = [name for name in names if name]
    shown = ", ".join(names[:LISTED])
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f": {shown}{rest}" if names else ""


def _told(fault: Fault, ranks: int, batch: str) -> str:
    place = fault.place
    where = f"{batch} {place.batch}, position {place.position}"
    if ranks > 1:
        where = f"rank {place.rank}, {where}"
    name = "a row" if place.row is None else f"row {place.row}"
    return f"{fault.detail or name} ({where})"


class Look(NamedTuple):
    """What a forward pass gives of a batch. (...) is the shape of its targets, V the vocabulary."""

    logps: Tensor  # (...) fp32
    hidden: Tensor  # (...) bool: not finite
    vocabulary: Tensor  # (V,) bool: rows of the weight that are not
    bias: Tensor  # (V,) bool; -inf, which masks an entry, is none of them


@torch.no_grad()
def look(model: nn.Module, batch: dict[str, Any], options: dict[str, Any]) -> HeadOutput:
    """A forward pass over a batch whose value is a Look. options: of linear_logprobs."""

    def head_fn(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Look:
        rows = torch.cat([~part.isfinite().all(1) for part in weight.split(WEIGHT_ROWS)])
        masked = rows & False if bias is None else bias.isnan() | (bias == torch.inf)
        logps = linear_logprobs(hidden, weight, batch["target"], bias, **options)
        return Look(logps, ~hidden.isfinite().all(-1), rows, masked)

    with evaluating(model):
        return head_calls.run(model, batch, head_fn)


def tensors_of_examples(
    found: Look, ref_logps: Tensor | None, scored: Tensor, examples: Sequence[EncodedExample]
) -> list[str | None]:
    """Of each example the tensor that is not finite, None where all are.

    Hidden states are looked at in prompt and completion: where one is not finite the gradient of
    the backbone is not either, even if nothing flows back from there.

    Args:
        found: of a padded batch, or of one packed example.
        ref_logps, scored: (...) as the targets; scored: bool, what the loss depends on.
    """
    B = len(examples)
    rows = lambda x: x.view(B, -1)
    bad_logps = rows(~found.logps.isfinite() & scored).any(1).tolist()
    bad_ref: list[bool] = [False] * B
    if ref_logps is not None:
        bad_ref = rows(~ref_logps.isfinite() & scored).any(1).tolist()
    of_head = WEIGHT if bool(found.vocabulary.any()) else None
    of_head = of_head or (BIAS if bool(found.bias.any()) else LOGITS)
    out: list[str | None] = []
    for k, example in enumerate(examples):
        if bool(rows(found.hidden)[k, : len(example.input_ids)].any()):
            out.append(HIDDEN)
        elif bad_ref[k]:
            out.append(REFERENCE)
        else:
            out.append(of_head if bad_logps[k] else None)
    return out


def scored_tokens(segments: StepSegments, like: Tensor) -> Tensor:
    """Tokens in a labelled segment, bool in the shape of `like`."""
    return SegmentIndex.of(segments).scored_tokens().view(like.shape)


def without(segments: StepSegments, sequences: Sequence[int]) -> StepSegments:
    """The same layout, with the tokens of some sequences in none."""
    gone = torch.tensor(sequences, dtype=torch.int32, device=segments.device)
    out = torch.isin(segments.sequence_index, gone)
    return StepSegments(
        segments.sequence_index.masked_fill(out, -1),
        segments.step_index.masked_fill(out, -1),
        segments.outcome_label,
        segments.step_label,
        segments.step_sequence,
    )
