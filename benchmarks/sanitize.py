"""The C++ extension under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

    python benchmarks/sanitize.py                 # all of them; half an hour on two cores
    python benchmarks/sanitize.py --only thread

For each, the extension is built into a copy of the package, a probe with a deliberate fault shows
that the sanitizer is at work, and the tests of every op, the property tests and the fuzzer of the
boundary run on that copy. The CUDA kernels are there too, as far as tests/test_cuda.py runs them on
the host. ThreadSanitizer needs clang with its OpenMP runtime, whose barriers it can see (Debian:
clang-16, libomp-16-dev, libclang-rt-16-dev); the others take g++.
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
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

from stepkto_kernels.bench.environment import environment  # noqa: E402

OUT = ROOT / "out/sanitize"
RESULT = ROOT / "benchmarks/results/sanitize.json"
SOURCES = ["bindings.cpp", "rows_cpu.cpp", "segments_cpu.cpp"]
OP_TESTS = ["linear_logprobs", "targets", "nan", "ops", "fused", "step_kto", "bitwise"]
PROPERTIES = ["properties_head", "properties_loss", "properties_segments", "bad_input"]
TESTS = ["native", "native_boundary", *OP_TESTS, *PROPERTIES]
REPORT = re.compile(r"(?:ERROR|WARNING): \w+Sanitizer|runtime error:|SUMMARY: \w+Sanitizer")


@dataclass(frozen=True)
class Sanitizer:
    """How the extension is built for a sanitizer, and how Python then has to be started.

    preload: libraries that have to be there before all others. fault: C++ statements that it has to
    report. threads: torch's, in the tests.
    """

    name: str
    compiler: str
    flags: list[str]
    preload: list[str]
    environment: dict[str, str]
    tests: list[str]
    fault: str
    threads: int = 1


def library(compiler: str, name: str) -> str:
    return subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()


def with_gcc() -> list[Sanitizer]:
    stop = "halt_on_error=1:exitcode=99"
    cxx = library("g++", "libstdc++.so.6")  # or its exceptions are not seen
    address = Sanitizer(
        "address",
        "g++",
        ["-fsanitize=address", "-fno-omit-frame-pointer", "-fopenmp"],
        [library("g++", "libasan.so"), cxx],
        # what Python keeps until it ends is not a leak; leaks.py looks for those
        {"ASAN_OPTIONS": f"detect_leaks=0:detect_stack_use_after_return=0:{stop}"},
        [*TESTS, "cuda"],
        "volatile char* p = new char[8]; p[8] = 1; delete[] p;",
    )
    undefined = Sanitizer(
        "undefined",
        "g++",
        ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-fopenmp"],
        [library("g++", "libubsan.so"), cxx],
        {"UBSAN_OPTIONS": f"print_stacktrace=1:{stop}"},
        [*TESTS, "cuda"],
        "volatile int x = 2147483647; x = x + 1;",
    )
    return [address, undefined]


def with_clang() -> list[Sanitizer]:
    names = ["clang++", *(f"clang++-{version}" for version in range(22, 13, -1))]
    compiler = next(filter(shutil.which, names), None)
    if compiler is None:
        raise SystemExit("thread: want clang++ with libomp and its sanitizers, got none")
    runtime = library(compiler, "libclang_rt.tsan-x86_64.so")
    if not os.path.isabs(runtime):
        runtime = f"{library(compiler, 'lib')}/linux/libclang_rt.tsan-x86_64.so"
    home = Path(shutil.which(compiler) or "").resolve().parents[1]
    archer = next(iter(glob.glob(f"{home}/lib/libarcher.so")), None)
    if archer is None or not os.path.exists(runtime):
        raise SystemExit(f"thread: want libarcher.so in {home} and {runtime}, got none")
    return [
        Sanitizer(
            "thread",
            compiler,
            ["-fsanitize=thread", "-shared-libsan", "-fopenmp", f"-Wl,-rpath,{home}/lib"],
            [runtime],
            {
                # torch's own threads are not built for it
                "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=99",
                "OMP_TOOL_LIBRARIES": archer,
            },
            TESTS,
            "int x = 0;\n#pragma omp parallel for num_threads(4)\n"
            "for (int i = 0; i < 100000; ++i) x += i;",
            threads=3,
        )
    ]


def build(sanitizer: Sanitizer, folder: Path) -> None:
    """The package, its tests and sources in `folder`, with an extension for the sanitizer."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("stepkto_kernels", "tests", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    target = folder / f"stepkto_kernels/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = (pybind11.get_include(), sysconfig.get_paths()["include"])
    command = [sanitizer.compiler, "-shared", "-fPIC", "-std=c++17", "-O1", "-g", *sanitizer.flags]
    command += ["-fvisibility=hidden", "-ffp-contract=off", *(f"-I{path}" for path in includes)]
    subprocess.run(
        [*command, *(folder / "csrc" / name for name in SOURCES), "-o", target], check=True
    )
    probe = folder / "probe.cpp"
    visible = '__attribute__((visibility("default")))'
    probe.write_text(
        f'extern "C" {visible} void probe() {{ {sanitizer.fault} }}\n', encoding="utf-8"
    )
    subprocess.run([*command, probe, "-o", folder / "probe.so"], check=True)


