"""Row kernels on one tile of logits, in torch: log-sum-exp, statistics, dlogits in place.

native.py has the same names in C++; head.py calls either.

Every reduction here goes along a row and gives a row the same bits whatever other rows are in the
tile: that is why the sum of exponentials is read off log_softmax, whose CPU kernel works row by
row. Maximum and log-sum are kept apart, as z - max is exact where it matters and z - lse is not.
Letters: n tokens of the tile, v vocabulary columns of the tile, C vocabulary chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepkto_kernels.config import LogitOptions

STATS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_prob")


class Tile(NamedTuple):
    """A tile of logits with what the row kernels ask of its tokens and columns."""

    x: Tensor  # (n, v) fp32, unit stride along v; hidden @ weight.T, or z once it is transformed
    target: Tensor  # (n,) int64
    v0: int  # vocabulary entry of the first column
    bias: Tensor | None = None  # (v,) fp32, None once it is added


def prepare(tile: Tile, options: LogitOptions) -> Tile:
    """Once for each new tile, before `Fold` and `dlogits_`: logits are transformed in place."""
    return Tile(transform_(tile.x, tile.bias, options), tile.target, tile.v0)


def transform_(logits: Tensor, bias: Tensor | None, options: LogitOptions) -> Tensor:
    """x = hidden @ weight.T -> cap(logit_scale * (x + bias)) / temperature. (n, v), in place."""
    if bias is not None:
        logits.add_(bias)
    if options.logit_scale != 1.0:
        logits.mul_(options.logit_scale)
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    if options.temperature != 1.0:
        logits.div_(options.temperature)
    return logits


def cap_slope(z: Tensor, options: LogitOptions) -> Tensor:
    """d cap / d (its argument) = 1 - tanh(.)**2, from the transformed z. Any shape, fp32."""
    assert options.softcap is not None
    flat = z.new_full((), options.softcap) / options.temperature  # |z| where tanh rounds to 1
    tanh = z * (options.temperature / options.softcap)
    return tanh.square_().neg_().add_(1.0).masked_fill_(z.abs() >= flat, 0.0)


def max_and_logsum(z: Tensor) -> tuple[Tensor, Tensor]:
    """max over a row, and log of the row's sum of exp(z - max). (n, v) -> (n,), (n,) fp32."""
    top = z.amax(1)
    logsum = -z.log_softmax(1).amax(1)
    # a row of -inf (a masked vocabulary) holds no probability; its max alone says so
    return top, torch.where(top == -torch.inf, 0.0, logsum)


class LogSumExp(NamedTuple):
    """lse = top + logsum, kept apart so that neither rounds the other. Both (n,) fp32."""

    top: Tensor
    logsum: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """log p of logits z, (n,) or (n, v)."""
        wide = (slice(None),) + (None,) * (z.ndim - 1)
        return (z - self.top[wide]) - self.logsum[wide]


