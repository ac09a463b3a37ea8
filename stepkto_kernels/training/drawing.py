"""Samples of a model into files: in this process, or in one for each GPU."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from stepkto_kernels.training import launch
from stepkto_kernels.training.iterate_config import SamplingConfig
from stepkto_kernels.training.models import sampling_model
from stepkto_kernels.training.records import Problem, RowWriter, as_row
from stepkto_kernels.training.run_folder import write_rows
from stepkto_kernels.training.sample import sample_into

Follow = Callable[[Iterable[int]], object]


def exhaust(counts: Iterable[int]) -> None:
    deque(counts, maxlen=0)


@dataclass(frozen=True)
class Draw:
    """How problems are sampled: `number` solutions of each, at a temperature, 0 for greedy ones."""

    number: int
    temperature: float
    seed: int


def derived_seed(*parts: object) -> int:
    """A seed of its own for each use; below 2**31, as everything that takes a seed does."""
    digest = sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def draw(
    config: SamplingConfig,
    model: str,
    problems: Sequence[Problem],
    draws: Mapping[Path, Draw],
    follow: Follow = exhaust,
) -> None:
    """Sample what these files do not have yet.

    The samples are the same in one process and in many.

    Args:
        config: says how; its model is not looked at.
        model: folder or hub name.
        problems: each once.
        draws: what is sampled into each file.
        follow: is given the number of rows after each chunk, and has to take all of them; not used
            where there are many processes, which say it themselves.
    Raises:
        ValueError: a file has other samples, or a setting does not fit.
        OSError: a file cannot be read or written, or a process failed.
    """
    if config.backend == "transformers" and config.num_processes > 1:
        for path, how in draws.items():
            draw_in_processes(config, model, problems, path, how)
        return
    with sampling_model(config, model) as sampler:
        for path, how in draws.items():
            with RowWriter(path) as writer:
                rows = sample_into(
                    writer,
                    problems,
                    sampler,
                    num_samples=how.number,
                    temperature=how.temperature,
                    seed=how.seed,
                    chunk=config.chunk,
                    prompt=config.prompt,
                )
                follow(rows)


def draw_in_processes(
    config: SamplingConfig, model: str, problems: Sequence[Problem], path: Path, how: Draw
) -> None:
    """`stepkto sample` in a folder beside the file, which is there when it is complete."""
    folder = path.with_name(path.name + ".work")
    if path.exists():
        shutil.rmtree(folder, ignore_errors=True)  # a kill came between the last two lines
        return
    folder.mkdir(exist_ok=True)
    write_rows(folder / "problems.jsonl", map(as_row, problems))
    options = {
        **{"model": model, "problems": folder / "problems.jsonl"},
        **{"output": folder / "samples.jsonl", "prompt": config.prompt, "chunk": config.chunk},
        **{"num-samples": how.number, "temperature": how.temperature, "seed": how.seed},
        **{"max-new-tokens": config.max_new_tokens, "batch-size": config.batch_size},
        **{"device": config.device, "dtype": config.dtype},
    }
    words = [*launch.processes(config.num_processes), "-m", "stepkto_kernels.cli", "sample"]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    launch.run(words)
    os.replace(folder / "samples.jsonl", path)
    shutil.rmtree(folder)
