"""Time one KTO step end to end on the CPU, to hold against stepkto_kernels/scaling.py.

python benchmarks/step.py    # writes benchmarks/results/step_cpu.json; some three minutes

A Llama-style model of 4 layers, H = 512, V = 128256, random, fp32: reference, both KL passes, the
fused loss, both backward passes, no optimizer. Bare GEMMs of the head are timed in turns with the
steps, on the tokens that are scored. On one thread and by its processor time, so that a machine
that does other things beside it gives nearly the same. `python benchmarks/scaling.py` then writes
the page.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed

from stepkto_kernels import (  # noqa: E402
    StepKTOConfig,
    StepSegments,
    fused_linear_step_kto_loss,
    kl_baseline,
    linear_logprobs,
)
from stepkto_kernels.bench.environment import environment  # noqa: E402
from stepkto_kernels.bench.problems import Shape, head_problem  # noqa: E402
from stepkto_kernels.bench.suites import GEMM_UNITS, BareGemm  # noqa: E402

RESULT = ROOT / "benchmarks/results/step_cpu.json"
SHAPE = {"hidden": 512, "vocabulary": 128256, "layers": 4, "intermediate": 1376, "heads": 8}
SEQUENCES, PROMPT, COMPLETION = 8, 80, 192
CONFIG = StepKTOConfig(step_weight=0.0)


def make_model(seed: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=SHAPE["hidden"],
            vocab_size=SHAPE["vocabulary"],
            num_hidden_layers=SHAPE["layers"],
            intermediate_size=SHAPE["intermediate"],
            num_attention_heads=SHAPE["heads"],
        )
    )


def make_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, StepSegments]:
    """Tokens (B, T), targets (B, T) of the completions only, and their segments."""
    generator = torch.Generator().manual_seed(seed)
    size = SEQUENCES, PROMPT + COMPLETION + 1
    tokens = torch.randint(SHAPE["vocabulary"], size, generator=generator)
    target = tokens[:, 1:].clone()
    completion = torch.ones_like(target)
    target[:, :PROMPT], completion[:, :PROMPT] = -100, 0
    labels = torch.arange(SEQUENCES) % 2
    nowhere = torch.full_like(target, -1)
    no_steps = torch.full((SEQUENCES, 1), -1)
    return tokens[:, :-1], target, StepSegments.from_padded(nowhere, completion, labels, no_steps)


def scores(model, batch, clock: dict[str, float]) -> torch.Tensor:  # (B, T) log-probs
    tokens, target, _ = batch
    with torch.no_grad():
        begin = time.process_time()
        hidden = model.model(tokens).last_hidden_state
        clock["backbone"] += time.process_time() - begin
        return linear_logprobs(hidden, model.lm_head.weight, target)


def step(policy, reference, batch, pairs) -> tuple[float, float]:
    """Seconds of all, and of the backbones' forward and backward passes."""
    clock = {"backbone": 0.0}
    policy.zero_grad()
    begin = time.process_time()
    ref_logps = scores(reference, batch, clock)
    kl = kl_baseline(scores(policy, pairs, clock), scores(reference, pairs, clock), pairs[2])
    tokens, target, segments = batch
    forward = time.process_time()
    hidden = policy.model(tokens).last_hidden_state
    clock["backbone"] += time.process_time() - forward
    leaf = hidden.detach().requires_grad_()
    loss, _ = fused_linear_step_kto_loss(
        leaf, policy.lm_head.weight, target, segments, ref_logps, kl, config=CONFIG
    )
    loss.backward()
    backward = time.process_time()
    hidden.backward(leaf.grad)
    end = time.process_time()
    return end - begin, clock["backbone"] + end - backward


def main() -> int:
    parser = argparse.ArgumentParser(description="time one KTO step end to end on the CPU")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy, reference = make_model(0), make_model(1)
    batch, pairs = make_batch(0), make_batch(1)
    shape = Shape(SEQUENCES * COMPLETION, SHAPE["hidden"], SHAPE["vocabulary"])
    gemm = BareGemm(head_problem(shape, torch.float32, "cpu"))
    gemm.run()
    step(policy, reference, batch, pairs)  # warm
    steps, units = [], []
    for _ in range(args.repeats):
        begin = time.process_time()
        gemm.run()
        units.append((time.process_time() - begin) / GEMM_UNITS)
        steps.append(step(policy, reference, batch, pairs))
        print(f"unit {units[-1]:.2f} s, step {steps[-1][0]:.2f} s, backbone {steps[-1][1]:.2f} s")
    best = min(steps)
    result = {
        **environment("cpu", "python benchmarks/step.py"),
        **SHAPE,
        "sequences": SEQUENCES,
        "prompt": PROMPT,
        "completion": COMPLETION,
        "repeats": args.repeats,
        "unit_s": round(min(units), 4),
        "step_s": round(best[0], 3),
        "backbone_s": round(best[1], 3),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
