"""What a training step is watched by, as sums that add up over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

LEVELS = ("outcome", "step")
LEVEL_TOTALS = (
    "loss",  # sum of loss terms; for steps reduced within a sequence where the config says so
    "terms",  # number of those terms, the normalizer of this batch alone
    "baseline",  # reference point z, nats
    "chosen",  # number of desirable segments
    "chosen_reward",  # sum of beta * r over them
    "chosen_logp",  # sum of their policy log-probs, nats
    "rejected",  # the same of undesirable segments
    "rejected_reward",
    "rejected_logp",
    "saturated",  # number of segments with |u| > SATURATED
)
TOTALS = ("batches", "tokens", "weighted_step_loss") + tuple(
    f"{level}_{name}" for level in LEVELS for name in LEVEL_TOTALS
)
SATURATED = 7.0  # at this |u| the slope of the sigmoid is 0.4% of its largest


@dataclass(frozen=True, eq=False)
class StepKTOMetrics:
    """Sums over a batch, on the device of the loss, without gradient.

    `a + b` merges micro-batches; to merge ranks, all-reduce `totals` as a sum. Adding waits for
    nothing; `compute` waits for the device once, so call it once a logging step.

    Args:
        totals: (len(TOTALS),) fp64, in the order of metrics.TOTALS.
    """

    totals: Tensor

    def __add__(self, other: StepKTOMetrics) -> StepKTOMetrics:
        return StepKTOMetrics(self.totals + other.totals)

    def compute(self) -> dict[str, float]:
        """Means by TRL's names, the process level under `step/`. A mean over nothing is left out.

        loss: the loss of all that was added, as one batch; outcome_loss and step/loss: its two
        terms before step_weight; kl: reference point z in nats, mean over batches;
        rewards/{chosen, rejected, margins}: mean of beta * r over desirable and undesirable
        segments, and the difference; logps/{chosen, rejected}: mean policy log-prob of a segment,
        nats; saturated: share of labelled segments on the flat part of the sigmoid;
        tokens: number of tokens that were in a labelled segment.
        """
        total = dict(zip(TOTALS, self.totals.tolist(), strict=True))
        out = {"tokens": total["tokens"], "loss": 0.0}
        if total["outcome_terms"]:
            out["outcome_loss"] = total["outcome_loss"] / total["outcome_terms"]
            out["loss"] += out["outcome_loss"]
        if total["step_terms"]:
            out["step/loss"] = total["step_loss"] / total["step_terms"]
            out["loss"] += total["weighted_step_loss"] / total["step_terms"]
        for level, prefix in zip(LEVELS, ("", "step/"), strict=True):
            if total["batches"]:
                out[prefix + "kl"] = total[f"{level}_baseline"] / total["batches"]
            for side in ("chosen", "rejected"):
                count = total[f"{level}_{side}"]
                if count:
                    out[f"{prefix}rewards/{side}"] = total[f"{level}_{side}_reward"] / count
                    out[f"{prefix}logps/{side}"] = total[f"{level}_{side}_logp"] / count
            labelled = total[f"{level}_chosen"] + total[f"{level}_rejected"]
            if labelled:
                out[prefix + "saturated"] = total[f"{level}_saturated"] / labelled
            if total[f"{level}_chosen"] and total[f"{level}_rejected"]:
                chosen, rejected = out[f"{prefix}rewards/chosen"], out[f"{prefix}rewards/rejected"]
                out[f"{prefix}rewards/margins"] = chosen - rejected
        return out
