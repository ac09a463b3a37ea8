"""Log-probability of each target under an lm_head, without ever holding the (N, V) logits.

    logp[t] = z[t, target[t]] - logsumexp_v z[t, v]
    z = cap(logit_scale * (hidden @ weight.T + bias)) / temperature
    d logp[t] / d z[t, :] = onehot(target[t]) - softmax(z[t, :])

plan.py chooses the mode; head.py has the passes. Modes differ in what they keep for the backward
pass: nothing of size V (recompute), (onehot - p) for some rows (cached), d logp / d hidden (frozen
head). All of them give the same bits in the forward pass.
Letters: N tokens (leading dimensions flattened), H hidden size, V vocabulary, R cached rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stepkto_kernels import backend as backends
from stepkto_kernels import checks, reference, shards
from stepkto_kernels.config import LogitOptions
from stepkto_kernels.head import (
    Head,
    WeightGradients,
    cached_backward,
    forward,
    forward_cached,
    forward_frozen,
    recompute_backward,
)
from stepkto_kernels.ops import custom_op
from stepkto_kernels.plan import HeadPlan, plan_head, token_chunk, vocab_chunk
from stepkto_kernels.rows import STATS, LogSumExp, RowGradient
from stepkto_kernels.shards import HeadGroup, VocabParallel


class LogprobStats(NamedTuple):
    """Statistics of each token's distribution, (...) each; None if not asked for, 0 where ignored.

    entropy: fp32, nats, differentiable. mean_logit: fp32, mean of z over the vocabulary.
    is_top1: bool, no logit is larger than the target's. log_sum_sq_prob: fp32, log sum_v p[v]**2.
    """

    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_prob: Tensor | None = None


def make_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: LogitOptions,
    backend: str,
    split: VocabParallel | None = None,
) -> Head:
    """Head over all tokens; checks targets on the CPU."""
    device = hidden.device.type
    V = weight.shape[0]
    known = V if split is None else split.V
    checks.targets(target, target != options.ignore_index, known, options.ignore_index)
    return Head(
        hidden,
        weight,
        target.contiguous(),
        bias,
        options,
        backend,
        token_chunk(device),
        vocab_chunk(V, device),
        num_tokens=hidden.shape[0],
        shards=split,
    )


def _plan(
    hidden: Tensor,
    weight: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    memory_budget: int | None,
    split: VocabParallel | None,
    through_entropy: bool = False,
) -> HeadPlan:
    return plan_head(
        hidden.shape[0],
        weight.shape[0] if split is None else split.largest,  # one plan on all ranks
        hidden.element_size(),
        hidden.device.type,
        needs_hidden=needs_hidden,
        needs_weight=needs_weight or needs_bias,
        needs_entropy=through_entropy,
        memory_budget=memory_budget,
    )


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gradients wait for the upstream one: fp16 would lose small ones that a loss scale lifts."""
    return torch.float32 if dtype == torch.float16 else dtype


