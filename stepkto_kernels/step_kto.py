"""Step-KTO loss of per-token log-probs (arXiv 2501.10799), with its analytic gradient.

    u = sign * beta * (r - z)      r: log-ratio of a segment, z: reference point, sign: label
    l = lam * sigmoid(-u)          the loss of a segment
    d l / d r = -lam * sign * beta * sigmoid(u) * sigmoid(-u)

Both levels are a few numbers a segment, so they are computed in fp64; the gradient of a token is
one number looked up for its sequence plus one for its step.
Letters: N tokens, B sequences, S steps.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stepkto_kernels import checks
from stepkto_kernels.config import STEP_REDUCTIONS, SegmentOptions, StepKTOConfig
from stepkto_kernels.metrics import SATURATED, TOTALS, StepKTOMetrics
from stepkto_kernels.segments import StepSegments, sum_by_index, take

Group = torch.distributed.ProcessGroup


class KLBaseline(NamedTuple):
    """Reference points z_o and z_s, in nats: 0-dim tensors or numbers, without gradient."""

    outcome: Tensor | float
    step: Tensor | float


class LossNormalizer(NamedTuple):
    """What the outcome and the process term are divided by; a term divided by 0 is 0."""

    outcome: Tensor | float
    step: Tensor | float


class SegmentIndex(NamedTuple):
    """The tensors of a StepSegments in the order in which the custom ops take them."""

    sequence_index: Tensor  # (N,) int32
    step_index: Tensor  # (N,) int32
    outcome_label: Tensor  # (B,) int8
    step_label: Tensor  # (S,) int8
    step_sequence: Tensor  # (S,) int32

    @classmethod
    def of(cls, segments: StepSegments) -> "SegmentIndex":
        return cls(
            segments.sequence_index,
            segments.step_index,
            segments.outcome_label,
            segments.step_label,
            segments.step_sequence,
        )

    @property
    def num_sequences(self) -> int:
        return self.outcome_label.shape[0]

    @property
    def num_steps(self) -> int:
        return self.step_label.shape[0]

    def labelled_steps(self) -> Tensor:
        return (self.step_label >= 0) & (self.step_sequence >= 0)  # (S,) bool

    def scored_tokens(self) -> Tensor:
        """(N,) bool: the token is in a labelled segment; no other token can change the loss."""
        labelled_sequence = (self.outcome_label >= 0).float()
        labelled_step = self.labelled_steps().float()
        either = take(labelled_sequence, self.sequence_index) + take(labelled_step, self.step_index)
        return either > 0


class SegmentRatios(NamedTuple):
    """Log-ratios of the segments, and what turns d r into d ratio[t]."""

    outcome: Tensor  # (B,) fp64
    step: Tensor  # (S,) fp64
    outcome_scale: Tensor  # (B,) fp64, 1, or 1 / tokens with length_normalize
    step_scale: Tensor  # (S,) fp64


def segment_ratios(ratio: Tensor, index: SegmentIndex, options: SegmentOptions) -> SegmentRatios:
    """r_o and r_s of per-token log-ratios. ratio: (N,) fp32 or fp64, nats."""
    clipped = ratio.clamp(options.clip_low, options.clip_high)
    sums, scales = [], []
    for segment, size in (
        (index.sequence_index, index.num_sequences),
        (index.step_index, index.num_steps),
    ):
        total = sum_by_index(clipped, segment, size)
        if options.length_normalize:
            scale = 1 / sum_by_index(torch.ones_like(ratio), segment, size).clamp(min=1)
        else:
            scale = torch.ones_like(total)
        sums.append(total * scale)
        scales.append(scale)
    return SegmentRatios(sums[0], sums[1], scales[0], scales[1])


def term_counts(index: SegmentIndex, options: SegmentOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of loss terms: outcome (0-dim), process (0-dim), labelled steps a sequence (B,)."""
    labelled = index.labelled_steps().double()
    steps = sum_by_index(labelled, index.step_sequence, index.num_sequences)
    outcome = (index.outcome_label >= 0).double().sum()
    if STEP_REDUCTIONS[int(options.step_reduction)] == "mean":
        return outcome, labelled.sum(), steps
    return outcome, (steps > 0).double().sum(), steps


class Terms(NamedTuple):
    """Loss terms of the segments of one level, 0 where unlabelled. All (n,) fp64."""

    value: Tensor  # l
    slope: Tensor  # d l / d r
    u: Tensor


