"""What is measured: random heads and batches, the same for everybody who runs.

Letters: N tokens, H hidden size, V vocabulary, B sequences, T tokens and K steps of a sequence.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from stepkto_kernels.config import StepKTOConfig
from stepkto_kernels.plan import cut
from stepkto_kernels.segments import StepSegments
from stepkto_kernels.step_kto import KLBaseline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST_SEQUENCE = 256
STEPS = 8  # K
HALF_PROMPT = "half_prompt"  # path on which the first half of every sequence is ignored
IGNORED = -100  # target of a token that is not scored
SPREAD = 2.0  # standard deviation of the logits, nats
LOSS_SPREAD = 1.0  # smaller, so that a sequence's log-ratio stays off the flat part of the sigmoid


class Shape(NamedTuple):
    N: int
    H: int
    V: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """ "2048x1024x32000" -> Shape(2048, 1024, 32000); a ValueError for anything else."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
        if not match:
            raise ValueError(f"shapes: want NxHxV, such as 2048x1024x32000, got {text!r}")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.N}x{self.H}x{self.V}"


@dataclass(frozen=True, eq=False)
class HeadProblem:
    """Per-token log-probs of an lm_head, and a gradient that differs from token to token."""

    shape: Shape
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    target: Tensor  # (N,) int64
    upstream: Tensor  # (N,) fp32, d loss / d logp


@dataclass(frozen=True, eq=False)
class LossProblem(HeadProblem):
    """A batch of B sequences of T tokens in K steps each; every token is scored.

    `upstream` is not used. The reference log-probs of a sequence sum to the same number for every
    sequence, so that a loss that takes none can have them as part of its reference point.
    """

    segments: StepSegments
    ref_logp: float  # reference log-prob of every token
    ref_hidden: Tensor  # (N, H), of the reference model where its pass is measured too
    baseline: KLBaseline
    config: StepKTOConfig

    @property
    def B(self) -> int:
        return self.segments.num_sequences

    @property
    def T(self) -> int:
        return self.shape.N // self.B

    def ref_logps(self) -> Tensor:
        return torch.full((self.shape.N,), self.ref_logp, device=self.hidden.device)


def head_problem(
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    *,
    spread: float = SPREAD,
    likely_targets: bool = False,
    seed: int = 0,
) -> HeadProblem:
    """Logits ~ N(0, spread**2), random targets.

    likely_targets: make every second target the most likely token, as a trained model's would be.
    """
    N, H, V = shape
    generator = torch.Generator(device).manual_seed(seed)
    randn = lambda *size: torch.randn(size, generator=generator, device=device)
    hidden, weight = randn(N, H).to(dtype), randn(V, H).mul_(spread / H**0.5).to(dtype)
    target = torch.randint(0, V, (N,), generator=generator, device=device)
    if likely_targets:
        wide = weight.float()
        for rows in cut(N, 256):
            top = (hidden[rows].float() @ wide.T).argmax(1)
            target[rows][::2] = top[::2]
    # no zeros: rows without a gradient may be dropped, and then it is another problem
    upstream = randn(N)
    upstream += upstream.sign() * 0.1
    return HeadProblem(shape, hidden, weight, target, upstream)


def loss_problem(shape: Shape, dtype: torch.dtype, device: str) -> LossProblem:
    """Sequences of equal length with alternating labels, reference log-probs near the policy's."""
    head = head_problem(shape, dtype, device, spread=LOSS_SPREAD)
    segments = batch_layout(shape.N, device)
    generator = torch.Generator(device).manual_seed(1)
    noise = torch.randn(head.hidden.shape, generator=generator, device=device)
    return LossProblem(
        **vars(head),
        segments=segments,
        ref_logp=-math.log(shape.V) - LOSS_SPREAD**2 / 2,  # mean log-prob of a random target
        ref_hidden=(0.95 * head.hidden.float() + 0.3 * noise).to(dtype),
        baseline=KLBaseline(0.3, 0.1),
        config=StepKTOConfig(step_weight=0.0),
    )


def batch_layout(N: int, device: str) -> StepSegments:
    """N tokens as sequences of equal length, K steps each, right and wrong ones mixed."""
    T = sequence_length(N)
    B, K = N // T, min(STEPS, T)
    step_ids = (torch.arange(T) * K // T).expand(B, T)
    label = torch.arange(B) % 2
    step_label = (torch.arange(B * K) % 3 > 0).long().view(B, K)
    made = StepSegments.from_padded(step_ids, torch.ones_like(step_ids), label, step_label)
    return made.to(device)  # on a GPU the fused loss would wait for segments that were made there


def make_problem(suite: str, shape: Shape, dtype: torch.dtype, device: str) -> HeadProblem:
    """The problem of suite "head" or "loss"."""
    make = head_problem if suite == "head" else loss_problem
    return make(shape, dtype, device)


def on_path(problem: HeadProblem, path: str) -> HeadProblem:
    """The same tensors with the targets or the options of a path."""
    if path == HALF_PROMPT:
        N = problem.shape.N
        T = sequence_length(N)
        prompt = torch.arange(N, device=problem.target.device) % T < T // 2
        return replace(problem, target=problem.target.masked_fill(prompt, IGNORED))
    if isinstance(problem, LossProblem) and path == "step_kto":
        return replace(problem, config=StepKTOConfig(step_weight=1.0))
    return problem


def scored_tokens(N: int, path: str) -> int:
    """Of the N tokens of a path; the others are ignored."""
    T = sequence_length(N)
    return N - N // T * (T // 2) if path == HALF_PROMPT else N


def sequence_length(N: int) -> int:
    """The largest power of two that divides N into at least two sequences, or 1."""
    lengths = (2**i for i in reversed(range(LONGEST_SEQUENCE.bit_length())))
    return next((T for T in lengths if N % T == 0 and N // T >= 2), 1)
