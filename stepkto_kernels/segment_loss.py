"""The segment level of the loss in torch: sums over sequences and steps, both KTO losses, slopes.

    u = sign * beta * (r - z)      r: log-ratio of a segment, z: reference point, sign: label
    l = lam * sigmoid(-u)          the loss of a segment
    d l / d r = -lam * sign * beta * sigmoid(u) * sigmoid(-u)

There are a few numbers a segment, so all of it is fp64; the gradient of a token is one number
looked up for its sequence plus one for its step. native.py has SegmentBatch in C++.
Letters: N tokens, n tokens of a block of whole sequences, B sequences, S steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stepkto_kernels.config import STEP_REDUCTIONS, SegmentOptions
from stepkto_kernels.metrics import SATURATED
from stepkto_kernels.segments import SegmentIndex, sum_by_index, take


class BatchLoss(NamedTuple):
    """Loss of a batch and what its backward pass needs, fp64."""

    loss: Tensor  # ()
    totals: Tensor  # (len(metrics.TOTALS),)
    outcome_slope: Tensor  # (B,), d loss / d ratio[t] for the tokens of a sequence
    step_slope: Tensor  # (S,), the same for the tokens of a step


def term_counts(index: SegmentIndex, options: SegmentOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of loss terms: outcome (0-dim), process (0-dim), labelled steps a sequence (B,)."""
    labelled = index.labelled_steps().double()
    B = index.outcome_label.shape[0]  # torch.compile of 2.8 knows no property of a NamedTuple
    steps = sum_by_index(labelled, index.step_sequence, B)
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
    number = lambda value: r.new_full((), value)  # fp64; a bare number takes the default dtype
    sign = torch.where(right, number(1.0), number(-1.0))
    lam = torch.where(right, number(desirable), number(undesirable))
    u = sign * beta * (r - z)
    wrongness = torch.sigmoid(-u)  # not 1 - sigmoid(u), which is 0 from u = 17 on in fp32
    # where, not a product: a NaN in an unlabelled segment is not in the loss
    value = torch.where(label >= 0, lam * wrongness, 0.0)
    slope = torch.where(label >= 0, -lam * sign * beta * torch.sigmoid(u) * wrongness, 0.0)
    return Terms(value, slope, torch.where(label >= 0, u, 0.0))


