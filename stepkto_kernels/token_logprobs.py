"""Log-probability of each target under logits that the caller already holds.

A few rows at a time are widened to fp32, so that narrow logits are never copied whole; the gradient
is the one (N, V) tensor that is made.
Letters: N tokens (leading dimensions flattened), V vocabulary.
"""

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


@custom_op("stepkto::token_logprobs")
def _token_logprobs(
    logits: Tensor, target: Tensor, options: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, top, logsum, (N,) each."""
    opts = LogitOptions.unpack(options)
    scored = target != opts.ignore_index
    checks.targets(target, scored, logits.shape[1], opts.ignore_index)
    column = torch.where(scored, target, 0)[:, None]
    logp, top, logsum = (target.new_empty(len(target), dtype=torch.float32) for _ in range(3))
    for rows in _row_slices(logits):
        z = _transformed(logits, rows, opts)
        top[rows], logsum[rows] = max_and_logsum(z)
        logp[rows] = LogSumExp(top[rows], logsum[rows]).log_prob(z.gather(1, column[rows])[:, 0])
    return torch.where(scored, logp, 0.0), top, logsum


@_token_logprobs.register_fake
def _(logits, target, options):  # type: ignore[no-untyped-def]
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
) -> Tensor:
    opts = LogitOptions.unpack(options)
    dlogp = torch.where(target != opts.ignore_index, dlogp, 0.0)
    row = RowGradient(LogSumExp(top, logsum), logp, dlogp)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in _row_slices(logits):
        z = _transformed(logits, rows, opts)
        dlogits[rows] = dlogits_(Tile(z, target[rows], 0), row.rows(rows), opts)
    return dlogits


@_token_logprobs_bwd.register_fake
def _(dlogp, logits, target, logp, top, logsum, options):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logits, target, ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, *output)


def _backward(ctx, dlogp, *unused):  # type: ignore[no-untyped-def]
    if dlogp is None:
        return None, None, None
    return _token_logprobs_bwd(dlogp, *ctx.saved_tensors, ctx.options), None, None


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
            is out of range.
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
    if backends.resolve(backend, logits.device, ("reference", "torch")) == "reference":
        return reference.token_logprobs(
            logits,
            target,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            ignore_index=ignore_index,
        )
    logps = _token_logprobs(logits.reshape(-1, V), target.reshape(-1), options.pack())[0]
    return logps.view(target.shape)
