"""Tile shapes of gemm_epilogue.py: those to choose from, and the file of those that were measured.

`stepkto tune` writes the file, for one kind of device and one version of Triton. It is used where
the environment variable STEPKTO_TUNED names it, and a file that does not fit is refused: which tile
shape runs decides a token's bits. No Triton is needed here.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stepkto_kernels import checks

VARIABLE = "STEPKTO_TUNED"
FORMAT = 1


@dataclass(frozen=True)
class TileShape:
    """Tile of a program and how it is compiled."""

    BLOCK_M: int  # tokens
    BLOCK_N: int  # vocabulary columns
    BLOCK_K: int  # of the hidden size at a time
    num_warps: int
    num_stages: int
    GROUP_M: int = 8  # tiles of tokens that share a pass over the vocabulary


# What `stepkto tune` chooses from. Each compiles without a spill for some architecture and kind
# (`python benchmarks/compile_report.py --candidates`; benchmarks/ROOFLINE.md has the list).
CANDIDATES = (
    TileShape(64, 128, 64, 4, 4),
    TileShape(64, 256, 64, 4, 3),
    TileShape(64, 256, 64, 8, 4),
    TileShape(128, 64, 64, 4, 4),
    TileShape(128, 128, 32, 8, 5),
    TileShape(128, 128, 64, 4, 3),
    TileShape(128, 128, 64, 8, 3),
    TileShape(128, 128, 64, 8, 4),
    TileShape(128, 128, 128, 8, 3),
    TileShape(128, 256, 64, 8, 3),
    TileShape(128, 256, 64, 8, 4),
    TileShape(128, 256, 64, 8, 4, GROUP_M=16),
    TileShape(256, 128, 64, 8, 3),
    TileShape(256, 128, 64, 8, 4),
)
# plain logits going forward and back; either with a bias, a soft cap or statistics
KINDS = ("forward", "dlogits", "narrow")
DTYPES = ("bfloat16", "float16")  # tensor cores have no exact fp32


class Device(NamedTuple):
    """What a measurement holds for."""

    device: str  # its name
    capability: list[int]  # [major, minor]
    triton: str  # version


class Key(NamedTuple):
    """What has one tile shape on a device, whatever the sizes: a row's bits depend on it."""

    kind: str  # of KINDS
    dtype: str  # of DTYPES
    descriptors: bool  # whether operands come through TMA


def read(path: Path, device: Device | None) -> dict[Key, TileShape]:
    """The tile shapes in a file for `device`; None reads one for any device.

    Raises:
        ValueError: no such file, one for another device or version, or with anything unknown in it.
            The message names the file and the field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        want = "a file that `stepkto tune` wrote"
        raise ValueError(f"{VARIABLE}: want {want}, got {path} ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: want JSON, got {error}") from None
    checks.require(isinstance(content, dict), str(path), "a JSON object", type(content).__name__)
    wanted = {"format": FORMAT, **({} if device is None else device._asdict())}
    for name, want in wanted.items():
        got = content.get(name)
        checks.require(got == want, f"{path}: {name}", repr(want), repr(got))
    entries = content.get("tiles")
    checks.require(isinstance(entries, list), f"{path}: tiles", "a list", repr(entries))
    found: dict[Key, TileShape] = {}
    for i, entry in enumerate(entries):
        where = f"{path}: tiles[{i}]"
        checks.require(isinstance(entry, dict), where, "an object", repr(entry))
        checks.choice(f"{where}.kind", entry.get("kind"), KINDS)
        checks.choice(f"{where}.dtype", entry.get("dtype"), DTYPES)
        descriptors, tile = entry.get("descriptors"), entry.get("tile")
        is_bool = isinstance(descriptors, bool)
        checks.require(is_bool, f"{where}.descriptors", "true or false", repr(descriptors))
        shape = next((shape for shape in CANDIDATES if asdict(shape) == tile), None)
        checks.require(shape is not None, f"{where}.tile", "one of tiles.CANDIDATES", repr(tile))
        assert shape is not None
        key = Key(entry["kind"], entry["dtype"], descriptors)
        checks.require(key not in found, where, "each case once", f"{key} again")
        found[key] = shape
    return found


def write(
    path: Path,
    device: Device,
    shapes: Mapping[Key, TileShape],
    notes: Mapping[Key, Mapping[str, Any]] | None = None,
) -> None:
    """Write what `read` reads, at once or not at all. notes: what else an entry is to say."""
    entries = [
        {**key._asdict(), "tile": asdict(shape), **(notes or {}).get(key, {})}
        for key, shape in shapes.items()
    ]
    content = {"format": FORMAT, **device._asdict(), "tiles": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def named_file() -> Path | None:
    """The file that STEPKTO_TUNED names."""
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


def state() -> str:
    """In words for people what tile shapes are used; looks at the content but not at the device."""
    path = named_file()
    if path is None:
        return f"the defaults ({VARIABLE} is not set)"
    try:
        found = read(path, None)
    except ValueError as error:
        return f"refused: {error}"
    return f"{len(found)} from {path}, the others the defaults"
