"""SIGKILL at random moments of training and of the rounds."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

from faulty.processes import Count, kill_until_done, succeed
from stepkto_kernels.training import checkpoints
from stepkto_kernels.training.records import Problem
from stepkto_kernels.training.rewards import arithmetic
from stepkto_kernels.training.run_folder import write_rows
from stepkto_kernels.training.tiny import make_data, make_model

STEPS = 6
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
# the last two need the reference model's file, and the running reference points
KINDS = {
    "mismatched": [],
    "cached reference": ["--reference-point", "zero", "--precompute-ref-log-probs"],
    "running reference points": ["--reference-point", "ema", "--gradient-accumulation-steps", "2"],
}


def make_inputs(folder: Path) -> Path:
    """A model, data for it, problems, and a model that writes solutions of them."""
    make_model(folder / "model")
    make_data(folder / "data.jsonl", 32)
    draw = random.Random(0)
    for name, number in (("train", 8), ("test", 4)):
        problems = [arithmetic.make_problem(draw) for _ in range(number)]
        rows = [
            asdict(Problem(f"{name} {i}", each.text.strip(), str(each.answer)))
            for i, each in enumerate(problems)
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    make_data(folder / "sft.jsonl", 500)
    words = ["train", "--method", "sft", "--model", str(folder / "model"), "--use-cpu"]
    words += ["--data", str(folder / "sft.jsonl"), "--output", str(folder / "m0")]
    words += ["--max-steps", "100", "--learning-rate", "6e-3", "--save-strategy", "no"]
    succeed([*words, "--per-device-train-batch-size", "16", "--logging-steps", "100"])
    return folder


def train_words(inputs: Path, output: Path, *more: str) -> list[str]:
    """`stepkto train`, a checkpoint at every step."""
    words = ["train", "--model", str(inputs / "model"), "--data", str(inputs / "data.jsonl")]
    words += ["--output", str(output), "--use-cpu", "--max-steps", str(STEPS), "--save-steps", "1"]
    words += ["--per-device-train-batch-size", "4", "--learning-rate", "1e-3"]
    return [*words, "--logging-steps", "1", "--resume", "auto", *more]


def trained(folder: Path, whole: Path) -> str | None:
    """What of a trained model is not as in `whole`: weights, optimizer, log."""
    for name in ("model.safetensors", f"checkpoint-{STEPS}/optimizer.pt"):
        if (folder / name).read_bytes() != (whole / name).read_bytes():
            return f"{name} differs"
    if log(folder) != log(whole):
        return f"the log differs: {log(folder)} and {log(whole)}"
    return None


def log(folder: Path) -> list[dict]:
    """The log's lines, without what the clock decides."""
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    # the mean loss of the last start is transformers' own business, and starts at 0
    mine = [line for line in lines if "train_runtime" not in line]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in mine]


def kill_training(inputs: Path, folder: Path, kills: int, seed: int = 0) -> Count:
    """Every kind in turn; notes how many kills left a checkpoint half-written."""
    count = Count(notes={"in saving": 0})
    for i, (kind, more) in enumerate(KINDS.items()):
        share = kills // len(KINDS) + (i < kills % len(KINDS))
        if share == 0:
            continue
        whole, limit = folder / f"{i}_whole", ["--save-total-limit", "2"]
        longest = succeed(train_words(inputs, whole, *more, *limit)).seconds
        seen: set[tuple[Path, int]] = set()

        def look(run: Path, seen: set = seen) -> None:
            for path in run.glob("checkpoint-*"):
                if checkpoints.flaw(path) is not None:
                    found = (path, path.stat().st_mtime_ns)
                    count.notes["in saving"] += found not in seen
                    seen.add(found)

        kill_until_done(
            count,
            share,
            lambda run, more=more, limit=limit: train_words(inputs, run, *more, *limit),
            lambda n, i=i: folder / f"{i}_{n}",
            lambda run, whole=whole: trained(run, whole),
            random.Random(f"{seed} {kind}"),
            longest,
            look,
        )
    return count


def iterate_words(inputs: Path, output: Path) -> list[str]:
    """`stepkto iterate`, two rounds."""
    config = inputs / "iterate.yaml"
    config.write_text(
        f"""
model: {inputs / "m0"}
problems: {inputs / "train.jsonl"}
eval_problems: {inputs / "test.jsonl"}
rounds: 2
num_samples: 4
eval_num_samples: 2
max_new_tokens: 48
chunk: 2
resamples: 100
rewards: {{outcome: exact, process: arithmetic}}
training: {{use_cpu: true, per_device_train_batch_size: 4, learning_rate: 1e-4, max_steps: 4,
  save_steps: 1, logging_steps: 1, disable_tqdm: true}}
"""
    )
    return ["iterate", "--config", str(config), "--output", str(output)]


def same_run(folder: Path, whole: Path) -> str | None:
    """What of a run of rounds is not as in `whole`, to the byte, rows counted too."""
    for path in sorted(whole.rglob("*")):
        name = path.relative_to(whole)
        if path.suffix in (".json", ".jsonl", ".safetensors") and path.name != "trainer_state.json":
            if not (folder / name).is_file() or (folder / name).read_bytes() != path.read_bytes():
                return f"{name} differs"
        if path.name in ("samples.jsonl", "labelled.jsonl"):
            rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
            keys = {(row["problem_id"], row["sample"]) for row in rows}
            if len(rows) != 32 or len(keys) != 32:
                return f"{name} has {len(keys)} samples in {len(rows)} rows"
    left = list(folder.rglob("*.part"))
    return f"{left[0].name} is left" if left else None


def kill_rounds(inputs: Path, folder: Path, kills: int, seed: int = 0) -> Count:
    count, whole = Count(notes={"in saving": 0}), folder / "whole"
    longest = succeed(iterate_words(inputs, whole)).seconds

    def look(run: Path) -> None:  # something stands under its temporary name
        count.notes["in saving"] += bool(list(run.glob("round_*/*.part")))

    kill_until_done(
        count,
        kills,
        lambda run: iterate_words(inputs, run),
        lambda n: folder / f"run_{n}",
        lambda run: same_run(run, whole),
        random.Random(f"{seed} rounds"),
        longest,
        look,
    )
    return count