def kto_terms(
    r: Tensor, label: Tensor, z: Tensor, beta: float, desirable: float, undesirable: float
) -> Terms:
    right = label > 0
    sign = torch.where(right, 1.0, -1.0).double()
    lam = torch.where(right, desirable, undesirable).double()
    u = sign * beta * (r - z)
    wrongness = torch.sigmoid(-u)  # not 1 - sigmoid(u), which is 0 from u = 17 on in fp32
    # where, not a product: a NaN in an unlabelled segment is not in the loss
    value = torch.where(label >= 0, lam * wrongness, 0.0)
    slope = torch.where(label >= 0, -lam * sign * beta * torch.sigmoid(u) * wrongness, 0.0)
    return Terms(value, slope, torch.where(label >= 0, u, 0.0))


class BatchLoss(NamedTuple):
    loss: Tensor  # () fp64
    totals: Tensor  # (len(TOTALS),) fp64
    outcome_slope: Tensor  # (B,) fp64, d loss / d ratio[t] for the tokens of a sequence
    step_slope: Tensor  # (S,) fp64, the same for the tokens of a step


def batch_loss(
    ratios: SegmentRatios,
    logp_sums: tuple[Tensor, Tensor],
    index: SegmentIndex,
    baseline: tuple[Tensor, Tensor],
    normalizer: tuple[Tensor, Tensor],
    options: SegmentOptions,
    tokens: Tensor,
) -> BatchLoss:
    """Loss, metrics and slopes from the log-ratios of the segments.

    logp_sums: policy log-prob of each segment, (B,) and (S,), for the metrics; tokens: 0-dim.
    """
    z_o, z_s = baseline
    outcome = kto_terms(
        ratios.outcome,
        index.outcome_label,
        z_o,
        options.beta,
        options.desirable_weight,
        options.undesirable_weight,
    )
    step_label = torch.where(index.labelled_steps(), index.step_label, -1)
    step = kto_terms(
        ratios.step,
        step_label,
        z_s,
        options.step_beta,
        options.step_desirable_weight,
        options.step_undesirable_weight,
    )
    outcome_terms, step_terms, steps = term_counts(index, options)
    if STEP_REDUCTIONS[int(options.step_reduction)] == "sequence_mean":
        share = take(1 / steps.clamp(min=1), index.step_sequence)  # of a step in its sequence
    else:
        share = torch.ones_like(step.value)
    step_loss = (share * step.value).sum()
    n_o, n_s = (torch.where(n > 0, n, 1.0) for n in normalizer)
    loss = outcome.value.sum() / n_o + options.step_weight * step_loss / n_s
    values = [torch.ones_like(loss), tokens, options.step_weight * step_loss]
    for terms, label, r, logp, beta, z, total, count in (
        (outcome, index.outcome_label, ratios.outcome, logp_sums[0], options.beta, z_o,
         outcome.value.sum(), outcome_terms),
        (step, step_label, ratios.step, logp_sums[1], options.step_beta, z_s,
         step_loss, step_terms),
    ):  # fmt: skip
        values += [total, count, z]
        for side in (label > 0, label == 0):
            values += [
                side.sum(),
                torch.where(side, beta * r, 0.0).sum(),
                torch.where(side, logp, 0.0).sum(),
            ]
        values.append((terms.u.abs() > SATURATED).sum())
    totals = torch.stack([value.double() for value in values])
    return BatchLoss(
        loss,
        totals,
        outcome.slope * ratios.outcome_scale / n_o,
        options.step_weight * share * step.slope * ratios.step_scale / n_s,
    )


def token_slopes(
    outcome_slope: Tensor, step_slope: Tensor, index: SegmentIndex, clipped: Tensor
) -> Tensor:
    """g[t] = d loss / d ratio[t], (N,) fp64, 0 where the token's log-ratio was clipped."""
    g = take(outcome_slope, index.sequence_index) + take(step_slope, index.step_index)
    return torch.where(clipped, 0.0, g)


def is_clipped(ratio: Tensor, options: SegmentOptions) -> Tensor:
    return (ratio < options.clip_low) | (ratio > options.clip_high)


def matched_baseline(ratios: SegmentRatios, index: SegmentIndex) -> tuple[Tensor, Tensor]:
    """max(0, mean log-ratio of the labelled segments) at each level, 0-dim fp64."""
    return (
        _clamped_mean(ratios.outcome, index.outcome_label >= 0)[0],
        _clamped_mean(ratios.step, index.labelled_steps())[0],
    )


