"""Files that are whole: written beside their place, put on disk, and named last."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, for the block to write a new file at.

    The file takes the place of `path` in one step where the block ends. Where the block raises, or
    the process dies in it, `path` is what it was before. Of a link the file behind it is replaced;
    a pipe or a device, such as /dev/null, is handed to the block as it is.

    Raises:
        OSError: what the block wrote does not get to the disk or to its place.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or a crash of the machine may leave a name without content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by one of this text, in UTF-8, without translating its line ends."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
