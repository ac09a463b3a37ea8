"""The segment layout of a batch, and sums of a per-token quantity over its segments.

A segment is a sequence's completion (outcome level) or one reasoning step (process level).
Letters: N tokens of the batch in one row, B sequences, S steps, T padded length, K steps of a
sequence.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from stepkto_kernels import checks
from stepkto_kernels.ops import custom_op


class SegmentIndex(NamedTuple):
    """The tensors of a StepSegments in the order in which the custom ops take them."""

    sequence_index: Tensor  # (N,) int32
    step_index: Tensor  # (N,) int32
    outcome_label: Tensor  # (B,) int8
    step_label: Tensor  # (S,) int8
    step_sequence: Tensor  # (S,) int32

    @classmethod
    def of(cls, segments: "StepSegments") -> "SegmentIndex":
        return cls(
            segments.sequence_index,
            segments.step_index,
            segments.outcome_label,
            segments.step_label,
            segments.step_sequence,
        )

    @property
    def num_sequences(self) -> int:
        return self.outcome_label.shape[0]

    @property
    def num_steps(self) -> int:
        return self.step_label.shape[0]

    @property
    def device(self) -> torch.device:
        return self.sequence_index.device

    def of_tokens(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sequence and step of all tokens, or of those at `rows`."""
        if rows is None:
            return self.sequence_index, self.step_index
        return self.sequence_index[rows], self.step_index[rows]

    def check_values(self) -> None:
        """Indices and labels are in range; what they point to is not looked at. Waits for a device.

        Raises:
            ValueError: one that is not.
        """
        for name, size in (
            ("sequence_index", self.num_sequences),
            ("step_index", self.num_steps),
            ("outcome_label", 2),
            ("step_label", 2),
            ("step_sequence", self.num_sequences),
        ):
            checks.index(name, getattr(self, name), size)

    def labelled_steps(self) -> Tensor:
        return (self.step_label >= 0) & (self.step_sequence >= 0)  # (S,) bool

    def scored_tokens(self) -> Tensor:
        """(N,) bool: the token is in a labelled segment; no other token can change the loss."""
        labelled_sequence = (self.outcome_label >= 0).float()
        labelled_step = self.labelled_steps().float()
        either = take(labelled_sequence, self.sequence_index) + take(labelled_step, self.step_index)
        return either > 0


class TokenLayout(NamedTuple):
    """Where the tokens of each sequence are, of those that can change the loss (scored_tokens).

    No shape depends on a value, so making one waits for nothing and compiles into a graph.
    """

    order: Tensor  # (N,) int64, positions of tokens, sequence after sequence; the others come last
    lengths: Tensor  # (B + 1,) int64, tokens of sequence -1 (of `validate`d segments 0), 0, 1, ...

    @classmethod
    def of(cls, index: SegmentIndex) -> "TokenLayout":
        B = index.outcome_label.shape[0]  # no property: see segment_loss.term_counts
        scored, slot = index.scored_tokens(), index.sequence_index + 1
        order = torch.where(scored, slot, B + 1).sort(stable=True).indices
        return cls(order, sum_by_index(scored.double(), slot, B + 1).long())


