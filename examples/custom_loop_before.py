"""A training loop of one's own, every logit in memory. custom_loop.py is the same on the kernels.

diff examples/custom_loop_before.py examples/custom_loop.py
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stepkto_kernels import StepKTOConfig, StepSegments, step_kto_loss
from stepkto_kernels.training.collator import StepKTOCollator
from stepkto_kernels.training.data import encode_example, read_examples
from stepkto_kernels.training.tiny import make_data, make_model


def log_probs(model, ids):
    target = ids[:, 1:]
    logits = model(ids).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(-1, target[..., None])[..., 0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, help="folder; default: a tiny model, made here")
    parser.add_argument("--data", type=Path, help="JSON lines; default: made here")
    parser.add_argument("--output", type=Path, default=Path("out/custom_loop"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    folder = args.model or make_model(args.output / "start")
    data = args.data or make_data(args.output / "data.jsonl")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    examples = [encode_example(row, tokenizer) for row in read_examples(data)]
    collate = StepKTOCollator(tokenizer.pad_token_id)
    config = StepKTOConfig(reference_point="zero")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)

    for step in range(args.steps):
        start = step * args.batch_size % len(examples)
        batch = collate(examples[start : start + args.batch_size])
        segments = StepSegments.from_padded(
            batch["step_ids"][:, 1:],
            batch["completion_mask"][:, 1:],
            batch["outcome_label"],
            batch["step_labels"],
        )
        with torch.no_grad():
            ref_logps = log_probs(reference, batch["input_ids"])
        logps = log_probs(policy, batch["input_ids"])
        loss, metrics = step_kto_loss(logps, ref_logps, segments, config=config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.6f}")
    policy.save_pretrained(args.output)


if __name__ == "__main__":
    main()
