"""Problems become sampled solutions in a file, that a killed run can go on from."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence

from stepkto_kernels import checks
from stepkto_kernels.training.prompts import PROMPTS, make_prompt
from stepkto_kernels.training.records import Problem, RowWriter, Sample, as_row, make
from stepkto_kernels.training.sampler import Sampler

Key = tuple[str, int]


def sample_into(
    writer: RowWriter,
    problems: Sequence[Problem],
    sampler: Sampler,
    *,
    num_samples: int,
    temperature: float,
    seed: int,
    chunk: int = 64,
    prompt: str = "plain",
    rank: int = 0,
    world_size: int = 1,
    done: Collection[Key] = (),
) -> Iterable[int]:
    """Sample what the file does not have yet; gives the number of its rows after each chunk.

    Problems are cut into chunks by their place, and a chunk's seed comes from `seed` and its ids.
    A chunk of which rows are missing is sampled again as a whole, so that with a sampler that keeps
    to its seeds the samples do not depend on where a run was killed, or on how many ranks it had.

    Args:
        writer: of the file of samples, opened anew.
        problems: each once.
        sampler: gives the completions.
        num_samples: of a problem, >= 1.
        temperature: >= 0, 0 is greedy.
        seed: of the whole run.
        chunk: problems that are sampled, and lost by a kill, together, >= 1.
        prompt: name of a prompt, see make_prompt.
        rank, world_size: of every world_size chunks, the one with this number is done here.
        done: problem ids and sample numbers that stand in other files.
    Raises:
        ValueError: an argument outside of the above, the file has other rows than these problems'
            samples, or the sampler gave another number of completions.
        OSError: the file cannot be written.
    """
    for name, value in (("num_samples", num_samples), ("chunk", chunk), ("world_size", world_size)):
        checks.integer(name, value, low=1)
    checks.integer("rank", rank, low=0)
    checks.require(rank < world_size, "rank", f"less than world_size = {world_size}", rank)
    checks.number("temperature", temperature, low=0)
    checks.choice("prompt", prompt, PROMPTS)
    ids = {problem.id for problem in problems}
    checks.require(len(ids) == len(problems), "problems", "ids of their own", "an id twice")
    present = {*already_sampled(writer, problems, num_samples, prompt), *done}
    for first in range(rank * chunk, len(problems), world_size * chunk):
        part = problems[first : first + chunk]
        missing = [
            (each.id, k) for each in part for k in range(num_samples) if (each.id, k) not in present
        ]
        if not missing:
            continue
        for sample in _sample_chunk(part, sampler, num_samples, temperature, seed, prompt):
            if sample.key not in present:
                row = as_row(sample)
                writer.write(row)
                writer.rows.append(row)
        yield len(writer.rows)


def _sample_chunk(
    problems: Sequence[Problem],
    sampler: Sampler,
    num_samples: int,
    temperature: float,
    seed: int,
    prompt: str,
) -> list[Sample]:
    prompts = [make_prompt(problem, prompt) for problem in problems]
    found = sampler(
        prompts,
        num_samples=num_samples,
        temperature=temperature,
        seed=chunk_seed(seed, [problem.id for problem in problems]),
    )
    fits = len(found) == len(prompts) and all(len(each) == num_samples for each in found)
    want = f"{num_samples} completions of each of {len(prompts)} prompts"
    checks.require(fits, "sampler", want, [len(each) for each in found])
    return [
        Sample(problem.id, k, text, completion.text, completion.finish)
        for problem, text, each in zip(problems, prompts, found, strict=True)
        for k, completion in enumerate(each)
    ]


def chunk_seed(seed: int, ids: Sequence[str]) -> int:
    """In [0, 2^32), the same for the same ids in the same order, everywhere."""
    text = "\0".join([str(seed), *ids])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def already_sampled(
    writer: RowWriter, problems: Sequence[Problem], num_samples: int, prompt: str
) -> set[Key]:
    """Keys of the rows that are there.

    Raises:
        ValueError: a row is malformed, there twice, or not a sample of these problems and prompt.
    """
    prompts = {problem.id: make_prompt(problem, prompt) for problem in problems}
    found: set[Key] = set()
    for number, row in enumerate(writer.rows, start=1):
        where = f"{writer.path}, row {number}"
        sample = make_sample(row, where)
        known = sample.problem_id in prompts and sample.sample < num_samples
        checks.require(known, where, "a sample of one of the problems", sample.key)
        same = sample.prompt == prompts[sample.problem_id]
        checks.require(same, where, f"the {prompt} prompt of its problem", repr(sample.prompt))
        checks.require(sample.key not in found, where, "each sample once", f"{sample.key} again")
        found.add(sample.key)
    return found


def make_sample(row: dict, where: str) -> Sample:
    """The Sample of a row of a file; ValueError where it does not fit."""
    if isinstance(row.get("prompt"), list):
        row = row | {"prompt": tuple(row["prompt"])}
    sample: Sample = make(Sample, row, where)
    return sample
