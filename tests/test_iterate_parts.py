"""Parts of `stepkto iterate`: settings, what is refused, what a round is made of."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("yaml")

from stepkto_kernels.cli import main  # noqa: E402
from stepkto_kernels.training import checkpoints, launch, sampler  # noqa: E402
from stepkto_kernels.training.iterate import Run, balanced_weights  # noqa: E402
from stepkto_kernels.training.iterate_config import (  # noqa: E402
    EvaluateConfig,
    IterateConfig,
    from_mapping,
)
from stepkto_kernels.training.models import sampling_model  # noqa: E402
from stepkto_kernels.training.records import Problem  # noqa: E402
from stepkto_kernels.training.run_folder import write_rows  # noqa: E402
from stepkto_kernels.training.tiny import make_model  # noqa: E402


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model and files of 10 and 6 problems."""
    folder = tmp_path_factory.mktemp("inputs")
    make_model(folder / "m0")
    for name, number in (("train", 10), ("test", 6)):
        problems = [Problem(f"{name} {i}", f"{i} + 1 = ?", str(i + 1)) for i in range(number)]
        write_rows(folder / f"{name}.jsonl", map(asdict, problems))
    return folder


def settings(inputs, **more):
    files = {"problems": inputs / "train.jsonl", "eval_problems": inputs / "test.jsonl"}
    paths = {"model": inputs / "m0"} | files
    return {name: str(path) for name, path in paths.items()} | more


@pytest.fixture
def made(inputs, tmp_path):
    """A run of which only the settings stand, and the command that goes on with it."""
    config = tmp_path / "run.yaml"
    rewards = {"outcome": "exact", "process": "arithmetic"}
    training = {"use_cpu": True, "max_steps": 5, "learning_rate": "1e-4"}
    given = settings(inputs, rounds=2, rewards=rewards, training=training)
    config.write_text(json.dumps(given))  # which is YAML
    run = tmp_path / "run"
    Run(run, from_mapping(IterateConfig, given))
    return run, ["iterate", "--config", str(config), "--output", str(run)]


