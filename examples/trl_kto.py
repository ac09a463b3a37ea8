"""TRL's KTOTrainer on the head of stepkto_kernels: one line around an ordinary TRL script.

    python examples/trl_kto.py --model MODEL --data rows.jsonl --output trained

--data has TRL's unpaired rows, one JSON object a line: `prompt`, `completion`, `label` (true or
false). Without --model a tiny model is made here, and without --data the sums of two digits, so
that the script runs without a download. --trl-head trains on TRL's own head, for comparison.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import KTOConfig, KTOTrainer

from stepkto_kernels.integrations.trl import use_stepkto_head


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    # TRL loads the reference model from where the policy came
    model_dir = args.model or make_model(args.output / "start")
    trainer = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        train_dataset=read_rows(args.data) if args.data else make_rows(),
        args=KTOConfig(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
    )
    if args.trl_head:
        trainer.train()
    else:
        with use_stepkto_head(memory_budget=args.memory_budget):
            trainer.train()
    trainer.save_model()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or hub name; None: a tiny one, made here")
    add("--data", type=Path, help="JSON-lines file; None: sums of digits, made here")
    add("--output", type=Path, default=Path("out/trl_kto"), help="folder for the trained model")
    add("--steps", type=int, default=25, help="optimizer steps")
    add("--batch-size", type=int, default=8)
    add("--learning-rate", type=float, default=3e-3, help="suits the tiny model")
    add("--memory-budget", type=int, help="bytes kept for the backward pass; None: recompute")
    add("--trl-head", action="store_true", help="train on TRL's own head")
    return parser.parse_args()


def read_rows(path: Path) -> Dataset:
    return load_dataset("json", data_files=str(path), split="train")


def make_rows() -> Dataset:
    """All sums of two digits, each with its answer, and with one that begins as it should not."""
    rows = []
    for a in range(10):
        for b in range(10):
            prompt, answer = f"{a} + {b} =", " ".join(str(a + b))
            rows.append({"prompt": prompt, "completion": f" {answer}", "label": True})
            rows.append({"prompt": prompt, "completion": f" = {answer}", "label": False})
    return Dataset.from_list(rows)


def make_model(folder: Path) -> Path:
    """A Llama of two layers and a tokenizer that knows digits, untrained."""
    words = ["<pad>", "<eos>", "<unk>", "+", "=", *map(str, range(10))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
