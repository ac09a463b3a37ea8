"""Samples of a model into a file: the sampler of this place and time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from stepkto_kernels.training.records import Problem, RowWriter, Sample, as_row
from stepkto_kernels.training.sampling import generate


class LocalSampler:
    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int, batch_size: int):
        self.model, self.tokenizer = model, tokenizer
        self.options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}

    def __call__(
        self, prompts: Sequence[str], *, num_samples: int, temperature: float, seed: int
    ) -> list[list[str]]:
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            num_samples=num_samples,
            temperature=temperature,
            seed=seed,
            **self.options,
        )


def sample_into(
    writer: RowWriter,
    problems: Sequence[Problem],
    sampler: Any,
    *,
    num_samples: int,
    temperature: float,
    seed: int,
    chunk: int = 64,
    prompt: str = "plain",
) -> Iterable[int]:
    done = {(row["problem_id"], row["sample"]) for row in writer.rows}
    for first in range(0, len(problems), chunk):
        some = problems[first : first + chunk]
        if all((p.id, i) in done for p in some for i in range(num_samples)):
            continue
        prompts = [p.problem.rstrip("\n") + "\n" for p in some]
        found = sampler(
            prompts, num_samples=num_samples, temperature=temperature, seed=seed + first
        )
        for p, text, completions in zip(some, prompts, found, strict=True):
            for i, completion in enumerate(completions):
                if (p.id, i) not in done:
                    row = as_row(Sample(p.id, i, text, completion, "stop"))
                    writer.write(row)
                    writer.rows.append(row)
        yield len(writer.rows)
