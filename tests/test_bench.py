"""The benchmark runner at tiny sizes: what it writes, and that nothing wrong is timed."""

import json
import math
from dataclasses import replace

import pytest
import torch

from stepkto_kernels import available_backends, reference
from stepkto_kernels.bench import exact as exact_module
from stepkto_kernels.bench import memory, peers, plans, runner, suites, timing
from stepkto_kernels.bench.contenders import Contender, Skip, execute
from stepkto_kernels.bench.exact import Check, exact_logps
from stepkto_kernels.bench.memory_suite import SLACK, cuda_slack, verdict
from stepkto_kernels.bench.options import Options, failure
from stepkto_kernels.bench.problems import (
    Shape,
    head_problem,
    loss_problem,
    on_path,
    sequence_length,
)
from stepkto_kernels.bench.timing import BareGemm, Times, interleaved, ratios
from stepkto_kernels.cli import main

TINY = Shape(32, 16, 100)


@pytest.fixture(autouse=True)
def no_poison():
    """conftest fills fresh tensors with NaN, and that changes what is timed and measured."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


def read(folder, suite):
    assert (folder / f"{suite}_cpu.png").read_bytes()[:4] == b"\x89PNG"
    return json.loads((folder / f"{suite}_cpu.json").read_text())


def bench(folder, suite, *arguments):
    fixed = ["--output", str(folder), "--repeats", "1", "--peers", "naive", "torch"]
    assert main(["bench", "--suite", suite, *fixed, "--shapes", str(TINY), *arguments]) == 0
    return read(folder, suite)


# ---- every suite ------------------------------------------------------------------------------


def check_environment(result):
    for key in ("device", "threads", "python", "torch", "commit", "date", "versions"):
        assert key in result
    suite = result["benchmark"]
    assert result["command"].startswith(f"stepkto bench --suite {suite} --device cpu")
    assert result["complete"] and all(row["status"] == "ok" for row in result["rows"])
    assert result["roofline"]["copy_gb_s"] > 0


@pytest.mark.parametrize("suite", ["head", "loss"])
def test_timed_suites(suite, tmp_path, capsys):
    result = bench(tmp_path, suite, "--no-memory")
    check_environment(result)
    rows = result["rows"]
    assert {row["path"] for row in rows} == set(runner.SUITE_PATHS[suite])
    for path in runner.SUITE_PATHS[suite]:
        here = [row for row in rows if row["path"] == path]
        (bare,) = (row for row in here if row["name"] == "gemm")
        assert bare["ratio"] == 1 and bare["units"] == 3
        assert {"ours", "naive" if path != "recompute" else "torch"} <= {r["name"] for r in here}
        for row in here:
            work = (
                row["units"] * 2e-9 * math.prod(TINY) / result["roofline"]["gemm_tflops"]["float32"]
            )
            moved = row["bytes"] / result["roofline"]["copy_gb_s"] * 1e-6
            assert row["floor_ms"] == pytest.approx(max(work, moved), rel=1e-2)
            assert row["of_floor"] == pytest.approx(row["ms_best"] / row["floor_ms"], rel=1e-3)
            assert row["ms_best"] <= row["ms_median"]
            assert row["ratio"] == pytest.approx(row["ms_best"] / bare["ms_best"], rel=1e-3)
            assert row["ratio_own"] == pytest.approx(row["ratio"] * 3 / row["units"], rel=1e-3)
            assert row["extra_mib"] is None
            if row["name"] != "gemm":
                error = row["max_dlogp" if suite == "head" else "loss_error"]
                assert error < 1e-4
    out = capsys.readouterr().out
    assert "ms best" in out and f"{TINY} float32" in out
    if suite == "loss":
        assert result["skipped"][-1]["who"] == "torch linear_cross_entropy"
        assert "no KTO loss" in result["skipped"][-1]["reason"]


def test_segments(tmp_path):
    result = bench(tmp_path, "segments")
    check_environment(result)
    for path in ("segment_sums", "step_kto_loss"):
        ours, plain = (row for row in result["rows"] if row["path"] == path)
        assert plain["ratio_to_plain"] == 1
        expected = ours["ms_best"] / plain["ms_best"]
        assert ours["ratio_to_plain"] == pytest.approx(expected, rel=1e-3)
        for row in (ours, plain):
            assert row["gb_s"] == pytest.approx(row["bytes"] / row["ms_best"] / 1e6, rel=1e-3)
            floor = row["bytes"] / result["roofline"]["copy_gb_s"] / 1e6
            assert row["floor_ms"] == pytest.approx(floor, rel=1e-2)


def test_accuracy_reports_both_dtypes(tmp_path):
    result = bench(tmp_path, "accuracy")
    check_environment(result)
    for row in result["rows"]:
        assert math.isfinite(row["max_dlogp"]) and row["mean_dlogp"] <= row["max_dlogp"]
        assert row["dhidden_error"] > 0
        assert (row["dweight_error"] is None) == (row["path"] == "frozen")
    worst = {
        (row["name"], row["dtype"]): row["max_dlogp"]
        for row in result["rows"]
        if row["path"] == "cached"
    }
    assert worst["ours", "bfloat16"] < worst["naive", "bfloat16"] / 100


def test_memory_runs_in_a_fresh_process(tmp_path):
    result = bench(
        tmp_path, "memory", "--paths", "recompute", "--peers", "none", "--backends", "torch"
    )
    check_environment(result)
    assert "--backends torch" in result["command"]
    (row,) = result["rows"]
    assert row["backend"] == "torch"
    assert row["name"] == "ours" and row["planned_mib"] >= 0
    assert row["extra_mib"] < row["planned_mib"] + SLACK


def test_memory_over_the_plan_is_wrong():
    assert verdict(10 + SLACK, 10.0) == "ok"
    assert verdict(10.1 + SLACK, 10.0).startswith("wrong")
    assert verdict(1e6, None) == "ok"


def test_memory_counts_what_is_made():
    N, H, V = 64, 8, 2**18  # blocks above 32 MiB are always mapped on their own

    def run(problem, hidden, weight, path):
        return problem.upstream.new_ones(N, V).sum(1)  # 64 MiB of fp32

    case = memory.Case("head", "forward", "-", (N, H, V), "float32", "cpu")
    contender = Contender("test", "test", "-", {"forward": 1}, run)
    assert 62 < memory.measure(case, contender) < 70
    # whatever ran before in this process may have left as much free
    blocks = [bytearray(b"x" * 100_000) for _ in range(1501)]
    last = blocks.pop()  # the heap ends after it
    del blocks
    assert 62 < memory.measure(case, contender) < 70
    assert len(last) == 100_000


def test_one_process_answers_for_several_cases(monkeypatch):
    """As on CUDA; a case that fails keeps nobody from being measured."""
    case = memory.Case("head", "forward", "naive/-", (32, 16, 2**17), "float32", "cpu")
    cases = [case, replace(case, key="nobody/-"), replace(case, path="half_prompt")]
    first, nobody, half = memory._peaks(cases)
    assert first > 10 and half > 10  # 16 MiB of logits
    assert nobody.startswith("failed: StopIteration")
    assert list(memory.in_fresh_process([])) == []
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    assert list(memory.in_fresh_process(cases[:1])) == ["failed: ended by signal or status 1"]


def test_memory_on_cuda_has_room_for_wide_sums():
    shape = Shape(8192, 4096, 131072)
    plan = plans.describe("recompute", shape, 2, "cuda", None)
    sums = 2 * (8192 + plan.vocab_chunk) * 4096 * 4
    assert cuda_slack(plan, shape, 2) == 2.5 * plan.token_chunk * plan.vocab_chunk * 4 + sums


# ---- the gate ---------------------------------------------------------------------------------


def right(problem, hidden, weight, path):
    return reference.linear_logprobs(hidden, weight, problem.target)


def off_by_a_hundredth(problem, hidden, weight, path):
    return right(problem, hidden, weight, path) * 1.01


def wrong_gradient(problem, hidden, weight, path):
    logps = right(problem, hidden, weight, path)
    return logps + 0.01 * (logps - logps.detach())


def not_a_number(problem, hidden, weight, path):
    return right(problem, hidden, weight, path) * torch.nan


def too_short(problem, hidden, weight, path):
    return right(problem, hidden, weight, path)[1:]


def raises(problem, hidden, weight, path):
    raise RuntimeError("no kernel\nfor this")


def too_large(problem, hidden, weight, path):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 80 GiB")


@pytest.mark.parametrize(
    ("run", "status"),
    [
        (right, "ok"),
        (off_by_a_hundredth, "wrong: max_dlogp"),
        (wrong_gradient, "wrong: dhidden_error"),
        (not_a_number, "wrong: max_dlogp nan"),
        (too_short, "failed: "),
        (raises, "failed: RuntimeError: no kernel"),
        (too_large, "out of memory: OutOfMemoryError: CUDA out of memory."),
    ],
)
def test_a_wrong_path_is_reported_and_not_timed(run, status):
    contender = Contender("test", "test", "-", {"recompute": 4}, run)
    options = Options(paths=("recompute",), repeats=1, memory=False)
    _, row = suites.timed_shape("head", [contender], TINY, "float32", options)
    assert row["status"].startswith(status) and "\n" not in row["status"]
    timed = row["status"] == "ok"
    assert all((row[key] is not None) == timed for key in ("ms_best", "ratio", "ratio_own"))


def test_out_of_memory_while_timing_is_a_row():
    calls = []

    def run(problem, hidden, weight, path):
        calls.append(problem.shape)
        # two shapes that warm up, the check, one round
        return (too_large if len(calls) > 4 else right)(problem, hidden, weight, path)

    contender = Contender("test", "test", "-", {"recompute": 4}, run)
    other = Contender("other", "other", "-", {"recompute": 4}, right)
    options = Options(paths=("recompute",), repeats=3, memory=False)
    rows = list(suites.timed_shape("head", [contender, other], TINY, "float32", options))
    assert [row["status"].partition(":")[0] for row in rows] == ["ok", "out of memory", "ok"]
    assert [row["ms_best"] is not None for row in rows] == [True, False, True]
    assert len(calls) == 5


def test_out_of_memory_on_a_cpu_is_told_apart():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert failure(raised.value).startswith("out of memory: RuntimeError")


def half_wrong(problem, hidden, weight, path):
    """The ignored tokens have log-probs."""
    return reference.linear_logprobs(hidden, weight, problem.target.clamp(min=0))


@pytest.mark.parametrize("name", ["naive", "torch"])
def test_ignored_tokens_are_checked(name):
    problem = on_path(head_problem(TINY, torch.float32, "cpu"), "half_prompt")
    ignored = problem.target == -100
    assert ignored.tolist() == [i % 16 < 8 for i in range(TINY.N)]
    exact = exact_logps(problem.hidden, problem.weight, problem.target)
    check = Check(problem, exact)
    run = peers.PEERS[name].head[1]
    if peers.PEERS[name].why_not("cpu") is None:
        outcome = execute(Contender("t", "t", "-", {}, run), problem, "half_prompt")
        assert check.verdict(check.errors(outcome)) == "ok"
        assert outcome.value[ignored].abs().max() == 0 == outcome.dhidden[ignored].abs().max()
    outcome = execute(Contender("t", "t", "-", {}, half_wrong), problem, "half_prompt")
    assert check.verdict(check.errors(outcome)).startswith("wrong: max_dlogp")


def test_only_who_drops_counts_half_of_the_units():
    found, _ = peers.contenders("head", "cpu")
    for contender in found:
        full = contender.units.get("recompute", contender.units.get("cached"))
        share = 0.5 if contender.name == "ours" else 1
        assert contender.units["half_prompt"] == share * full
    assert peers.PEERS["cce"].head[0]["half_prompt"] == 2


def test_our_own_wrong_row_is_an_error(tmp_path, monkeypatch):
    def wrong(suite, device, names):
        return [Contender("ours", "ours", "-", {"frozen": 2}, off_by_a_hundredth)], []

    monkeypatch.setattr(suites, "contenders", wrong)
    arguments = ["--output", str(tmp_path), "--shapes", str(TINY), "--paths", "frozen"]
    assert main(["bench", "--suite", "head", "--repeats", "1", *arguments]) == 1
    assert read(tmp_path, "head")["rows"][1]["ms_best"] is None


def test_a_wrong_loss_fails_its_check():
    problem = loss_problem(TINY, torch.float32, "cpu")
    exact = exact_logps(problem.hidden, problem.weight, problem.target)
    check = Check(problem, exact, problem.ref_logps().double())
    run = peers.PEERS["naive"].loss[1]
    good = execute(Contender("t", "t", "-", {}, run), problem, "kto")
    assert check.verdict(check.errors(good)) == "ok"
    for bad in (
        good._replace(value=good.value * 1.01),
        good._replace(dhidden=good.dhidden * 1.01),
        good._replace(dweight=good.dweight * 1.01),
    ):
        assert check.verdict(check.errors(bad)).startswith("wrong")


@pytest.mark.parametrize("held", [2**28, 1])
def test_exact_gradients_are_autograds(held, monkeypatch):
    """Whatever the slices of the vocabulary."""
    monkeypatch.setattr(exact_module, "BYTES", held)
    monkeypatch.setattr(exact_module, "NARROWEST", 32)
    problem = head_problem(TINY, torch.float64, "cpu")
    exact = exact_logps(problem.hidden, problem.weight, problem.target)
    check = Check(problem, exact)
    outcome = execute(Contender("t", "t", "-", {}, right), problem, "cached")
    torch.testing.assert_close(exact.logps, outcome.value)
    torch.testing.assert_close(check.dhidden, outcome.dhidden[check.rows])
    torch.testing.assert_close(check.dweight, outcome.dweight[check.columns])


# ---- times, problems, peers -------------------------------------------------------------------


def test_ratios():
    assert ratios(6.0, 3.0, 4) == (2.0, 1.5)
    assert ratios(3.0, 3.0, 3) == (1.0, 1.0)
    columns = suites.time_columns(Times(2.0, 5.0), Times(4.0, 4.0), units=1)
    assert columns == {
        "ms_best": 2.0,
        "ms_median": 5.0,
        "ratio": 0.5,
        "ratio_median": 1.25,
        "ratio_own": 1.5,
    }


def test_what_fails_is_left_out_and_the_first_round_on_cuda_is_not_timed(monkeypatch):
    measured = []

    def measure(run, calls):
        measured.append(run())
        return 1.0

    monkeypatch.setattr(timing, "_cuda_timer", lambda: measure)
    errors = {}
    runs = {"a": lambda: "a", "bad": lambda: 1 / 0, "b": lambda: "b"}
    times = interleaved(runs, 2, "cuda", failed=lambda name, error: errors.update({name: error}))
    assert set(times) == {"a", "b"} and measured.count("a") == 3
    assert list(errors) == ["bad"] and isinstance(errors["bad"], ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        interleaved(runs, 1, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("suite", ["head", "loss", "segments"])
def test_suites_on_a_gpu(suite, tmp_path):
    fixed = ["--device", "cuda", "--output", str(tmp_path), "--repeats", "2", "--peers", "naive"]
    arguments = ["--shapes", "256x128x1000", "--no-memory"]
    assert main(["bench", "--suite", suite, *fixed, *arguments]) == 0
    result = json.loads((tmp_path / f"{suite}_cuda.json").read_text())
    assert result["complete"] and all(row["ms_best"] > 0 for row in result["rows"])


@pytest.mark.gpu
def test_memory_on_a_gpu_is_the_allocators():
    case = memory.Case("head", "forward", "naive/-", (256, 64, 2**17), "bfloat16", "cuda")
    first, second = memory.in_fresh_process([case, case])
    assert first == pytest.approx(second, abs=1) and first > 64  # MiB, bf16 logits


def test_runs_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(runs, 3, "cpu", calls=2)
    assert "".join(calls) == "aabbcc" + "bbccaa" + "ccaabb"
    assert all(0 <= t.best <= t.median for t in times.values())


@pytest.mark.parametrize("free", [1 << 40, 4 * 32 * 4 * 30])
def test_bare_gemm_is_three_products(free, monkeypatch):
    monkeypatch.setattr("stepkto_kernels.bench.timing.free_bytes", lambda like: free)
    problem = head_problem(TINY, torch.float32, "cpu")
    gemm = BareGemm(problem)
    assert len(gemm.vocab) == (1 if free == 1 << 40 else 4)
    dweight = gemm.run()
    logits = problem.hidden @ problem.weight.T
    torch.testing.assert_close(dweight, logits.T @ problem.hidden)
    torch.testing.assert_close(gemm.dhidden, logits @ problem.weight)


@pytest.mark.parametrize(("N", "T"), [(2048, 256), (4096, 256), (96, 32), (2, 1), (1, 1), (7, 1)])
def test_sequences_divide_the_tokens(N, T):
    assert sequence_length(N) == T


def test_shape_reads_what_it_prints():
    assert Shape.parse(str(TINY)) == TINY
    with pytest.raises(ValueError, match="NxHxV"):
        Shape.parse("0x1x2")


def test_who_is_missing_is_listed_with_the_reason(monkeypatch):
    missing = {"liger-kernel", "trl"}
    real = peers.version
    monkeypatch.setattr(peers, "version", lambda p: None if p in missing else real(p))
    found, skipped = peers.contenders("loss", "cpu")
    assert Skip("TRL chunked", "not installed: pip install trl") in skipped
    assert {c.name for c in found} == {"ours", "naive"}
    assert {s.who for s in skipped} >= {peers.PEERS[n].label for n in ("torch", "liger", "cce")}


def test_keys_find_their_contender():
    for suite in ("head", "loss"):
        found, _ = peers.contenders(suite, "cpu")
        assert len({c.key for c in found}) == len(found)
        for contender in found:
            assert peers.find(suite, contender.key, "cpu").who == contender.who
    backends = {c.backend for c in found if c.name == "ours"}
    assert ("native" in backends) == (available_backends()["native"] == "ok")
