"""Step-KTO loss straight from hidden states: loss and gradients while the logits are there.

Whole sequences are packed into blocks whose fp32 logits fit the scratch. For each block: logits ->
log-probs -> segment sums -> g[t] -> dlogits in place -> dhidden, dweight. That is 3 GEMM units
where log-probs first and gradients later take 4. A sequence longer than a block is run in the two
passes of linear_logprobs instead: forward, then recompute.
Letters: N tokens, n tokens of a block, H hidden size, V vocabulary, B sequences, S steps.
"""

import torch
from torch import Tensor

from stepkto_kernels import backend as backends
from stepkto_kernels import checks, shards
from stepkto_kernels.config import LogitOptions, SegmentOptions, StepKTOConfig
from stepkto_kernels.head import (
    WeightGradients,
    forward,
    full_rows,
    full_rows_backward,
    pick_rows,
    recompute_backward,
    vocab_tiles,
)
from stepkto_kernels.linear_logprobs import (
    check_head,
    gradient_dtype,
    linear_logprobs,
    make_head,
    resolve_split,
    wants_grad,
)
from stepkto_kernels.metrics import TOTALS, StepKTOMetrics
from stepkto_kernels.ops import custom_op
from stepkto_kernels.plan import fused_rows
from stepkto_kernels.rows import RowGradient
from stepkto_kernels.segments import SegmentIndex, StepSegments, TokenLayout
from stepkto_kernels.shards import HeadGroup, VocabParallel
from stepkto_kernels.step_kto import (
    KLBaseline,
    LossNormalizer,
    kernels,
    loss_of_log_probs,
    resolve_baseline,
    resolve_normalizer,
)


def pack_sequences(lengths: list[int], capacity: int) -> list[tuple[int, int]]:
    """Cut sequences, in order, into blocks [first, last) of at most `capacity` tokens.

    A sequence longer than `capacity` gets a block of its own.
    """
    blocks: list[tuple[int, int]] = []
    first, used = 0, 0
    for i, length in enumerate(lengths):
        if i > first and used + length > capacity:
            blocks.append((first, i))
            first, used = i, 0
        used += length
    if lengths:
        blocks.append((first, len(lengths)))
    return blocks


def token_blocks(layout: TokenLayout, capacity: int) -> list[Tensor]:
    """Positions of the tokens of each block, whole sequences together.

    Waits for a GPU where the lengths are on it.
    """
    lengths = [n for n in layout.lengths.tolist() if n]
    blocks, start = [], 0
    for first, last in pack_sequences(lengths, capacity):
        stop = start + sum(lengths[first:last])
        blocks.append(layout.order[start:stop])
        start = stop
    return blocks


def gradient_lift(options: SegmentOptions, n_o: Tensor, n_s: Tensor) -> Tensor:
    """Power of two, 0-dim fp64, that brings the largest possible d loss / d logp to about 1.

    For dlogits in fp16: with many labels to divide by, all of them would be below its smallest
    number, and the loss scale of the caller comes only in the backward pass. lam * beta / 4 is the
    steepest slope of a term.
    """
    o = options
    outcome = o.beta * max(o.desirable_weight, o.undesirable_weight)
    step = o.step_weight * o.step_beta * max(o.step_desirable_weight, o.step_undesirable_weight)
    divisor_o, divisor_s = (torch.where(n > 0, n, 1.0) for n in (n_o, n_s))
    steepest = (outcome / divisor_o + step / divisor_s) / 4
    steepest = torch.where(steepest > 0, steepest, 1.0).clamp(2.0**-100, 2.0**100)
    return torch.exp2(-torch.floor(torch.log2(steepest)))


