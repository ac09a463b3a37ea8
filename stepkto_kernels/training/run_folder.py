"""Folders that a killed run goes on from: whole files, the settings, and one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepkto_kernels import checks, files

END = 2**20  # bytes


def complete(path: Path, make: Callable[[Path], None]) -> None:
    """Make a file or folder under a temporary name, unless it is there, and then name it.

    make: called with the temporary path, where a killed run may have left a part.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        make(part)
        os.replace(part, path)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines anew, on disk when this returns."""
    with open(path, "wb") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def settings_of(values: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Settings as they are kept: absolute paths, and digests of folders.

    Args:
        values: what JSON can hold.
        paths: names of those that are paths, or hub names where no such path exists.
    """
    found: dict[str, Any] = json.loads(json.dumps(values))
    for name in paths:
        path = Path(found[name])
        if path.exists():
            found[name] = str(path.absolute())
        if path.is_dir():
            found[f"{name}_sha256"] = digest(path)
    return found


def digest(path: Path) -> str:
    """SHA-256 of what a model's folder has in weights and JSON.

    Of each file the size and both ends: a model takes minutes to read, and training changes every
    part of it.
    """
    found = hashlib.sha256()
    for each in sorted(path.iterdir()):
        if each.suffix in (".safetensors", ".bin", ".json") and each.name != "trainer_state.json":
            size = each.stat().st_size
            found.update(f"{each.name} {size}\n".encode())
            with open(each, "rb") as file:
                found.update(file.read(END))
                file.seek(max(0, size - END))
                found.update(file.read())
    return found.hexdigest()


def keep_settings(
    path: Path,
    wanted: Mapping[str, Any],
    may_grow: Sequence[str] = (),
    may_change: Sequence[str] = (),
) -> None:
    """Write a folder's settings, or see that it was made with the same.

    Args:
        path: YAML file.
        wanted: of settings_of.
        may_grow: names of numbers that may be larger than before.
        may_change: names of what may be anything.
    Raises:
        ValueError: a setting, or the content of a file, is another one; names it.
    """
    import yaml

    from stepkto_kernels.training.command import read_yaml

    if path.exists():
        found = read_yaml(path)
        before, now = flat(found), flat(wanted)
        for name in sorted({*before, *now}):
            old: Any = before.get(name)
            new: Any = now.get(name)
            if name in may_grow:
                checks.require(new >= old, name, f"at least {old}, as in {path}", new)
            elif name.partition(".")[0] not in may_change:
                checks.require(new == old, name, f"{old!r}, as in {path}", repr(new))
        if wanted == found:
            return
    files.write_text(path, yaml.safe_dump(dict(wanted), sort_keys=False))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings in settings as "training.learning_rate"."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """The right to work in a folder; given up when the process ends, however it does.

    Raises:
        ValueError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            want = "a folder that nothing else works in"
            raise ValueError(f"{folder}: want {want}, got one at work") from None
        yield
