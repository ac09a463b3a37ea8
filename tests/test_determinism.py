"""README's table of promises about bits: threads and instruction sets here, the rest where it says.

Letters: N tokens, V vocabulary, H hidden size.
"""

import ast
import importlib.machinery
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sysconfig

import pytest
import torch

from stepkto_kernels import linear_logprobs, linear_logprobs_with_stats, native

ROOT = pathlib.Path(__file__).parent.parent
CSRC = ROOT / "csrc"
# What setup.py compiles for, and what a processor has to say that it can.
LEVELS = {"x86-64": None, "x86-64-v3": "avx2", "x86-64-v4": "avx512f"}
STATS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_prob")


@pytest.mark.parametrize("mode", ["forward", "frozen", "cached", "recompute"])
@pytest.mark.parametrize(
    "size",
    [(37, 300, 64), (700, 4100, 64), (64, 18992, 33), (5, 300, 1), (27, 40, 10), (17, 99, 4096)],
    ids=str,
)
def test_any_number_of_threads(head_problem, evaluate, backend, size, mode):
    """Log-probs: the GEMMs of the gradients may add up in another order."""
    if backend == "triton":
        pytest.skip("has no threads of its own")
    N, V, H = size
    problem = head_problem(N, V, H, bias=True, softcap=9.0)
    needs = {"forward": (), "frozen": ("hidden",)}.get(mode, ("hidden", "weight", "bias"))
    budget = 10**9 if mode == "cached" else None
    found = []
    for threads in (1, 2, 3, 8, 64):  # also more than there are processors
        torch.set_num_threads(threads)
        found.append(
            evaluate(linear_logprobs, problem, needs, memory_budget=budget, backend=backend)
        )
    for other in found[1:]:
        assert torch.equal(other["logps"], found[0]["logps"])


@pytest.mark.parametrize("threads", [1, 3, 8, 16, 64])
def test_any_selection_with_any_number_of_threads(head_problem, backend, threads):
    """Threads share rows and columns out, and a row's bits must not depend on its share."""
    if backend == "triton":
        pytest.skip("has no threads of its own")
    torch.set_num_threads(threads)
    for N, V, H in ((14, 21, 33), (17, 40, 5), (128, 1000, 10), (300, 2100, 64)):
        problem = head_problem(N, V, H, ignored="none")
        call = lambda rows: linear_logprobs(
            problem.hidden[rows],  # noqa: B023
            problem.weight,  # noqa: B023
            problem.target[rows],  # noqa: B023
            backend=backend,
        )
        whole = call(slice(None))
        for kept in (1, 5, N // 2, 3 * N // 4, N):
            rows = torch.randperm(N)[:kept]
            assert torch.equal(call(rows), whole[rows]), (N, V, H, kept)


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """_native for single instruction sets, as far as this processor has them."""
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("g++") is None or not pathlib.Path("/proc/cpuinfo").exists():
        pytest.skip("no g++, or no list of the processor's instructions")
    able = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    folder = tmp_path_factory.mktemp("builds")
    command = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-DKTO_CLONES="]
    command += [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    exact = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]  # as setup.py
    for name, flags in (("bindings", ["-O0"]), ("segments_cpu", exact)):
        source, target = CSRC / f"{name}.cpp", folder / f"{name}.o"
        subprocess.run([*command, *flags, "-c", source, "-o", target], check=True)
    found = {}
    for level, flag in LEVELS.items():
        if flag is not None and flag not in able:
            continue
        target = folder / f"{level}.so"
        sources = [folder / "bindings.o", folder / "segments_cpu.o", CSRC / "rows_cpu.cpp"]
        more = [*exact, f"-march={level}", "-shared", *sources]
        subprocess.run([*command, *more, "-o", target], check=True)
        loader = importlib.machinery.ExtensionFileLoader("_native", str(target))
        spec = importlib.util.spec_from_file_location("_native", target, loader=loader)
        found[level] = importlib.util.module_from_spec(spec)
        loader.exec_module(found[level])
    return found


@pytest.mark.skipif(native.WHY_NOT is not None, reason=str(native.WHY_NOT))
def test_any_instruction_set(head_problem, builds, monkeypatch, logit_options):
    if len(builds) < 2:
        pytest.skip(f"this processor has only {list(builds)}")
    problem = head_problem(70, 2 * 2049 + 31, 16, spread=8.0, **logit_options)
    results = {}
    for level, build in {"installed": native._native, **builds}.items():
        monkeypatch.setattr(native, "_native", build)
        hidden, weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))
        for needs_weight in (False, True):  # frozen, then recompute
            weight.requires_grad_(needs_weight)
            logps, stats = linear_logprobs_with_stats(
                hidden,
                weight,
                problem.target,
                problem.bias,
                stats=STATS,
                backend="native",
                **problem.options,
            )
            (logps * problem.upstream).sum().backward(retain_graph=needs_weight)
            results.setdefault(level, []).extend([logps.detach(), *(x.detach() for x in stats)])
        (logps * problem.upstream + stats.entropy).sum().backward()
        results[level] += [hidden.grad, weight.grad]
    want = results.pop("installed")
    for level, got in results.items():
        for i, (a, b) in enumerate(zip(want, got, strict=True)):
            assert torch.equal(a, b), f"{level}, result {i}"


def test_readmes_promises_are_tests():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## The same bits\n")[1].split("\n## ")[0]
    named = re.findall(r"`(test_\w+)::(test_\w+)`", section)
    assert len(named) >= 8
    for module, name in named:
        tree = ast.parse((ROOT / f"tests/{module}.py").read_text(encoding="utf-8"))
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in tests, f"no {name} in {module}.py"
