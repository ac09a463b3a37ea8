"""Vocabulary-parallel heads: which rows of the lm_head each rank holds, and what they exchange.

Every rank computes log-sum-exp, target logit and statistics of its own columns. One all-gather
brings these few numbers a token together, and every rank folds them in rank order: the results have
the same bits on all ranks, whatever algorithm the collective takes. d hidden is a sum over ranks.

Bytes that a rank receives, s statistics but is_top1: 4 * (P - 1) * (3 + s) * n forward;
8 * (P - 1) / P * N * H for d hidden (half of it for gathered tokens), in the forward pass where the
head is frozen. The weight and its gradient never travel.
Letters: P ranks, V vocabulary, H hidden size, N tokens, n of them that have a target.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stepkto_kernels import checks, rows
from stepkto_kernels.config import LogitOptions
from stepkto_kernels.rows import LogSumExp

# Mesh dimensions over which every rank works on the same tokens, by their usual names.
TENSOR_PARALLEL = ("tp", "tensor_parallel")

# torch 2.13 renamed them
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def named_group(name: str) -> dist.ProcessGroup:
    """The process group that torch registered by this name, as custom ops take no group."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(...) of the same shape on all ranks -> (P, ...)."""
    out = x.new_empty(group.size(), *x.shape)
    if x.numel():
        _all_gather(out.view(-1), x.contiguous().view(-1), group=group)
    return out


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(P, ...) -> (...): the sum over ranks of this rank's part."""
    out = x.new_empty(x.shape[1:])
    if x.numel():
        _reduce_scatter(out.view(-1), x.contiguous().view(-1), group=group)
    return out


def stack_padded(pieces: Sequence[Tensor], whole: Tensor) -> Tensor:
    """Pieces that `whole` (N, ...) falls into, as (P, longest, ...); a view where all are alike."""
    lengths = {len(piece) for piece in pieces}
    if len(lengths) == 1:
        return whole.unflatten(0, (len(pieces), *lengths))
    parts = whole.new_zeros(len(pieces), max(lengths), *whole.shape[1:])
    for part, piece in zip(parts, pieces, strict=True):
        part[: len(piece)] = piece
    return parts