def _clamped_mean(r: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.where(counted, r, 0.0).sum()
    count = counted.double().sum()
    return (total / count.clamp(min=1)).clamp(min=0), total, count


@torch.library.custom_op("stepkto::step_kto", mutates_args=())
def _step_kto(
    logps: Tensor,
    ref_logps: Tensor,
    index: list[Tensor],
    z_o: Tensor,
    z_s: Tensor,
    n_o: Tensor,
    n_s: Tensor,
    matched: bool,
    options: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    opts, idx = SegmentOptions.unpack(options), SegmentIndex(*index)
    ratios = segment_ratios(logps - ref_logps, idx, opts)
    baseline = matched_baseline(ratios, idx) if matched else (z_o, z_s)
    out = batch_loss(
        ratios, logp_sums(logps, idx), idx, baseline, (n_o, n_s), opts, idx.scored_tokens().sum()
    )
    return out.loss.to(logps.dtype), out.totals, out.outcome_slope, out.step_slope


@_step_kto.register_fake
def _(logps, ref_logps, index, z_o, z_s, n_o, n_s, matched, options):  # type: ignore[no-untyped-def]
    wide = lambda *shape: logps.new_empty(shape, dtype=torch.float64)
    outcome_label, step_label = index[2], index[3]
    sizes = (len(TOTALS),), outcome_label.shape, step_label.shape
    return logps.new_empty(()), *(wide(*size) for size in sizes)


def logp_sums(logps: Tensor, index: SegmentIndex) -> tuple[Tensor, Tensor]:
    return (
        sum_by_index(logps, index.sequence_index, index.num_sequences),
        sum_by_index(logps, index.step_index, index.num_steps),
    )


@torch.library.custom_op("stepkto::step_kto_bwd", mutates_args=())
def _step_kto_bwd(
    dloss: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    index: list[Tensor],
    outcome_slope: Tensor,
    step_slope: Tensor,
    options: list[float],
) -> Tensor:
    clipped = is_clipped(logps - ref_logps, SegmentOptions.unpack(options))
    g = token_slopes(outcome_slope, step_slope, SegmentIndex(*index), clipped)
    return (dloss * g).to(logps.dtype)


@_step_kto_bwd.register_fake
def _(dloss, logps, ref_logps, index, outcome_slope, step_slope, options):  # type: ignore[no-untyped-def]
    return torch.empty_like(logps)


def _step_kto_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logps, ref_logps, index = inputs[:3]
    ctx.options = inputs[-1]
    ctx.save_for_backward(logps, ref_logps, output[2], output[3], *index)


def _step_kto_backward(ctx, dloss, *unused):  # type: ignore[no-untyped-def]
    logps, ref_logps, outcome_slope, step_slope, *index = ctx.saved_tensors
    g = _step_kto_bwd(dloss, logps, ref_logps, index, outcome_slope, step_slope, ctx.options)
    return g, None, [None] * len(index), None, None, None, None, None, None


_step_kto.register_autograd(_step_kto_backward, setup_context=_step_kto_setup)


def step_kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    segments: StepSegments,
    baseline: KLBaseline | None = None,
    config: StepKTOConfig = StepKTOConfig(),  # noqa: B008, frozen
    normalizer: LossNormalizer | None = None,
) -> tuple[Tensor, StepKTOMetrics]:
    """Step-KTO loss of per-token log-probs.

    Args:
        logps: (...) fp32 or fp64 with N elements: policy log-probs in nats, in the order of
            `segments`. Not bf16: a sum over thousands of tokens would keep the rounding of each.
        ref_logps: same shape and dtype, of the reference model; no gradient flows into it.
        segments: layout and labels.
        baseline: reference points for reference_point "mismatched", "ema" and, where the caller
            averages over ranks, "matched"; refused where `config` fixes them.
        normalizer: divisors of the two terms; None counts the labels of this batch. Give global
            counts (`loss_normalizer`, added over micro-batches and ranks) so that micro-batches'
            gradients add up to the gradient of the whole batch.
    Returns:
        loss: () dtype of `logps`, differentiable in `logps`; 0 where nothing is labelled.
        metrics: of this batch.
    Raises:
        ValueError: shape, dtype or device differs, or `baseline` and `config` do not fit.
    """
    checks.token_tensor("logps", logps, segments)
    checks.ref_logps(ref_logps, logps.shape, logps.dtype, logps.device)
    z, matched = resolve_baseline(baseline, config, logps.device)
    n = resolve_normalizer(normalizer, segments, config)
    loss, totals, _, _ = _step_kto(
        logps.reshape(-1),
        ref_logps.detach().reshape(-1),
        list(SegmentIndex.of(segments)),
        *z,
        *n,
        matched,
        config.segment_options().pack(),
    )
    return loss, StepKTOMetrics(totals)


def resolve_baseline(
    baseline: KLBaseline | None, config: StepKTOConfig, device: torch.device
) -> tuple[tuple[Tensor, Tensor], bool]:
    """Reference points as 0-dim fp64 tensors, and whether to take them from the batch itself."""
    fixed = config.fixed_reference_point
    if fixed is not None:
        checks.require(
            baseline is None,
            "baseline",
            f"None, as config fixes the reference points at {fixed}",
            baseline,
        )
        baseline = KLBaseline(fixed, fixed)
    matched = baseline is None and config.reference_point == "matched"
    if matched:
        baseline = KLBaseline(0.0, 0.0)
    checks.require(
        baseline is not None,
        "baseline",
        f"a KLBaseline, as config.reference_point is {config.reference_point!r}"
        " (kl_baseline makes one; 'zero' and 'matched' need none)",
        None,
    )
    assert baseline is not None
    z_o = as_scalar("baseline.outcome", baseline.outcome, device)
    return (z_o, as_scalar("baseline.step", baseline.step, device)), matched


def resolve_normalizer(
    normalizer: LossNormalizer | None, segments: StepSegments, config: StepKTOConfig
) -> tuple[Tensor, Tensor]:
    if normalizer is None:
        normalizer = loss_normalizer(segments, config)
    return (
        as_scalar("normalizer.outcome", normalizer.outcome, segments.device),
        as_scalar("normalizer.step", normalizer.step, segments.device),
    )


def as_scalar(name: str, value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        checks.shape(name, value, (), "()")
        return value.detach().to(device=device, dtype=torch.float64)
    checks.number(name, value)
    return torch.full((), float(value), dtype=torch.float64, device=device)


@torch.no_grad()
def kl_baseline(
    logps: Tensor,
    ref_logps: Tensor,
    segments: StepSegments,
    group: Group | None = None,
    *,
    config: StepKTOConfig = StepKTOConfig(),  # noqa: B008, frozen
) -> KLBaseline:
    """Reference points: max(0, mean log-ratio) over the batch's sequences and over its steps.

    Pass the log-probs of mismatched pairs (the prompt of one example, the completion of another)
    for KTO's estimate of the KL divergence. Labels are not looked at; segments without tokens are
    left out. Global sum over global count where `group` is given.

    Args:
        logps, ref_logps: (...) fp32 or fp64 with N elements, nats.
        segments: layout of those tokens.
        group: process group to average over; every rank must call.
        config: `ratio_clip` and `length_normalize` are applied as in the loss.
    Returns:
        KLBaseline of 0-dim fp64 tensors.
    Raises:
        ValueError: shape, dtype or device differs.
    """
    checks.token_tensor("logps", logps, segments)
    checks.ref_logps(ref_logps, logps.shape, logps.dtype, logps.device)
    index = SegmentIndex.of(segments)
    ratio = (logps - ref_logps).reshape(-1)
    ratios = segment_ratios(ratio, index, config.segment_options())
    ones = torch.ones_like(ratio)
    outcome_tokens = sum_by_index(ones, index.sequence_index, index.num_sequences)
    step_tokens = sum_by_index(ones, index.step_index, index.num_steps)
    _, outcome_sum, outcome_count = _clamped_mean(ratios.outcome, outcome_tokens > 0)
    _, step_sum, step_count = _clamped_mean(ratios.step, step_tokens > 0)
    sums = torch.stack([outcome_sum, outcome_count, step_sum, step_count])
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    z = sums[0::2] / sums[1::2].clamp(min=1)
    z = z.clamp(min=0)
    return KLBaseline(z[0], z[1])


@torch.no_grad()
def loss_normalizer(
    segments: StepSegments,
    config: StepKTOConfig = StepKTOConfig(),  # noqa: B008, frozen
    group: Group | None = None,
) -> LossNormalizer:
    """Divisors of the two loss terms for this batch, summed over `group` where it is given.

    Over gradient accumulation, add up the micro-batches': the field sums are the whole batch's.

    Returns:
        outcome: number of labelled sequences; step: number of sequences with a labelled step, or of
        labelled steps with step_reduction "mean". 0-dim fp64 tensors.
    """
    outcome, step, _ = term_counts(SegmentIndex.of(segments), config.segment_options())
    counts = torch.stack([outcome, step])
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    return LossNormalizer(counts[0], counts[1])
