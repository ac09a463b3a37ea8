"""Step-KTO without padding: a batch is one row, and every sequence attends to itself alone.

    python examples/packing.py --model MODEL --data solutions.jsonl --output trained

With attn_implementation flash_attention_2 the row goes through its variable-length kernels, with
sdpa through a block-diagonal mask. Without --model and --data a tiny model and its data are made
here; their lengths are even, so the share of padding that is saved is small.
"""

import argparse
from pathlib import Path

from stepkto_kernels.training import StepKTOArguments, StepKTOTrainer
from stepkto_kernels.training.tiny import make_data, make_model


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="folder or hub name")
    parser.add_argument("--data", type=Path, help="JSON lines")
    parser.add_argument("--output", type=Path, default=Path("out/packing"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--attention", default="sdpa", help="flash_attention_2 on a GPU that has it"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    trainer = StepKTOTrainer(
        args.model or str(make_model(args.output / "start")),
        args=StepKTOArguments(
            output_dir=str(args.output),
            padding_free=True,
            model_init_kwargs={"attn_implementation": args.attention},
            max_steps=args.steps,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=args.data or make_data(args.output / "data.jsonl"),
    )
    examples = trainer.train_dataset.examples
    tokens = sum(len(example.input_ids) for example in examples)
    longest = max(len(example.input_ids) for example in examples)
    share = 1 - tokens / (longest * len(examples))
    print(
        f"{tokens} tokens; padded to the longest, {100 * share:.0f} % of a batch would be padding"
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
