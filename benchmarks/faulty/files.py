"""Damaged checkpoints, checkpoints of another training, full disks, corrupt lines."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from faulty.kills import STEPS, train_words, trained
from faulty.processes import Count, Done, command, succeed

LINES = 100_000
MOST_SECONDS = 60.0  # for a command that finds a corrupt line among so many


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "short of a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit flipped": flip,
    "a folder in its place": folder_instead,
}


def stopped(done: Done, *said: str) -> bool:
    """One line that says all that, instead of a traceback."""
    is_clear = done.status == 2 and ": error: " in done.text.strip().splitlines()[-1]
    return is_clear and "Traceback" not in done.text and all(each in done.text for each in said)


def damage_checkpoints(inputs: Path, folder: Path, most: int | None = None) -> Count:
    """Every file of the newest checkpoint, damaged in every way, or `most` of those at random.

    `--resume auto` has to go on from the one before, and to name what it passes by; asked for by
    its name the checkpoint has to be refused.
    """
    count, whole, run = Count(), folder / "whole", folder / "run"
    succeed(train_words(inputs, whole))
    last = f"checkpoint-{STEPS}"
    names = sorted(path.name for path in (whole / last).iterdir())
    todo = [(name, damage) for name in names for damage in DAMAGES]
    if most is not None:
        todo = random.Random(0).sample(todo, most)
    for number, (name, damage) in enumerate(todo):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        for each in (last, f"checkpoint-{STEPS - 1}"):
            shutil.copytree(whole / each, run / each)
        DAMAGES[damage](run / last / name)
        if number % 8 == 0:  # of all of them it would be the same check again
            done = command([*train_words(inputs, run), "--resume", str(run / last)])
            count.add("stopped", stopped(done, str(run / last)), f"{name} {damage}: {done}")
        done = command(train_words(inputs, run))
        named = f"{last}: passed by" in done.text
        problem = trained(run, whole) if done.status == 0 and named else done.text[-2000:]
        count.add("survived", problem is None, f"{name} {damage}: {problem}")
    return count


def other_trainings(inputs: Path, folder: Path) -> Count:
    """A checkpoint, and one option that is not what it was trained with: named and refused."""
    from transformers import AutoModelForCausalLM

    from stepkto_kernels.training.tiny import make_data

    count, run = Count(), folder / "run"
    succeed(train_words(inputs, run))
    before = _hashes(run)
    wide, data = folder / "wide", make_data(folder / "other.jsonl", 32, seed=1)
    shutil.copytree(inputs / "model", wide)
    model = AutoModelForCausalLM.from_pretrained(wide)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.save_pretrained(wide)
    others = {
        "beta": ["--beta", "0.2"],
        "step_reduction": ["--step-reduction", "sum"],
        "reference_point": ["--reference-point", "zero"],
        "bf16": ["--bf16"],
        "dtype": ["--model-init-kwargs", '{"dtype": "bfloat16"}'],
        "vocab_size": ["--model", str(wide)],
        "data": ["--data", str(data)],
        "max_length": ["--max-length", "512"],
        "learning_rate": ["--learning-rate", "1e-4"],
        "seed": ["--seed", "7"],
        "sequences_per_step": ["--gradient-accumulation-steps", "2"],
        "adapter": ["--lora-rank", "4"],
        "trainer": ["--method", "sft"],
    }
    for name, words in others.items():
        done = command([*train_words(inputs, run), *words])
        is_so = stopped(done, f"error: {name}: want", "as ", "was trained with")
        count.add("stopped", is_so and _hashes(run) == before, f"{name}: {done}")
    return count


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def limit_files(size: int) -> None:
    """No file of this process may grow beyond this: as where the disk is full, EFBIG for ENOSPC."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fill_disks(inputs: Path, folder: Path, sizes: Iterable[int]) -> Count:
    """Writing fails where a file passes a size; with space again the same command ends equal."""
    count, whole = Count(), folder / "whole"
    succeed(train_words(inputs, whole))
    labelled = folder / "whole.jsonl"
    samples = write_samples(folder, 64)
    succeed(label_words(folder, samples, labelled))
    for size in sizes:
        run, out = folder / f"run_{size}", folder / f"{size}.jsonl"
        done = command(train_words(inputs, run), before=partial(limit_files, size))
        again = command(train_words(inputs, run))
        problem = trained(run, whole) if again.status == 0 else again.text[-2000:]
        is_so = problem is None and (done.status == 0 or stopped(done, str(run)))
        count.add("stopped", is_so, f"training, {size} bytes: {done}, then {problem}")
        small = partial(limit_files, size // 100)
        done = command(label_words(folder, samples, out), before=small)
        succeed(label_words(folder, samples, out))
        is_so = stopped(done, "File too large") and out.read_bytes() == labelled.read_bytes()
        count.add("stopped", is_so, f"labelling, {size // 100} bytes: {done}")
    return count


def write_samples(folder: Path, number: int) -> Path:
    """Samples of half as many problems, in samples.jsonl beside problems.jsonl."""
    path = folder / "samples.jsonl"
    with open(folder / "problems.jsonl", "w") as problems, open(path, "w") as samples:
        for i in range(number):
            name, text = str(i // 2), f"{i // 2} + {i} = {i // 2 + i}\nAnswer: {i // 2 + i}"
            if i % 2 == 0:
                row = {"id": name, "problem": f"{name} + {i} = ?", "answer": str(i // 2 + i)}
                problems.write(json.dumps(row) + "\n")
            row = {"problem_id": name, "sample": i % 2, "prompt": f"{name} + {i} = ?\n"}
            samples.write(json.dumps(row | {"completion": text, "finish": "stop"}) + "\n")
    return path


def label_words(folder: Path, samples: Path, output: Path) -> list[str]:
    words = ["label", "--samples", str(samples), "--problems", str(folder / "problems.jsonl")]
    return [*words, "--output", str(output), "--outcome", "exact", "--chunk", "8"]


CORRUPTIONS: dict[str, Callable[[bytes], bytes]] = {
    "cut in half": lambda line: line[: len(line) // 2] + b"\n",
    "no end of line": lambda line: line.rstrip(b"\n"),
    "zeros": lambda line: bytes(len(line) - 1) + b"\n",
    "not UTF-8": lambda line: b"\xff" + line,
    "another type": lambda line: b"[" + line.strip() + b"]\n",
    "nested 100,000 deep": lambda line: b"[" * 100_000 + b"\n",
}


def corrupt_lines(
    inputs: Path, folder: Path, kinds: Iterable[str] = tuple(CORRUPTIONS), lines: int = LINES
) -> Count:
    """One bad line in training data, in samples, and in a labelled file that is gone on with."""
    count, rng = Count(notes={"most seconds": 0.0}), random.Random(0)
    samples = write_samples(folder, lines)
    rows = [json.loads(line) for line in samples.open()]
    labelled = folder / "labelled.jsonl"
    with open(labelled, "w") as file:
        for row in rows:
            pieces = row["completion"].splitlines(keepends=True)
            row = {name: row[name] for name in ("problem_id", "sample", "prompt")}
            row |= {"completions": pieces, "labels": [True, None], "label": True}
            file.write(json.dumps(row) + "\n")
    for kind in kinds:
        for name, good in (("data", labelled), ("samples", samples), ("labelled", labelled)):
            content, at = good.read_bytes().splitlines(keepends=True), rng.randrange(lines - 1)
            content[at] = CORRUPTIONS[kind](content[at])
            bad = folder / f"bad_{name}.jsonl"
            bad.write_bytes(b"".join(content))
            if name == "data":
                words = [*train_words(inputs, folder / "out"), "--data", str(bad)]
            elif name == "samples":
                words = label_words(folder, bad, folder / "new.jsonl")
            else:
                words = label_words(folder, samples, bad)
                told = bad.with_name(bad.name + ".settings.json")
                told.write_text(json.dumps(SETTINGS))
            before = _hashes(folder)
            done = command(words)
            is_so = stopped(done, f"{bad}, line {at + 1}") and done.seconds < MOST_SECONDS
            made = {path for path in _hashes(folder) if path not in before}
            kept = all(_hashes(folder)[path] == before[path] for path in before)
            problem = f"{kind} in {name}: {done._replace(text=done.text[-500:])}, made {made}"
            count.add("stopped", is_so and kept and not made, problem)
            seconds = max(count.notes["most seconds"], done.seconds)
            count.notes["most seconds"] = round(seconds, 1)
    return count


# as label_words asks for
SETTINGS = {"outcome": "exact", "process": "none", "after_error": "keep", "style": "auto"}