def exchange(values: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """A few int64 numbers of each rank, (P, K) on the CPU.

    Waits for `device` where the group has no CPU backend beside that of the device.
    """
    on_cpu = "cpu:" in dist.get_backend_config(group)
    return all_gather(torch.tensor(values, device="cpu" if on_cpu else device), group).cpu()


@dataclass(frozen=True)
class VocabParallel:
    """How the rows of an lm_head are split over the ranks of a process group, in rank order.

    Made by `parallel.vocab_parallel`. Plain numbers, so that neither the offset of a shard nor the
    plan of a call is waited for, and all ranks agree on both.

    Args:
        sizes: rows of the weight on each rank; 0 is allowed.
        rank: of this process within the group.
        group_name: of the process group, as torch registers it.
        counts: tokens of each rank where `hidden` is what `parallel.gather_tokens` made of them,
            which asks for a rank's own rows of d hidden only; empty: every rank wants all of it.
    """

    sizes: tuple[int, ...]
    rank: int
    group_name: str
    counts: tuple[int, ...] = ()

    @property
    def start(self) -> int:
        """Vocabulary entry of this rank's first row."""
        return sum(self.sizes[: self.rank])

    @property
    def V(self) -> int:
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        return max(self.sizes)

    @property
    def group(self) -> dist.ProcessGroup:
        return named_group(self.group_name)

    def of_tokens(self, counts: Sequence[int]) -> VocabParallel:
        """The same for gathered tokens: reduces d hidden at half the cost. See `counts`."""
        checks.token_counts(counts, len(self.sizes))
        return replace(self, counts=tuple(counts))

    def pack(self) -> str:
        """One string for a custom op."""
        words = [",".join(map(str, numbers)) for numbers in (self.sizes, self.counts)]
        return "|".join([*words, str(self.rank), self.group_name])

    @classmethod
    def unpack(cls, packed: str) -> VocabParallel | None:
        if not packed:
            return None
        sizes, counts, rank, name = packed.split("|", 3)
        numbers = lambda word: tuple(int(x) for x in word.split(",") if x)
        return cls(numbers(sizes), int(rank), name, numbers(counts))

    def sum_(self, x: Tensor) -> Tensor:
        """x (N, ...) of all ranks added up, in place and in its dtype; see `counts`."""
        if not x.numel():
            return x
        if not x.is_contiguous():  # collectives take memory as it lies
            return x.copy_(self.sum_(x.contiguous()))
        if not self.counts:
            dist.all_reduce(x, group=self.group)
            return x
        pieces = x.split(self.counts)
        own = pieces[self.rank]
        own.copy_(reduce_scatter(stack_padded(pieces, x), self.group)[: len(own)])
        return x

    def merge(
        self,
        target_logit: Tensor,
        lse: LogSumExp,
        values: Mapping[str, Tensor],
        stats: tuple[str, ...],
        options: LogitOptions,
    ) -> tuple[Tensor, LogSumExp, dict[str, Tensor]]:
        """What rows.Fold.finish gives, of the whole vocabulary, from that of each rank's columns.

        target_logit: (n,), NaN where the target is another rank's.
        """
        summed = tuple(name for name in stats if name != "is_top1")
        v = self.sizes[self.rank]
        part = [values[name] * v if name == "mean_logit" else values[name] for name in summed]
        top, logsum = lse
        # Columns that are all masked hold no probability: their log-sum is -inf, or NaN in torch.
        lowest = torch.finfo(torch.float32).min
        masked = (top == -torch.inf) | ((top <= lowest) & (logsum == -torch.inf))
        logsum = torch.where(masked, -torch.inf, logsum)
        for i, name in enumerate(summed):
            if name != "mean_logit":
                part[i] = torch.where(masked, 0.0, part[i])
        gathered = all_gather(torch.stack([top, logsum, target_logit, *part]), self.group)
        top, logsum, target_logit, *part = gathered.permute(1, 2, 0)  # (n, P) each
        fold = rows.Fold(len(top), len(self.sizes), self.V, stats, options, top.device)
        fold.top, fold.logsum = top.contiguous(), logsum.contiguous()
        missing = target_logit.isnan()
        found = torch.where(missing, 0.0, target_logit).sum(1)
        fold.target_logit = torch.where(missing.all(1), torch.nan, found)
        fold.partial = {name: x.contiguous() for name, x in zip(summed, part, strict=True)}
        return fold.finish()

    def nothing(
        self, n: int, stats: tuple[str, ...], device: torch.device
    ) -> tuple[Tensor, LogSumExp, dict[str, Tensor]]:
        """Target logit, log-sum-exp and statistics of an empty shard, for `merge`."""
        full = lambda value: torch.full((n,), value, dtype=torch.float32, device=device)
        none = LogSumExp(full(-torch.inf), full(-torch.inf))
        return full(torch.nan), none, {name: full(0.0) for name in stats}


def torch_chunks(V: int, ranks: int) -> tuple[int, ...]:
    """Rows of each rank of a DTensor that is Shard(0): ceil(V / P), the last ones fewer or none."""
    chunk = -(-V // ranks)
    ends = [min(end, V) for end in accumulate([chunk] * ranks)]
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


def is_dtensor(value: object) -> bool:
    # by its attributes: importing torch.distributed.tensor would slow down everyone's import
    return isinstance(value, Tensor) and hasattr(value, "placements")


def shard_dim(name: str, value: Any) -> int | None:
    """0 for a DTensor that is Shard(0) on a 1-D mesh, None for one that is Replicate."""
    placements = value.placements
    mesh = value.device_mesh
    kind = type(placements[0]).__name__ if len(placements) == 1 else None
    if kind == "Shard" and placements[0].dim == 0:
        return 0
    want = "a DTensor that is Shard(0) or Replicate() on a 1-D mesh"
    checks.require(kind == "Replicate", name, want, f"{placements} on {mesh}")
    return None


def dtensor_shards(weight: Any) -> VocabParallel:
    """Split of a DTensor that is Shard(0) on a 1-D mesh. No collective."""
    mesh = weight.device_mesh
    sizes = torch_chunks(weight.shape[0], mesh.size())
    return VocabParallel(sizes, mesh.get_local_rank(), mesh.get_group().group_name)


HeadGroup = dist.ProcessGroup | VocabParallel


def check_group(group: object) -> None:
    want = "None, a ProcessGroup or a parallel.VocabParallel"
    # a tuple: torch.compile of 2.8 takes no union here
    fits = group is None or isinstance(group, (dist.ProcessGroup, VocabParallel))
    checks.require(fits, "group", want, group)


def local_tensors(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    group: HeadGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, HeadGroup | None]:
    """The same with DTensors as this rank's plain tensors, and the group of a sharded weight."""
    check_group(group)
    if not any(is_dtensor(value) for value in (hidden, weight, target, bias)):
        return hidden, weight, target, bias, group
    for name, value in (("hidden", hidden), ("target", target)):
        if is_dtensor(value):
            replicated = shard_dim(name, value) is None
            checks.require(replicated, name, "Replicate(), or a plain tensor", value.placements)  # type: ignore[attr-defined]
    if is_dtensor(weight) and shard_dim("weight", weight) == 0:
        group = _dtensor_group(hidden, weight, group)
        if bias is not None:
            fits = is_dtensor(bias) and shard_dim("bias", bias) == 0
            checks.require(fits, "bias", "a DTensor split as weight", type(bias).__name__)
    else:
        if is_dtensor(weight):
            want = "None, as weight is a DTensor that is Replicate()"
            checks.require(group is None, "group", want, group)
        if is_dtensor(bias):
            replicated = shard_dim("bias", bias) is None
            checks.require(replicated, "bias", "split as weight", bias.placements)  # type: ignore[union-attr]
    local = lambda x: x.to_local() if is_dtensor(x) else x
    return local(hidden), local(weight), local(target), local(bias), group


def _dtensor_group(hidden: Any, weight: Any, group: HeadGroup | None) -> VocabParallel:
    """Shard(0) means vocabulary-parallel only where hidden is known to be the same on all ranks."""
    shards = dtensor_shards(weight)
    if group is not None:
        same = group.group_name == shards.group_name
        checks.require(same, "group", "that of weight's mesh", group.group_name)
        return group if isinstance(group, VocabParallel) else shards
    mesh = weight.device_mesh
    names: tuple[str, ...] = mesh.mesh_dim_names or ()
    known = is_dtensor(hidden) and hidden.device_mesh == mesh
    checks.require(
        known or (len(names) == 1 and names[0] in TENSOR_PARALLEL),
        "weight",
        "parallel.gathered_weight(weight) where ranks have different tokens (FSDP), or, where all "
        "have the same, group=parallel.vocab_parallel(weight), hidden as a Replicate() DTensor or "
        f"a mesh named {' or '.join(map(repr, TENSOR_PARALLEL))}",
        f"Shard(0) on a mesh named {names}",
    )
    return shards


def resolve(
    weight: Tensor,
    group: HeadGroup | None,
    same_everywhere: Mapping[str, object],
    tokens: int = 0,
) -> VocabParallel | None:
    """The split of `weight` (V_local, H); a bare process group is asked, with one small exchange.

    same_everywhere: what must not differ between ranks, by name; looked at in that exchange.
    Raises:
        ValueError: on all ranks where something differs; where sizes and weight do not fit.
    """
    if group is None:
        return None
    if isinstance(group, VocabParallel):
        got = weight.shape[0]
        want = f"V_local = {group.sizes[group.rank]} rows as in group"
        checks.require(got == group.sizes[group.rank], "weight", want, got)
        fits = not group.counts or sum(group.counts) == tokens
        checks.require(fits, "hidden", f"{sum(group.counts)} tokens as in group.counts", tokens)
        return group
    want = "parallel.vocab_parallel(weight, group) where torch.compile traces"
    checks.require(not torch.compiler.is_compiling(), "group", want, "a ProcessGroup")
    numbers = [zlib.crc32(repr(value).encode()) for value in same_everywhere.values()]
    table = exchange([weight.shape[0], *numbers], group, weight.device)
    for column, (name, value) in enumerate(same_everywhere.items(), 1):
        differing = (table[:, column] != table[0, column]).nonzero()[:, 0].tolist()
        want = "the same on all ranks of group"
        checks.require(not differing, name, want, f"{value} here, ranks {differing} unlike rank 0")
    sizes = tuple(table[:, 0].tolist())
    checks.require(sum(sizes) > 0, "weight", "at least one row on some rank", sizes)
    return VocabParallel(sizes, group.rank(), group.group_name)
