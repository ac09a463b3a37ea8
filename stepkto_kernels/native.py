"""The C++ kernels of csrc/ for the CPU, under the names of rows.py and segment_loss.py.

Row kernels read hidden @ weight.T as the GEMM left it and apply the logit options on the way.
The extension checks shapes, dtypes, strides and indices itself (csrc/tensors.h): a ValueError.
Letters: n tokens and v vocabulary columns of a tile, B sequences, S steps.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from stepkto_kernels import segment_loss
from stepkto_kernels.config import LogitOptions, SegmentOptions
from stepkto_kernels.metrics import TOTALS
from stepkto_kernels.rows import LogSumExp, RowGradient, Tile
from stepkto_kernels.segment_loss import BatchLoss
from stepkto_kernels.segments import SegmentIndex

_native: Any = None
WHY_NOT: str | None = None
try:
    # after torch, whose OpenMP runtime it then shares
    _native = importlib.import_module("stepkto_kernels._native")
except ImportError as error:
    WHY_NOT = f"the C++ extension is not there: {error}"


def _tile(tile: Tile) -> Any:
    return _native.Tile(tile.x, tile.bias, tile.target, tile.v0)


def _options(options: LogitOptions) -> Any:
    return _native.LogitOptions(options.temperature, options.logit_scale, options.softcap or 0.0)


def prepare(tile: Tile, options: LogitOptions) -> Tile:
    """The kernels take tiles as they are."""
    return tile


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
        wide = lambda used: torch.zeros(n, dtype=torch.float64) if used else None
        self.n, self.vocabulary, self.stats, self.options = n, vocabulary, stats, options
        self.top = torch.full((n,), torch.finfo(torch.float32).min, dtype=torch.float32)
        self.sum = torch.zeros(n, dtype=torch.float64)
        self.target_logit = torch.full((n,), torch.nan, dtype=torch.float32)
        self.logit_sum = wide("mean_logit" in stats)
        self.moment = wide("entropy" in stats)
        self.square_sum = wide("log_sum_sq_prob" in stats)

    def _state(self, rows: slice) -> Any:
        parts = self.top, self.sum, self.target_logit, self.logit_sum, self.moment, self.square_sum
        return _native.FoldState(*(None if part is None else part[rows] for part in parts))

    def add(self, tile: Tile, rows: slice, chunk: int) -> None:
        """Fold in a tile of the tokens `rows`."""
        threads = torch.get_num_threads()
        _native.fold(_tile(tile), self._state(rows), _options(self.options), threads)

    def add_frozen(
        self, tile: Tile, rows: slice, chunk: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """`add`, and turn the tile into exp(z - top) * slope with 0 at the target, in place.

        top is the largest logit so far. Returns what sums over earlier tiles are to be multiplied
        by, (n,), as that may have risen, and the tile: fp32, whatever `dtype` the caller would
        like.
        """
        rescale = torch.empty(tile.x.shape[0], dtype=torch.float32)
        _native.fold_frozen(
            _tile(tile),
            self._state(rows),
            _options(self.options),
            rescale,
            torch.get_num_threads(),
        )
        return rescale, tile.x

    def finish(self) -> tuple[Tensor, LogSumExp, dict[str, Tensor]]:
        """Log-prob of the target (n,), its log-sum-exp, and the statistics by name (n,)."""
        row = lambda: torch.empty(self.n, dtype=torch.float32)
        logp, logsum = row(), row()
        values = {name: row() for name in self.stats}
        _native.finish(
            self._state(slice(0, self.n)),
            logp,
            logsum,
            values.get("entropy"),
            values.get("log_sum_sq_prob"),
            torch.get_num_threads(),
        )
        if self.logit_sum is not None:
            values["mean_logit"] = (self.logit_sum / self.vocabulary).float()
        if "is_top1" in self.stats:
            values["is_top1"] = (self.target_logit >= self.top).float()
        return logp, LogSumExp(self.top, logsum), values


def dlogits_(
    tile: Tile, row: RowGradient, options: LogitOptions, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits -> gradient of the loss in hidden @ weight.T + bias, in place. (n, v) fp32.

    fp32, whatever `dtype` the caller would like.
    """
    parts = (row.lse.top, row.lse.logsum, row.logp, row.dlogp, row.dentropy, row.entropy)
    gradient = _native.RowGradient(*(None if part is None else part.contiguous() for part in parts))
    _native.dlogits(_tile(tile), gradient, _options(options), torch.get_num_threads())
    return tile.x


class SegmentBatch(segment_loss.SegmentBatch):
    """segment_loss.SegmentBatch with sums and loss in C++."""

    def _levels(self) -> tuple[Any, Any]:
        sums = zip(self.ratio, self.logp, self.tokens, strict=True)
        return tuple(_native.LevelSums(*level) for level in sums)

    def add(self, logps: Tensor, ref_logps: Tensor, rows: Tensor | None = None) -> None:
        """Add all tokens, or those at `rows` (n,). logps, ref_logps: (n,) fp32, nats."""
        _native.segment_sums(
            _segments(self.index, rows),
            logps.contiguous(),
            ref_logps.contiguous(),
            self.options.clip_low,
            self.options.clip_high,
            *self._levels(),
        )

    def loss(self, baseline: tuple[Tensor, Tensor], normalizer: tuple[Tensor, Tensor]) -> BatchLoss:
        """Of all that was added; baseline and normalizer: 0-dim fp64 tensors, outcome and step."""
        o = self.options
        options = _native.LossOptions(
            (float(baseline[0]), o.beta, o.desirable_weight, o.undesirable_weight),
            (float(baseline[1]), o.step_beta, o.step_desirable_weight, o.step_undesirable_weight),
            o.step_weight,
            int(o.step_reduction),
            bool(o.length_normalize),
            float(normalizer[0]),
            float(normalizer[1]),
        )
        wide = lambda *shape: torch.empty(shape, dtype=torch.float64)
        B, S = self.index.num_sequences, self.index.num_steps
        out = BatchLoss(wide(), wide(len(TOTALS)), wide(B), wide(S))
        _native.batch_loss(_segments(self.index, None), *self._levels(), options, *out)
        return out


def token_slopes(
    index: SegmentIndex,
    options: SegmentOptions,
    logps: Tensor,
    ref_logps: Tensor,
    outcome_slope: Tensor,
    step_slope: Tensor,
    scale: Tensor | float = 1.0,
    rows: Tensor | None = None,
) -> Tensor:
    """segment_loss.token_slopes, fp32."""
    g = torch.empty(logps.shape, dtype=torch.float32)
    _native.token_slopes(
        _segments(index, rows),
        logps.contiguous(),
        ref_logps.contiguous(),
        options.clip_low,
        options.clip_high,
        outcome_slope,
        step_slope,
        float(scale),
        g,
    )
    return g


def _segments(index: SegmentIndex, rows: Tensor | None) -> Any:
    """The kernels' Segments of all tokens or those at `rows`; indices that point outside raise."""
    parts = *index.of_tokens(rows), *index[2:]
    return _native.Segments(*(part.contiguous() for part in parts))


def exp(x: Tensor) -> Tensor:
    """The kernels' exp of a contiguous fp32 tensor; for the test of its error."""
    out = torch.empty_like(x)
    _native.exp_array(x, out)
    return out


def tanh(x: Tensor) -> Tensor:
    """The kernels' tanh of a contiguous fp32 tensor; for the test of its error."""
    out = torch.empty_like(x)
    _native.tanh_array(x, out)
    return out
