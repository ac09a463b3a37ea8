"""Log-probability of each target under logits that the caller already holds.

The gradient is the one (N, V) tensor that is made: Triton kernels read the logits in their own
dtype, and the torch backend widens a few rows at a time to fp32.
Letters: N tokens (leading dimensions flattened), V vocabulary.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from stepkto_kernels import backend as backends
from stepkto_kernels import checks, reference
from stepkto_kernels.config import LogitOptions
from stepkto_kernels.ops import custom_op
from stepkto_kernels.plan import MIB, cut
from stepkto_kernels.rows import (
    LogSumExp,
    RowGradient,
    Tile,
    dlogits_,
    max_and_logsum,
    transform_,
)

ROW_BYTES = 16 * MIB  # fp32 logits that are worked on at once


def _row_slices(logits: Tensor) -> list[slice]:
    N, V = logits.shape
    return cut(N, max(ROW_BYTES // (4 * V), 1))


def _transformed(logits: Tensor, rows: slice, options: LogitOptions) -> Tensor:
    return transform_(logits[rows].to(torch.float32, copy=True), None, options)


def _triton_rows() -> ModuleType:
    return importlib.import_module("stepkto_kernels.kernels.rows")


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


@custom_op("stepkto::token_logprobs")
def _token_logprobs(
    logits: Tensor, target: Tensor, options: list[float], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, top, logsum, (N,) each."""
    opts = LogitOptions.unpack(options)
    N, V = logits.shape
    scored = target != opts.ignore_index
    checks.targets(target, scored, V, opts.ignore_index)
    if backend == "triton":
        fold = _triton_rows().Fold(N, 1, V, (), opts, logits.device)
        fold.add(Tile(_unit_stride(logits), target.contiguous(), 0), slice(0, N), 0)
        logp, lse, _ = fold.finish()
        return torch.where(scored, logp, 0.0), lse.top, lse.logsum
    inside = (target >= 0) & (target < V)
    column = torch.where(inside, target, 0)[:, None]
    logp, top, logsum = (target.new_empty(len(target), dtype=torch.float32) for _ in range(3))
    for rows in _row_slices(logits):
        z = _transformed(logits, rows, opts)
        top[rows], logsum[rows] = max_and_logsum(z)
        logp[rows] = LogSumExp(top[rows], logsum[rows]).log_prob(z.gather(1, column[rows])[:, 0])
    logp = torch.where(inside, logp, torch.nan)  # what a GPU does not look at first
    return torch.where(scored, logp, 0.0), top, logsum


@_token_logprobs.register_fake
def _(logits, target, options, backend):  # type: ignore[no-untyped-def]
    return tuple(logits.new_empty(len(target), dtype=torch.float32) for _ in range(3))


@custom_op("stepkto::token_logprobs_bwd")
def _token_logprobs_bwd(
    dlogp: Tensor,
    logits: Tensor,
    target: Tensor,
    logp: Tensor,
    top: Tensor,
    logsum: Tensor,
    options: list[float],
    backend: str,
) -> Tensor:
    opts = LogitOptions.unpack(options)
    dlogp = torch.where(target != opts.ignore_index, dlogp, 0.0)
    row = RowGradient(LogSumExp(top, logsum), logp, dlogp)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if backend == "triton":
        tile = Tile(_unit_stride(logits), target.contiguous(), 0)
        return _triton_rows().dlogits(tile, row, opts, dlogits)
    for rows in _row_slices(logits):
        z = _transformed(logits, rows, opts)
        dlogits[rows] = dlogits_(Tile(z, target[rows], 0), row.rows(rows), opts)
    return dlogits


@_token_logprobs_bwd.register_fake
def _(dlogp, logits, target, logp, top, logsum, options, backend):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logits, target, *ctx.call = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, *output)


def _backward(ctx, dlogp, *unused):  # type: ignore[no-untyped-def]
    if dlogp is None:
        return None, None, None, None
    return _token_logprobs_bwd(dlogp, *ctx.saved_tensors, *ctx.call), None, None, None


_token_logprobs.register_autograd(_backward, setup_context=_setup_context)


def token_logprobs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each target, in nats, under given logits; differentiable in `logits`.

    For trainers that hold logits anyway; `linear_logprobs` does without them.

    Args:
        logits: (..., V) fp32, bf16 or fp16, any strides.
        target: (...) int64 in [0, V), already shifted, or `ignore_index`.
        temperature, logit_scale, softcap: z = cap(logit_scale * logits) / temperature with
            cap(x) = softcap * tanh(x / softcap); no cap for None.
        backend: "auto", or one of `available_backends()`.
    Returns:
        (...) fp32; 0 with zero gradient where target is ignored. The gradient has the dtype of
        `logits`.
    Raises:
        ValueError: a shape, dtype, device or option is not as above; on the CPU also a target that
            is out of range, whose log-prob is NaN on a GPU.
    """
    dtypes = checks.FLOAT_DTYPES + ((torch.float64,) if backend == "reference" else ())
    checks.tensor("logits", logits, dtypes=dtypes)
    checks.require(logits.ndim >= 1, "logits", "shape (..., V)", "shape ()")
    V = logits.shape[-1]
    checks.require(V > 0, "logits", "V > 0", f"shape {tuple(logits.shape)}")
    checks.tensor("target", target, dtypes=(torch.int64,))
    checks.shape("target", target, tuple(logits.shape[:-1]), "logits.shape[:-1]")
    checks.same_device("target", target, "logits", logits)
    options = LogitOptions(temperature, logit_scale, softcap, ignore_index)
    backend = backends.resolve(backend, logits.device, ("reference", "torch", "triton"))
    if backend == "reference":
        if checks.values_are_free(target):
            flat = target.reshape(-1)
            checks.targets(flat, flat != ignore_index, V, ignore_index)
        return reference.token_logprobs(
            logits,
            target,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            ignore_index=ignore_index,
        )
    logps = _token_logprobs(logits.reshape(-1, V), target.reshape(-1), options.pack(), backend)[0]
    return logps.view(target.shape)
