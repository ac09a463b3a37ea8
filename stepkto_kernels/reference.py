"""The specification: the same functions in plain torch, by autograd, in any dtype up to fp64.

Everything is materialised and nothing is clever: these are what the ops are tested against, and
what `backend="reference"` runs. Logits are formed in the dtype of the inputs, as a user's own code
would; what follows is fp32, or fp64 where the inputs are.
Letters: N tokens, H hidden size, V vocabulary, B sequences, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stepkto_kernels import checks
from stepkto_kernels.config import StepKTOConfig
from stepkto_kernels.segments import StepSegments
from stepkto_kernels.step_kto import KLBaseline, LossNormalizer


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def transform_logits(
    logits: Tensor, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """z = cap(logit_scale * logits) / temperature in fp32 (fp64 for fp64 logits)."""
    z = _wide(logits) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_logprobs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """log softmax(z)[target]. logits (..., V), target (...) int64 -> (...), 0 where ignored."""
    z = transform_logits(logits, temperature, logit_scale, softcap)
    scored = target != ignore_index
    checks.targets(target, scored, z.shape[-1], ignore_index)
    logps = z.log_softmax(-1).gather(-1, torch.where(scored, target, 0)[..., None])[..., 0]
    return torch.where(scored, logps, 0.0)


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
) -> Tensor:
    """hidden (..., H), weight (V, H), target (...), bias (V,) -> log-probs (...), nats."""
    return token_logprobs(
        F.linear(hidden, weight, bias),
        target,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
    )


def linear_logprobs_with_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    stats: Sequence[str],
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and the statistics of `stats`, each (...), 0 (False) where ignored."""
    logits = F.linear(hidden, weight, bias)
    logps = token_logprobs(
        logits,
        target,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
    )
    z = transform_logits(logits, temperature, logit_scale, softcap)
    scored = target != ignore_index
    log_p = z.log_softmax(-1)
    at_target = z.gather(-1, torch.where(scored, target, 0)[..., None])[..., 0]
    formulas = {
        # a masked logit of -inf has p = 0, and 0 * -inf would be NaN; exp(-1e4) is 0 in fp64 too
        "entropy": lambda: -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1),
        "mean_logit": lambda: z.mean(-1).detach(),
        "is_top1": lambda: at_target >= z.amax(-1),
        "log_sum_sq_prob": lambda: (2 * log_p).logsumexp(-1).detach(),
    }
    values = {name: formulas[name]() for name in stats}
    return logps, {name: torch.where(scored, x, torch.zeros_like(x)) for name, x in values.items()}


def segment_sums(ratio: Tensor, segments: StepSegments) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of each sequence (B,) and of each step (S,)."""
    ratio = ratio.reshape(-1)

    def sums(index: Tensor, size: int) -> Tensor:
        inside = index >= 0
        return ratio.new_zeros(size).index_add(0, index[inside].long(), ratio[inside])

    return (
        sums(segments.sequence_index, segments.num_sequences),
        sums(segments.step_index, segments.num_steps),
    )


def _segment_ratios(
    logps: Tensor, ref_logps: Tensor, segments: StepSegments, config: StepKTOConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r_o (B,), r_s (S,) and the numbers of tokens behind each."""
    ratio = (logps - ref_logps.detach()).reshape(-1)
    if config.ratio_clip is not None:
        ratio = ratio.clamp(*config.ratio_clip)
    r_o, r_s = segment_sums(ratio, segments)
    n_o, n_s = segment_sums(torch.ones_like(ratio), segments)
    if config.length_normalize:
        r_o, r_s = r_o / n_o.clamp(min=1), r_s / n_s.clamp(min=1)
    return r_o, r_s, n_o, n_s


def _clamped_mean(r: Tensor) -> Tensor:
    return r.detach().mean().clamp(min=0) if r.numel() else r.new_zeros(())


