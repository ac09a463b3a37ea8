"""Step-KTO from nothing to a better model in two or three minutes on two CPU cores.

A sloppy annotator writes solutions of arithmetic word problems. A small transformers model learns
from them, from scratch, and takes over the mistakes (M0). Then, round by round, the model solves
fresh problems, exact checkers label every answer and every step, and Step-KTO trains the next model
on that (M1, M2). Each model is evaluated on problems of its own: how many answers are right, and
how many of the solutions with a right answer have a wrong step in them.

    python examples/demo.py --output out/demo

leaves there table.md, rounds.png, results.json, samples.txt (solutions before and after, step by
step), and for each round the data (round_1.jsonl) and the model's folder with its training curves
(M1/curves.png).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from stepkto_kernels.training import evaluate, report
from stepkto_kernels.training.rewards import arithmetic
from stepkto_kernels.training.rewards.arithmetic import Problem
from stepkto_kernels.training.sampling import generate

QUICK = {"problems": 8, "eval_problems": 8, "samples": 2, "sft_steps": 4, "batch_size": 8}
MAX_NEW_TOKENS = 44  # 5 steps of 7 tokens, answer and end are 38
DECODE_BATCH = 400  # sequences; 100 to 800 take the same time here, more take longer
ERRORS = "step_errors_in_correct"

START = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", flush=True)


def main() -> None:
    args = parse_args()
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    if not args.trainer.is_file():
        raise SystemExit(f"--trainer: want the training script, got {args.trainer}: no such file")
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the training script
    transformers_logging.disable_progress_bar()
    tokenizer = arithmetic.build_tokenizer()
    held_out = make_problems(args.eval_problems, f"{args.seed} held out")
    k = args.samples

    model = train_first_model(tokenizer, args.sft_steps, args.seed)
    model_dir = save(model, tokenizer, output / "M0")
    evaluations = {"M0": evaluate_model("M0", model, tokenizer, held_out, k, args.seed)}

    for round_number in range(1, args.rounds + 1):
        name = f"M{round_number}"
        data = output / f"round_{round_number}.jsonl"
        problems = make_problems(args.problems, f"{args.seed} round {round_number}")
        weights = write_round_data(data, model, tokenizer, problems, k, args.seed + round_number)
        model_dir = train_step_kto(
            args.trainer,
            model=model_dir,
            data=data,
            output=output / name,
            learning_rate=args.learning_rate,
            batch_size=args.batch_size,
            micro_batch_size=args.batch_size,
            epochs=1,
            warmup_steps=10,
            beta=0.1,
            step_weight=args.step_weight,
            **weights,
            seed=args.seed + round_number,
            max_grad_norm=1.0,
            logging_steps=1,
            save_steps=0,  # a round is too short for checkpoints
        )
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        evaluations[name] = evaluate_model(name, model, tokenizer, held_out, k, args.seed)

    write_report(output, args, held_out, evaluations)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="folder for results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=400, help="training problems a round")
    parser.add_argument("--eval-problems", type=int, default=400, help="held-out problems")
    parser.add_argument("--samples", type=int, default=8, help="solutions sampled of each problem")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sft-steps", type=int, default=600, help="steps of the first model")
    parser.add_argument("--learning-rate", type=float, default=6e-5, help="of Step-KTO")
    parser.add_argument("--batch-size", type=int, default=64, help="of Step-KTO, in solutions")
    parser.add_argument("--step-weight", type=float, default=3.0, help="0 is plain KTO")
    parser.add_argument(
        "--trainer",
        type=Path,
        default=Path(__file__).with_name("train_step_kto.py"),
        help="script that trains a round",
    )
    # Matrices this small gain little by more, and lose a lot where other programs want the cores.
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--quick", action="store_true", help=f"a tiny run, for tests: {QUICK}")
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args()
    for name in ("problems", "eval_problems", "samples", "sft_steps", "batch_size", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: want >= 1, got {getattr(args, name)}")
    if args.rounds < 0:
        parser.error(f"--rounds: want >= 0, got {args.rounds}")
    return args


def make_problems(number: int, stream: str) -> list[Problem]:
    """Problems of a random stream of their own: each name gives other problems."""
    rng = random.Random(stream)
    return [arithmetic.make_problem(rng) for _ in range(number)]


# The first model: supervised training on the annotator's solutions


def new_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama of 97k parameters. With small initial weights or tied embeddings it learns slowly."""
    return LlamaForCausalLM(
        LlamaConfig(
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
    )


def train_first_model(
    tokenizer: PreTrainedTokenizerBase, steps: int, seed: int
) -> LlamaForCausalLM:
    batch_size, peak, warmup = 32, 4e-3, 50
    torch.manual_seed(seed)
    model = new_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    annotator = arithmetic.SloppyAnnotator(random.Random(f"{seed} annotator"))
    rng = random.Random(f"{seed} first model")
    parameters = sum(p.numel() for p in model.parameters())
    say(f"M0: a model of {parameters:,} parameters learns from {steps * batch_size:,} solutions")
    for step in range(1, steps + 1):
        problems = [arithmetic.make_problem(rng) for _ in range(batch_size)]
        solutions = [annotator.solve(problem, rng) for problem in problems]
        loss = completion_loss(model, tokenizer, [p.text for p in problems], solutions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, step / warmup) * (0.05 + 0.95 * cosine)
        optimizer.step()
        optimizer.zero_grad()
        if step % 150 == 0 or step == steps:
            say(f"M0: step {step}, loss {loss.item():.3f} nats a token")
    return model


def completion_loss(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    completions: list[str],
) -> torch.Tensor:
    """Mean cross-entropy of the completions' tokens and the end of sequence, given the prompts."""
    prompt_ids = tokenizer(prompts)["input_ids"]
    completion_ids = [ids + [tokenizer.eos_token_id] for ids in tokenizer(completions)["input_ids"]]
    rows = [p + c for p, c in zip(prompt_ids, completion_ids, strict=True)]
    width = max(map(len, rows))
    # Padded on the right, where no token of a causal model looks: no attention mask needed.
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    position = torch.arange(1, width)
    starts = torch.tensor([[len(p)] for p in prompt_ids])
    ends = torch.tensor([[len(row)] for row in rows])
    scored = (starts <= position) & (position < ends)  # (B, T - 1), by the token predicted
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    return cross_entropy(model.lm_head(hidden[scored]), ids[:, 1:][scored])


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# A round: sample, label, train


def write_round_data(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    num_samples: int,
    seed: int,
) -> dict[str, float]:
    """Sample solutions, label them into a JSON-lines file, and give the outcome's class weights."""
    solutions = sample(model, tokenizer, problems, num_samples, 1.0, seed)
    rows = [
        labelled_row(problem, text)
        for problem, texts in zip(problems, solutions, strict=True)
        for text in texts
        if text  # nothing written, nothing to score
    ]
    if not rows:
        raise SystemExit(f"{path}: the model wrote only empty solutions; more --sft-steps may help")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    right = sum(row["label"] for row in rows)
    steps = [label for row in rows for label in row["labels"] if label is not None]
    say(
        f"{path.name}: {len(rows)} solutions of {len(problems)} problems, "
        f"{right} right answers, {sum(steps)} of {len(steps)} steps right"
    )
    return class_weights(right, len(rows) - right)


def labelled_row(problem: Problem, text: str) -> dict[str, Any]:
    """A training example; the strings of `completions` joined by nothing are the solution."""
    steps, answer_line = arithmetic.split_lines(text)
    labels: list[bool | None] = list(arithmetic.check_steps(problem, text))
    if answer_line:  # the outcome judges it, it is no step
        steps.append(answer_line)
        labels.append(None)
    outcome = arithmetic.check_outcome(problem, text)
    return {"prompt": problem.text, "completions": steps, "labels": labels, "label": outcome}


def class_weights(desirable: int, undesirable: int, ratio: float = 1.33) -> dict[str, float]:
    """Weights with desirable_weight * desirable = ratio * undesirable_weight * undesirable.

    Their mean over the examples is 1. Without them the more frequent wrong answers of a weak model
    push down what all solutions share, and the model forgets how to write one.
    """
    if not desirable or not undesirable:
        return {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    unit = (desirable + undesirable) / (1 + ratio)
    return {
        "desirable_weight": round(ratio * unit / desirable, 4),
        "undesirable_weight": round(unit / undesirable, 4),
    }


def train_step_kto(trainer: Path, **options: Any) -> Path:
    """Run the training script as a command, its output in a log file beside the model folder."""
    model_dir: Path = options["output"]
    command = [sys.executable, str(trainer)]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    log_path = model_dir.with_suffix(".log")
    say(f"{model_dir.name}: training, see {log_path}")
    with log_path.open("w", encoding="utf-8") as log:
        log.write(" ".join(command) + "\n")
        log.flush()
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code != 0:
        tail = "\n".join(log_path.read_text(encoding="utf-8").splitlines()[-20:])
        raise SystemExit(f"the training of {model_dir.name} failed with code {code}:\n{tail}")
    return model_dir


# Evaluation


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    number: int,
    temperature: float,
    seed: int,
) -> list[list[str]]:
    return generate(
        model,
        tokenizer,
        [problem.text for problem in problems],
        num_samples=number,
        temperature=temperature,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=DECODE_BATCH,
        seed=seed,
    )


def judge(problem: Problem, text: str) -> evaluate.Verdict:
    steps = arithmetic.check_steps(problem, text)
    return evaluate.Verdict(
        correct=arithmetic.check_outcome(problem, text),
        answer=arithmetic.extract_answer(text),
        steps=tuple(steps),
        missing_steps=max(0, len(problem.operations) - len(steps)),
    )


def evaluate_model(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    num_samples: int,
    seed: int,
) -> evaluate.Evaluation:
    result = evaluate.evaluate(
        problems,
        lambda ps, number, temperature: sample(model, tokenizer, ps, number, temperature, seed),
        judge,
        num_samples=num_samples,
    )
    metrics = result.metrics()
    say(
        f"{name}: Pass@1 {report.percent(metrics['pass@1'])} %, step errors in correct solutions "
        f"{report.percent(metrics[ERRORS])} %, answered {report.percent(metrics['answered'])} %"
    )
    return result


# What is left behind


def write_report(
    output: Path,
    args: argparse.Namespace,
    problems: list[Problem],
    evaluations: dict[str, evaluate.Evaluation],
) -> None:
    rounds = {name: evaluation.metrics() for name, evaluation in evaluations.items()}
    columns = {
        "pass@1": "Pass@1",
        f"maj@{args.samples}": f"Maj@{args.samples}",
        ERRORS: "step errors in correct solutions",
        f"{ERRORS}_greedy": "the same, greedy",
        "step_accuracy": "steps right",
    }
    table = report.markdown_table(
        ["%", *columns.values()],
        [[name, *(report.percent(m[key]) for key in columns)] for name, m in rounds.items()],
    )
    (output / "table.md").write_text(table, encoding="utf-8")
    report.plot_rounds(
        rounds,
        output / "rounds.png",
        series={key: columns[key] for key in ("pass@1", ERRORS)},
        title="Step-KTO by round",
    )
    (output / "samples.txt").write_text(before_and_after(problems, evaluations), encoding="utf-8")
    results = {
        "settings": {name: v for name, v in vars(args).items() if not isinstance(v, Path)},
        "rounds": {
            name: {key: None if math.isnan(v) else round(v, 6) for key, v in metrics.items()}
            for name, metrics in rounds.items()
        },
        "seconds": round(time.perf_counter() - START, 1),
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    say(f"done; table, plots and solutions are in {output}")
    print(f"\n{table}\nHeld-out problems: {len(problems)}; samples of each: {args.samples}.")


def before_and_after(
    problems: list[Problem], evaluations: dict[str, evaluate.Evaluation], number: int = 6
) -> str:
    """Greedy solutions of the first and the last model, first of all where M0 was right by luck."""
    first, last = list(evaluations)[0], list(evaluations)[-1]
    lucky = [v.correct and v.has_step_error for v in evaluations[first].greedy]
    parts = []
    for i in sorted(range(len(problems)), key=lambda i: not lucky[i])[:number]:
        parts.append(f"{problems[i].text}(gold answer: {problems[i].answer})\n")
        for name in (first, last):
            solution = evaluations[name].greedy_solutions[i]
            parts.append(f"\n{name}\n{annotated(problems[i], solution)}")
        parts.append("\n" + "-" * 80 + "\n")
    return "".join(parts)


def annotated(problem: Problem, text: str) -> str:
    """A solution with the checkers' verdict beside every step and the answer."""
    steps, answer_line = arithmetic.split_lines(text)
    labels = arithmetic.check_steps(problem, text)
    lines = [*steps, answer_line or "(no answer)"]
    labels.append(arithmetic.check_outcome(problem, text))
    return "".join(
        f"  {line.rstrip():<24}{'right' if label else 'WRONG'}\n"
        for line, label in zip(lines, labels, strict=True)
    )


if __name__ == "__main__":
    main()