@custom_op("stepkto::linear_logprobs")
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: list[float],
    stats: str,
    gradient_bound: float,
    backend: str,
    memory_budget: int | None,
    vocab_parallel: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp (N,), stats (K, N), top (N,), logsum (N,), dlogp/dhidden (N, H), cache (R * V,).

    The last two are empty in the modes that do without. stats: K names, joined by spaces.
    vocab_parallel: VocabParallel.pack() of a sharded head.
    """
    names = tuple(stats.split())
    split = VocabParallel.unpack(vocab_parallel)
    plan = _plan(hidden, weight, needs_hidden, needs_weight, needs_bias, memory_budget, split)
    head = make_head(hidden, weight, target, bias, LogitOptions.unpack(options), backend, split)
    scored = target != head.options.ignore_index
    head = head.keep(scored)
    kept_dtype = gradient_dtype(hidden.dtype)
    dlogp_dhidden, cache = hidden.new_empty(0, dtype=kept_dtype), hidden.new_empty(0)
    if plan.mode == "frozen":
        logp, lse, values, row = forward_frozen(head, names)
        if head.rows is None:
            row.masked_fill_(~scored[:, None], 0.0)
        dlogp_dhidden = head.spread(row.to(kept_dtype))
    elif plan.mode == "cached":
        logp, lse, values, cache = forward_cached(head, plan.cached_rows, hidden.dtype, names)
    else:
        logp, lse, values = forward(head, names)
    if head.rows is None:  # the ignored tokens were computed along
        logp = torch.where(scored, logp, 0.0)
        values = {name: torch.where(scored, value, 0.0) for name, value in values.items()}
    rows = [head.spread(values[name]) for name in names]
    stacked = torch.stack(rows) if rows else logp.new_empty(0, hidden.shape[0])
    outputs = head.spread(logp), stacked, head.spread(lse.top), head.spread(lse.logsum)
    return *outputs, dlogp_dhidden, cache


@_linear_logprobs.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    target,
    bias,
    options,
    stats,
    gradient_bound,
    backend,
    memory_budget,
    vocab_parallel,
    needs_hidden,
    needs_weight,
    needs_bias,
):
    names = stats.split()
    split = VocabParallel.unpack(vocab_parallel)
    plan = _plan(hidden, weight, needs_hidden, needs_weight, needs_bias, memory_budget, split)
    N, H = hidden.shape
    row = lambda: hidden.new_empty(N, dtype=torch.float32)
    stacked = hidden.new_empty(len(names), N, dtype=torch.float32)
    kept_dtype = gradient_dtype(hidden.dtype)
    shape = (N, H) if plan.mode == "frozen" else (0,)
    dlogp_dhidden = hidden.new_empty(shape, dtype=kept_dtype)
    cache = hidden.new_empty(plan.cached_rows * weight.shape[0])
    return row(), stacked, row(), row(), dlogp_dhidden, cache


@custom_op("stepkto::linear_logprobs_bwd")
def _linear_logprobs_bwd(
    dlogp: Tensor,
    dentropy: Tensor | None,
    entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logp: Tensor,
    top: Tensor,
    logsum: Tensor,
    dlogp_dhidden: Tensor,
    cache: Tensor,
    options: list[float],
    gradient_bound: float,
    backend: str,
    memory_budget: int | None,
    vocab_parallel: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden (N, H), dweight (V, H), dbias (V,); empty where not needed."""
    opts = LogitOptions.unpack(options)
    # Tokens without a gradient cost nothing. "Not at most", so that a NaN is not dropped.
    pulled = ~(dlogp.abs() <= gradient_bound) & (target != opts.ignore_index)
    dlogp = torch.where(pulled, dlogp, 0.0)
    # What frozen and cached keep says nothing of the entropy. Most only log it, so the forward pass
    # does not reckon with its gradient; where that comes, all is recomputed.
    through_entropy = dentropy is not None
    if dlogp_dhidden.numel() and not through_entropy:
        dhidden = (dlogp[:, None] * dlogp_dhidden).to(hidden.dtype)
        # a token without gradient may hold anything, NaN too, so its 0 is not a product
        dhidden.masked_fill_(~pulled[:, None], 0.0)
        return dhidden, weight.new_empty(0), weight.new_empty(0)
    split = VocabParallel.unpack(vocab_parallel)
    needs = needs_hidden, needs_weight, needs_bias
    plan = _plan(hidden, weight, *needs, memory_budget, split, through_entropy)
    scored = target != opts.ignore_index
    if dentropy is not None:
        pulled |= (dentropy != 0) & scored
    # the cache holds the scored tokens, so the numbering of those must stay
    head = make_head(hidden, weight, target, bias, opts, backend, split)
    head = head.keep(scored if plan.mode == "cached" else pulled)
    row = RowGradient(LogSumExp(top, logsum), logp, dlogp, dentropy, entropy)
    row = row.rows(slice(None) if head.rows is None else head.rows)

    wide = None
    if needs_hidden:
        wide = torch.zeros_like(head.hidden, dtype=torch.float32)
    weights = WeightGradients(
        torch.zeros_like(weight) if needs_weight else None,
        torch.zeros_like(bias) if bias is not None and needs_bias else None,
    )
    if plan.mode == "cached":
        active = pulled if head.rows is None else pulled[head.rows]
        known = active.device.type == "cpu" and not bool(active.all())
        cached_backward(
            head, cache, plan.cached_rows, row, active if known else None, wide, weights
        )
    else:
        recompute_backward(head, row, wide, weights)
    dweight = weight.new_empty(0) if weights.dweight is None else weights.dweight
    dbias = weight.new_empty(0) if weights.dbias is None else weights.dbias
    if wide is None:
        return hidden.new_empty(0), dweight, dbias
    if split is None:
        return head.spread(wide.to(hidden.dtype)), dweight, dbias
    # of all tokens: which ones have a gradient must not decide what ranks exchange
    return split.sum_(head.spread(wide)).to(hidden.dtype), dweight, dbias