def kl_baseline(
    logps: Tensor,
    ref_logps: Tensor,
    segments: StepSegments,
    *,
    config: StepKTOConfig = StepKTOConfig(),  # noqa: B008, frozen
) -> KLBaseline:
    """max(0, mean r) over the sequences and over the steps that have tokens."""
    r_o, r_s, n_o, n_s = _segment_ratios(logps, ref_logps, segments, config)
    return KLBaseline(_clamped_mean(r_o[n_o > 0]), _clamped_mean(r_s[n_s > 0]))


def _kto(
    r: Tensor, label: Tensor, z: Tensor | float, beta: float, desirable: float, undesirable: float
) -> Tensor:
    """lam * sigmoid(-sign * beta * (r - z)) of the labelled segments, 0 for the others."""
    number = lambda value: r.new_full((), value)  # a bare number takes the default dtype
    sign = torch.where(label > 0, number(1.0), number(-1.0))
    lam = torch.where(label > 0, number(desirable), number(undesirable))
    # not torch.sigmoid: its gradient y * (1 - y) is 0 where y rounds to 1
    value = F.logsigmoid(-sign * beta * (r - z)).exp()
    return torch.where(label >= 0, lam * value, 0.0)


def step_kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    segments: StepSegments,
    baseline: KLBaseline | None = None,
    config: StepKTOConfig = StepKTOConfig(),  # noqa: B008, frozen
    normalizer: LossNormalizer | None = None,
) -> Tensor:
    """outcome term / n_o + step_weight * process term; see StepKTOConfig. Returns the loss only."""
    r_o, r_s, _, _ = _segment_ratios(logps, ref_logps, segments, config)
    step_sequence = segments.step_sequence.long()
    step_label = torch.where(step_sequence >= 0, segments.step_label, -1)
    outcome_label = segments.outcome_label

    if config.fixed_reference_point is not None:
        baseline = KLBaseline(config.fixed_reference_point, config.fixed_reference_point)
    elif baseline is None:
        if config.reference_point != "matched":
            raise ValueError(
                f"baseline: want a KLBaseline for {config.reference_point!r}, got None"
            )
        matched = _clamped_mean(r_o[outcome_label >= 0]), _clamped_mean(r_s[step_label >= 0])
        baseline = KLBaseline(*matched)

    l_o = _kto(
        r_o,
        outcome_label,
        baseline.outcome,
        config.beta,
        config.desirable_weight,
        config.undesirable_weight,
    )
    l_s = _kto(
        r_s,
        step_label,
        baseline.step,
        config.beta if config.step_beta is None else config.step_beta,
        config.step_desirable_weight,
        config.step_undesirable_weight,
    )
    labelled = (step_label >= 0).nonzero()[:, 0]
    zeros = l_s.new_zeros(segments.num_sequences)
    steps = zeros.index_add(0, step_sequence[labelled], torch.ones_like(l_s[labelled]))
    per_sequence = zeros.index_add(0, step_sequence[labelled], l_s[labelled])
    if config.step_reduction == "sequence_mean":
        per_sequence = per_sequence / steps.clamp(min=1)
    if normalizer is None:
        by_steps = config.step_reduction == "mean"
        n_s = steps.sum() if by_steps else (steps > 0).sum()
        normalizer = LossNormalizer((outcome_label >= 0).sum(), n_s)
    loss = l_o.sum() / _or_one(normalizer.outcome)
    return loss + config.step_weight * per_sequence.sum() / _or_one(normalizer.step)


def _or_one(n: Tensor | float) -> Tensor | float:
    """A term without labels has no summands; its divisor must not make it NaN."""
    return 1.0 if n <= 0 else n


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
) -> Tensor:
    """step_kto_loss of linear_logprobs. Returns the loss only."""
    logps = linear_logprobs(
        hidden,
        weight,
        target,
        bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
    )
    return step_kto_loss(logps, ref_logps, segments, baseline, config, normalizer)
