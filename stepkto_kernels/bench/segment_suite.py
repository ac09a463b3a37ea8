"""Suite segments: segment sums and the loss of given log-probs, forward and backward.

The peer is plain torch, index_add over the segments and autograd (stepkto_kernels.reference).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from stepkto_kernels import reference
from stepkto_kernels.bench.contenders import Contender, Skip
from stepkto_kernels.bench.exact import GATE, ULP
from stepkto_kernels.bench.options import Options, Row, new_row
from stepkto_kernels.bench.problems import Shape, batch_layout
from stepkto_kernels.bench.roofline import path_bytes
from stepkto_kernels.bench.timing import interleaved
from stepkto_kernels.config import StepKTOConfig
from stepkto_kernels.segments import StepSegments, segment_sums
from stepkto_kernels.step_kto import KLBaseline, step_kto_loss

BASELINE = KLBaseline(0.3, 0.1)
CONFIG = StepKTOConfig()
TIMED_MS = 20.0  # calls are repeated until they take about this long
FLOOR = 32 * ULP  # relative, in case plain torch is exact by luck

# (log-probs (N,), segments) -> gradient (N,)
Run = Callable[[Tensor, StepSegments], Tensor]


def _sums(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, s: StepSegments) -> Tensor:
    """Gradient of half the sum of all sums squared."""
    leaf = x.detach().requires_grad_()
    sums = function(leaf, s)
    torch.autograd.backward(sums, [total.detach() for total in sums])
    assert leaf.grad is not None
    return leaf.grad


def _loss(function: Callable[..., object], x: Tensor, s: StepSegments) -> Tensor:
    leaf = x.detach().requires_grad_()
    out = function(leaf, torch.zeros_like(x), s, BASELINE, CONFIG)
    loss = out[0] if isinstance(out, tuple) else out
    assert isinstance(loss, Tensor)
    loss.backward()
    assert leaf.grad is not None
    return leaf.grad


# Path -> ours, plain torch
PATHS: dict[str, tuple[Run, Run]] = {
    "segment_sums": (partial(_sums, segment_sums), partial(_sums, reference.segment_sums)),
    "step_kto_loss": (partial(_loss, step_kto_loss), partial(_loss, reference.step_kto_loss)),
}


def segments(options: Options) -> Iterator[Row | Skip]:
    for shape in options.shapes_of("segments"):
        for path in PATHS:
            if options.wants(path):
                options.note(f"segments N = {shape.N} {path}")
                yield from _rows(path, shape, options)


def _rows(path: str, shape: Shape, options: Options) -> Iterator[Row]:
    device = options.device
    layout = batch_layout(shape.N, device)
    generator = torch.Generator(device).manual_seed(0)
    x = 0.1 * torch.randn(shape.N, generator=generator, device=device)
    ours, plain = PATHS[path]
    exact = plain(x.double(), layout)
    error = lambda run: float((run(x, layout) - exact).abs().max())
    limit = GATE * error(plain) + FLOOR * float(exact.abs().max())
    wrong = error(ours)
    status = "ok" if wrong <= limit else f"wrong: gradient error {wrong:.2g} > {limit:.2g}"
    contenders = [
        Contender("ours", "stepkto_kernels", "auto", {}, partial(ours, x, layout)),
        Contender("naive", "plain torch", "-", {}, partial(plain, x, layout)),
    ]
    base = contenders[-1].key
    runs = {c.key: c.run for c in contenders if c.name == "naive" or status == "ok"}
    once = interleaved(runs, 3, device)[base].best
    times = interleaved(runs, options.repeats, device, max(1, round(TIMED_MS / once)))
    for contender in contenders:
        row = new_row("segments", path, contender, shape, "float32")
        row.update(H=None, V=None, ms_best=None, ms_median=None, ratio_to_plain=None)
        row["bytes"] = path_bytes("segments", path, shape, "float32", {})
        if contender.name == "ours":
            row["status"] = status
        if contender.key in times:
            best, row["ms_median"] = times[contender.key]
            row.update(ms_best=best, ratio_to_plain=best / times[base].best)
        yield row
