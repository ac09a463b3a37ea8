"""The C++ kernels of csrc/ for the CPU, under the names of rows.py and segment_loss.py.

Row kernels read hidden @ weight.T as the GEMM left it and apply the logit options on the way.
Tensors are passed as addresses, so shapes, dtypes and strides are asserted here.
Letters: n tokens and v vocabulary columns of a tile, B sequences, S steps.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from stepkto_kernels import checks, segment_loss
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


def _address(tensor: Tensor | None, dtype: torch.dtype, length: int) -> int:
    """Address of a contiguous (length,) CPU tensor, 0 for None."""
    if tensor is None:
        return 0
    assert tensor.shape == (length,) and tensor.dtype == dtype, (tensor.shape, tensor.dtype, length)
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.data_ptr()


def _tile(tile: Tile) -> Any:
    x = tile.x
    n, v = x.shape
    assert x.dtype == torch.float32 and x.device.type == "cpu" and (x.stride(1) == 1 or v <= 1)
    return _native.Tile(
        x.data_ptr(),
        n,
        v,
        x.stride(0),
        _address(tile.bias, torch.float32, v),
        _address(tile.target, torch.int64, n),
        tile.v0,
    )


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
        self.target_logit = torch.zeros(n, dtype=torch.float32)
        self.logit_sum = wide("mean_logit" in stats)
        self.moment = wide("entropy" in stats)
        self.square_sum = wide("log_sum_sq_prob" in stats)

    def _state(self, rows: slice) -> Any:
        n = rows.stop - rows.start
        part = lambda x: None if x is None else x[rows]
        return _native.FoldState(
            _address(part(self.top), torch.float32, n),
            _address(part(self.sum), torch.float64, n),
            _address(part(self.target_logit), torch.float32, n),
            _address(part(self.logit_sum), torch.float64, n),
            _address(part(self.moment), torch.float64, n),
            _address(part(self.square_sum), torch.float64, n),
        )

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
            rescale.data_ptr(),
            torch.get_num_threads(),
        )
        return rescale, tile.x

    def finish(self) -> tuple[Tensor, LogSumExp, dict[str, Tensor]]:
        """Log-prob of the target (n,), its log-sum-exp, and the statistics by name (n,)."""
        row = lambda: torch.empty(self.n, dtype=torch.float32)
        logp, logsum = row(), row()
        values = {name: row() for name in self.stats}
        pointer = lambda name: values[name].data_ptr() if name in values else 0
        _native.finish(
            self._state(slice(0, self.n)),
            self.n,
            logp.data_ptr(),
            logsum.data_ptr(),
            pointer("entropy"),
            pointer("log_sum_sq_prob"),
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
    n = tile.x.shape[0]
    parts = (row.lse.top, row.lse.logsum, row.logp, row.dlogp, row.dentropy, row.entropy)
    held = [None if part is None else part.contiguous() for part in parts]
    gradient = _native.RowGradient(*(_address(part, torch.float32, n) for part in held))
    _native.dlogits(_tile(tile), gradient, _options(options), torch.get_num_threads())
    return tile.x


class SegmentBatch(segment_loss.SegmentBatch):
    """segment_loss.SegmentBatch with sums and loss in C++."""

    def __init__(self, index: SegmentIndex, options: SegmentOptions):
        _check_index(index)
        super().__init__(index, options)

    def _levels(self) -> tuple[Any, Any]:
        return tuple(
            _native.LevelSums(
                *(_address(x[level], torch.float64, len(x[level])) for x in self._sums)
            )
            for level in (0, 1)
        )

    @property
    def _sums(self) -> tuple[tuple[Tensor, Tensor], ...]:
        return self.ratio, self.logp, self.tokens

    def add(self, logps: Tensor, ref_logps: Tensor, rows: Tensor | None = None) -> None:
        """Add all tokens, or those at `rows` (n,). logps, ref_logps: (n,) fp32, nats."""
        logps, ref_logps = logps.contiguous(), ref_logps.contiguous()
        segments, _held = _segments(self.index, rows)
        _native.segment_sums(
            segments,
            _address(logps, torch.float32, len(logps)),
            _address(ref_logps, torch.float32, len(logps)),
            self.options.clip_low,
            self.options.clip_high,
            *self._levels(),
        )

    def loss(self, baseline: tuple[Tensor, Tensor], normalizer: tuple[Tensor, Tensor]) -> BatchLoss:
        """Of all that was added; baseline and normalizer: 0-dim fp64 tensors, outcome and step."""
        o = self.options
        segments, _held = _segments(self.index, None)
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
        _native.batch_loss(segments, *self._levels(), options, *(x.data_ptr() for x in out))
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
    logps, ref_logps = logps.contiguous(), ref_logps.contiguous()
    g = torch.empty(logps.shape, dtype=torch.float32)
    segments, _held = _segments(index, rows)
    _native.token_slopes(
        segments,
        _address(logps, torch.float32, len(logps)),
        _address(ref_logps, torch.float32, len(logps)),
        options.clip_low,
        options.clip_high,
        _address(outcome_slope, torch.float64, index.num_sequences),
        _address(step_slope, torch.float64, index.num_steps),
        float(scale),
        g.data_ptr(),
    )
    return g


def _check_index(index: SegmentIndex) -> None:
    """The kernels write where indices and labels point, so they must point inside."""
    for name, value, size in (
        ("sequence_index", index.sequence_index, index.num_sequences),
        ("step_index", index.step_index, index.num_steps),
        ("outcome_label", index.outcome_label, 2),
        ("step_label", index.step_label, 2),
        ("step_sequence", index.step_sequence, index.num_sequences),
    ):
        if value.numel():
            low, high = (int(x) for x in value.aminmax())
            checks.require(-1 <= low and high < size, name, f"values in [-1, {size})", (low, high))


def _segments(index: SegmentIndex, rows: Tensor | None) -> tuple[Any, tuple[Tensor, ...]]:
    """The kernels' Segments of all tokens or those at `rows`, and the tensors it points into."""
    tensors = tuple(x.contiguous() for x in (*index.of_tokens(rows), *index[2:]))
    sizes = len(tensors[0]), index.num_sequences, index.num_steps
    dtypes = (torch.int32, torch.int32, torch.int8, torch.int8, torch.int32)
    lengths = (sizes[0], sizes[0], sizes[1], sizes[2], sizes[2])
    addresses = (_address(*args) for args in zip(tensors, dtypes, lengths, strict=True))
    return _native.Segments(*sizes, *addresses), tensors


def exp(x: Tensor) -> Tensor:
    """The kernels' exp of a contiguous fp32 tensor; for the test of its error."""
    out = torch.empty_like(x)
    _native.exp_array(_address(x, torch.float32, len(x)), out.data_ptr(), len(x))
    return out


def tanh(x: Tensor) -> Tensor:
    """The kernels' tanh of a contiguous fp32 tensor; for the test of its error."""
    out = torch.empty_like(x)
    _native.tanh_array(_address(x, torch.float32, len(x)), out.data_ptr(), len(x))
    return out
