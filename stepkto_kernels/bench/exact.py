"""Correctness against fp64, before anything is timed.

fp64 log-probs of every token cost one GEMM pass; gradients are compared on some rows of dhidden
and of dweight, as each row of either can be had on its own once the log-sum-exps are known.
Letters: N tokens, H hidden size, V vocabulary, r tokens and c vocabulary entries compared.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stepkto_kernels import reference
from stepkto_kernels.bench.contenders import Outcome
from stepkto_kernels.bench.problems import IGNORED, HeadProblem, LossProblem
from stepkto_kernels.plan import MIB, cut

# A path fails beyond this multiple of the eager computation's error in the same dtype. It is to
# catch wrong answers; how imprecise a right one is stands in the table.
GATE = 10
ULP = torch.finfo(torch.float32).eps
COMPARED = 64  # tokens, and vocabulary entries
BYTES = 256 * MIB  # fp64 logits, or weights, held at once
NARROWEST = 256  # vocabulary entries, however many rows there are


@dataclass(frozen=True)
class Errors:
    """Against fp64. Log-probs in nats, gradients relative to the largest element; None: not made.

    Gradients of a loss are compared like those of log-probs.
    """

    max_dlogp: float | None = None
    mean_dlogp: float | None = None
    dhidden_error: float | None = None
    dweight_error: float | None = None
    loss_error: float | None = None


class Exact(NamedTuple):
    logps: Tensor  # (N,) fp64
    lse: Tensor  # (N,) fp64


def exact_logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Exact:
    h = hidden.double()
    lse = h.new_full((len(h),), -math.inf)
    at_target = torch.zeros_like(lse)
    for vocab in _vocab_slices(len(h), weight):
        z = h @ weight[vocab].double().T
        lse = torch.logaddexp(lse, z.logsumexp(1))
        here = (target >= vocab.start) & (target < vocab.stop)
        own = z.gather(1, torch.where(here, target - vocab.start, 0)[:, None])[:, 0]
        at_target = torch.where(here, own, at_target)
    return Exact(torch.where(target == IGNORED, 0.0, at_target - lse), lse)


def _vocab_slices(rows: int, weight: Tensor) -> list[slice]:
    """Slices of the vocabulary of which the weights and the logits of `rows` rows fit BYTES each.

    In fp64, where all of a large model's head would be gigabytes.
    """
    V, H = weight.shape
    return cut(V, max(BYTES // (8 * max(rows, H)), NARROWEST))


def exact_gradients(
    problem: HeadProblem, lse: Tensor, g: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """dhidden[rows] (r, H) and dweight[columns] (c, H) in fp64, for d loss / d logp = g (N,)."""
    h, weight = problem.hidden.double(), problem.weight
    picked, target = h[rows], problem.target[rows]
    # an ignored token has g = 0 and any target
    dhidden = weight[target.clamp(min=0)].double()
    for vocab in _vocab_slices(len(rows), weight):
        w = weight[vocab].double()
        dhidden -= (picked @ w.T - lse[rows, None]).exp_() @ w
    dhidden *= g[rows, None]
    d = (h @ weight[columns].double().T - lse[:, None]).exp_().neg_()  # (N, c), -p
    d += problem.target[:, None] == columns
    return dhidden, (d * g[:, None]).T @ h


class Check:
    """What one path of a problem should give, and how far off is wrong."""

    def __init__(
        self,
        problem: HeadProblem,
        exact: Exact,
        ref_logps: Tensor | None = None,
        compared: int = COMPARED,
    ):
        """ref_logps: (N,) fp64, of a LossProblem."""
        kept = problem.target != IGNORED
        exact = exact._replace(logps=exact.logps.where(kept, 0.0))
        self.exact, self.loss = exact, None
        g = problem.upstream.double().where(kept, 0.0)
        if isinstance(problem, LossProblem):
            assert ref_logps is not None
            self.loss, g = _exact_loss(problem, exact.logps, ref_logps)
        N, V, device = problem.shape.N, problem.shape.V, problem.hidden.device
        generator = torch.Generator().manual_seed(2)
        pick = lambda n: torch.randperm(n, generator=generator)[:compared].to(device)
        self.rows = pick(N)
        # half of the entries are targets of the tokens
        half = compared // 2
        targets = problem.target[self.rows]
        targets = targets[targets != IGNORED][:half]
        self.columns = torch.cat([targets, pick(V)[:half]]).unique()
        self.dhidden, self.dweight = exact_gradients(problem, exact.lse, g, self.rows, self.columns)
        self.allowed = self._allowed(problem, g)

    def _allowed(self, problem: HeadProblem, g: Tensor) -> Errors:
        """GATE times what the eager computation in the same dtype makes of a few of the rows."""
        rows = self.rows[:COMPARED]
        hidden = problem.hidden[rows].detach().requires_grad_()
        weight = problem.weight.detach().requires_grad_()
        logps = reference.linear_logprobs(hidden, weight, problem.target[rows])
        logps.backward(g[rows].to(logps.dtype))
        few = HeadProblem(problem.shape, hidden.detach(), weight.detach(), problem.target[rows], g)
        everything = torch.arange(len(rows), device=rows.device)
        lse = self.exact.lse[rows]
        dhidden, dweight = exact_gradients(few, lse, g[rows], everything, self.columns)
        assert hidden.grad is not None and weight.grad is not None
        dlogp = _largest(logps.detach() - self.exact.logps[rows])
        # floors: some roundings of fp32, in case the eager result is exact by luck
        size = _largest(self.exact.lse) + _largest(self.exact.logps)
        allowed_dlogp = GATE * dlogp + 4 * ULP * size
        slack = 32 * ULP
        if isinstance(problem, LossProblem):
            slack += _sum_slack(problem, allowed_dlogp, self.exact.logps)
        return Errors(
            max_dlogp=allowed_dlogp,
            dhidden_error=GATE * _relative(hidden.grad, dhidden) + slack,
            dweight_error=GATE * _relative(weight.grad[self.columns], dweight) + slack,
            loss_error=slack,
        )

    def errors(self, outcome: Outcome) -> Errors:
        """Raises ValueError where a shape is not the problem's."""
        value, dhidden, dweight = outcome
        picked = None if dhidden is None else _relative(dhidden[self.rows], self.dhidden)
        columns = None if dweight is None else _relative(dweight[self.columns], self.dweight)
        if self.loss is not None:
            loss_error = abs(float(value) - self.loss)
            return Errors(dhidden_error=picked, dweight_error=columns, loss_error=loss_error)
        if value.shape != self.exact.logps.shape:
            want = tuple(self.exact.logps.shape)
            raise ValueError(f"log-probs: want shape {want}, got {tuple(value.shape)}")
        difference = (value.double() - self.exact.logps).abs()
        return Errors(float(difference.max()), float(difference.mean()), picked, columns)

    def verdict(self, errors: Errors) -> str:
        """ "ok", or what is wrong."""
        allowed = asdict(self.allowed)
        for name, error in asdict(errors).items():
            limit = allowed[name]
            if error is not None and limit is not None and not error <= limit:  # NaN is wrong too
                return f"wrong: {name} {error:.2g} > {limit:.2g}"
        return "ok"


def _exact_loss(problem: LossProblem, logps: Tensor, ref_logps: Tensor) -> tuple[float, Tensor]:
    leaf = logps.detach().requires_grad_()
    loss = reference.step_kto_loss(
        leaf, ref_logps, problem.segments, problem.baseline, problem.config
    )
    (g,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), g


def _sum_slack(problem: LossProblem, dlogp: float, logps: Tensor) -> float:
    """What errors of log-probs do to a loss: a segment's sum, and u = beta * sum, are off by this.

    T errors of random sign, and the roundings of fp32 sums of T log-probs.
    """
    T = problem.T
    return problem.config.beta * (math.sqrt(T) * dlogp + 8 * ULP * T * _largest(logps.mean()))


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _relative(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|; NaN if there is one."""
    if got.shape != want.shape:
        raise ValueError(f"a gradient: want shape {tuple(want.shape)}, got {tuple(got.shape)}")
    return float((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-300))
