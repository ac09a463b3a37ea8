"""StepKTOLoss: the fused loss as a module that remembers its reference points."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stepkto_kernels import checks, shards
from stepkto_kernels.backend import BACKENDS
from stepkto_kernels.config import LogitOptions, StepKTOConfig
from stepkto_kernels.fused_step_kto import fused_linear_step_kto_loss
from stepkto_kernels.metrics import TOTALS, StepKTOMetrics
from stepkto_kernels.segments import StepSegments
from stepkto_kernels.shards import HeadGroup
from stepkto_kernels.step_kto import KLBaseline, LossNormalizer, as_scalar


class StepKTOLoss(nn.Module):
    """`fused_linear_step_kto_loss` with its options bound and running reference points.

        loss_fn = StepKTOLoss(StepKTOConfig(beta=0.1))
        loss, metrics = loss_fn(hidden, model.lm_head.weight, target, segments, ref_logps, baseline)

    The running value is an exponential mean (config.ema_decay) in the buffer `running`, saved with
    the module: of the baselines passed in with reference_point "mismatched", where it serves a call
    without one (a batch of one sequence has no mismatched pair), with one warning; of the matched
    log-ratios of earlier batches with reference_point "ema". It moves in training mode only.

    Args:
        config: options of the loss.
        temperature, logit_scale, softcap, ignore_index, memory_budget, gradient_bound, backend,
        group: as `fused_linear_step_kto_loss`.
    Raises:
        ValueError: an option out of range.
    """

    running: Tensor  # (2,) fp64, z_o and z_s in nats
    seen: Tensor  # (2,) fp64, numbers of batches behind them

    def __init__(
        self,
        config: StepKTOConfig = StepKTOConfig(),  # noqa: B008, frozen
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        memory_budget: int | None = None,
        gradient_bound: float = 0.0,
        backend: str = "auto",
        group: HeadGroup | None = None,
    ):
        super().__init__()
        LogitOptions(temperature, logit_scale, softcap, ignore_index)
        checks.instance("config", config, StepKTOConfig)
        checks.memory_budget(memory_budget)
        checks.number("gradient_bound", gradient_bound, low=0)
        checks.choice("backend", backend, BACKENDS)
        shards.check_group(group)
        self.config = config
        self.options = {
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "ignore_index": ignore_index,
            "memory_budget": memory_budget,
            "gradient_bound": gradient_bound,
            "backend": backend,
            "group": group,
        }
        self.register_buffer("running", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))
        self._warned = False

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        segments: StepSegments,
        ref_logps: Tensor,
        baseline: KLBaseline | None = None,
        bias: Tensor | None = None,
        normalizer: LossNormalizer | None = None,
        *,
        update_running: bool = True,
    ) -> tuple[Tensor, StepKTOMetrics]:
        """Arguments, results and errors of `fused_linear_step_kto_loss`.

        update_running: whether the running value may move; under gradient accumulation pass False
        for all but the last micro-batch of a step, so that z is one number a step.
        """
        checks.boolean("update_running", update_running)
        given = baseline
        kind = self.config.reference_point
        from_config = self.config.fixed_reference_point is not None
        if baseline is None and not from_config and kind in ("mismatched", "ema"):
            if kind == "mismatched" and not self._warned:
                self._warned = True
                warnings.warn(
                    "no baseline for this batch: using the running mean of earlier ones",
                    stacklevel=4,  # the caller of the module, behind two frames of nn.Module
                )
            baseline = self.running_baseline()
        loss, metrics = fused_linear_step_kto_loss(
            hidden,
            weight,
            target,
            segments,
            ref_logps,
            baseline,
            bias,
            config=self.config,
            normalizer=normalizer,
            **self.options,  # type: ignore[arg-type]
        )
        update = update_running and self.training
        if update and kind == "ema":
            self.observe_metrics(metrics)
        elif update and kind == "mismatched" and given is not None:
            self.observe_baseline(given)
        return loss, metrics

    def running_baseline(self) -> KLBaseline:
        """The running value as reference points, which are never below 0."""
        z = self.running.clamp(min=0)
        return KLBaseline(z[0], z[1])

    def observe_baseline(self, baseline: KLBaseline) -> None:
        """Move the running value towards a step's reference points."""
        device = self.running.device
        value = torch.stack([as_scalar("baseline", z, device) for z in baseline])
        self._move(value, torch.ones_like(value, dtype=torch.bool))

    def observe_metrics(self, metrics: StepKTOMetrics) -> None:
        """Move it towards the mean log-ratios of a step: of all its micro-batches and ranks."""
        self._move(*self._matched(metrics))

    def _matched(self, metrics: StepKTOMetrics) -> tuple[Tensor, Tensor]:
        """Mean log-ratio of the batch's labelled segments, and whether there are any. (2,) each."""
        total = dict(zip(TOTALS, metrics.totals, strict=True))
        step_beta = self.config.step_beta or self.config.beta
        sums, counts = [], []
        for level, beta in (("outcome", self.config.beta), ("step", step_beta)):
            rewards = total[f"{level}_chosen_reward"] + total[f"{level}_rejected_reward"]
            sums.append(rewards / beta)
            counts.append(total[f"{level}_chosen"] + total[f"{level}_rejected"])
        count = torch.stack(counts)
        return torch.stack(sums) / count.clamp(min=1), count > 0

    @torch.no_grad()
    def _move(self, value: Tensor, known: Tensor) -> None:
        decay = self.config.ema_decay * (self.seen > 0).double()
        moved = decay * self.running + (1 - decay) * value
        self.running.copy_(torch.where(known, moved, self.running))
        self.seen += known

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> StepKTOLoss:
        """Move with a model, but stay fp64: a mean of many batches does not fit bf16."""
        before = {"running": self.running, "seen": self.seen}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = getattr(self, name)
            setattr(self, name, moved.double() if value.is_meta else value.to(moved.device))
        return self
