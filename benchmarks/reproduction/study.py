"""The runs of the reproduction: which there are, one run, and all of them, resumable.

A run is one method at one learning rate from the M0 of one seed, for three rounds; it is done when
its line stands in runs.jsonl. Runs are deterministic on one machine, whatever their order.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import LlamaForCausalLM

from stepkto_kernels import files
from stepkto_kernels.training.records import RowWriter

from . import policy
from .policy import Method, Solution
from .task import TASKS, Language, Problem

METHODS = {
    "kto": Method("kto", {"step_weight": 0.0}),
    "step_kto": Method("step_kto", {"step_weight": 1.0}),
    "rft": Method("rft", None),
}
CONTROLS = {
    "step only": Method("step only", {}, outcome=False),
    "step_weight 0.3": Method("step_weight 0.3", {"step_weight": 0.3}),
    "step_weight 3": Method("step_weight 3", {"step_weight": 3.0}),
    "step_reduction mean": Method("step_reduction mean", {"step_reduction": "mean"}),
    "step_reduction sum": Method("step_reduction sum", {"step_reduction": "sum"}),
    "z zero": Method("z zero", {"reference_point": "zero"}),
    "z matched": Method("z matched", {"reference_point": "matched"}),
    "labels up to the first error": Method("up to error", {}, labels="up to error"),
    "outcomes not balanced": Method("outcomes not balanced", {}, balance=False),
}
RATES = (1.5e-5, 3e-5, 6e-5, 1.2e-4, 2.4e-4, 4.8e-4)
SEEDS = tuple(range(10))
TUNING_SEEDS = (1000, 1001, 1002)  # not reported
CONTROL_SEEDS = SEEDS[:5]
CONTROL_TASK = "coded"
ROUNDS = 3
MARGIN = 0.01  # of Pass@1 that a learning rate may lose against the method's best


@dataclass(frozen=True)
class Size:
    """How much a run does: numbers of problems, samples of each, and optimizer steps of M0."""

    problems: int = 300
    samples: int = 8
    held_out: int = 600
    sft_steps: int = policy.SFT_STEPS


@dataclass(frozen=True)
class Run:
    """What makes a run; `method` names one of METHODS or CONTROLS."""

    task: str
    method: str
    rate: float
    seed: int


Row = dict[str, Any]


def key(row: Row | Run) -> tuple[str, str, float, int]:
    row = row if isinstance(row, dict) else asdict(row)
    return row["task"], row["method"], row["rate"], row["seed"]


def tuning_runs(tasks: Sequence[str]) -> list[Run]:
    return [
        Run(task, method, rate, seed)
        for task in tasks
        for seed in TUNING_SEEDS
        for method in METHODS
        for rate in RATES
    ]


def reported_runs(tasks: Sequence[str], rates: dict[tuple[str, str], float]) -> list[Run]:
    return [
        Run(task, method, rates[task, method], seed)
        for task in tasks
        for seed in SEEDS
        for method in METHODS
    ]


def control_runs(rates: dict[tuple[str, str], float]) -> list[Run]:
    """Variants at Step-KTO's rate, and KTO and Step-KTO at every rate."""
    at = rates[CONTROL_TASK, "step_kto"]
    runs = []
    for seed in CONTROL_SEEDS:
        runs += [Run(CONTROL_TASK, name, at, seed) for name in CONTROLS]
        runs += [Run(CONTROL_TASK, m, rate, seed) for m in ("kto", "step_kto") for rate in RATES]
    return runs


def chosen_rates(rows: Iterable[Row], tasks: Sequence[str]) -> dict[tuple[str, str], float]:
    """Each method's learning rate, from the tuning seeds, by one rule for all of them.

    Of the rates that lose at most MARGIN of the method's best Pass@1 at M3: the one with the fewest
    errors in correct solutions at M3. A collapsed format loses Pass@1, so it needs no rule.
    """
    found = {}
    table = tuning_table(rows)
    for task in tasks:
        for method in METHODS:
            mine = [row for row in table if (row["task"], row["method"]) == (task, method)]
            best = max(row["pass@1"] for row in mine)
            kept = [row for row in mine if row["pass@1"] >= best - MARGIN]
            found[task, method] = min(kept, key=lambda row: row["errors"])["rate"]
    return found


def tuning_table(rows: Iterable[Row]) -> list[Row]:
    """Means over the tuning seeds at M3 for each task, method and rate; format: the least round."""
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        if row["seed"] in TUNING_SEEDS and row["method"] in METHODS:
            groups.setdefault((row["task"], row["method"], row["rate"]), []).append(row)
    return [
        {
            "task": task,
            "method": method,
            "rate": rate,
            "seeds": len(group),
            "pass@1": fmean(row["rounds"][-1]["pass@1"] for row in group),
            "errors": fmean(row["rounds"][-1]["errors"] for row in group),
            "format": fmean(min(r["format"] for r in row["rounds"][1:]) for row in group),
        }
        for (task, method, rate), group in sorted(groups.items())
    ]