class SegmentBatch:
    """Sums over the segments of a batch, collected over blocks of tokens, and their loss."""

    def __init__(self, index: SegmentIndex, options: SegmentOptions):
        zeros = lambda size: torch.zeros(size, dtype=torch.float64, device=index.device)
        levels = lambda: (zeros(index.num_sequences), zeros(index.num_steps))
        self.index, self.options = index, options
        self.ratio = levels()  # (B,), (S,): sums of clipped log-ratios
        self.logp = levels()  # sums of policy log-probs
        self.tokens = levels()  # numbers of tokens

    def add(self, logps: Tensor, ref_logps: Tensor, rows: Tensor | None = None) -> None:
        """Add all tokens, or those at `rows` (n,). logps, ref_logps: (n,), nats."""
        options = self.options
        ratio = logps.double() - ref_logps.double()
        clipped = ratio.clamp(options.clip_low, options.clip_high)
        for level, segment in enumerate(self.index.of_tokens(rows)):
            size = self.ratio[level].shape[0]
            self.ratio[level].add_(sum_by_index(clipped, segment, size))
            self.logp[level].add_(sum_by_index(logps, segment, size))
            self.tokens[level].add_(sum_by_index(torch.ones_like(logps), segment, size))

    def all_reduce(self, group: dist.ProcessGroup) -> Tensor:
        """Add the sums of other ranks; returns the number of scored tokens of all, () fp64."""
        sums = [x for pair in (self.ratio, self.logp, self.tokens) for x in pair]
        scored = self.index.scored_tokens().sum(dtype=torch.float64)
        packed = torch.cat([*sums, scored[None]])
        dist.all_reduce(packed, group=group)
        for x, total in zip(sums, packed[:-1].split([len(x) for x in sums]), strict=True):
            x.copy_(total)
        return packed[-1]

    def scale(self, level: int) -> Tensor:
        """d r / d (sum of log-ratios): 1, or 1 / tokens with length_normalize."""
        if self.options.length_normalize:
            return 1 / self.tokens[level].clamp(min=1)
        return torch.ones_like(self.ratio[level])

    def r(self, level: int) -> Tensor:
        """Log-ratios of sequences (level 0) or steps (level 1)."""
        return self.ratio[level] * self.scale(level)

    @property
    def labelled(self) -> tuple[Tensor, Tensor]:
        """Which sequences (B,) and steps (S,) have a label."""
        return self.index.outcome_label >= 0, self.index.labelled_steps()

    def matched_baseline(self) -> tuple[Tensor, Tensor]:
        """max(0, mean log-ratio of the labelled segments) of both levels, () each."""
        means = (mean_over(self.r(level), counted) for level, counted in enumerate(self.labelled))
        z_o, z_s = (total / count.clamp(min=1) for total, count in means)
        return z_o.clamp(min=0), z_s.clamp(min=0)

    def loss(self, baseline: tuple[Tensor, Tensor], normalizer: tuple[Tensor, Tensor]) -> BatchLoss:
        """Of all that was added; baseline and normalizer: 0-dim fp64 tensors, outcome and step."""
        index, options = self.index, self.options
        outcome = kto_terms(
            self.r(0),
            index.outcome_label,
            baseline[0],
            options.beta,
            options.desirable_weight,
            options.undesirable_weight,
        )
        step_label = torch.where(index.labelled_steps(), index.step_label, -1)
        step = kto_terms(
            self.r(1),
            step_label,
            baseline[1],
            options.step_beta,
            options.step_desirable_weight,
            options.step_undesirable_weight,
        )
        outcome_terms, step_terms, steps = term_counts(index, options)
        if STEP_REDUCTIONS[int(options.step_reduction)] == "sequence_mean":
            share = take(1 / steps.clamp(min=1), index.step_sequence)  # of a step in its sequence
        else:
            share = torch.ones_like(step.value)
        outcome_loss, step_loss = outcome.value.sum(), (share * step.value).sum()
        n_o, n_s = (torch.where(n <= 0, 1.0, n) for n in normalizer)
        loss = outcome_loss / n_o + options.step_weight * step_loss / n_s
        tokens = index.scored_tokens().sum()
        totals = [torch.ones_like(loss), tokens, options.step_weight * step_loss]
        totals += [outcome_loss, outcome_terms, baseline[0]]
        totals += self._side_totals(0, index.outcome_label, options.beta, outcome.u)
        totals += [step_loss, step_terms, baseline[1]]
        totals += self._side_totals(1, step_label, options.step_beta, step.u)
        return BatchLoss(
            loss,
            torch.stack([value.double() for value in totals]),
            outcome.slope * self.scale(0) / n_o,
            options.step_weight * share * step.slope * self.scale(1) / n_s,
        )

    def _side_totals(self, level: int, label: Tensor, beta: float, u: Tensor) -> list[Tensor]:
        """metrics.LEVEL_TOTALS of one level from `chosen` on."""
        out = []
        for side in (label > 0, label == 0):
            reward = torch.where(side, beta * self.r(level), 0.0)
            logp = torch.where(side, self.logp[level], 0.0)
            out += [side.sum(), reward.sum(), logp.sum()]
        return [*out, (u.abs() > SATURATED).sum()]


def mean_over(r: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the segments that are counted, () each."""
    return torch.where(counted, r, 0.0).sum(), counted.double().sum()


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
    """g[t] = scale * d loss / d logps[t] of all tokens or those at `rows`; dtype of logps.

    0 where the token's log-ratio was clipped.
    """
    sequence, step = index.of_tokens(rows)
    ratio = logps.double() - ref_logps.double()
    clipped = (ratio < options.clip_low) | (ratio > options.clip_high)
    g = take(outcome_slope, sequence) + take(step_slope, step)
    return torch.where(clipped, 0.0, scale * g).to(logps.dtype)
