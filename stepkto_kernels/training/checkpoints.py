"""Checkpoints that are whole or not used: the seal is written when everything else is on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from stepkto_kernels import checks, files

SEAL = "step_kto.json"
STATE = "trainer_state.json"  # transformers writes it last of all, behind the seal
END = 2**20  # bytes


def step_of(folder: Path) -> int | None:
    """The number in "checkpoint-12"; None where this is no checkpoint's name."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else None


def seal(folder: Path, settings: Mapping[str, Any], with_state: bool = False) -> None:
    """Put the files of a checkpoint on disk, and then a list of them, with what they belong to.

    Args:
        settings: what JSON can hold, of `check_settings`.
        with_state: trainer_state.json is there too, which Trainer writes last.
    """
    marks = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != SEAL and (with_state or name != STATE):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            marks[name] = mark(path)
    content = {"files": marks, "settings": dict(settings)}
    files.write_text(folder / SEAL, json.dumps(content, indent=1))


def mark(path: Path) -> list[Any]:
    """Size of a file and SHA-256 of its ends: to read all of a model would take minutes."""
    with open(path, "rb") as file:
        found = hashlib.sha256(file.read(END))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - END))
        found.update(file.read())
    return [size, found.hexdigest()]


def flaw(folder: Path) -> str | None:
    """Why a checkpoint cannot be gone on from; None where it can."""
    try:
        for name, (size, digest) in _sealed(folder)["files"].items():
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                return f"{SEAL} names a file outside of it"
            got = mark(folder / name)
            if got[0] != size:
                return f"{name} has {got[0]} of {size} bytes"
            if got[1] != digest:
                return f"{name} is not what was written"
        state = json.loads((folder / STATE).read_bytes())
        if state["global_step"] != step_of(folder):
            return f"{STATE} is of step {state['global_step']}"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{SEAL} or {STATE} is damaged"
    return None


def _sealed(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / SEAL).read_bytes())
    return found


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint of a folder, None where there is none; warns of those passed by."""
    steps = {step_of(path): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    for step in sorted((step for step in steps if step is not None), reverse=True):
        why = flaw(steps[step])
        if why is None:
            return steps[step]
        warnings.warn(f"{steps[step]}: passed by, as {why}", stacklevel=2)
    return None


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """That a sealed checkpoint is of a training with these settings.

    Raises:
        ValueError: one differs; names it.
    """
    before = _sealed(folder)["settings"]
    now = json.loads(json.dumps(dict(settings)))  # as they were written: no tuples
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        checks.require(old == new, name, f"{old!r}, as {folder} was trained with", repr(new))
