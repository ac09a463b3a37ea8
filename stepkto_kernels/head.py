"""Passes over the lm_head in tiles: a GEMM by torch, row work by rows.py or native.py.

Nothing of size N x V is ever held, but for the rows of the cached mode.

Letters: N tokens of the batch, n tokens of a Head (those that are kept), H hidden size,
V vocabulary (of a sharded head: this rank's rows), v columns of a vocabulary chunk, R cached rows.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from stepkto_kernels import native, plan
from stepkto_kernels import rows as torch_rows
from stepkto_kernels.config import LogitOptions
from stepkto_kernels.plan import cut, even_chunk
from stepkto_kernels.rows import LogSumExp, RowGradient, Tile, cap_slope
from stepkto_kernels.shards import VocabParallel

# Of CPU GEMMs. A row's bits depend on how threads share rows and columns out, unless both come in
# multiples of this (measured with MKL, 1 to 128 threads; tests/test_determinism.py).
GEMM_UNIT = 16


@dataclass(frozen=True, eq=False)
class Head:
    """The tokens of one call, the lm_head, and how both are cut into tiles.

    It holds the tokens that are kept, gathered and widened once for all tiles; on the CPU the
    ignored ones are never computed. On a GPU all are kept: counting them would wait for the device.
    """

    hidden: Tensor  # (n, H), in gemm_dtype once `keep` or `pick` was called
    weight: Tensor  # (V, H)
    target: Tensor  # (n,) int64
    bias: Tensor | None  # (V,)
    options: LogitOptions
    backend: str  # "torch", "native" or "triton": whose kernels do the row work
    token_chunk: int
    vocab_chunk: int
    num_tokens: int  # N
    rows: Tensor | None = None  # (n,) int64, which of the N tokens are kept; None: all
    shards: VocabParallel | None = None  # of a head of which other ranks hold other rows

    def keep(self, mask: Tensor) -> Head:
        """Drop the tokens where mask (n,) is False, where that needs no wait for a device."""
        if mask.device.type != "cpu" or bool(mask.all()):
            return replace(self, hidden=self.hidden.to(self.gemm_dtype))
        return self.pick(mask.nonzero()[:, 0])

    def pick(self, kept: slice | Tensor) -> Head:
        """Some of the kept tokens only."""
        rows = self.rows
        if rows is None:
            rows = torch.arange(self.num_tokens, device=self.hidden.device)
        return replace(
            self,
            hidden=self.hidden[kept].to(self.gemm_dtype),
            target=self.target[kept],
            rows=rows[kept],
        )

    def pick_with_target(self, kept: Tensor) -> tuple[Head, Tensor]:
        """Some of the tokens, of which ignored ones are dropped, and which have a target (n,) bool.

        On a GPU those are kept, with hidden states of 0: counting them would wait for the device.
        """
        has_target = self.target[kept] != self.options.ignore_index
        if has_target.device.type == "cpu":
            return self.pick(kept[has_target]), has_target
        part = self.pick(kept)
        part.hidden.masked_fill_(~has_target[:, None], 0.0)  # a copy, as `kept` is an index
        return part, has_target

    @property
    def gemm_dtype(self) -> torch.dtype:
        """CPU GEMMs would round narrow results, so there everything is widened first."""
        on_cpu = self.hidden.device.type == "cpu" and self.backend != "triton"
        return torch.float32 if on_cpu else self.weight.dtype

    @property
    def epilogue(self) -> bool:
        """Whether our own GEMM does the row work in its epilogue, or row kernels after torch's."""
        unit_strides = self.hidden.stride(1) == 1 and self.weight.stride(1) == 1
        pays = plan.epilogue_pays(self.weight.shape[1], self.weight.element_size())
        return self.backend == "triton" and unit_strides and pays and len(self.weight) > 0

    @property
    def n(self) -> int:
        return self.hidden.shape[0]

    @property
    def v0(self) -> int:
        """Vocabulary entry, as targets count them, of the first row of `weight`."""
        return 0 if self.shards is None else self.shards.start

    def scored(self, tokens: slice) -> Tensor | None:
        """1 for tokens with a target, 0 for ignored ones, (n,) fp32; None where those are gone."""
        if self.hidden.device.type == "cpu":
            return None
        return (self.target[tokens] != self.options.ignore_index).float()

    @property
    def token_slices(self) -> list[slice]:
        return cut(self.n, even_chunk(self.n, self.token_chunk))

    def recompute_tiles(self) -> Head:
        """The head cut as it is best for recomputing dlogits: in an epilogue they are half as wide
        and nothing else is held, so tiles are larger and sums over them are visited less often."""
        if not self.epilogue:
            return self
        tokens, columns = plan.EPILOGUE_TILE
        return replace(self, token_chunk=tokens, vocab_chunk=columns)

    @property
    def vocab_slices(self) -> list[slice]:
        return cut(self.weight.shape[0], self.vocab_chunk)

    def spread(self, kept: Tensor) -> Tensor:
        """Kept tokens (n, ...) into all tokens (N, ...), 0 elsewhere."""
        if self.rows is None:
            return kept
        full = kept.new_zeros(self.num_tokens, *kept.shape[1:])
        full[self.rows] = kept
        return full

    def sum_over_ranks(self, kept: Tensor) -> Tensor:
        """(n, ...) of a sharded head, added up over the ranks that ask for it."""
        assert self.shards is not None
        if not self.shards.counts or self.rows is None:
            return self.shards.sum_(kept)
        return self.shards.sum_(self.spread(kept))[self.rows]

    def weight_tile(self, vocab: slice) -> Tensor:
        return self.weight[vocab].to(self.gemm_dtype)

    def scratch(self) -> Tensor | None:
        """Memory for one tile after the other; None where torch's allocator is as good."""
        if self.hidden.device.type != "cpu" or self.epilogue:
            return None
        size = min(self.n, self.token_chunk) * self.vocab_chunk
        return torch.empty(size, dtype=torch.float32)

    @property
    def kernels(self) -> ModuleType:
        if self.backend == "triton":
            return importlib.import_module("stepkto_kernels.kernels.rows")
        return native if self.backend == "native" else torch_rows

    def tile(self, tokens: slice, w: Tensor, vocab: slice, out: Tensor | None) -> Tile:
        """Logits of some tokens and a vocabulary chunk, ready for the row kernels. 1 GEMM.

        w: weight_tile(vocab). out: contiguous memory for at least the tile; None: new memory.
        """
        h = self.hidden[tokens]
        if out is not None:
            out = out.view(-1)[: len(h) * len(w)].view(len(h), len(w))
        bias = None if self.bias is None else self.bias[vocab].float().contiguous()
        tile = Tile(mm(h, w.T, out), self.target[tokens], self.v0 + vocab.start, bias)
        return self.kernels.prepare(tile, self.options)

    def dlogits(
        self, tokens: slice, w: Tensor, vocab: slice, row: RowGradient, out: Tensor | None
    ) -> Tensor:
        """dlogits (n, v) of some tokens, rebuilt from the hidden states. 1 GEMM.

        Arguments as for `tile`; row: of those tokens.
        """
        if not self.epilogue:
            return self.dlogits_of(self.tile(tokens, w, vocab, out), row)
        h = self.hidden[tokens]
        return gemm_epilogue().dlogits(
            h,
            w,
            self.target[tokens],
            None if self.bias is None else self.bias[vocab],
            self.v0 + vocab.start,
            row,
            self.options,
            h.new_empty(len(h), len(w)),
        )

    def dlogits_of(self, tile: Tile, row: RowGradient) -> Tensor:
        """dlogits (n, v) from logits, in the same memory where the dtype allows it."""
        return self.kernels.dlogits_(tile, row, self.options, self.gemm_dtype)

    def new_fold(self, stats: tuple[str, ...] = ()) -> torch_rows.Fold:
        V, chunks = self.weight.shape[0], len(self.vocab_slices)
        return self.kernels.Fold(self.n, chunks, V, stats, self.options, self.hidden.device)