class Fold:
    """Collects log-sum-exp, target logit and statistics of n tokens, a vocabulary chunk a call."""

    def __init__(
        self,
        n: int,
        chunks: int,
        vocabulary: int,
        stats: tuple[str, ...],
        options: LogitOptions,
        device: torch.device,
    ):
        new = lambda *shape: torch.zeros(shape, dtype=torch.float32, device=device)
        self.top = new(n, chunks)
        self.logsum = new(n, chunks)
        # NaN where the target is in no chunk: an ignored token, or one that is out of range
        self.target_logit = new(n).fill_(torch.nan)
        self.vocabulary = vocabulary
        self.stats = stats
        self.options = options
        self.running_top = new(n).fill_(torch.finfo(torch.float32).min)
        self.partial = {name: new(n, chunks) for name in stats if name != "is_top1"}

    def add(self, tile: Tile, rows: slice, chunk: int) -> None:
        """Fold in a tile of the tokens `rows` and the vocabulary chunk `chunk`."""
        z = tile.x
        top, logsum = max_and_logsum(z)
        self.top[rows, chunk] = top
        self.logsum[rows, chunk] = logsum
        column, inside = columns(tile)
        at_target = z.gather(1, column[:, None])[:, 0]
        self.target_logit[rows] = torch.where(inside, at_target, self.target_logit[rows])
        if "mean_logit" in self.partial:
            self.partial["mean_logit"][rows, chunk] = z.sum(1)
        if "entropy" in self.partial or "log_sum_sq_prob" in self.partial:
            # within the chunk; a masked column would be 0 * -inf, a masked chunk NaN
            log_p = z.log_softmax(1).clamp_(min=-1e4)
            log_p = log_p.masked_fill_((top == -torch.inf)[:, None], -1e4)
            if "entropy" in self.partial:
                self.partial["entropy"][rows, chunk] = -(log_p.exp() * log_p).sum(1)
            if "log_sum_sq_prob" in self.partial:
                self.partial["log_sum_sq_prob"][rows, chunk] = log_p.mul_(2).logsumexp(1)

    def add_frozen(
        self, tile: Tile, rows: slice, chunk: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """`add`, and turn the tile into exp(z - top) * slope with 0 at the target, in place.

        top is the largest logit so far. Returns what sums over earlier tiles are to be multiplied
        by, (n,), as that may have risen, and the tile: fp32, whatever `dtype` the caller would
        like.
        """
        self.add(tile, rows, chunk)
        top = torch.maximum(self.running_top[rows], self.top[rows, chunk])
        rescale = (self.running_top[rows] - top).exp()
        self.running_top[rows] = top
        slope = None if self.options.softcap is None else cap_slope(tile.x, self.options)
        tile.x.sub_(top[:, None]).exp_()
        if slope is not None:
            tile.x.mul_(slope)
        put_(tile, torch.zeros_like(top))
        return rescale, tile.x

    def finish(self) -> tuple[Tensor, LogSumExp, dict[str, Tensor]]:
        """Log-prob of the target (n,), its log-sum-exp, and the statistics by name (n,)."""
        top = self.top.amax(1)
        mass = (self.top - top[:, None]) + self.logsum  # log of a chunk's mass over exp(top)
        mass_top, mass_logsum = max_and_logsum(mass)
        lse = LogSumExp(top, mass_top + mass_logsum)
        log_share = mass - lse.logsum[:, None]  # log of the probability that a chunk holds
        out = {}
        for name in self.stats:
            if name == "is_top1":
                out[name] = (self.target_logit >= top).float()
            elif name == "mean_logit":
                out[name] = self.partial[name].sum(1) / self.vocabulary
            elif name == "entropy":  # of the chunks, plus the mean entropy within them
                share = log_share.exp()
                surprise = self.partial[name] - log_share.clamp(min=-1e4)
                out[name] = (share * surprise).sum(1)
            elif name == "log_sum_sq_prob":
                out[name] = (self.partial[name] + 2 * log_share).logsumexp(1)
        return lse.log_prob(self.target_logit), lse, out


def columns(tile: Tile) -> tuple[Tensor, Tensor]:
    """Column of each target, 0 where it is not in the tile, and whether it is. (n,) each."""
    column = tile.target - tile.v0
    inside = (column >= 0) & (column < tile.x.shape[1])
    return torch.where(inside, column, 0), inside


def put_(tile: Tile, values: Tensor) -> None:
    """Write values (n,) at the targets that are in the tile."""
    column, inside = columns(tile)
    values = torch.where(inside, values, tile.x.gather(1, column[:, None])[:, 0])
    tile.x.scatter_(1, column[:, None], values[:, None])


class RowGradient(NamedTuple):
    """What a row's dlogits are made of; (n,) fp32 each.

    d loss / d z[v] = dlogp * (onehot[v] - p[v]) - dentropy * p[v] * (log p[v] + entropy)
    """

    lse: LogSumExp
    logp: Tensor  # of the target
    dlogp: Tensor | None  # None: 1, the gradient is scaled later
    dentropy: Tensor | None = None
    entropy: Tensor | None = None

    def rows(self, rows: slice | Tensor) -> RowGradient:
        pick = lambda x: None if x is None else x[rows]
        lse = LogSumExp(self.lse.top[rows], self.lse.logsum[rows])
        return RowGradient(
            lse, self.logp[rows], pick(self.dlogp), pick(self.dentropy), pick(self.entropy)
        )


def dlogits_(
    tile: Tile, row: RowGradient, options: LogitOptions, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits -> gradient of the loss in hidden @ weight.T + bias, in place. (n, v) fp32.

    fp32, whatever `dtype` the caller would like.
    """
    z = tile.x
    slope = None if options.softcap is None else cap_slope(z, options)
    z.sub_(row.lse.top[:, None]).sub_(row.lse.logsum[:, None])  # log p
    # p - 1 of a target that is almost certain must not come from a rounded p
    at_target = -torch.expm1(row.logp)
    if row.dlogp is not None:
        at_target = row.dlogp * at_target
    if row.dentropy is not None:
        assert row.dlogp is not None and row.entropy is not None
        pull = lambda log_p, wide: (log_p + row.entropy[wide]) * row.dentropy[wide]
        finite = row.logp.clamp(min=-1e4)
        at_target = at_target - finite.exp() * pull(finite, slice(None))
        wide = (slice(None), None)
        factor = pull(z.clamp_(min=-1e4), wide).add_(row.dlogp[wide])
        z.exp_().mul_(factor).neg_()
    elif row.dlogp is not None:
        z.exp_().mul_(-row.dlogp[:, None])
    else:
        z.exp_().neg_()
    put_(tile, at_target)
    if slope is not None:
        z.mul_(slope)
    chain = options.logit_scale / options.temperature
    return z if chain == 1.0 else z.mul_(chain)