def execute(runs: Sequence[Run], folder: Path, size: Size, jobs: int) -> list[Row]:
    """Do the runs that are not done yet, `jobs` at a time; gives the rows of all that are.

    Raises:
        ValueError: the folder's runs are of another size.
    """
    with RowWriter(folder / "runs.jsonl") as writer:
        for row in writer.rows:
            if row["size"] != asdict(size):
                raise ValueError(f"{folder}: want runs of {size}, got {row['size']}")
        done = {key(row) for row in writer.rows}
        todo = [run for run in dict.fromkeys(runs) if key(run) not in done]
        context = get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
            waiting = [pool.submit(one_run, run, folder, size) for run in todo]
            for number, future in enumerate(as_completed(waiting), start=1):
                row = future.result()
                writer.write(row)
                writer.rows.append(row)
                last = row["rounds"][-1]
                print(
                    f"{number}/{len(todo)} {row['task']} {row['method']} {row['rate']:g} "
                    f"seed {row['seed']}: Pass@1 {last['pass@1']:.3f}, errors "
                    f"{last['errors']:.3f}, {row['seconds']:.0f} s",
                    flush=True,
                )
        return list(writer.rows)


def _one_thread() -> None:
    torch.set_num_threads(1)  # matrices this small gain nothing by more


def one_run(run: Run, folder: Path, size: Size) -> Row:
    started = time.perf_counter()
    language = Language(TASKS[run.task])
    method = (METHODS | CONTROLS)[run.method]
    held_out = draw(language, size.held_out, f"{run.seed} held out")
    model, first = _first(language, run.seed, folder, size, held_out)
    rounds = [first]
    for number in range(1, ROUNDS + 1):
        problems = draw(language, size.problems, f"{run.seed} round {number}")
        seed = 1000 * run.seed + number  # the same for all methods: M1 has the same data
        sampled = policy.sample(model, language, problems, size.samples, seed)
        solutions = [solution for group in sampled for solution in group]
        found = policy.train(model, language, method, solutions, run.rate, seed)
        training = {name: found[name] for name in KEPT if name in found}
        rounds.append(evaluate(model, language, held_out, size, run.seed) | {"training": training})
    seconds = time.perf_counter() - started
    return asdict(run) | {"size": asdict(size), "rounds": rounds, "seconds": round(seconds, 1)}


KEPT = ("kl", "rewards/chosen", "rewards/rejected", "saturated", "step/kl", "step/rewards/margins")


def draw(language: Language, number: int, stream: str) -> list[Problem]:
    rng = random.Random(f"{language.task.name} {stream}")
    return [language.draw(rng) for _ in range(number)]


def _first(
    language: Language, seed: int, folder: Path, size: Size, held_out: Sequence[Problem]
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """M0 and its evaluation, made once a seed."""
    path = folder / f"M0_{language.task.name}_{seed}.pt"
    model = policy.new_model(len(language.words)).eval()
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        return model, saved["metrics"]
    model = policy.first_model(language, seed, size.sft_steps)
    metrics = evaluate(model, language, held_out, size, seed)
    with files.replacing(path) as temporary:
        torch.save({"model": copy.deepcopy(model.state_dict()), "metrics": metrics}, temporary)
    return model, metrics


def evaluate(
    model: LlamaForCausalLM, language: Language, problems: Sequence[Problem], size: Size, seed: int
) -> dict[str, Any]:
    """Shares in [0, 1]. `errors`: sampled solutions with a wrong or missing step among those with
    a right answer; `errors_greedy` the same of greedy ones; `format`: complete solutions."""
    greedy = [group[0] for group in policy.sample(model, language, problems, 1, seed, 0.0)]
    groups = policy.sample(model, language, problems, size.samples, seed)
    samples = [solution for group in groups for solution in group]
    steps = [right for s in samples for right in s.verdict.steps]
    return {
        "pass@1": fmean(s.verdict.correct for s in greedy),
        "maj@8": fmean(majority_is_right(group) for group in groups),
        "accuracy": fmean(s.verdict.correct for s in samples),
        "errors": errors_in_correct(samples),
        "errors_greedy": errors_in_correct(greedy),
        "step_accuracy": fmean(steps),
        "format": fmean(s.verdict.complete for s in samples),
        "tokens": fmean(len(s.ids) for s in samples),
    }


def majority_is_right(group: Sequence[Solution]) -> bool:
    """Of equally frequent answers the first; solutions without one do not vote."""
    answers = [s.verdict.answer for s in group if s.verdict.answer >= 0]
    if not answers:
        return False
    winner = max(dict.fromkeys(answers), key=answers.count)
    return any(s.verdict.correct for s in group if s.verdict.answer == winner)


def errors_in_correct(solutions: Iterable[Solution]) -> float:
    wrong = [s.verdict.has_step_error(len(s.problem.operations)) for s in solutions
             if s.verdict.correct]  # fmt: skip
    return fmean(wrong) if wrong else float("nan")
