"""The CUDA kernels of csrc/ for the segment level of the loss, under the names of segment_loss.py.

Everything is queued on torch's current stream of the device and nothing waits for it: reference
points, normalizers and the upstream gradient are read there. The extension checks shapes, dtypes,
strides and devices itself (csrc/tensors.h): a ValueError.
Letters: N tokens, n tokens to add, B sequences, S steps.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stepkto_kernels import segment_loss
from stepkto_kernels.config import SegmentOptions
from stepkto_kernels.metrics import TOTALS
from stepkto_kernels.segment_loss import BatchLoss
from stepkto_kernels.segments import SegmentIndex

_cuda: Any = None
WHY_NOT: str | None = None
try:
    _cuda = importlib.import_module("stepkto_kernels._cuda")
except ImportError as error:
    WHY_NOT = f"the CUDA extension is not there: {error}"

# (device, stream) -> int64 words, all 0 between launches, which a stream runs one after another
_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def serves(device: torch.device) -> bool:
    """Whether the kernels are there and compiled for `device`: see ARCHITECTURES in setup.py."""
    if WHY_NOT is not None or device.type != "cuda" or torch.version.hip is not None:
        return False
    major = torch.cuda.get_device_capability(device)[0]
    return major in (8, 9, 10) or major >= 12


@contextmanager
def _queue(device: torch.device) -> Iterator[Any]:
    """Where to launch: the current stream of the device."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        yield _cuda.Queue(torch.device("cuda", torch.cuda.current_device()), stream)


def _workspace(device: torch.device, stream: int, words: int) -> Tensor:
    """Zeros that a launch on the stream leaves at zero, so that no call has to set them."""
    zeros = lambda size: torch.zeros(size, dtype=torch.int64, device=device)
    if torch.cuda.is_current_stream_capturing():
        return zeros(words)  # the graph's own: it may run on another stream
    held = _workspaces.get((device, stream))
    if held is None or len(held) < words:
        held = _workspaces[device, stream] = zeros(max(words, 1 << 14))
    return held


def _segments(index: SegmentIndex) -> Any:
    return _cuda.Segments(*(part.contiguous() for part in index))


def _tokens(options: SegmentOptions, logps: Tensor, ref_logps: Tensor, rows: Tensor | None) -> Any:
    rows = None if rows is None else rows.contiguous()
    clip = options.clip_low, options.clip_high
    return _cuda.Tokens(rows, logps.contiguous(), ref_logps.contiguous(), *clip)


def _loss(
    index: SegmentIndex,
    options: SegmentOptions,
    baseline: tuple[Tensor, Tensor],
    normalizer: tuple[Tensor, Tensor],
    matched: bool,
) -> tuple[Any, BatchLoss]:
    """The kernels' Loss, and the tensors that it writes to."""
    o = options
    B, S = index.num_sequences, index.num_steps
    wide = lambda *shape: torch.empty(shape, dtype=torch.float64, device=index.device)
    out = BatchLoss(wide(), wide(len(TOTALS)), wide(B), wide(S))
    loss = _cuda.Loss(
        (o.beta, o.desirable_weight, o.undesirable_weight),
        (o.step_beta, o.step_desirable_weight, o.step_undesirable_weight),
        o.step_weight,
        int(o.step_reduction),
        bool(o.length_normalize),
        *baseline,
        *normalizer,
        matched,
        *out,
    )
    return loss, out


def batch_loss(
    index: SegmentIndex,
    options: SegmentOptions,
    logps: Tensor,
    ref_logps: Tensor,
    baseline: tuple[Tensor, Tensor],
    normalizer: tuple[Tensor, Tensor],
    matched: bool = False,
) -> BatchLoss:
    """`SegmentBatch`, `add` of all tokens and `loss` in one launch.

    Args:
        logps, ref_logps: (N,) fp32, nats.
        baseline, normalizer: 0-dim fp64 tensors, outcome and step.
        matched: take the reference points from the batch (`matched_baseline`), not `baseline`.
    """
    B, S = index.num_sequences, index.num_steps
    with _queue(index.device) as queue:
        segments = _segments(index)
        tokens = _tokens(options, logps, ref_logps, None)
        loss, out = _loss(index, options, baseline, normalizer, matched)
        sums = torch.empty(3 * (B + S), dtype=torch.float64, device=index.device)
        workspace = _workspace(index.device, queue.stream, _cuda.workspace_words(B, S))
        _cuda.forward(segments, tokens, loss, workspace, sums, queue)
    return out


class SegmentBatch(segment_loss.SegmentBatch):
    """segment_loss.SegmentBatch with sums and loss in CUDA.

    The sums are exact, so adding the tokens in another order or in other blocks gives the same
    bits. `loss` may be called between two `add`s.
    """

    def __init__(self, index: SegmentIndex, options: SegmentOptions):
        B, S = index.num_sequences, index.num_steps
        self.index, self.options = index, options
        self._segments = _segments(index)
        words = _cuda.workspace_words(B, S)
        self._workspace = torch.zeros(words, dtype=torch.int64, device=index.device)
        self._sums = torch.empty(3 * (B + S), dtype=torch.float64, device=index.device)
        self._sums_are_old = True

    def add(self, logps: Tensor, ref_logps: Tensor, rows: Tensor | None = None) -> None:
        """Add all tokens, or those at `rows` (n,) int64. logps, ref_logps: (n,) fp32, nats."""
        with _queue(self.index.device) as queue:
            tokens = _tokens(self.options, logps, ref_logps, rows)
            _cuda.segment_sums(self._segments, tokens, self._workspace, queue)
        self._sums_are_old = True

    def loss(self, baseline: tuple[Tensor, Tensor], normalizer: tuple[Tensor, Tensor]) -> BatchLoss:
        """Of all that was added; baseline and normalizer: 0-dim fp64 tensors, outcome and step."""
        with _queue(self.index.device) as queue:
            loss, out = _loss(self.index, self.options, baseline, normalizer, matched=False)
            _cuda.batch_loss(self._segments, loss, self._workspace, self._sums, queue)
        self._sums_are_old = False
        return out

    def _level_sums(self, row: int) -> tuple[Tensor, Tensor]:
        if self._sums_are_old:
            with _queue(self.index.device) as queue:
                _cuda.read_sums(self._segments, self._workspace, self._sums, queue)
            self._sums_are_old = False
        B, S = self.index.num_sequences, self.index.num_steps
        return self._sums[row * (B + S) :].split((B, S, (2 - row) * (B + S)))[:2]

    @property
    def ratio(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Sums of clipped log-ratios, (B,) and (S,)."""
        return self._level_sums(0)

    @property
    def logp(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Sums of policy log-probs, (B,) and (S,)."""
        return self._level_sums(1)

    @property
    def tokens(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Numbers of tokens, (B,) and (S,)."""
        return self._level_sums(2)


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
    """segment_loss.token_slopes, fp32. A tensor `scale` is 0-dim and read on the device."""
    g = torch.empty(logps.shape, dtype=torch.float32, device=index.device)
    upstream = scale.to(torch.float32) if isinstance(scale, Tensor) else None
    with _queue(index.device) as queue:
        _cuda.token_slopes(
            _segments(index),
            _tokens(options, logps, ref_logps, rows),
            outcome_slope,
            step_slope,
            upstream,
            1.0 if isinstance(scale, Tensor) else scale,
            g,
            queue,
        )
    return g
