"""The small model of the reproduction: made, taught by the annotator, sampled from, trained.

Letters: B sequences, T padded length, N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import stepkto_kernels as stepkto
from stepkto_kernels.step_kto import KLBaseline

from .task import Annotator, Language, Problem, Verdict

SFT_STEPS, SFT_BATCH, SFT_RATE, SFT_WARMUP = 500, 32, 4e-3, 50
BATCH, WARMUP, CLIP = 64, 10, 1.0
BALANCE = 1.33  # desirable_weight * desirable over undesirable_weight * undesirable
IGNORED = -100


@dataclass(frozen=True)
class Solution:
    """A judged solution of a problem, as token ids."""

    problem: Problem
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    verdict: Verdict


@dataclass(frozen=True)
class Method:
    """How a round trains.

    Args:
        name: of the method or of a variant of it.
        loss: options of StepKTOConfig; None trains by cross-entropy on right answers only.
        labels: "keep", or "up to error": no step labels after a first wrong step.
        outcome: False takes the outcome term away.
    """

    name: str
    loss: dict | None
    labels: str = "keep"
    outcome: bool = True
    balance: bool = field(default=True)


def new_model(vocabulary: int) -> LlamaForCausalLM:
    """With the usual small initial weights, or tied embeddings, this one learns slowly."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            initializer_range=0.1,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def first_model(language: Language, seed: int, steps: int = SFT_STEPS) -> LlamaForCausalLM:
    """M0: supervised training on the annotator's solutions."""
    torch.manual_seed(seed)
    model = new_model(len(language.words))
    annotator = Annotator(language, random.Random(f"{seed} annotator"))
    rng = random.Random(f"{seed} first model")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(1, steps + 1):
        problems = [language.draw(rng) for _ in range(SFT_BATCH)]
        rows = [(language.prompt(p), annotator.solve(p, rng)) for p in problems]
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        rate = SFT_RATE * min(1.0, step / SFT_WARMUP) * (0.05 + 0.95 * cosine)
        descend(model, optimizer, cross_entropy(model, rows), rate)
    return model.eval()


def descend(model: LlamaForCausalLM, optimizer, loss: Tensor, rate: float) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


