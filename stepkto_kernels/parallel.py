"""Heads and batches over several ranks.

    weight (rows of V)      tokens                      call
    sharded                 the same on all ranks       group=vocab_parallel(weight, group)
    sharded                 cut over the same group     gather_tokens, then group=...of_tokens()
    sharded (FSDP2)         each rank's own             gathered_weight, or own_token_logprobs
    whole                   a sequence on many ranks    own_segments, step_kto_loss(context_group=)
    whole                   each rank's own (DDP)       loss_normalizer(group=), kl_baseline(group=)

A DTensor weight that is Shard(0) fits the first three lines. It is taken as vocabulary-parallel, by
itself, where its mesh is named "tp" or `hidden` is a Replicate() DTensor on that mesh; elsewhere it
is refused until the call says which it is. One that is Replicate() is a whole weight, whose
gradient is not reduced here.

Every rank of a group has to make the same calls in the same order, forward and backward, also one
without tokens or labels: its loss is 0 with gradients of 0. Arguments are checked before the first
exchange, so what is wrong on all ranks raises on all; a rank that raises alone leaves the others
waiting until the group's timeout.
Letters: P ranks, N tokens of all ranks, V vocabulary, H hidden size, B sequences, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from stepkto_kernels import checks, shards
from stepkto_kernels.linear_logprobs import linear_logprobs
from stepkto_kernels.segments import StepSegments
from stepkto_kernels.shards import VocabParallel

__all__ = [
    "VocabParallel",
    "gather_tokens",
    "gathered_weight",
    "own_segments",
    "own_token_logprobs",
    "split_tokens",
    "token_counts",
    "vocab_parallel",
]

REDUCTIONS = ("mean", "sum")


def vocab_parallel(weight: Tensor, group: ProcessGroup | None = None) -> VocabParallel:
    """How a weight is sharded over its rows, for `group=` of the head's functions. Call it once.

    Args:
        weight: this rank's rows (V_local, H), or a DTensor that is Shard(0) on a 1-D mesh.
        group: its process group, in which every rank must call; None for a DTensor, which knows.
    Raises:
        ValueError: no such weight or group; on all ranks: H or dtype differs between them, or
            nobody has a row.
    """
    if shards.is_dtensor(weight):
        return _sharded(weight)
    checks.tensor("weight", weight, dtypes=checks.FLOAT_DTYPES, ndim=2)
    checks.instance("group", group, ProcessGroup)
    same = {"weight.shape[1]": weight.shape[1], "weight.dtype": weight.dtype}
    split = shards.resolve(weight, group, same)
    assert split is not None
    return split


def _sharded(weight: Any) -> VocabParallel:
    fits = shards.is_dtensor(weight) and shards.shard_dim("weight", weight) == 0
    got = weight.placements if shards.is_dtensor(weight) else type(weight).__name__
    checks.require(fits, "weight", "a DTensor that is Shard(0) on a 1-D mesh", got)
    return shards.dtensor_shards(weight)


# ---- a sharded weight, other tokens on each rank: FSDP2 ------------------------------------------


class _GatheredWeight(torch.autograd.Function):
    """(V_local, ...) -> (V, ...); the gradient is summed over ranks in fp32 and rounded once."""

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, split: VocabParallel, dtype: torch.dtype, mean: bool
    ) -> Tensor:
        ctx.split, ctx.dtype, ctx.mean = split, local.dtype, mean
        padded = _pad(local.to(dtype), split.largest)
        return shards.all_gather(padded, split.group).flatten(0, 1)[: split.V]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        split, P = ctx.split, len(ctx.split.sizes)
        wide = _pad(grad.float(), P * split.largest).unflatten(0, (P, split.largest))
        own = shards.reduce_scatter(wide, split.group)[: split.sizes[split.rank]]
        if ctx.mean:
            own = own / P
        return own.to(ctx.dtype), None, None, None


def _pad(x: Tensor, length: int) -> Tensor:
    if len(x) == length:
        return x
    return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])])


def gathered_weight(
    weight: Tensor, *, reduce: str = "mean", dtype: torch.dtype | None = None
) -> Tensor:
    """The whole of an FSDP2 parameter, whose gradient counts the tokens of every rank.

    `weight.full_tensor()` takes its gradient for the same on all ranks and keeps each rank's own
    part of it: the other ranks' tokens are lost. Here they are reduced, in fp32.

        loss, _ = fused_linear_step_kto_loss(hidden, gathered_weight(model.lm_head.weight), ...)

    Args:
        weight: DTensor that is Shard(0) on a 1-D mesh. A plain tensor is returned as it is: where
            FSDP has left a parameter unsharded, its own hooks reduce the gradient.
        reduce: "mean" over the ranks, which is what FSDP2 does to all other parameters: with
            global `normalizer`s multiply the loss by the number of ranks. "sum": the gradient of
            the sum of the ranks' losses.
        dtype: to gather in, as FSDP2's param_dtype; None takes that of `weight`.
    Returns:
        (V, H) plain tensor. Differentiable; every rank has to run the backward pass.
    Raises:
        ValueError: another placement or mesh, an unknown `reduce`, or no such dtype.
    """
    checks.choice("reduce", reduce, REDUCTIONS)
    fits = dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    checks.require(fits, "dtype", "a floating-point torch.dtype or None", dtype)
    checks.require(isinstance(weight, Tensor), "weight", "a torch.Tensor", type(weight).__name__)
    if not shards.is_dtensor(weight):
        return weight if dtype is None else weight.to(dtype)
    split = _sharded(weight)
    local: Any = weight
    return _GatheredWeight.apply(local.to_local(), split, dtype or weight.dtype, reduce == "mean")


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def own_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    reduce: str = "mean",
    **options: Any,
) -> Tensor:
    """`linear_logprobs` of this rank's tokens under an FSDP2 head that is never gathered.

    Tokens travel in place of the weight, which pays where N < V: all ranks score the tokens of all
    against their own rows.

    Args:
        hidden, target: this rank's (..., H) and (...); the number of tokens may differ, and be 0.
        weight, bias: DTensors that are Shard(0) on a 1-D mesh.
        reduce: "mean" or "sum" over the ranks, of the gradients of weight and bias; see
            `gathered_weight`.
        options: of `linear_logprobs`, but for `group`; the same on all ranks.
    Returns:
        (...) fp32. Every rank has to run the backward pass, if any does.
    Raises:
        ValueError: as `linear_logprobs` and `gathered_weight`.
    """
    checks.choice("reduce", reduce, REDUCTIONS)
    split = _sharded(weight)
    H = weight.shape[1]
    checks.tensor("hidden", hidden, dtypes=checks.FLOAT_DTYPES)
    checks.require(hidden.shape[-1:] == (H,), "hidden", f"shape (..., {H})", tuple(hidden.shape))
    checks.tensor("target", target, dtypes=(torch.int64,))
    checks.shape("target", target, tuple(hidden.shape[:-1]), "hidden.shape[:-1]")
    if bias is not None:
        checks.require(shards.is_dtensor(bias), "bias", "a DTensor", type(bias).__name__)
        checks.require(_sharded(bias) == split, "bias", "split as weight", _sharded(bias))
    scale = 1 / len(split.sizes) if reduce == "mean" else 1.0
    local = lambda x: _ScaledGradient.apply(x.to_local(), scale)
    flat, group = hidden.reshape(-1, H), split.group
    counts = token_counts(flat, group)
    logps = linear_logprobs(
        gather_tokens(flat, group, counts),
        local(weight),
        gather_tokens(target.reshape(-1), group, counts),
        None if bias is None else local(bias),
        group=split.of_tokens(counts),
        **options,
    )
    return split_tokens(logps, group, counts).view(target.shape)


# ---- tokens cut over ranks -----------------------------------------------------------------------


def token_counts(x: Tensor, group: ProcessGroup) -> tuple[int, ...]:
    """len(x) of each rank. Waits for a GPU where `group` has no CPU backend.

    Raises:
        ValueError: x is not a tensor of a dimension or more, or group is none.
    """
    _check_tokens(x, group)
    return tuple(shards.exchange([len(x)], group, x.device)[:, 0].tolist())


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, counts: tuple[int, ...]) -> Tensor:
        ctx.own = _own(group, counts)
        return _gather(x, group, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.own], None, None


class _SplitTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, counts: tuple[int, ...]) -> Tensor:
        ctx.call = group, counts
        return x[_own(group, counts)].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, *ctx.call), None, None


def _own(group: ProcessGroup, counts: Sequence[int]) -> slice:
    start = sum(counts[: group.rank()])
    return slice(start, start + counts[group.rank()])


def _gather(x: Tensor, group: ProcessGroup, counts: Sequence[int]) -> Tensor:
    everyone = shards.all_gather(_pad(x, max(counts)), group)
    if min(counts) == max(counts):
        return everyone.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])


def _check_tokens(x: object, group: object) -> None:
    fits = isinstance(x, Tensor) and x.layout == torch.strided and x.ndim > 0
    got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
    checks.require(fits, "x", "a dense tensor (N, ...)", got)
    checks.instance("group", group, ProcessGroup)


def _checked_counts(
    x: Tensor, group: ProcessGroup, counts: Sequence[int] | None, of_all: bool
) -> tuple[int, ...]:
    if counts is None and not of_all:
        return token_counts(x, group)
    _check_tokens(x, group)
    checks.token_counts(counts, group.size())
    assert counts is not None
    want = sum(counts) if of_all else counts[group.rank()]
    checks.require(len(x) == want, "x", f"{want} tokens, as in counts", len(x))
    return tuple(counts)


def gather_tokens(x: Tensor, group: ProcessGroup, counts: Sequence[int] | None = None) -> Tensor:
    """The tokens of all ranks, in rank order: sequence parallel -> what a sharded head takes.

        split = vocab_parallel(weight, group)  # once
        counts = token_counts(hidden, group)  # unless they are known
        hidden = gather_tokens(hidden, group, counts)  # target: likewise, or known to all
        logps = linear_logprobs(hidden, weight, target, group=split.of_tokens(counts))

    Args:
        x: this rank's tokens (N_local, ...), of any dtype.
        counts: N_local of each rank; None exchanges them.
    Returns:
        (N, ...). The gradient has to be that of the whole loss on every rank, as a sharded head
        gives it; a rank's own tokens get their rows of it.
    Raises:
        ValueError: counts and x do not fit.
    """
    return _GatherTokens.apply(x, group, _checked_counts(x, group, counts, False))


def split_tokens(x: Tensor, group: ProcessGroup, counts: Sequence[int]) -> Tensor:
    """This rank's tokens of (N, ...); its gradient is gathered from all ranks.

    Between a sharded head, to which the gradient of every token must be known, and a loss that each
    rank computes of its own tokens. counts: tokens of each rank.

    Raises:
        ValueError: counts and x do not fit.
    """
    return _SplitTokens.apply(x, group, _checked_counts(x, group, counts, True))


# ---- a sequence on several ranks: context parallel -----------------------------------------------


def own_segments(segments: StepSegments, rows: slice | Tensor) -> StepSegments:
    """Layout of the tokens `rows` that this rank has, for step_kto_loss(context_group=...).

    segments: of the whole batch, the same on all ranks. Sequences, steps and labels stay as they
    are, so that sums over them can be added up between ranks.
    rows: a slice, indices (int32 or int64) or a mask (bool) of the N tokens.

    Raises:
        ValueError: rows is none of these, or points outside.
    """
    checks.instance("segments", segments, StepSegments)
    if not isinstance(rows, slice):
        checks.tensor("rows", rows, dtypes=(torch.bool, *checks.INDEX_DTYPES), ndim=1)
        N = segments.num_tokens
        if rows.dtype == torch.bool:
            checks.shape("rows", rows, (N,), "(N,)")
        elif checks.values_are_free(rows) and rows.numel():
            low, high = (int(x) for x in rows.aminmax())
            checks.require(-N <= low and high < N, "rows", f"indices of {N} tokens", (low, high))
    return StepSegments(
        segments.sequence_index[rows],
        segments.step_index[rows],
        segments.outcome_label,
        segments.step_label,
        segments.step_sequence,
    )