def test_training_goes_on_from_the_newest_whole_checkpoint(inputs, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(launch, "run", begun.append)
    for step in (9, 10, 11, 12):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"all of them")
        if step != 12:
            checkpoints.seal(folder, {})
        (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"gl')
    with pytest.warns(UserWarning, match="checkpoint-1[12]: passed by, as"):
        launch.train({"output": str(tmp_path)}, tmp_path / "training.yaml")
    assert begun[0][-2:] == ["--resume", str(tmp_path / "checkpoint-10")]


@pytest.mark.parametrize(
    "options, launcher",
    [
        ({}, []),
        ({"num_processes": 4}, "-m torch.distributed.run --standalone --nproc_per_node 4".split()),
        (
            {"num_processes": 4, "accelerate_config": "fsdp2.yaml"},
            "-m accelerate.commands.launch --config_file fsdp2.yaml --num_processes 4".split(),
        ),
    ],
)
def test_how_training_is_started(tmp_path, monkeypatch, options, launcher):
    started = []
    monkeypatch.setattr(launch, "run", started.append)
    config = tmp_path / "training.yaml"
    launch.train({"model": "m", "output": str(tmp_path)}, config, **options)
    assert started == [[*launcher, *launch.TRAIN, "--config", str(config)]]


def test_training_that_fails_is_an_error(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(OSError, match="want exit status 0, got 3"):
        launch.run(["-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("method", ["step_kto", "sft"])
def test_selection(inputs, tmp_path, method):
    more = {"deduplicate": "true", "per_problem": "2", "fill": "true", "method": method}
    run = Run(tmp_path / "run", from_mapping(IterateConfig, settings(inputs, **more)))
    (tmp_path / "run" / "round_1").mkdir()
    labelled = [
        {"problem_id": f"p{i}", "sample": k, "completions": [f"{k % 6}"], "label": k % 3 == 0}
        for i in range(4)
        for k in range(12)  # the last six are the first six again
    ]
    write_rows(tmp_path / "run" / "round_1" / "labelled.jsonl", labelled)
    run.stages(1)["selected.jsonl"](1, tmp_path / "selected.jsonl")
    lines = (tmp_path / "selected.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [row["problem_id"] for row in found] == [f"p{i // 2}" for i in range(8)]
    assert all(row["sample"] < 6 for row in found)
    right = [row["label"] for row in found]
    assert all(right) if method == "sft" else sum(right) == 4


def test_balanced_weights():
    found = balanced_weights([True, True, False, None] * 5 + [False] * 20, 1.33)
    right, wrong = found["desirable_weight"], found["undesirable_weight"]
    assert 10 * right == pytest.approx(1.33 * 25 * wrong)
    assert 10 * right + 25 * wrong == pytest.approx(35)
    assert set(balanced_weights([True, None], 1.33).values()) == {1.0}


@pytest.mark.parametrize(
    "more, said",
    [
        (["--temperature", "0.5"], "temperature: want 1.0"),
        (["--rounds", "1"], "rounds: want at least 2"),
        (["--learning-rate", "1e-5"], "training.learning_rate: want"),
        (["--after-error", "wrong"], "labels.after_error: want 'keep'"),
    ],
)
def test_another_config_is_refused(made, capsys, more, said):
    assert main([*made[1], *more]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, said",
    [
        (["--method", "ppo"], "method: want one of"),
        (["--rounds", "0"], "rounds: want an int >= 1"),
        (["--rounds", "two"], "rounds: want a number"),
        (["--learning-rat", "1"], "did you mean learning_rate?"),
        (["--output-dir", "x"], "options of training only"),
        (["--outcome", "vibes"], "argument --outcome"),
        (["--prm", "x"], "--prm: want --process prm"),
        (
            ["--balance-outcomes", "1", "--desirable-weight", "2"],
            "training: want no weights",
        ),
        (["--method", "sft", "--balance-outcomes", "1"], "balance_outcomes: want none"),
        (["--method", "kto", "--step-weight", "1"], "step_weight: want 0 with method kto"),
        (["--lora-alpha", "2"], "want --lora-rank"),
        (["--temperature", "0"], "temperature: want"),
        (["--problems", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_before_anything_is_done(inputs, tmp_path, capsys, change, said):
    run, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(json.dumps(settings(inputs)))
    try:
        status = main(["iterate", "--config", str(config), "--output", str(run), *change])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and not run.exists()
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_settings_that_are_not_known_are_named(inputs, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("modle: x\n")
    assert main(["iterate", "--config", str(config), "--output", str(tmp_path / "run")]) == 2
    assert "did you mean model?" in capsys.readouterr().err
    config.write_text("model: x\nproblems: y\n")
    assert main(["iterate", "--config", str(config), "--output", str(tmp_path / "run")]) == 2
    assert "eval_problems: want it" in capsys.readouterr().err


def test_the_file_of_the_readme_is_one():
    import re

    import yaml

    text = (Path(__file__).parents[1] / "README.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    config = from_mapping(IterateConfig, yaml.safe_load(block))
    assert config.method == "step_kto" and config.rewards["process"] == "judge"


@pytest.mark.parametrize("seed", range(3))
def test_problems_of_a_round(inputs, tmp_path, seed):
    """Each once before any comes again."""
    for number in (1, 4, 10, 25):
        given = settings(inputs, problems_per_round=number, seed=seed)
        run = Run(tmp_path / str(number), from_mapping(IterateConfig, given))
        drawn = [[p.id for p in run.problems_of(t)] for t in range(1, 6)]
        assert all(len(set(ids)) == len(ids) for ids in drawn)
        if number == 1:
            assert len({ids[0] for ids in drawn}) == 5
        if number == 4:
            assert len({*drawn[0], *drawn[1], *drawn[2]}) == 10
        if number >= 10:
            assert all(len(ids) == 10 for ids in drawn) and drawn[0] != drawn[1]


def test_changed_problems_are_refused(inputs, made, capsys):
    problems = inputs / "train.jsonl"
    content = problems.read_bytes()
    try:
        problems.write_bytes(content + b'{"id": "one more", "problem": "?", "answer": "1"}\n')
        assert main(made[1]) == 2
    finally:
        problems.write_bytes(content)
    assert "problems_sha256: want" in capsys.readouterr().err


def test_another_first_model_is_refused(inputs, made, capsys):
    weights = inputs / "m0" / "model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert main(made[1]) == 2
    finally:
        weights.write_bytes(content)
    assert "model_sha256: want" in capsys.readouterr().err


def test_vllm_is_given_its_options_and_given_up(inputs, tmp_path, monkeypatch):
    made = []

    class Fake:
        def __init__(self, model, **options):
            made.append((model, options))
            self.llm = "much memory"

    monkeypatch.setattr(sampler, "VLLMSampler", Fake)
    settings = {"model": "m", "problems": "p", "backend": "vllm", "dtype": "bfloat16"}
    settings["backend_options"] = {"tensor_parallel_size": 2}
    with sampling_model(from_mapping(EvaluateConfig, settings), "m") as found:
        pass
    assert not hasattr(found, "llm")
    assert made == [("m", {"max_new_tokens": 1024, "dtype": "bfloat16", "tensor_parallel_size": 2})]
    with pytest.raises(ValueError, match="backend_options: want none"):
        from_mapping(EvaluateConfig, settings | {"backend": "transformers"})
