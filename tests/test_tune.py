"""Tuned tile shapes, in Triton's interpreter with a timer that says what it is told.

Letters: N tokens, H hidden size, V vocabulary.
"""

import json
import os
from dataclasses import asdict, replace

import pytest
import torch

from stepkto_kernels import available_backends, linear_logprobs, plan
from stepkto_kernels.bench import tune
from stepkto_kernels.bench.problems import Shape
from stepkto_kernels.bench.timing import Times
from stepkto_kernels.cli import main
from stepkto_kernels.kernels import tiles
from stepkto_kernels.kernels.tiles import Key, TileShape

DEVICE = tiles.Device("interpreter", [0, 0], "3.7.0")
FAST, SLOW = TileShape(16, 32, 16, 4, 1, GROUP_M=3), TileShape(64, 64, 64, 4, 1)
KEYS = [Key(kind, "float16", False) for kind in tiles.KINDS]
SIZES = [Shape(70, 20, 130), Shape(33, 24, 66)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(tiles, "CANDIDATES", (SLOW, FAST))
    monkeypatch.delenv(tiles.VARIABLE, raising=False)


@pytest.fixture
def gemm():
    if available_backends()["triton"] != "ok" or torch.cuda.is_available():
        pytest.skip(f"for Triton's interpreter; triton: {available_backends()['triton']}")
    from stepkto_kernels.kernels import gemm_epilogue

    gemm_epilogue.tuned.cache_clear()
    yield gemm_epilogue
    gemm_epilogue.tuned.cache_clear()


def write(path, **changes):
    """A file for DEVICE, with some fields of it, or of its first entry (tile_...), changed."""
    tiles.write(path, DEVICE, dict.fromkeys(KEYS, FAST))
    content = json.loads(path.read_text())
    for name, value in changes.items():
        holder = content["tiles"][0] if name.startswith("tile_") else content
        holder[name.removeprefix("tile_")] = value
    path.write_text(json.dumps(content))
    return path


# ---- the file ---------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "tuned.json"
    shapes = {KEYS[0]: FAST, KEYS[1]: SLOW, Key("narrow", "bfloat16", True): FAST}
    tiles.write(path, DEVICE, shapes, {KEYS[0]: {"ratio": 0.9}})
    assert tiles.read(path, DEVICE) == tiles.read(path, None) == shapes
    assert json.loads(path.read_text())["tiles"][0]["ratio"] == 0.9


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = write(tmp_path / "tuned.json")
    before = path.read_text()
    with pytest.raises(TypeError):
        tiles.write(path, DEVICE, dict.fromkeys(KEYS, SLOW), {KEYS[2]: {"ratio": object()}})
    assert path.read_text() == before and os.listdir(tmp_path) == ["tuned.json"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"device": "NVIDIA A100"}, "device: want 'interpreter', got 'NVIDIA A100'"),
        ({"capability": [8, 0]}, r"capability: want \[0, 0\], got \[8, 0\]"),
        ({"triton": "3.4.0"}, "triton: want '3.7.0', got '3.4.0'"),
        ({"format": 2}, "format: want 1, got 2"),
        ({"tiles": {}}, "tiles: want a list, got {}"),
        ({"tiles": [3]}, r"tiles\[0\]: want an object, got 3"),
        ({"tile_kind": "backward"}, r"tiles\[0\].kind: want one of 'forward', .*'backward'"),
        ({"tile_dtype": "float32"}, r"tiles\[0\].dtype: want one of 'bfloat16', .*'float32'"),
        ({"tile_descriptors": 0}, r"tiles\[0\].descriptors: want true or false, got 0"),
        ({"tile_tile": None}, r"tiles\[0\].tile: want one of tiles.CANDIDATES, got None"),
        (
            {"tile_tile": asdict(replace(FAST, BLOCK_K=17))},
            r"tiles\[0\].tile: want one of tiles.CANDIDATES, got .*17",
        ),
        ({"tile_kind": "dlogits"}, r"tiles\[1\]: want each case once, got .*'dlogits'"),
    ],
)
def test_refused_files(tmp_path, changes, message):
    path = write(tmp_path / "tuned.json", **changes)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        tiles.read(path, DEVICE)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_refused_content(tmp_path, content):
    path = tmp_path / "tuned.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: want "):
        tiles.read(path, DEVICE)


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match="^STEPKTO_TUNED: want .*none.json .No such file"):
        tiles.read(tmp_path / "none.json", DEVICE)


def test_doctor_says_what_is_used(tmp_path, monkeypatch, capsys):
    def said():
        assert main(["doctor"]) == 0
        return next(x for x in capsys.readouterr().out.splitlines() if "tile shapes" in x)

    assert "the defaults (STEPKTO_TUNED is not set)" in said()
    path = write(tmp_path / "tuned.json")
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    assert f"3 from {path}, the others the defaults" in said()
    path.write_text("{}")
    assert f"refused: {path}: format: want 1, got None" in said()


# ---- what is used -----------------------------------------------------------------------------


@pytest.fixture
def named(gemm, tmp_path, monkeypatch):
    """STEPKTO_TUNED names a file of this interpreter; returns its path."""
    path = tmp_path / "tuned.json"
    tiles.write(path, gemm.identity(None), {KEYS[0]: FAST, KEYS[2]: FAST})
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    return path


