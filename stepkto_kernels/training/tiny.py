"""A tiny model and labelled solutions, made here: for trying things out without a download."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stepkto_kernels.training.data import StepKTOExample, write_jsonl
from stepkto_kernels.training.rewards import arithmetic


def make_model(folder: Path, seed: int = 0) -> Path:
    """Write an untrained Llama of 88 thousand parameters and the tokenizer of its arithmetic."""
    tokenizer = arithmetic.build_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(path: Path, examples: int = 64, seed: int = 0) -> Path:
    """Write solutions of a sloppy annotator in the data format, every step and answer judged."""
    annotator = arithmetic.SloppyAnnotator(random.Random(f"{seed} annotator"))
    draw = random.Random(f"{seed} problems")
    rows = []
    for _ in range(examples):
        problem = arithmetic.make_problem(draw)
        text = annotator.solve(problem, draw)
        steps, answer = arithmetic.split_lines(text)
        labels = arithmetic.check_steps(problem, text)
        rows.append(
            StepKTOExample(
                prompt=problem.text,
                completions=(*steps, answer) if answer else tuple(steps),
                labels=(*labels, None) if answer else tuple(labels),
                label=arithmetic.check_outcome(problem, text),
            )
        )
    write_jsonl(path, rows)
    return path