def started(sanitizer: Sanitizer, folder: Path) -> dict[str, str]:
    """Environment of a Python that imports the package from `folder`."""
    return os.environ | {
        "LD_PRELOAD": " ".join(sanitizer.preload),
        "PYTHONPATH": str(folder),
        "PYTHONMALLOC": "malloc",  # seen by the sanitizer
        "STEPKTO_TEST_THREADS": str(sanitizer.threads),
        "STEPKTO_HOST_FLAGS": " ".join(sanitizer.flags),
        **sanitizer.environment,
    }


def sees_faults(sanitizer: Sanitizer, folder: Path) -> bool:
    """Whether the sanitizer ends a process that has our extension and runs into a fault."""
    code = f"""
import ctypes, torch
from stepkto_kernels import native
assert native._native.__file__.startswith({str(folder)!r})
ctypes.CDLL({str(folder / "probe.so")!r}).probe()
"""
    environment = started(sanitizer, folder)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.returncode != 0 and REPORT.search(done.stderr) is not None


def run_tests(
    sanitizer: Sanitizer, folder: Path, cases: int, only: list[str] | None
) -> dict[str, object]:
    """Numbers of tests by outcome, and what the sanitizer reported."""
    files = [name for name in sanitizer.tests if only is None or name in only]
    names = [f"tests/test_{name}.py" for name in files]
    report = folder / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names]
    # what runs none of our C++
    command += [
        "-k",
        "not triton and not torch and not compile and not gpu",
        f"--junitxml={report}",
    ]
    environment = started(sanitizer, folder) | {"STEPKTO_FUZZ": str(cases)}
    start = time.monotonic()
    output = folder / "output.txt"
    with output.open("w", encoding="utf-8") as file:
        subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=file)
    text = output.read_text(encoding="utf-8", errors="replace")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if report.exists():
        suite = ElementTree.parse(report).getroot()[0]
        counts = {name: int(suite.get(name, 0)) for name in counts}
    else:
        print(text[-3000:], file=sys.stderr)
    unfinished = not report.exists()
    return counts | {
        "reports": len(REPORT.findall(text)),
        "unfinished": unfinished,
        "files": files,
        "cases_each": cases,
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = ("address", "undefined", "thread")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--cases", type=int, default=500, help="of each property")
    parser.add_argument(
        "--files", nargs="+", choices=[*TESTS, "cuda"], help="of tests, all of them"
    )
    parser.add_argument("--result", type=Path, default=RESULT, help="JSON file")
    args = parser.parse_args()
    rows, good = [], True
    gcc = with_gcc() if set(args.only) & {"address", "undefined"} else []
    clang = with_clang() if "thread" in args.only else []
    for sanitizer in (*gcc, *clang):
        if sanitizer.name not in args.only:
            continue
        folder = OUT / sanitizer.name
        build(sanitizer, folder)
        row: dict[str, object] = {"sanitizer": sanitizer.name, "threads": sanitizer.threads}
        version = subprocess.check_output([sanitizer.compiler, "--version"], text=True)
        row["compiler"] = version.split("\n")[0]
        row["sees_a_deliberate_fault"] = sees_faults(sanitizer, folder)
        row |= run_tests(sanitizer, folder, args.cases, args.files)
        print(json.dumps(row), flush=True)
        rows.append(row)
        wrong = row["failures"], row["errors"], row["reports"], row["unfinished"]
        good = good and bool(row["sees_a_deliberate_fault"]) and not any(wrong)
    if tuple(args.only) == names:
        command = "python benchmarks/sanitize.py"
        if args.files:
            command += f" --cases {args.cases} --files {' '.join(args.files)}"
        result = {"environment": environment("cpu", command), "rows": rows}
        args.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
