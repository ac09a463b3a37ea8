"""Whole optimizer steps of StepKTOTrainer beside TRL's KTOTrainer: seconds and peak memory.

    python benchmarks/trainer.py

Every contender trains the same Llama-style model (tied embeddings, fp32, AdamW) on the same
sequences, in a process of its own; they take turns, `--rounds` times. A step is what passes from
the end of one optimizer step to the end of the next, the first one not counted, and the memory is
the process's resident peak, Python and torch included. The TRL contenders need `pip install trl`.
The outcome loss of the first step is compared before anything is written: they do the same work.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CONTENDERS = {
    "trl": "TRL KTOTrainer",
    "trl-cached": "TRL KTOTrainer, reference log-probs cached",
    "ours": "StepKTOTrainer",
    "ours-cached-zero": "StepKTOTrainer, reference log-probs cached, z = 0",
    "ours-cached-matched": "StepKTOTrainer, reference log-probs cached, z matched",
}
OURS = {
    "ours": {},
    "ours-cached-zero": {"precompute_ref_log_probs": True, "reference_point": "zero"},
    "ours-cached-matched": {"precompute_ref_log_probs": True, "reference_point": "matched"},
}
LOSS_TOLERANCE = 1e-4  # of the first step, where policy and reference agree and z is 0 for all
ANSWER = "result: "  # begins the line that a contender's process answers with


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=512)
    add("--vocabulary", type=int, default=128256)
    add("--batch", type=int, default=8, help="sequences a step")
    add("--prompt", type=int, default=80, help="tokens of a prompt")
    add("--completion", type=int, default=192, help="tokens of a completion, EOS included")
    add("--steps", type=int, default=2, help="timed optimizer steps of a process")
    add("--rounds", type=int, default=2, help="turns of every contender")
    add("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    add("--output", type=Path, default=ROOT / "benchmarks/results/trainer_cpu.json")
    add("--run", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    return parser.parse_args()


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """KTO rows of exactly as many tokens as asked for; right and wrong ones in turn."""
    import random

    draw = random.Random(0)
    words = lambda n: " ".join(f"w{draw.randrange(args.vocabulary - 3)}" for _ in range(n))
    return [
        {
            "prompt": words(args.prompt),
            # both trainers join the two texts, and words are split on spaces
            "completion": " " + words(args.completion - 1),
            "label": i % 2 == 0,
        }
        for i in range(args.batch * (args.steps + 1))
    ]


def make_model(args: argparse.Namespace, folder: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden // 64, 1),
        num_key_value_heads=max(args.hidden // 128, 1),
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    # saved and loaded, as TRL loads its reference from where the model came from
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def make_tokenizer(args: argparse.Namespace) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(args.vocabulary - 3))]
    vocabulary = {name: i for i, name in enumerate(names)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One contender, in this process."""
    import transformers

    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *unused: Any, **named: Any) -> None:
            ends.append(time.perf_counter())

    length = args.prompt + args.completion
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "per_device_train_batch_size": args.batch,
            "max_steps": args.steps + 1,
            "max_length": length,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        model = make_model(args, folder)
        given = {"processing_class": make_tokenizer(args), "callbacks": [Clock()]}
        if args.run in OURS:
            from stepkto_kernels.training import StepKTOArguments, StepKTOTrainer

            options = StepKTOArguments(**common, **OURS[args.run])
            trainer = StepKTOTrainer(model, args=options, train_dataset=rows(args), **given)
        else:
            from datasets import Dataset
            from trl import KTOConfig, KTOTrainer

            options = KTOConfig(**common, precompute_ref_log_probs=args.run == "trl-cached")
            dataset = Dataset.from_list(rows(args))
            trainer = KTOTrainer(model, args=options, train_dataset=dataset, **given)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"step_seconds": steps, "peak_mib": peak, "first_loss": losses[0]}


def in_fresh_process(args: argparse.Namespace, name: str) -> dict[str, Any]:
    words = [sys.executable, __file__, "--run", name]
    for option in ("layers", "hidden", "vocabulary", "batch", "prompt", "completion", "steps"):
        words += [f"--{option}", str(getattr(args, option))]
    done = subprocess.run(words, capture_output=True, text=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if done.returncode or not answers:
        raise SystemExit(f"{CONTENDERS[name]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(answers[-1].removeprefix(ANSWER))


def main() -> None:
    args = parse_args()
    if args.run:
        print(ANSWER + json.dumps(run(args)), flush=True)
        return
    from stepkto_kernels.bench.environment import environment

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.contenders}
    for turn in range(args.rounds):
        for name in args.contenders:
            result = in_fresh_process(args, name)
            found[name].append(result)
            seconds = ", ".join(f"{s:.2f}" for s in result["step_seconds"])
            text = f"{CONTENDERS[name]}: {seconds} s a step, {result['peak_mib']:.0f} MiB"
            print(f"round {turn + 1}: {text}, first loss {result['first_loss']:.6f}", flush=True)
    losses = [result["first_loss"] for results in found.values() for result in results]
    if max(losses) - min(losses) > LOSS_TOLERANCE:
        raise SystemExit(f"the contenders do not do the same: first losses {losses}")
    words = ["python", "benchmarks/trainer.py", *sys.argv[1:]]
    result = {
        "benchmark": "trainer",
        **environment("cpu", shlex.join(words)),
        "model": {k: getattr(args, k) for k in ("layers", "hidden", "vocabulary")},
        "batch": {k: getattr(args, k) for k in ("batch", "prompt", "completion")},
        "rows": [summary(name, results) for name, results in found.items()],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.output}")


def summary(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [s for result in results for s in result["step_seconds"]]
    return {
        "name": name,
        "who": CONTENDERS[name],
        "step_seconds_best": round(min(steps), 3),
        "step_seconds_median": round(statistics.median(steps), 3),
        "steps": len(steps),
        "peak_mib": round(max(result["peak_mib"] for result in results)),
        "first_loss": results[0]["first_loss"],
    }


if __name__ == "__main__":
    main()
