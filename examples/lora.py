"""Step-KTO on a LoRA adapter: the reference is the model with its adapter switched off.

    python examples/lora.py --model MODEL --data solutions.jsonl --output adapter

The head is frozen, so it costs 2 units of its GEMM in place of 3 or 4. With --targets lm_head it
has an adapter too. Without --model and --data a tiny model and its data are made here.
"""

import argparse
from pathlib import Path

from peft import LoraConfig

from stepkto_kernels.training import StepKTOArguments, StepKTOTrainer
from stepkto_kernels.training.tiny import make_data, make_model


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="folder or hub name")
    parser.add_argument("--data", type=Path, help="JSON lines")
    parser.add_argument("--output", type=Path, default=Path("out/lora"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    trainer = StepKTOTrainer(
        args.model or str(make_model(args.output / "start")),
        args=StepKTOArguments(
            output_dir=str(args.output),
            max_steps=args.steps,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=args.data or make_data(args.output / "data.jsonl"),
        peft_config=LoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules=args.targets,
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
