"""Row kernels on one tile of logits in C++ (csrc/rows_cpu.cpp): the names of rows.py, on the CPU.

They read hidden @ weight.T as the GEMM left it and apply the logit options on the way. Tensors are
passed as addresses, so shapes, dtypes and strides are asserted here.
Letters: n tokens of the tile, v vocabulary columns of the tile.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from stepkto_kernels.config import LogitOptions
from stepkto_kernels.rows import LogSumExp, RowGradient, Tile

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
        self.top = torch.full((n,), torch.finfo(torch.float32).min)
        self.sum = torch.zeros(n, dtype=torch.float64)
        self.target_logit = torch.zeros(n)
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

    def add_frozen(self, tile: Tile, rows: slice, chunk: int) -> Tensor:
        """`add`, and turn the tile into exp(z - top) * slope with 0 at the target, in place.

        top is the largest logit so far. Returns what sums over earlier tiles are to be multiplied
        by, (n,), as that may have risen.
        """
        rescale = torch.empty(tile.x.shape[0])
        _native.fold_frozen(
            _tile(tile),
            self._state(rows),
            _options(self.options),
            rescale.data_ptr(),
            torch.get_num_threads(),
        )
        return rescale

    def finish(self) -> tuple[Tensor, LogSumExp, dict[str, Tensor]]:
        """Log-prob of the target (n,), its log-sum-exp, and the statistics by name (n,)."""
        logp, logsum = torch.empty(self.n), torch.empty(self.n)
        values = {name: torch.empty(self.n) for name in self.stats}
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


def dlogits_(tile: Tile, row: RowGradient, options: LogitOptions) -> Tensor:
    """Logits -> gradient of the loss in hidden @ weight.T + bias, in place. (n, v) fp32."""
    n = tile.x.shape[0]
    parts = (row.lse.top, row.lse.logsum, row.logp, row.dlogp, row.dentropy, row.entropy)
    held = [None if part is None else part.contiguous() for part in parts]
    gradient = _native.RowGradient(*(_address(part, torch.float32, n) for part in held))
    _native.dlogits(_tile(tile), gradient, _options(options), torch.get_num_threads())
    return tile.x


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
