"""Step-KTO with parameters, gradients and optimizer state sharded over processes (FSDP2).

    accelerate launch --config_file examples/fsdp2.yaml examples/fsdp2.py --model MODEL --data FILE

The head runs inside the model's own forward pass, where FSDP2 has gathered its weight and from
where it reduces its gradient: nothing calls full_tensor(). Without --model and --data a tiny model
and its data are made here. accelerate has no FSDP on a CPU: there the same script trains with data
parallelism, the parameters whole on every process:

    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import argparse
from pathlib import Path

from stepkto_kernels.training import StepKTOArguments, StepKTOTrainer
from stepkto_kernels.training.tiny import make_data, make_model


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="folder or hub name")
    parser.add_argument("--data", type=Path, help="JSON lines")
    parser.add_argument("--output", type=Path, default=Path("out/fsdp2"))
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    options = StepKTOArguments(
        output_dir=str(args.output),
        per_device_train_batch_size=4,
        max_steps=args.steps,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    model, data = args.model or args.output / "start", args.data or args.output / "data.jsonl"
    with options.main_process_first(local=False):  # the others find what it has made
        args.output.mkdir(parents=True, exist_ok=True)
        if args.model is None and not (model / "config.json").exists():
            make_model(model)
        if args.data is None and not data.exists():
            make_data(data)

    trainer = StepKTOTrainer(str(model), args=options, train_dataset=data)
    trainer.train()
    trainer.save_model(str(args.output / "trained"))


if __name__ == "__main__":
    main()