@_linear_logprobs_bwd.register_fake
def _(  # type: ignore[no-untyped-def]
    dlogp,
    dentropy,
    entropy,
    hidden,
    weight,
    target,
    bias,
    logp,
    top,
    logsum,
    dlogp_dhidden,
    cache,
    options,
    gradient_bound,
    backend,
    memory_budget,
    vocab_parallel,
    needs_hidden,
    needs_weight,
    needs_bias,
):
    dhidden = hidden.new_empty(hidden.shape) if needs_hidden else hidden.new_empty(0)
    dweight = weight.new_empty(weight.shape) if needs_weight else weight.new_empty(0)
    dbias = bias.new_empty(bias.shape) if needs_bias else weight.new_empty(0)
    return dhidden, dweight, dbias


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    hidden, weight, target, bias, options, stats, *call = inputs
    logp, stacked, top, logsum, dlogp_dhidden, cache = output
    ctx.call = (options, *call)
    names = stats.split()
    ctx.entropy_row = names.index("entropy") if "entropy" in names else None
    ctx.set_materialize_grads(False)  # or zeros as large as the cache would be made for it
    ctx.save_for_backward(
        hidden, weight, target, bias, logp, stacked, top, logsum, dlogp_dhidden, cache
    )


def _backward(ctx, dlogp, dstacked, *unused):  # type: ignore[no-untyped-def]
    hidden, weight, target, bias, logp, stacked, *kept = ctx.saved_tensors
    if dlogp is None:
        dlogp = torch.zeros_like(logp)
    row = ctx.entropy_row
    dentropy = entropy = None
    if row is not None and dstacked is not None:
        entropy, dentropy = stacked[row], dstacked[row]
    grads = _linear_logprobs_bwd(
        dlogp, dentropy, entropy, hidden, weight, target, bias, logp, *kept, *ctx.call
    )
    needed = ctx.call[-3:]
    dhidden, dweight, dbias = (g if n else None for g, n in zip(grads, needed, strict=True))
    return dhidden, dweight, None, dbias, *[None] * 9