@custom_op("stepkto::fused_step_kto")
def _fused_step_kto(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ref_logps: Tensor,
    index: list[Tensor],
    order: Tensor | None,
    lengths: Tensor | None,
    z_o: Tensor,
    z_s: Tensor,
    n_o: Tensor,
    n_s: Tensor,
    segment_options: list[float],
    logit_options: list[float],
    gradient_bound: float,
    backend: str,
    memory_budget: int | None,
    vocab_parallel: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (), metric totals, and d loss / d hidden, weight, bias, empty where not needed.

    order, lengths: a TokenLayout, lengths as a CPU tensor: as numbers they would make torch.compile
    compile for every batch anew.
    """
    idx = SegmentIndex(*index)
    if hidden.device.type == "cpu":
        idx.check_values()
    V, H = weight.shape
    device = hidden.device
    on_cpu = device.type == "cpu"
    split = VocabParallel.unpack(vocab_parallel)
    logit = LogitOptions.unpack(logit_options)
    head = make_head(hidden, weight, target, bias, logit, backend, split)
    if order is None or lengths is None:
        order, lengths = TokenLayout.of(idx)
    # a sharded head has the same blocks on all ranks, as each brings the ranks together
    capacity = fused_rows(V if split is None else split.largest, memory_budget, device.type)
    # Only tokens in a labelled segment can change the loss; the others need no logits.
    blocks = token_blocks(TokenLayout(order, lengths), capacity)
    longest = max((len(b) for b in blocks if len(b) <= capacity), default=0)
    fp32 = lambda *shape: torch.zeros(shape, dtype=torch.float32, device=device)
    scratch = torch.empty(longest * V, dtype=torch.float32, device=device)

    options = SegmentOptions.unpack(segment_options)
    level = kernels(backend, device)
    batch = level.SegmentBatch(idx, options)
    loss = lambda: batch.loss((z_o, z_s), (n_o, n_s))
    kept_dtype = gradient_dtype(hidden.dtype)
    dhidden_dtype = kept_dtype if split is None else torch.float32  # a sum over ranks, once
    dhidden = torch.zeros_like(hidden, dtype=dhidden_dtype) if needs_hidden else None
    weights = WeightGradients(
        torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None,
        fp32(V) if needs_bias else None,
    )
    lift = None
    if head.gemm_dtype == torch.float16:
        lift = gradient_lift(options, n_o, n_s).to(torch.float32)
    for rows in blocks:
        part, has_target = head.pick_with_target(rows)
        tiles = None
        if len(rows) <= capacity:
            tiles, logp, lse, _ = full_rows(part, vocab_tiles(part, scratch, part.n))
        else:
            logp, lse, _ = forward(part)
        # a token without a target counts as one of log-prob 0, as it does in linear_logprobs
        if on_cpu:
            block_logp = fp32(len(rows))
            block_logp[has_target] = logp
        else:
            block_logp = torch.where(has_target, logp, 0.0)
        batch.add(block_logp, ref_logps[rows], rows)
        if not (needs_hidden or needs_weight or needs_bias):
            continue
        slopes = loss()[2:]  # final for the sequences of this block
        g = level.token_slopes(idx, options, block_logp, ref_logps[rows], *slopes, rows=rows)
        # clipped or saturated tokens have no gradient; "not at most", so that a NaN is not dropped
        pulled = ~(g.abs() <= gradient_bound) & has_target
        if on_cpu:
            g, pulled = g[has_target], pulled[has_target]
        else:
            g = torch.where(pulled, g, 0.0)
        row = RowGradient(lse, logp, g if lift is None else g * lift)
        if on_cpu and not bool(pulled.all()):
            pulled = pulled.nonzero()[:, 0]
            part, row = part.pick(pulled), row.rows(pulled)
            tiles = None if tiles is None else pick_rows(tiles, pulled)
        wide = torch.zeros_like(part.hidden, dtype=torch.float32) if needs_hidden else None
        if tiles is None:
            recompute_backward(part, row, wide, weights)
        else:
            full_rows_backward(part, row, tiles, wide, weights)
        if dhidden is not None and wide is not None:
            dhidden[part.rows] = (wide if lift is None else wide / lift).to(dhidden_dtype)
    if lift is not None:
        weights.divide_(lift)
    if split is not None and dhidden is not None:
        dhidden = split.sum_(dhidden).to(kept_dtype)
    out = loss()
    empty = lambda: hidden.new_empty(0, dtype=kept_dtype)
    return (
        out.loss.float(),
        out.totals,
        empty() if dhidden is None else dhidden,
        empty() if weights.dweight is None else weights.dweight.to(kept_dtype),
        empty() if weights.dbias is None else weights.dbias.to(kept_dtype),
    )


@_fused_step_kto.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    target,
    bias,
    ref_logps,
    index,
    order,
    lengths,
    z_o,
    z_s,
    n_o,
    n_s,
    segment_options,
    logit_options,
    gradient_bound,
    backend,
    memory_budget,
    vocab_parallel,
    needs_hidden,
    needs_weight,
    needs_bias,
):
    loss = hidden.new_empty((), dtype=torch.float32)
    totals = hidden.new_empty(len(TOTALS), dtype=torch.float64)
    kept_dtype = gradient_dtype(hidden.dtype)
    like = lambda x, needed: hidden.new_empty(x.shape if needed else 0, dtype=kept_dtype)
    return (
        loss,
        totals,
        like(hidden, needs_hidden),
        like(weight, needs_weight),
        like(bias, needs_bias),
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.needs = inputs[-3:]
    ctx.dtype = inputs[0].dtype
    ctx.num_index = len(inputs[5])
    ctx.set_materialize_grads(False)  # or zeros of the size of all gradients would be made
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _scale(grad: Tensor, dloss: Tensor) -> Tensor:
    """grad * dloss, in place: a second (V, H) tensor would double what the loss holds.

    A second backward pass over the same loss then raises, as autograd sees that saved tensors were
    changed. Graph tracers, which pass tensors of their own types, cannot trace that change.
    """
    return grad.mul_(dloss) if type(grad) is Tensor else grad * dloss


def _backward(ctx, dloss, *unused):  # type: ignore[no-untyped-def]
    if dloss is None:
        return *[None] * 5, [None] * ctx.num_index, *[None] * 15
    dhidden, dweight, dbias = (
        _scale(grad, dloss).to(ctx.dtype) if needed else None
        for grad, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return dhidden, dweight, None, dbias, None, [None] * ctx.num_index, *[None] * 15


_fused_step_kto.register_autograd(_backward, setup_context=_setup_context)


def fused_linear_step_kto_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    segments: StepSegments,
    ref_logps: Tensor,
    baseline: KLBaseline | None = None,
    bias: Tensor | None = None,
    *,
    config: StepKTOConfig = StepKTOConfig(),  # noqa: B008, frozen
    normalizer: LossNormalizer | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    gradient_bound: float = 0.0,
    backend: str = "auto",
    group: HeadGroup | None = None,
) -> tuple[Tensor, StepKTOMetrics]:
    """step_kto_loss of linear_logprobs in one pass over the head: 3 GEMM units in place of 4.

    Args:
        hidden: (..., H) fp32, bf16 or fp16 with N tokens in the order of `segments`.
        weight: (V, H), dtype of `hidden`.
        target: (...) int64, already shifted. `ignore_index` takes a token out.
        segments: layout and labels. Tokens outside of labelled segments cost nothing. On a GPU,
            segments that were made on the CPU and moved by `to` let the call run ahead of the
            device; of those made on the GPU it waits once for the lengths. A captured CUDA graph
            keeps the lengths that it was captured with.
        ref_logps: (...) fp32, reference log-probs, nats.
        baseline, config, normalizer: as `step_kto_loss`. reference_point "matched" without a
            baseline needs all log-probs before the first gradient and so costs 4 units.
        bias: (V,), dtype of `hidden`.
        temperature, logit_scale, softcap, backend, group: as `linear_logprobs`. With a group all of
            its ranks pass the same batch and get the same loss and metrics: what is added up over
            data-parallel ranks counts each such group once.
        memory_budget: bytes for the fp32 logits held at once, V * 4 a token; None takes
            plan.FUSED_BYTES. A sequence that does not fit costs 4 units instead of 3. At least 16
            tokens are held.
        gradient_bound: tokens with |d loss / d logp| of at most this get no gradient and cost no
            backward GEMM; 0 is exact.
    Returns:
        loss: () fp32. The gradients are computed along with it and kept until `backward`, which can
        be called once.
        metrics: of this batch.
    Raises:
        ValueError: as `linear_logprobs` and `step_kto_loss`.
    """
    hidden, weight, target, bias, group = shards.local_tensors(hidden, weight, target, bias, group)
    dtypes = checks.FLOAT_DTYPES + ((torch.float64,) if backend == "reference" else ())
    check_head(hidden, weight, target, bias, memory_budget, group, dtypes)
    checks.number("gradient_bound", gradient_bound, low=0)
    checks.instance("segments", segments, StepSegments)
    options = LogitOptions(temperature, logit_scale, softcap, ignore_index)
    checks.num_tokens("target", target, segments)
    checks.same_device("segments", segments, "hidden", hidden)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    checks.ref_logps(ref_logps, target.shape, wide, hidden.device)
    z, matched = resolve_baseline(baseline, config, hidden.device)
    n = resolve_normalizer(normalizer, segments, config)
    backend = backends.resolve(backend, hidden.device)
    split = resolve_split(
        hidden, weight, bias, memory_budget, options, backend, group, config=config
    )
    if matched or backend == "reference":
        logps = linear_logprobs(
            hidden,
            weight,
            target,
            bias,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            ignore_index=ignore_index,
            memory_budget=memory_budget,
            gradient_bound=gradient_bound,
            backend=backend,
            group=split,
        )
        return loss_of_log_probs(logps, ref_logps, segments, config, (z, matched), n, backend)
    loss, totals, *_ = _fused_step_kto(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        target.reshape(-1),
        bias,
        ref_logps.detach().reshape(-1),
        list(SegmentIndex.of(segments)),
        *(segments.layout or (None, None)),
        *z,
        *n,
        config.segment_options().pack(),
        options.pack(),
        float(gradient_bound),
        backend,
        memory_budget,
        "" if split is None else split.pack(),
        wants_grad(hidden),
        wants_grad(weight),
        wants_grad(bias),
    )
    return loss, StepKTOMetrics(totals)