@pytest.fixture
def launched(gemm, monkeypatch):
    """(kind, tile shape) of every launch."""
    seen = []
    resolve = gemm.Launch.resolve

    def spy(self):
        out = resolve(self)
        seen.append((self.kind, out[0]))
        return out

    monkeypatch.setattr(gemm.Launch, "resolve", spy)
    return seen


def test_without_the_variable_the_defaults_are_used(launched, gemm, monkeypatch, head_problem):
    monkeypatch.setattr(plan, "epilogue_pays", lambda H, itemsize: True)
    problem = head_problem(dtype=torch.float16)
    linear_logprobs(problem.hidden, problem.weight, problem.target, backend="triton")
    assert launched and {shape for _, shape in launched} == {gemm.INTERPRETED_SHAPE}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "narrow"])
def test_tuned_shapes_are_used_and_right(
    named, launched, gemm, monkeypatch, head_problem, evaluate, assert_head_within_bound, bias
):
    """Those in the file; the default for dlogits, which is not in it."""
    monkeypatch.setattr(plan, "epilogue_pays", lambda H, itemsize: True)
    problem = head_problem(dtype=torch.float16, bias=bias)
    results = evaluate(linear_logprobs, problem, backend="triton")
    assert_head_within_bound(results, problem, unit=torch.finfo(torch.float16).eps)
    default = gemm.INTERPRETED_SHAPE
    wanted = {("narrow", FAST)} if bias else {("forward", FAST), ("dlogits", default)}
    assert set(launched) == wanted


def test_a_row_has_the_same_shape_in_every_batch(named, launched, monkeypatch, head_problem):
    monkeypatch.setattr(plan, "epilogue_pays", lambda H, itemsize: True)
    for N in (1, 16, 200):
        problem = head_problem(N=N, dtype=torch.float16)
        linear_logprobs(problem.hidden, problem.weight, problem.target, backend="triton")
    assert set(launched) == {("forward", FAST)}


def test_a_file_of_another_device_is_refused_when_it_is_needed(named, monkeypatch, head_problem):
    monkeypatch.setattr(plan, "epilogue_pays", lambda H, itemsize: True)
    tiles.write(named, DEVICE._replace(device="NVIDIA H100"), {KEYS[0]: FAST})
    problem = head_problem(dtype=torch.float16)
    with pytest.raises(ValueError, match=f"^{named}: device: want 'interpreter', got 'NVIDIA"):
        linear_logprobs(problem.hidden, problem.weight, problem.target, backend="triton")


# ---- the tuner --------------------------------------------------------------------------------


def timer(ratio):
    """FAST takes `ratio` of the default's time, all others as long as it."""
    best = lambda name: ratio if name == tune._words(FAST) else 1.0
    return lambda runs: {name: Times(best(name), 9.0) for name in runs}


def test_the_fastest_is_chosen(gemm):
    said = []
    choices = tune.tune(SIZES, ["float16"], "cpu", timer(0.8), said.append)
    assert set(choices) == set(KEYS) and len(said) == len(KEYS)
    for choice in choices.values():
        assert choice == tune.Choice(FAST, gemm.INTERPRETED_SHAPE, pytest.approx(0.8), {})


def test_the_default_stays_unless_one_is_faster(gemm):
    for choice in tune.tune(SIZES[:1], ["float16"], "cpu", timer(0.995)).values():
        assert choice.shape == choice.default and choice.ratio == 1


def test_a_wrong_candidate_is_left_out(gemm, monkeypatch):
    """However fast it is. Here the one whose results are spoiled."""
    forward = gemm.forward

    def spoiled(*args, shape=None, **kwargs):
        fold = forward(*args, shape=shape, **kwargs)
        if shape == FAST:
            fold.target_logit += 0.01
        return fold

    monkeypatch.setattr(gemm, "forward", spoiled)
    choices = tune.tune(SIZES[:1], ["float16"], "cpu", timer(0.5))
    for key, choice in choices.items():
        assert (choice.shape == FAST) == (key.kind == "dlogits")
        assert bool(choice.left_out) == (key.kind != "dlogits")


def test_one_that_does_not_fit_is_left_out(gemm, monkeypatch):
    from triton import OutOfResources

    dlogits = gemm.dlogits

    def too_large(*args, shape=None, **kwargs):
        if shape == SLOW:
            raise OutOfResources(300000, 232448, "shared memory")
        return dlogits(*args, shape=shape, **kwargs)

    monkeypatch.setattr(gemm, "dlogits", too_large)
    choice = tune.tune(SIZES[:1], ["float16"], "cpu", timer(0.5))[KEYS[1]]
    assert choice.shape == FAST and "shared memory" in choice.left_out[tune._words(SLOW)]


def test_the_command(gemm, monkeypatch, tmp_path, capsys):
    """Writes a file that is then used; refuses a machine without a GPU."""
    path = tmp_path / "tuned.json"
    arguments = ["tune", "--shapes", "33x20x66", "--dtype", "float16", "--output", str(path)]
    assert main(arguments) == 2
    assert "tune: want a CUDA GPU and Triton" in capsys.readouterr().err and not path.exists()
    on_cpu = tune.tune
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(
        tune, "tune", lambda shapes, dtypes, *rest: on_cpu(shapes, dtypes, "cpu", timer(0.7))
    )
    assert main(arguments) == 0
    assert f"export STEPKTO_TUNED={path}" in capsys.readouterr().out
    assert tiles.read(path, gemm.identity(None)) == dict.fromkeys(KEYS, FAST)
