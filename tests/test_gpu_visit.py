"""The script of a GPU visit, with parts that need no GPU."""

import importlib.util
import io
import json
import pathlib
import sys
import time

import pytest

PATH = pathlib.Path(__file__).parent.parent / "benchmarks/gpu_visit.py"


@pytest.fixture(scope="module")
def visit():
    spec = importlib.util.spec_from_file_location("gpu_visit", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules[spec.name]


def python(visit, code, seconds=30, **options):
    return visit.Part((sys.executable, "-c", code), seconds, **options)


def run(visit, parts, tmp_path, limit=60.0):
    file = io.StringIO()
    results = visit.run_parts(list(parts), parts, limit, tmp_path, visit.Log(file))
    return results, file.getvalue()


def test_one_part_fails_and_the_next_runs(visit, tmp_path):
    parts = {
        "bad": python(visit, "import sys; print('so it was'); sys.exit(3)"),
        "missing": visit.Part(("/no/such/program",), 5),
        "no tool": python(visit, "", needs="no-such-tool-here"),
        "good": python(
            visit,
            "import os, stepkto_kernels; open('{out}/x', 'w').write(os.environ['SAID'])",
            env={"SAID": "hello"},
        ),
    }
    results, log = run(visit, parts, tmp_path)
    assert results["bad"] == "failed: exit status 3" and "so it was" in log
    assert results["missing"].startswith("failed: ")
    assert results["no tool"].startswith("not run: no-such-tool-here is not on the PATH")
    assert results["good"] == "ok" and (tmp_path / "x").read_text() == "hello"


def test_a_part_is_cut_off_with_its_children(visit, tmp_path, monkeypatch):
    monkeypatch.setattr(visit, "GRACE", 0.5)
    child = "import time; print('there', flush=True); time.sleep(8); open('{out}/late', 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    results, log = run(visit, {"slow": python(visit, code)}, tmp_path, limit=2.0)
    assert results["slow"] == "cut off after 2 s" and "there" in log
    assert time.monotonic() - begin < 6
    time.sleep(max(0.0, 9 - (time.monotonic() - begin)))
    assert not (tmp_path / "late").exists()


def test_time_that_is_left_over_goes_to_the_next_part(visit):
    assert visit.allowance([20, 100, 100], 300) == 100
    assert visit.allowance([100, 100], 280) == 180
    assert visit.allowance([100, 300], 200) == 50  # too little: in proportion
    assert visit.allowance([100], 40) == 40
    usual = sum(visit.PARTS[name].seconds for name in visit.USUAL)
    assert usual <= visit.LIMIT < 600 - 2 * visit.GRACE


def test_commands_of_the_parts_are_accepted(visit):
    """By the parser of the benchmark runner; of the others that the program is there."""
    import argparse

    from stepkto_kernels.bench import runner, tune

    parser, tuner = argparse.ArgumentParser(), argparse.ArgumentParser()
    runner.add_arguments(parser)
    tune.add_arguments(tuner)
    command = visit.PARTS["tune"].command
    assert len(tuner.parse_args(command[command.index("tune") + 1 :]).shapes) == 2
    for part in visit.PARTS.values():
        if "bench" in part.command:
            args = parser.parse_args(part.command[part.command.index("bench") + 1 :])
            assert args.device == "cuda" and set(args.suite) <= set(runner.SUITES)


def row(**values):
    base = dict(N=8, H=2, V=9, dtype="bfloat16", path="forward", name="ours", backend="triton")
    base |= dict(who="stepkto_kernels", status="ok", ratio_own=1.05, of_floor=1.1, extra_mib=12.4)
    return {**base, "ms_best": 3.0, **values}


def test_table_has_our_best_beside_the_best_peer(visit):
    rows = [
        row(name="gemm", who="bare GEMM", ms_best=1.0),
        row(backend="torch", ms_best=4.0),
        row(),
        row(name="trl", who="TRL", backend="-", ms_best=9.0),
        row(name="cce", who="CCE", backend="-", ms_best=None, status="out of memory: 80 GiB"),
        row(path="frozen", ms_best=None, status="wrong: max_dlogp", extra_mib=None),
    ]
    text = visit.table(rows)
    (forward,) = (line for line in text.splitlines() if line.startswith("| forward"))
    cells = [cell.strip() for cell in forward.strip("|").split("|")]
    assert cells[1:] == [
        "8x2x9 bfloat16",
        "stepkto_kernels, triton",
        "3.00",
        "1.050",
        "1.100",
        "12",
        "TRL 9.00 ms",
    ]
    assert "forward 8x2x9 CCE/-: out of memory" in text
    assert "frozen 8x2x9 stepkto_kernels/triton: wrong" in text


def test_the_table_comes_last_and_a_failure_shows_in_the_status(
    visit, tmp_path, monkeypatch, capsys
):
    written = json.dumps({"rows": [row()]})
    good = python(visit, f"open('{{out}}/head_cuda.json', 'w').write({written!r})")
    monkeypatch.setitem(visit.PARTS, "head", good)
    monkeypatch.setenv("STEPKTO_GPU_OUT", str(tmp_path / "new"))
    assert visit.main(["--parts", "head"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("| forward")
    assert (tmp_path / "new/log.txt").read_text() == out
    monkeypatch.setitem(visit.PARTS, "doctor", python(visit, "1 / 0"))
    assert visit.main(["--parts", "doctor", "head"]) == 1
    assert visit.main(["--parts", "doctor"]) == 1
    assert not (tmp_path / "new/head_cuda.json").exists()  # of the visit before