def gemm_epilogue() -> ModuleType:
    """The module, which needs Triton."""
    return importlib.import_module("stepkto_kernels.kernels.gemm_epilogue")


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in fp32, into `out` where given. A row's bits do not depend on the number of rows."""
    if a.device.type == "cpu":
        return _mm_in_units(a.float(), b.float(), out)
    if a.dtype == torch.float32:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _mm_in_units(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """a @ b as products of whole units of rows and columns; what is left over is padded to one."""
    shape = a.shape[0], b.shape[1]
    if out is None:
        out = a.new_empty(shape)
    if a.shape[1] == 0:  # which pad of torch 2.8 refuses
        return out.zero_()
    rows, columns = ([slice(0, k), slice(k, n)] for n in shape for k in [n - n % GEMM_UNIT])
    pad = torch.nn.functional.pad
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            part = out[row, column]
            if not part.numel():
                continue
            left, right = a[row], b[:, column]
            if i == 0 and j == 0:
                torch.mm(left, right, out=part)
                continue
            if i == 1:
                left = pad(left, (0, 0, 0, GEMM_UNIT - len(left)))
            if j == 1:
                right = pad(right, (0, GEMM_UNIT - right.shape[1]))
            part.copy_(torch.mm(left, right)[: part.shape[0], : part.shape[1]])
    return out


def add_mm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. total is fp32; a is rounded to b's dtype where that is narrower."""
    a = a.to(b.dtype)
    if total.device.type == "cpu":
        if total.shape[0] < GEMM_UNIT:
            total.add_(mm(a, b))
        else:
            total.addmm_(a.float(), b.float())
    elif b.dtype == torch.float32:
        total.addmm_(a, b)
    elif _addmm_accumulates(total.device, b.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(a, b, out_dtype=torch.float32))


@functools.cache
def _addmm_accumulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a narrow product to a fp32 tensor; the first with out_dtype did not."""
    narrow = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, narrow, narrow, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def forward(head: Head, stats: tuple[str, ...] = ()) -> tuple[Tensor, LogSumExp, dict[str, Tensor]]:
    """1 unit. Log-probs of the kept tokens (n,), their log-sum-exp, statistics by name (n,)."""
    if head.epilogue:
        return forward_epilogue(head, stats)
    fold = head.new_fold(stats)
    scratch = head.scratch()
    for chunk, vocab in enumerate(head.vocab_slices):
        w = head.weight_tile(vocab)
        for tokens in head.token_slices:
            fold.add(head.tile(tokens, w, vocab, scratch), tokens, chunk)
    return finish(head, [fold], stats)[1:]


def finish(
    head: Head, folds: list[torch_rows.Fold], stats: tuple[str, ...]
) -> tuple[Tensor, Tensor, LogSumExp, dict[str, Tensor]]:
    """Results of groups of tokens as one: largest logit here (n,), and what `forward` gives.

    Of a sharded head over all ranks, by one collective.
    """
    if head.shards is not None and head.weight.shape[0] == 0:
        target_logit, lse, values = head.shards.nothing(head.n, stats, head.hidden.device)
        logp = target_logit
    else:
        logp, lse, values = join([fold.finish() for fold in folds], stats)
        target_logit = torch.cat([fold.target_logit for fold in folds])
    top = lse.top
    if head.shards is not None:
        logp, lse, values = head.shards.merge(target_logit, lse, values, stats, head.options)
    return top, logp, lse, values


def forward_epilogue(
    head: Head, stats: tuple[str, ...]
) -> tuple[Tensor, LogSumExp, dict[str, Tensor]]:
    """`forward` by our own GEMM, a few thousand tokens at a time to bound its partial results."""
    folds = []
    for tokens in cut(head.n, plan.EPILOGUE_TILE[0]) or [slice(0, 0)]:
        h, target = head.hidden[tokens], head.target[tokens] - head.v0
        fold = gemm_epilogue().forward(h, head.weight, target, head.bias, head.options, stats)
        folds.append(fold)
    return finish(head, folds, stats)[1:]


def rescale_(total: Tensor, factor: Tensor) -> None:
    """total (n, H) *= factor (n,). Nearly all factors are 1, which the CPU need not multiply by."""
    if total.device.type == "cpu":
        raised = (factor != 1).nonzero()[:, 0]
        if len(raised) < len(factor):
            total[raised] *= factor[raised, None]
            return
    total *= factor[:, None]


def join(
    parts: list[tuple[Tensor, LogSumExp, dict[str, Tensor]]], stats: tuple[str, ...]
) -> tuple[Tensor, LogSumExp, dict[str, Tensor]]:
    """What `forward` gives for groups of tokens, as one."""
    if len(parts) == 1:
        return parts[0]
    logps, lses, values = zip(*parts, strict=True)
    lse = LogSumExp(torch.cat([p.top for p in lses]), torch.cat([p.logsum for p in lses]))
    return torch.cat(logps), lse, {name: torch.cat([p[name] for p in values]) for name in stats}


def forward_frozen(
    head: Head, stats: tuple[str, ...] = ()
) -> tuple[Tensor, LogSumExp, dict[str, Tensor], Tensor]:
    """2 units. As `forward`, and d logp / d hidden (n, H) fp32, with the head taken as constant.

    d logp / d hidden = W[y] - sum_v p[v] W[v], times the slopes of the logit options. The sum is
    collected like the log-sum-exp: relative to a running maximum, rescaled when that rises.
    """
    options = head.options
    fold = head.new_fold(stats)
    expected = torch.zeros_like(head.hidden, dtype=torch.float32)
    scratch = head.scratch()
    for chunk, vocab in enumerate(head.vocab_slices):
        w = head.weight_tile(vocab)
        for tokens in head.token_slices:
            tile = head.tile(tokens, w, vocab, scratch)
            # without the target: its share is added in the end as 1 - p, not from a rounded p
            rescale, d = fold.add_frozen(tile, tokens, chunk, head.gemm_dtype)
            rescale_(expected[tokens], rescale)
            add_mm_(expected[tokens], d, w)
    top, logp, lse, values = finish(head, [fold], stats)
    chain = options.logit_scale / options.temperature
    V = head.weight.shape[0]
    for tokens in head.token_slices if V else []:
        target = head.target[tokens] - head.v0
        others = -torch.exp(-lse.logsum[tokens]) * chain
        own = -torch.expm1(logp[tokens]) * chain
        if options.softcap is not None:
            own = own * cap_slope(fold.target_logit[tokens], options)
        if head.shards is not None:  # from this rank's largest logit to the largest of all
            highest = top[tokens].clamp(min=torch.finfo(torch.float32).min)
            others *= torch.exp(highest - lse.top[tokens])
            own = torch.where((target >= 0) & (target < V), own, 0.0)
        expected[tokens] *= others[:, None]
        expected[tokens] += own[:, None] * head.weight[target.clamp(0, V - 1)].float()
    if head.shards is not None:
        expected = head.sum_over_ranks(expected)
    return logp, lse, values, expected


def full_rows(
    head: Head, scratch: list[Tensor] | None = None, stats: tuple[str, ...] = ()
) -> tuple[list[Tile], Tensor, LogSumExp, dict[str, Tensor]]:
    """1 unit. All logits of a few tokens, as one tile (n, v) a vocabulary chunk.

    Returns the tiles, in `scratch` where it is given, and what `forward` does.
    """
    everything = slice(0, head.n)
    fold = head.new_fold(stats)
    tiles = []
    for chunk, vocab in enumerate(head.vocab_slices):
        out = None if scratch is None else scratch[chunk]
        tiles.append(head.tile(everything, head.weight_tile(vocab), vocab, out))
        fold.add(tiles[-1], everything, chunk)
    return tiles, *finish(head, [fold], stats)[1:]


def pick_rows(tiles: list[Tile], rows: Tensor) -> list[Tile]:
    """The tiles with some of their tokens only, moved to the front of the same memory."""
    out = []
    for tile in tiles:
        front = tile.x[: len(rows)]
        front.copy_(tile.x[rows])
        out.append(tile._replace(x=front, target=tile.target[rows]))
    return out


def vocab_tiles(head: Head, flat: Tensor, rows: int) -> list[Tensor]:
    """Memory (at least rows * V,) as one contiguous (rows, v) tile a vocabulary chunk."""
    return [
        flat[rows * v.start : rows * v.stop].view(rows, v.stop - v.start) for v in head.vocab_slices
    ]


def forward_cached(
    head: Head, cached_rows: int, dtype: torch.dtype, stats: tuple[str, ...] = ()
) -> tuple[Tensor, LogSumExp, dict[str, Tensor], Tensor]:
    """1 unit. As `forward`, and (onehot - p) of the first `cached_rows` kept tokens, or of all.

    It has the dtype `dtype`, and the slopes of the logit options are in it.
    """
    V = head.weight.shape[0]
    cache = torch.empty(cached_rows * V, dtype=dtype, device=head.hidden.device)
    tiles = vocab_tiles(head, cache, cached_rows)
    in_place = dtype == torch.float32
    used = min(cached_rows, head.n)
    for tile in tiles:
        tile[used:] = 0  # rows of ignored tokens: unused, but an output like the others
    parts = []
    for tokens in head.pick(slice(0, used)).token_slices:
        scratch = [tile[tokens] for tile in tiles] if in_place else None
        logits, logp, lse, values = full_rows(head.pick(tokens), scratch, stats)
        parts.append((logp, lse, values))
        row = RowGradient(lse, logp, dlogp=head.scored(tokens))
        for source, tile in zip(logits, tiles, strict=True):
            d = head.dlogits_of(source, row)
            if not in_place:
                tile[tokens] = d
    parts.append(forward(head.pick(slice(used, head.n)), stats))
    return *join(parts, stats), cache


class WeightGradients:
    """Gradients of weight and bias, collected in fp32 and rounded once.

    A fp32 tensor is added to in place, over as many visits of a vocabulary chunk as it takes. A
    narrower one is written when its chunk ends, so each chunk may be visited once.
    """

    def __init__(self, dweight: Tensor | None, dbias: Tensor | None):
        self.dweight = dweight  # (V, H)
        self.dbias = dbias  # (V,)

    def begin(self, vocab: slice) -> tuple[Tensor | None, Tensor | None]:
        """fp32 tensors (v, H) and (v,) to add the chunk's gradients to."""
        return _wide_chunk(self.dweight, vocab), _wide_chunk(self.dbias, vocab)

    def divide_(self, by: Tensor) -> None:
        for full in (self.dweight, self.dbias):
            if full is not None:
                full /= by

    def end(self, vocab: slice, chunk: tuple[Tensor | None, Tensor | None]) -> None:
        for full, part in zip((self.dweight, self.dbias), chunk, strict=True):
            if full is not None and part is not None and full.dtype != torch.float32:
                full[vocab] = part


def _wide_chunk(full: Tensor | None, vocab: slice) -> Tensor | None:
    if full is None or full.dtype == torch.float32:
        return None if full is None else full[vocab]
    return torch.zeros_like(full[vocab], dtype=torch.float32)


def _accumulate(
    d: Tensor,
    h: Tensor,
    w: Tensor,
    dhidden: Tensor | None,
    chunk: tuple[Tensor | None, Tensor | None],
) -> None:
    """Add what the dlogits d (n, v) of a tile give to dhidden (n, H) and the chunk's gradients."""
    dweight, dbias = chunk
    if dhidden is not None:
        add_mm_(dhidden, d, w)
    if dweight is not None:
        add_mm_(dweight, d.T, h)
    if dbias is not None:
        dbias += d.sum(0, dtype=torch.float32)


def _recompute_chunk(
    head: Head,
    row: RowGradient,
    vocab: slice,
    w: Tensor,
    dhidden: Tensor | None,
    chunk: tuple[Tensor | None, Tensor | None],
    scratch: Tensor | None,
) -> None:
    for tokens in head.token_slices:
        d = head.dlogits(tokens, w, vocab, row.rows(tokens), scratch)
        _accumulate(d, head.hidden[tokens], w, None if dhidden is None else dhidden[tokens], chunk)


def recompute_backward(
    head: Head, row: RowGradient, dhidden: Tensor | None, weights: WeightGradients
) -> None:
    """1 unit to rebuild the logits and 1 for each gradient.

    row: of the kept tokens. dhidden: (n, H) fp32 that is added to, None if not wanted.
    """
    head = head.recompute_tiles()
    scratch = head.scratch()
    for vocab in head.vocab_slices:
        chunk = weights.begin(vocab)
        _recompute_chunk(head, row, vocab, head.weight_tile(vocab), dhidden, chunk, scratch)
        weights.end(vocab, chunk)


def full_rows_backward(
    head: Head,
    row: RowGradient,
    tiles: list[Tile],
    dhidden: Tensor | None,
    weights: WeightGradients,
) -> None:
    """1 unit for each gradient, from the logits that `full_rows` left of all kept tokens."""
    for vocab, tile in zip(head.vocab_slices, tiles, strict=True):
        chunk = weights.begin(vocab)
        d = head.dlogits_of(tile, row)
        _accumulate(d, head.hidden, head.weight_tile(vocab), dhidden, chunk)
        weights.end(vocab, chunk)


def cached_backward(
    head: Head,
    cache: Tensor,
    cached_rows: int,
    row: RowGradient,
    active: Tensor | None,
    dhidden: Tensor | None,
    weights: WeightGradients,
) -> None:
    """1 unit for each gradient of the cached tokens; the rest is recomputed.

    dhidden = g * (D @ W), dweight = D.T @ (g * hidden), D = onehot - p: g never meets D itself,
    which is as large as the logits. active: (n,) bool, the tokens that have a gradient at all;
    None: all.
    """
    assert row.dlogp is not None
    used = min(cached_rows, head.n)
    groups: tuple[slice | Tensor, slice | Tensor] = slice(0, used), slice(used, head.n)
    if active is not None:
        where = active.nonzero()[:, 0]
        groups = where[where < used], where[where >= used]
    cached, rest = (head.pick(group) for group in groups)
    g, rest_row = row.dlogp[groups[0], None], row.rows(groups[1])
    # a token without gradient may hold anything, so 0 does not come from a product with it
    scaled = (g * cached.hidden).masked_fill_(g == 0, 0.0).to(head.gemm_dtype)
    wide, rest_wide = (None if dhidden is None else dhidden[group] for group in groups)
    scratch = rest.scratch()
    for vocab, tile in zip(head.vocab_slices, vocab_tiles(head, cache, cached_rows), strict=True):
        chunk = weights.begin(vocab)
        w = head.weight_tile(vocab)
        for tokens in cached.token_slices:
            kept = tile[tokens] if isinstance(groups[0], slice) else tile[groups[0][tokens]]
            d = kept.to(head.gemm_dtype)
            if wide is not None:
                add_mm_(wide[tokens], d, w)
            dweight, dbias = chunk
            if dweight is not None:
                add_mm_(dweight, d.T, scaled[tokens])
            if dbias is not None:
                dbias += d.float().T @ g[tokens, 0]
        _recompute_chunk(rest, rest_row, vocab, w, rest_wide, chunk, scratch)
        weights.end(vocab, chunk)
    if wide is not None:
        wide.mul_(g)
    if active is not None:  # an index made copies, a slice did not
        for group, part in zip(groups, (wide, rest_wide), strict=True):
            if dhidden is not None and part is not None:
                dhidden[group] = part