_linear_logprobs.register_autograd(_backward, setup_context=_setup_context)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    memory_budget: int | None,
    group: HeadGroup | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Shapes, dtypes and devices that every op over an lm_head asks for."""
    checks.tensor("hidden", hidden, dtypes=dtypes)
    checks.require(hidden.ndim >= 1, "hidden", "shape (..., H)", "shape ()")
    H = hidden.shape[-1]
    checks.require(H > 0, "hidden", "H > 0", f"shape {tuple(hidden.shape)}")
    checks.tensor("weight", weight, dtypes=(hidden.dtype,), ndim=2)
    V = weight.shape[0]
    checks.shape("weight", weight, (V, H), "(V, H)")
    some = V > 0 or group is not None  # a rank of a sharded head may hold nothing
    checks.require(some, "weight", "at least one row", f"shape {tuple(weight.shape)}")
    checks.tensor("target", target, dtypes=(torch.int64,))
    checks.shape("target", target, tuple(hidden.shape[:-1]), "hidden.shape[:-1]")
    named = {"weight": weight, "target": target}
    if bias is not None:
        checks.tensor("bias", bias, dtypes=(hidden.dtype,))
        checks.shape("bias", bias, (V,), "(V,)")
        named["bias"] = bias
    for name, value in named.items():
        checks.same_device(name, value, "hidden", hidden)
    checks.memory_budget(memory_budget)


def resolve_split(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    memory_budget: int | None,
    options: LogitOptions,
    backend: str,
    group: HeadGroup | None,
    **others: object,
) -> VocabParallel | None:
    """How the head is sharded, after all other checks: with a bare process group a collective."""
    if group is None:
        return None
    want = "torch, native or triton where group is given"
    checks.require(backend != "reference", "backend", want, repr(backend))
    same = {
        "hidden.shape": (hidden.numel() // hidden.shape[-1], hidden.shape[-1]),
        "hidden.dtype": hidden.dtype,
        "hidden.requires_grad": wants_grad(hidden),
        "weight.requires_grad": (wants_grad(weight), wants_grad(bias)),
        "bias": bias is not None,
        "memory_budget": memory_budget,
        "logit options": options,
        **others,
    }
    return shards.resolve(weight, group, same, hidden.numel() // hidden.shape[-1])


def wants_grad(value: Tensor | None) -> bool:
    return value is not None and value.requires_grad and torch.is_grad_enabled()


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    gradient_bound: float = 0.0,
    backend: str = "auto",
    group: HeadGroup | None = None,
) -> Tensor:
    """Log-probability of each target, in nats, differentiable in hidden, weight and bias.

    Args:
        hidden: (..., H) fp32, bf16 or fp16, any strides.
        weight: (V, H), dtype of `hidden`.
        target: (...) int64 in [0, V), already shifted, or `ignore_index`.
        bias: (V,), dtype of `hidden`.
        temperature, logit_scale, softcap: z = cap(logit_scale * (hidden @ weight.T + bias)) /
            temperature with cap(x) = softcap * tanh(x / softcap); no cap for None.
        memory_budget: bytes that may be kept for the backward pass where `weight` or `bias` needs a
            gradient: rows that fit cost 3 GEMM units in all, the others 4.
        gradient_bound: tokens whose upstream gradient is at most this in magnitude get none, and
            on the CPU cost no backward GEMM; 0 is exact.
        backend: "auto", or one of `available_backends()`.
        group: process group over which `weight` and `bias` are sharded along V: each rank passes
            its rows, in rank order, and the same `hidden` and `target`, which counts the whole
            vocabulary. All ranks get all log-probs, with the same bits, and the whole gradient of
            `hidden`; that of `weight` stays local. The gradient that flows in must be the same on
            all ranks. A bare group exchanges the shards' sizes in every call; with
            `parallel.vocab_parallel(weight, group)`, made once, no GPU is waited for. A DTensor
            weight brings its own group, see parallel.py.
    Returns:
        (...) fp32; 0 with zero gradient where target is ignored. Gradients have the dtype of their
        input and are accumulated in fp32. On the CPU the bits of a token's log-prob depend on that
        token alone: not on the batch, its order, the memory budget, or which gradients are needed.
        A NaN in a hidden state makes that token's log-prob NaN, one in weight or bias all of them.
    Raises:
        ValueError: a shape, dtype, device or option is not as above, a backend cannot serve the
            call, or, on the CPU, a target is out of range. A GPU is not waited for: there the
            log-prob of such a target is NaN.
    Error: at most 2x that of log_softmax of materialised logits in the same dtype, against fp64
        (tests/test_linear_logprobs.py).
    """
    return linear_logprobs_with_stats(
        hidden,
        weight,
        target,
        bias,
        stats=(),
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        memory_budget=memory_budget,
        gradient_bound=gradient_bound,
        backend=backend,
        group=group,
    )[0]


def linear_logprobs_with_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    stats: Sequence[str] = STATS,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    gradient_bound: float = 0.0,
    backend: str = "auto",
    group: HeadGroup | None = None,
) -> tuple[Tensor, LogprobStats]:
    """`linear_logprobs` and statistics of each token's distribution from the same pass.

    Args:
        stats: which of "entropy", "mean_logit", "is_top1", "log_sum_sq_prob"; only those are
            computed. A backward pass through "entropy" recomputes, whatever was kept for it; one
            that does not touch it costs what it does without.
        Others: as `linear_logprobs`.
    Returns:
        log-probs (...) fp32, and LogprobStats of (...) tensors.
    Raises:
        ValueError: as `linear_logprobs`, or an unknown name in `stats`.
    """
    hidden, weight, target, bias, group = shards.local_tensors(hidden, weight, target, bias, group)
    dtypes = checks.FLOAT_DTYPES + ((torch.float64,) if backend == "reference" else ())
    check_head(hidden, weight, target, bias, memory_budget, group, dtypes)
    checks.number("gradient_bound", gradient_bound, low=0)
    several = isinstance(stats, Sequence) and not isinstance(stats, str)
    checks.require(several, "stats", "a sequence of names", repr(stats))
    for name in stats:
        checks.choice("stats", name, STATS)
    stats = tuple(dict.fromkeys(stats))
    options = LogitOptions(temperature, logit_scale, softcap, ignore_index)
    backend = backends.resolve(backend, hidden.device)
    split = resolve_split(hidden, weight, bias, memory_budget, options, backend, group, stats=stats)
    if backend == "reference":
        if checks.values_are_free(target):
            flat = target.reshape(-1)
            checks.targets(flat, flat != ignore_index, weight.shape[0], ignore_index)
        logps, values = reference.linear_logprobs_with_stats(
            hidden,
            weight,
            target,
            bias,
            stats=stats,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            ignore_index=ignore_index,
        )
        return logps, LogprobStats(**values)
    logps, stacked, *_ = _linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        target.reshape(-1),
        bias,
        options.pack(),
        " ".join(stats),
        float(gradient_bound),
        backend,
        memory_budget,
        "" if split is None else split.pack(),
        wants_grad(hidden),
        wants_grad(weight),
        wants_grad(bias),
    )
    values = {name: row.view(target.shape) for name, row in zip(stats, stacked, strict=True)}
    for name in values:
        if name == "is_top1":
            values[name] = values[name] > 0
        elif name != "entropy":
            values[name] = values[name].detach()
    return logps.view(target.shape), LogprobStats(**values)
