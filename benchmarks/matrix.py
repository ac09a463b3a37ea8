"""The tests in other environments: other Pythons and torches, without what is optional.

    python benchmarks/matrix.py                      # a quarter of an hour
    python benchmarks/matrix.py --only "without Triton"

Each environment is a virtual environment of its own in which the package is installed from the
checkout, not in place. A Python that is not there is left out and named; it is looked for in PATH
and among pyenv's. Where pip has no CPU build of a torch, it takes the CUDA build (3 GB and more).
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

from stepkto_kernels.bench.environment import environment  # noqa: E402

OUT = ROOT / "out/matrix"
RESULT = ROOT / "benchmarks/results/matrix.json"
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
ROOM = 12 * 2**30  # bytes: a CUDA build of torch, and what pip keeps of it meanwhile
LOSS = ["linear_logprobs", "targets", "nan", "fused", "step_kto", "ops", "plan", "cli"]
TRAINING = ["data", "collator", "trainer", "train_command", "label", "sampler"]
PROPERTIES = ["properties_head", "properties_loss", "properties_segments", "bad_input"]
WIDE = [*LOSS, *TRAINING, *PROPERTIES, "parallel", "waits", "triton", "bitwise"]
TRITON = ("triton",)  # which CUDA builds of torch bring


class Leg(NamedTuple):
    """One environment.

    python: its version. torch: "pinned", as constraints.txt says, or a requirement. extras: of the
    package. without: packages to take out again. extension: whether the C++ one is built.
    tests: files of tests/.
    """

    name: str
    python: str = THIS_PYTHON
    torch: str = "pinned"
    extras: str = ""
    without: tuple[str, ...] = ()
    extension: bool = True
    tests: list[str] = LOSS


LEGS = [  # downloads early: they leave the cores to the others' tests
    Leg("oldest torch, Python 3.10", "3.10", "torch==2.8.0", "train", tests=WIDE),
    Leg("without Triton", extras="train", without=TRITON, tests=[*LOSS, *TRAINING]),
    Leg("Python 3.12", "3.12", "pinned", "train", tests=WIDE),
    Leg("newer torch", torch="torch==2.14.1", extras="train", tests=[*LOSS, "parallel", "waits"]),
    Leg("without the extension", extras="triton", extension=False),
    Leg("without transformers", extras="triton", tests=[*LOSS, "native", "native_boundary"]),
    Leg("without any of the three", without=TRITON, extension=False),
]


def find_python(version: str) -> str | None:
    """A Python of this version that runs."""
    if version == THIS_PYTHON:
        return sys.executable
    home = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    found = [
        shutil.which(f"python{version}"),
        *glob.glob(f"{home}/versions/{version}.*/bin/python"),
    ]
    for python in filter(None, found):
        code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return python
    return None


def install(leg: Leg, python: str, folder: Path) -> Path:
    """The environment's Python, the package and pytest installed."""
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    inside = folder / "venv/bin/python"
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if leg.torch != "pinned":  # which brings the Triton that fits
        pins = [pin for pin in pins if not pin.startswith(("torch==", "triton=="))]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")
    pip = [inside, "-m", "pip", "install", "--disable-pip-version-check", "-q", "-c", constraints]
    # torch first: with a requirement that is open upwards pip may prefer another build
    subprocess.run([*pip, "torch" if leg.torch == "pinned" else leg.torch], check=True)
    source = folder / "source"  # not the checkout, which may have a build of another kind
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("stepkto_kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    package = f"{source}[{leg.extras}]" if leg.extras else str(source)
    settings = os.environ | {"STEPKTO_CUDA": "0"}
    if not leg.extension:  # a machine without a compiler
        settings |= {"CC": "false", "CXX": "false"}
    # numpy: Triton's interpreter needs it, no other part of the loss does
    more = ["pytest", "hypothesis", *(["numpy"] if "triton" in leg.extras else [])]
    subprocess.run([*pip, package, *more], check=True, env=settings)
    if leg.without:
        subprocess.run([inside, "-m", "pip", "uninstall", "-q", "-y", *leg.without], check=True)
    return inside


def versions(python: Path) -> dict[str, object]:
    """What is there, as the environment itself says."""
    code = """
import importlib.metadata as m, json, platform, stepkto_kernels, torch
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return None
print(json.dumps({
    "python": platform.python_version(),
    "torch": torch.__version__,
    "triton": version("triton"),
    "transformers": version("transformers"),
    "backends": stepkto_kernels.available_backends(),
    "where": stepkto_kernels.__file__,
}))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [python, "-I", "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def expected(leg: Leg, found: dict[str, object]) -> bool:
    """Whether what is there is what the leg is named after."""
    backends = found["backends"]
    assert isinstance(backends, dict)
    has = {
        "Triton": found["triton"] is not None,
        "the extension": backends["native"] == "ok",
        "transformers": found["transformers"] is not None,
    }
    missing = [name for name, there in has.items() if not there]
    if leg.name.startswith("without"):
        named = list(has) if "any" in leg.name else [leg.name.removeprefix("without ")]
        return set(named) <= set(missing)
    asked = leg.torch.removeprefix("torch==")
    torch_fits = asked in ("pinned", str(found["torch"]).split("+")[0])
    python_fits = str(found["python"]).startswith(leg.python + ".")
    return torch_fits and python_fits and "the extension" not in missing


def run(leg: Leg, python: str) -> dict[str, object]:
    folder = OUT / re.sub(r"\W+", "_", leg.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.monotonic()
    inside = install(leg, python, folder)
    installed = time.monotonic()
    found = versions(inside)
    assert str(ROOT / "stepkto_kernels") not in str(found.pop("where")), "the checkout's package"
    row: dict[str, object] = {"leg": leg.name, **found, "as_named": expected(leg, found)}
    checkout = folder / "checkout"  # tests and what they read, not the package
    for name in ("tests", "csrc"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, checkout)
    report = folder / "junit.xml"
    names = [f"tests/test_{name}.py" for name in leg.tests]
    command = [inside, "-m", "pytest", "-q", "--durations=20", "-p", "no:cacheprovider", *names]
    # fp16 GEMMs in Triton's interpreter take minutes, and `make test` has them
    command += ["-k", "not (triton and fp16)"]
    done = subprocess.run(
        [*command, f"--junitxml={report}"],
        cwd=checkout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    (folder / "output.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    suite = ElementTree.parse(report).getroot()[0]
    counts = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    if done.returncode != 0:
        print(done.stdout[-4000:], file=sys.stderr)
    shutil.rmtree(folder / "venv")
    seconds = {
        "install_seconds": round(installed - start, 1),
        "test_seconds": round(time.monotonic() - installed, 1),
    }
    return row | counts | seconds


def run_if_there(leg: Leg) -> dict[str, object]:
    python = find_python(leg.python)
    free = shutil.disk_usage(ROOT).free
    row: dict[str, object] = {"leg": leg.name}
    if python is None:
        row["left_out"] = f"no Python {leg.python} here"
    elif free < ROOM:
        row["left_out"] = f"{free / 2**30:.0f} GiB of disk are free, {ROOM / 2**30:.0f} wanted"
    else:
        try:
            row = run(leg, python)
        except (subprocess.CalledProcessError, ElementTree.ParseError, OSError) as error:
            row = {"leg": leg.name, "broken": str(error)}  # the other legs go on
    print(json.dumps(row), flush=True)
    return row


def has_passed(row: dict[str, object]) -> bool:
    """A leg that is what it is named after and whose tests passed, at least one of them."""
    counts = [row.get(name) for name in ("failures", "errors")]
    return bool(row.get("as_named") and row.get("tests")) and counts == [0, 0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [leg.name for leg in LEGS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--jobs", type=int, default=2, help="at a time, default 2")
    parser.add_argument("--result", type=Path, help=f"JSON file; with all legs {RESULT.name}")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(run_if_there, [leg for leg in LEGS if leg.name in args.only]))
    target = args.result or (RESULT if args.only == names else None)
    if target is not None and not any("broken" in row for row in rows):
        result = {"environment": environment("cpu", "python benchmarks/matrix.py"), "rows": rows}
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    left_out = sum("left_out" in row for row in rows)
    passed = sum(map(has_passed, rows))
    failed = len(rows) - left_out - passed
    print(f"{passed} passed, {failed} failed, {left_out} left out")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