def shifted(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """Input ids and targets, both (B, T); prompt and padding have target IGNORED.

    Rows are padded on the right, where no token of a causal model looks: no mask is needed.
    """
    width = max(len(prompt) + len(ids) for prompt, ids in rows) - 1
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    for i, (prompt, ids) in enumerate(rows):
        whole = torch.tensor([*prompt, *ids])
        inputs[i, : len(whole) - 1] = whole[:-1]
        targets[i, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
    return inputs, targets


def hidden_states(model: LlamaForCausalLM, inputs: Tensor) -> Tensor:  # (B, T, H)
    return model.model(input_ids=inputs, use_cache=False).last_hidden_state


def cross_entropy(model: LlamaForCausalLM, rows: Sequence) -> Tensor:
    """Mean over the completions' tokens, nats."""
    inputs, targets = shifted(rows)
    logps = token_logps(model, inputs, targets)
    return -logps.sum() / (targets != IGNORED).sum()


def token_logps(model: LlamaForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:  # (B, T)
    hidden = hidden_states(model, inputs)
    return stepkto.linear_logprobs(hidden, model.lm_head.weight, targets, ignore_index=IGNORED)


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    language: Language,
    problems: Sequence[Problem],
    number: int,
    seed: int,
    temperature: float = 1.0,
) -> list[list[Solution]]:
    """`number` judged solutions of each problem; temperature 0 is greedy.

    Problems whose prompts are as long are decoded in one batch: nothing is padding.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    prompts = [language.prompt(problem) for problem in problems]
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    found: list[list[Solution]] = [[] for _ in problems]
    generator = torch.Generator().manual_seed(seed)
    for _, places in sorted(by_length.items()):
        rows = [i for i in places for _ in range(number)]
        ids = torch.tensor([prompts[i] for i in rows])
        written = _decode(model, ids, language.longest, temperature, generator).tolist()
        for i, row in zip(rows, written, strict=True):
            end = row.index(language.eos) + 1 if language.eos in row else len(row)
            solution = tuple(row[:end])
            verdict = language.check(problems[i], solution)
            found[i].append(Solution(problems[i], tuple(prompts[i]), solution, verdict))
    return found


def _decode(
    model: LlamaForCausalLM,
    ids: Tensor,  # (B, prompt)
    longest: int,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:  # (B, longest)
    cache, written = None, []
    alive = torch.ones(len(ids), dtype=torch.bool)
    for _ in range(longest):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1]
        if temperature == 0:
            ids = logits.argmax(-1, keepdim=True)
        else:
            chances = torch.softmax(logits / temperature, -1)
            ids = torch.multinomial(chances, 1, generator=generator)
        ids = ids * alive[:, None]  # 0, the end of sequence, once it has ended
        alive &= ids[:, 0] != 0
        written.append(ids)
        if not alive.any():
            break
    return torch.cat(written, 1)


def train(
    model: LlamaForCausalLM,
    language: Language,
    method: Method,
    solutions: Sequence[Solution],
    rate: float,
    seed: int,
) -> dict[str, float]:
    """One round, in place: an epoch over the solutions, the model as it is being the reference.

    Returns:
        Means over the last quarter of the optimizer steps: the loss's metrics.
    """
    if method.loss is None:
        solutions = [s for s in solutions if s.verdict.correct]
    order = list(solutions)
    random.Random(f"{seed} order").shuffle(order)
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), weight_decay=0.0)
    if method.loss is None:
        for step, batch in enumerate(batches, start=1):
            loss = cross_entropy(model, [(s.prompt, s.ids) for s in batch])
            descend(model, optimizer, loss, rate * min(1.0, step / WARMUP))
        return {}
    config = stepkto.StepKTOConfig(**method.loss, **outcome_weights(method, solutions))
    needs_pairs = config.reference_point == "mismatched"
    prepared = [prepare(model, language, method, batch, needs_pairs) for batch in batches]
    totals = None
    for step, batch in enumerate(prepared, start=1):
        baseline = mismatched_baseline(model, batch, config) if needs_pairs else None
        hidden = hidden_states(model, batch.inputs)
        loss, metrics = stepkto.fused_linear_step_kto_loss(
            hidden,
            model.lm_head.weight,
            batch.targets,
            batch.segments,
            batch.ref_logps,
            baseline,
            config=config,
            ignore_index=IGNORED,
        )
        descend(model, optimizer, loss, rate * min(1.0, step / WARMUP))
        if step > 0.75 * len(prepared):
            totals = metrics if totals is None else totals + metrics
    return {} if totals is None else totals.compute()


def outcome_weights(method: Method, solutions: Sequence[Solution]) -> dict[str, float]:
    """Class weights of a round, their mean over the solutions 1.

    Without them the more frequent wrong answers push down what all solutions share.
    """
    if not method.outcome:
        return {"desirable_weight": 0.0, "undesirable_weight": 0.0}
    right = sum(s.verdict.correct for s in solutions)
    wrong = len(solutions) - right
    if not method.balance or not right or not wrong:
        return {}
    unit = len(solutions) / (1 + BALANCE)
    return {"desirable_weight": BALANCE * unit / right, "undesirable_weight": unit / wrong}


@dataclass(frozen=True)
class Batch:
    """A batch of a round, its reference log-probs, and those of its mismatched pairs."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    segments: stepkto.StepSegments
    ref_logps: Tensor  # (B, T) fp32
    pairs: tuple[Tensor, Tensor, stepkto.StepSegments, Tensor] | None


@torch.no_grad()
def prepare(
    model: LlamaForCausalLM,
    language: Language,
    method: Method,
    batch: Sequence[Solution],
    needs_pairs: bool,
) -> Batch:
    inputs, targets = shifted([(s.prompt, s.ids) for s in batch])
    ref_logps = token_logps(model, inputs, targets)
    pairs = None
    if needs_pairs and len(batch) > 1:
        others = [*batch[1:], batch[0]]
        mismatched = [(s.prompt, other.ids) for s, other in zip(batch, others, strict=True)]
        found = shifted(mismatched)
        segments = step_segments(language, method, mismatched, others, found[1])
        pairs = (*found, segments, token_logps(model, *found))
    rows = [(s.prompt, s.ids) for s in batch]
    return Batch(inputs, targets, step_segments(language, method, rows, batch, targets), ref_logps,
                 pairs)  # fmt: skip


def step_segments(
    language: Language,
    method: Method,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    solutions: Sequence[Solution],
    targets: Tensor,
) -> stepkto.StepSegments:
    """Steps are the lines before the answer; `solutions` have the labels of the rows' ends."""
    most = max(1, max(len(s.verdict.steps) for s in solutions))
    step_ids = torch.full_like(targets, -1)
    labels = torch.full((len(rows), most), -1, dtype=torch.int64)
    for i, ((prompt, ids), solution) in enumerate(zip(rows, solutions, strict=True)):
        at = len(prompt) - 1
        for k, line in enumerate(language.split(ids)[0]):
            step_ids[i, at : at + len(line)] = k
            at += len(line)
        known = kept_labels(method, solution.verdict.steps)
        labels[i, : len(known)] = torch.tensor(known, dtype=torch.int64)
    outcomes = torch.tensor([int(s.verdict.correct) for s in solutions])
    return stepkto.StepSegments.from_padded(step_ids, targets != IGNORED, outcomes, labels)


def kept_labels(method: Method, steps: Sequence[bool]) -> list[int]:
    if method.labels == "up to error" and False in steps:
        return [int(right) for right in steps[: list(steps).index(False) + 1]]
    return [int(right) for right in steps]


@torch.no_grad()
def mismatched_baseline(
    model: LlamaForCausalLM, batch: Batch, config: stepkto.StepKTOConfig
) -> KLBaseline | None:
    if batch.pairs is None:
        return KLBaseline(torch.zeros(()), torch.zeros(()))
    inputs, targets, segments, ref_logps = batch.pairs
    return stepkto.kl_baseline(
        token_logps(model, inputs, targets), ref_logps, segments, config=config
    )
