"""An evaluation as files: greedy and sampled solutions, judged, and the metrics of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from stepkto_kernels.training import evaluation, label_command
from stepkto_kernels.training.bootstrap import Estimate
from stepkto_kernels.training.iterate_config import SamplingConfig
from stepkto_kernels.training.label import Labeller, label_into
from stepkto_kernels.training.records import Problem, RowWriter, read_rows, read_samples
from stepkto_kernels.training.sample import sample_into
from stepkto_kernels.training.sampler import Sampler


@dataclass(frozen=True)
class Draw:
    """How problems are sampled: `number` solutions of each, at a temperature, 0 for greedy ones."""

    number: int
    temperature: float
    seed: int
    prompt: str
    chunk: int  # problems that are sampled together


def derived_seed(*parts: object) -> int:
    """A seed of its own for each use; below 2**31, as everything that takes a seed does."""
    digest = sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def draw(path: Path, problems: Sequence[Problem], sampler: Sampler, how: Draw) -> Iterator[int]:
    """Sample what the file does not have yet; gives the number of rows after each chunk."""
    with RowWriter(path) as writer:
        yield from sample_into(
            writer,
            problems,
            sampler,
            num_samples=how.number,
            temperature=how.temperature,
            seed=how.seed,
            chunk=how.chunk,
            prompt=how.prompt,
        )


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
            label_command.process_reward(arguments, options),
            after_error=arguments.after_error,
            style=arguments.style,
            workers=arguments.workers,
        )


def evaluate_into(
    folder: Path,
    problems: Sequence[Problem],
    sampler: Callable[[], AbstractContextManager[Sampler]],
    labeller: Callable[[], AbstractContextManager[Labeller]],
    draws: Mapping[str, Draw],
) -> None:
    """Write NAME_samples.jsonl and the judged NAME.jsonl for each draw, or what they do not have.

    sampler, labeller: called once, the second when the first is closed, as both may hold a model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with sampler() as drawing:
        for name, how in draws.items():
            for _ in draw(folder / f"{name}_samples.jsonl", problems, drawing, how):
                pass
    with labeller() as judging:
        for name in draws:
            for _ in judge(folder / f"{name}_samples.jsonl", folder / f"{name}.jsonl", judging):
                pass


def evaluation_draws(config: SamplingConfig, seed: int) -> dict[str, Draw]:
    """What held-out problems are sampled for; seed: of the random ones."""
    c = config
    return {
        "greedy": Draw(1, 0.0, 0, c.prompt, c.chunk),
        "sampled": Draw(c.eval_num_samples, c.eval_temperature, seed, c.prompt, c.chunk),
    }


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


def list_rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]
