"""An evaluation as files: greedy and sampled solutions, judged, and the metrics of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from stepkto_kernels import checks
from stepkto_kernels.training import evaluation, label_command
from stepkto_kernels.training.bootstrap import Estimate
from stepkto_kernels.training.drawing import Draw, draw, exhaust
from stepkto_kernels.training.iterate_config import SamplingConfig
from stepkto_kernels.training.label import Labeller, label_into
from stepkto_kernels.training.problems import load_problems
from stepkto_kernels.training.records import Problem, RowWriter, as_row, read_rows, read_samples
from stepkto_kernels.training.run_folder import keep_settings, settings_of


def load(name: str, source: str, layout: str | None) -> list[Problem]:
    """Problems as load_problems takes them, at least one; name: of the setting."""
    problems = load_problems(source, layout)
    checks.require(len(problems) > 0, name, "at least one problem", f"none in {source}")
    return problems


def keep_config(
    folder: Path,
    config: SamplingConfig,
    problems: Mapping[str, Sequence[Problem]],
    may_grow: Sequence[str] = (),
) -> None:
    """Write config.yaml, or see that the folder was made with the same settings and problems.

    Flags of the rewards that do not decide what labels are may change, such as a judge's
    concurrency.

    Raises:
        ValueError: a setting, the first model or a problem is another one; names it.
    """
    settings = settings_of(asdict(config), ("model", *problems))
    arguments = config.reward_arguments(folder / "rewards")
    options = label_command.process_options(arguments)
    settings["labels"] = label_command.settings(arguments, options)
    for name, found in problems.items():
        content = json.dumps([as_row(problem) for problem in found])
        settings[f"{name}_sha256"] = sha256(content.encode()).hexdigest()
    keep_settings(folder / "config.yaml", settings, may_grow, may_change=("rewards",))


def judge(samples: Path, labelled: Path, labeller: Labeller, chunk: int = 64) -> Iterator[int]:
    """Label what the file does not have yet; gives the number of rows after each chunk."""
    found = read_samples(samples)
    with RowWriter(labelled) as writer:
        yield from label_into(writer, found, labeller, chunk=chunk)


@contextmanager
def make_labeller(arguments: Any, problems: Iterable[Problem]) -> Iterator[Labeller]:
    """The rewards that label_command's flags ask for."""
    options = label_command.process_options(arguments)
    with label_command.outcome_reward(arguments) as outcome:
        yield Labeller(
            {problem.id: problem for problem in problems},
            outcome,
            label_command.process_reward(arguments, options, outcome),
            after_error=arguments.after_error,
            style=arguments.style,
            workers=arguments.workers,
        )


def evaluate_into(
    folder: Path,
    config: SamplingConfig,
    model: str,
    problems: Sequence[Problem],
    seed: int,
    labeller: Callable[[], AbstractContextManager[Labeller]],
) -> None:
    """Write greedy.jsonl and sampled.jsonl, judged, and their samples, or what is not there yet.

    Args:
        folder: made where there is none.
        config: says how problems are sampled; its model is not looked at.
        seed: of the random solutions.
        labeller: called when the model is given up, as it may hold one too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draws = {
        "greedy": Draw(1, 0.0, 0),
        "sampled": Draw(config.eval_num_samples, config.eval_temperature, seed),
    }
    samples = {name: folder / f"{name}_samples.jsonl" for name in draws}
    draw(config, model, problems, {samples[name]: how for name, how in draws.items()})
    with labeller() as judging:
        for name, path in samples.items():
            exhaust(judge(path, folder / f"{name}.jsonl", judging))


def measure(folder: Path, config: SamplingConfig) -> dict[str, Estimate]:
    """Metrics of greedy.jsonl and sampled.jsonl."""
    greedy, sampled = (list_rows(folder / f"{name}.jsonl") for name in ("greedy", "sampled"))
    with equality(config.equal) as equal:
        return evaluation.estimates(
            greedy, sampled, equal=equal, resamples=config.resamples, seed=config.seed
        )


@contextmanager
def equality(name: str) -> Iterator[evaluation.Equal | None]:
    """What tells answers from each other beside their text."""
    if name == "text":
        yield None
        return
    from stepkto_kernels.training.rewards.symbolic import MathVerify

    with MathVerify() as reward:

        def equal(answer: str, other: str) -> bool:
            if "\n" in other or "\\boxed" in other:
                return False  # it would not be the whole answer of the line below
            problem = Problem(id="equality", problem="", answer=answer)
            return reward(problem, f"Answer: {other}") is True

        yield equal


def shown(found: Mapping[str, Estimate]) -> str:
    """Metrics in one line, in percent with their intervals."""
    percent = lambda e: f"{100 * e.value:.1f} ({100 * e.low:.1f} to {100 * e.high:.1f})"
    return ", ".join(f"{name} {percent(estimate)}" for name, estimate in found.items())


def write_metrics(path: Path, about: Mapping[str, Any], found: Mapping[str, Estimate]) -> None:
    content = {**about, "metrics": evaluation.as_json(found)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def list_rows(path: Path) -> list[Any]:
    return [row for _, row in read_rows(path)]