@dataclass(frozen=True, eq=False)
class StepSegments:
    """Which token belongs to which sequence and step, and how both are labelled.

    Make it on the CPU and move it with `to`: what the fused loss has to know on the host about a
    batch goes along, and it never waits for a GPU.

    Args:
        sequence_index: (N,) int32, sequence of each token, -1 = not scored (prompt, padding).
        step_index: (N,) int32, step of each token in [0, S), -1 = in no step.
        outcome_label: (B,) int8, 1 right, 0 wrong, -1 unlabelled.
        step_label: (S,) int8, 1 right, 0 wrong, -1 unlabelled.
        step_sequence: (S,) int32, sequence of each step; -1 takes the step out of the loss.
    Raises:
        ValueError: a shape, dtype or device differs. Values are checked by `validate` only.
    """

    sequence_index: Tensor  # (N,) int32
    step_index: Tensor  # (N,) int32
    outcome_label: Tensor  # (B,) int8
    step_label: Tensor  # (S,) int8
    step_sequence: Tensor  # (S,) int32
    # Of segments that were made on the CPU and moved: `order` on their device, `lengths` on the
    # CPU. Not an argument, so that dataclasses.replace does not keep it beside other labels.
    layout: TokenLayout | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("sequence_index", "step_index", "step_sequence"):
            checks.tensor(name, getattr(self, name), dtypes=(torch.int32,), ndim=1)
        for name in ("outcome_label", "step_label"):
            checks.tensor(name, getattr(self, name), dtypes=(torch.int8,), ndim=1)
        checks.shape("step_index", self.step_index, (self.num_tokens,), "(N,)")
        checks.shape("step_sequence", self.step_sequence, (self.num_steps,), "(S,)")
        for name in ("step_index", "outcome_label", "step_label", "step_sequence"):
            checks.same_device(name, getattr(self, name), "sequence_index", self.sequence_index)

    @property
    def num_tokens(self) -> int:
        return self.sequence_index.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.outcome_label.shape[0]

    @property
    def num_steps(self) -> int:
        return self.step_label.shape[0]

    @property
    def device(self) -> torch.device:
        return self.sequence_index.device

    @classmethod
    def from_padded(
        cls, step_ids: Tensor, completion_mask: Tensor, outcome_label: Tensor, step_labels: Tensor
    ) -> "StepSegments":
        """Layout of a right- or left-padded batch; token (b, t) becomes token b * T + t.

        Args:
            step_ids: (B, T) int, step of each token counted within its sequence, -1 = in no step.
            completion_mask: (B, T) bool or int, nonzero where the token is scored.
            outcome_label: (B,) int in {1, 0, -1}.
            step_labels: (B, K) int in {1, 0, -1}, padded with -1. Step k of sequence b becomes
                step b * K + k, so that S = B * K needs no look at the values. A step without
                tokens takes no part in the loss.
        Raises:
            ValueError: shapes, dtypes or devices differ; on the CPU also a step id outside of
                [-1, K), or another label.
        """
        checks.tensor("step_ids", step_ids, dtypes=checks.INDEX_DTYPES, ndim=2)
        B, T = step_ids.shape
        checks.tensor("completion_mask", completion_mask, dtypes=checks.MASK_DTYPES, ndim=2)
        checks.shape("completion_mask", completion_mask, (B, T), "(B, T)")
        checks.tensor("outcome_label", outcome_label, dtypes=checks.LABEL_DTYPES, ndim=1)
        checks.shape("outcome_label", outcome_label, (B,), "(B,)")
        checks.tensor("step_labels", step_labels, dtypes=checks.LABEL_DTYPES, ndim=2)
        K = step_labels.shape[1]
        checks.shape("step_labels", step_labels, (B, K), "(B, K)")
        for name, value in (
            ("completion_mask", completion_mask),
            ("outcome_label", outcome_label),
            ("step_labels", step_labels),
        ):
            checks.same_device(name, value, "step_ids", step_ids)
        checks.labels("outcome_label", outcome_label)
        checks.labels("step_labels", step_labels)
        if step_ids.numel() and checks.values_are_free(step_ids):
            low, high = int(step_ids.min()), int(step_ids.max())
            checks.require(
                -1 <= low and high < K, "step_ids", f"values in [-1, K) = [-1, {K})", (low, high)
            )
        scored = completion_mask != 0
        sequence = torch.arange(B, device=step_ids.device)[:, None].expand(B, T)
        in_step = scored & (step_ids >= 0)
        step_index = torch.where(in_step, step_ids + sequence * K, -1)
        sequence = torch.where(scored, sequence, -1).reshape(-1)
        step_index = step_index.reshape(-1)
        step_sequence = _sequence_of_steps(step_index, sequence, B * K)
        return cls(
            sequence_index=sequence.int(),
            step_index=step_index.int(),
            outcome_label=outcome_label.to(torch.int8),
            step_label=step_labels.reshape(-1).to(torch.int8),
            step_sequence=step_sequence.int(),
        )

    @classmethod
    def from_packed(
        cls,
        cu_seqlens: Tensor,
        step_index: Tensor,
        outcome_label: Tensor,
        step_labels: Tensor,
        completion_mask: Tensor | None = None,
    ) -> "StepSegments":
        """Layout of sequences laid end to end in one row of N tokens.

        Args:
            cu_seqlens: (B + 1,) int, sequence b is tokens [cu_seqlens[b], cu_seqlens[b + 1]);
                tokens from cu_seqlens[B] on are padding.
            step_index: (N,) int, step of each token in [0, S) over the whole batch, -1 = in none.
            outcome_label: (B,) int in {1, 0, -1}.
            step_labels: (S,) int in {1, 0, -1}. A step without tokens takes no part in the loss.
            completion_mask: (N,) bool or int, zero where a token is not scored; None scores all.
        Raises:
            ValueError: shapes, dtypes or devices differ; on the CPU also a step index outside of
                [-1, S), another label, or cu_seqlens that fall, or lie outside of [0, N].
        """
        checks.tensor("cu_seqlens", cu_seqlens, dtypes=checks.INDEX_DTYPES, ndim=1)
        checks.tensor("step_index", step_index, dtypes=checks.INDEX_DTYPES, ndim=1)
        N, B = step_index.shape[0], cu_seqlens.shape[0] - 1
        checks.require(B >= 0, "cu_seqlens", "shape (B + 1,)", "shape (0,)")
        checks.tensor("outcome_label", outcome_label, dtypes=checks.LABEL_DTYPES, ndim=1)
        checks.shape("outcome_label", outcome_label, (B,), "(B,)")
        checks.tensor("step_labels", step_labels, dtypes=checks.LABEL_DTYPES, ndim=1)
        if completion_mask is not None:
            checks.tensor("completion_mask", completion_mask, dtypes=checks.MASK_DTYPES, ndim=1)
            checks.shape("completion_mask", completion_mask, (N,), "(N,)")
        for name, value in (
            ("cu_seqlens", cu_seqlens),
            ("outcome_label", outcome_label),
            ("step_labels", step_labels),
            ("completion_mask", completion_mask),
        ):
            if value is not None:
                checks.same_device(name, value, "step_index", step_index)
        checks.labels("outcome_label", outcome_label)
        checks.labels("step_labels", step_labels)
        if checks.values_are_free(cu_seqlens):
            ends = cu_seqlens.tolist()
            rising = ends == sorted(ends) and 0 <= ends[0] and ends[-1] <= N
            checks.require(rising, "cu_seqlens", f"rising values in [0, N] = [0, {N}]", ends)
        if N and checks.values_are_free(step_index):
            S = step_labels.shape[0]
            low, high = (int(x) for x in step_index.aminmax())
            checks.require(
                -1 <= low and high < S, "step_index", f"values in [-1, S) = [-1, {S})", (low, high)
            )
        position = torch.arange(N, device=step_index.device)
        sequence = torch.bucketize(position, cu_seqlens.long(), right=True) - 1
        scored = (sequence >= 0) & (sequence < B)
        if completion_mask is not None:
            scored = scored & (completion_mask != 0)
        sequence = torch.where(scored, sequence, -1)
        step_index = torch.where(scored, step_index, -1)
        step_sequence = _sequence_of_steps(step_index, sequence, step_labels.shape[0])
        return cls(
            sequence_index=sequence.int(),
            step_index=step_index.int(),
            outcome_label=outcome_label.to(torch.int8),
            step_label=step_labels.to(torch.int8),
            step_sequence=step_sequence.int(),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "StepSegments":
        index = SegmentIndex.of(self)
        moved = StepSegments(*(x.to(device, non_blocking=non_blocking) for x in index))
        layout = self.layout
        if moved.device.type == "cpu":
            layout = None
        elif layout is None and self.device.type == "cpu":
            layout = TokenLayout.of(index)
        if layout is not None:
            order = layout.order.to(device, non_blocking=non_blocking)
            object.__setattr__(moved, "layout", TokenLayout(order, layout.lengths))
        return moved

    def validate(self) -> "StepSegments":
        """Check the values too; waits for the device.

        Raises:
            ValueError: an index or label out of range, or a step in two sequences.
        """
        B, S = self.num_sequences, self.num_steps
        for name, low, high in (
            ("sequence_index", -1, B - 1),
            ("step_index", -1, S - 1),
            ("step_sequence", -1, B - 1),
            ("outcome_label", -1, 1),
            ("step_label", -1, 1),
        ):
            value = getattr(self, name)
            if value.numel():
                got = (int(value.min()), int(value.max()))
                inside = low <= got[0] and got[1] <= high
                checks.require(inside, name, f"values in [{low}, {high}]", f"values in {list(got)}")
        in_step = (self.step_index >= 0).nonzero()[:, 0]
        step = self.step_index[in_step].long()
        wrong = self.sequence_index[in_step] != self.step_sequence[step]
        if bool(wrong.any()):
            t = int(in_step[wrong][0])
            want = f"sequence {int(self.step_sequence[step[wrong][0]])} of its step"
            checks.require(False, f"sequence_index[{t}]", want, int(self.sequence_index[t]))
        return self


def _sequence_of_steps(step_index: Tensor, sequence: Tensor, S: int) -> Tensor:
    """Sequence of each step, -1 for a step without tokens. (N,), (N,) -> (S,) int64."""
    out = torch.full((S + 1,), -1, dtype=torch.int64, device=step_index.device)
    # amax, not plain scatter: the same result in any order of writes
    out.scatter_reduce_(0, _slot(step_index, S), sequence, "amax")
    return out[:S]


def _slot(index: Tensor, size: int) -> Tensor:
    """Index with -1 sent to an extra last slot, so that no branch looks at the values."""
    return torch.where(index >= 0, index, size).long()


def sum_by_index(values: Tensor, index: Tensor, size: int) -> Tensor:
    """out[i] = sum of values[t] over index[t] == i, fp64, in a fixed order. (N,) -> (size,)."""
    out = torch.zeros(size + 1, dtype=torch.float64, device=values.device)
    if values.device.type == "cpu":
        out.index_add_(0, _slot(index, size), values.double())
    else:  # index_add_ is atomic on CUDA; index_put_ with accumulate sorts first
        out.index_put_((_slot(index, size),), values.double(), accumulate=True)
    return out[:size]


def take(values: Tensor, index: Tensor) -> Tensor:
    """values[index[t]], 0 where index[t] is -1. (size,), (N,) -> (N,)."""
    padded = torch.cat([values, values.new_zeros(1)])
    return padded[_slot(index, values.shape[0])]


@custom_op("stepkto::segment_sums")
def _segment_sums(
    ratio: Tensor, sequence_index: Tensor, step_index: Tensor, num_sequences: int, num_steps: int
) -> tuple[Tensor, Tensor]:
    if ratio.device.type == "cpu":
        for name, index, size in (
            ("sequence_index", sequence_index, num_sequences),
            ("step_index", step_index, num_steps),
        ):
            checks.index(name, index, size)
    outcome = sum_by_index(ratio, sequence_index, num_sequences)
    step = sum_by_index(ratio, step_index, num_steps)
    return outcome.to(ratio.dtype), step.to(ratio.dtype)


@_segment_sums.register_fake
def _(ratio, sequence_index, step_index, num_sequences, num_steps):  # type: ignore[no-untyped-def]
    return ratio.new_empty(num_sequences), ratio.new_empty(num_steps)


@custom_op("stepkto::segment_sums_bwd")
def _segment_sums_bwd(
    doutcome: Tensor, dstep: Tensor, sequence_index: Tensor, step_index: Tensor
) -> Tensor:
    return take(doutcome, sequence_index) + take(dstep, step_index)


@_segment_sums_bwd.register_fake
def _(doutcome, dstep, sequence_index, step_index):  # type: ignore[no-untyped-def]
    return doutcome.new_empty(sequence_index.shape)


def _segment_sums_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1], inputs[2])


def _segment_sums_backward(ctx, doutcome, dstep):  # type: ignore[no-untyped-def]
    return _segment_sums_bwd(doutcome, dstep, *ctx.saved_tensors), None, None, None, None


_segment_sums.register_autograd(_segment_sums_backward, setup_context=_segment_sums_setup)


def segment_sums(ratio: Tensor, segments: StepSegments) -> tuple[Tensor, Tensor]:
    """Sums of a per-token quantity over sequences and over steps.

    Args:
        ratio: (...) fp32 or fp64 with N elements, in the order of `segments`.
    Returns:
        (B,) and (S,), dtype of `ratio`, 0 for a segment without tokens. Accumulated in fp64 in
        token order, so the bits depend on a segment's own tokens only. Differentiable in `ratio`.
    Raises:
        ValueError: dtype, number of elements or device differ.
    """
    checks.instance("segments", segments, StepSegments)
    checks.token_tensor("ratio", ratio, segments)
    outcome, step = _segment_sums(
        ratio.reshape(-1),
        segments.sequence_index,
        segments.step_index,
        segments.num_sequences,
        segments.num_steps,
    )
    return outcome, step
