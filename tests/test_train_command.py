"""`stepkto train`: YAML and flags, the dry run, what it refuses, and that it trains."""

import json
import sys

import pytest

transformers = pytest.importorskip("transformers")

from stepkto_kernels.cli import main  # noqa: E402
from stepkto_kernels.training import command  # noqa: E402
from stepkto_kernels.training.progress import Bar, Lines, progress  # noqa: E402
from stepkto_kernels.training.tiny import make_data, make_model  # noqa: E402


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return make_model(folder / "model"), make_data(folder / "data.jsonl", examples=8)


@pytest.fixture
def config(inputs, tmp_path):
    """A YAML file; more lines are added to it."""
    model, data = inputs

    def write(*lines):
        path = tmp_path / "run.yaml"
        needed = [f"model: {model}", f"data: {data}", f"output: {tmp_path / 'out'}"]
        path.write_text("\n".join([*needed, "use_cpu: true", "max-steps: 2", *lines]) + "\n")
        return str(path)

    return write


def parsed(*words, config):
    args = command_arguments(*words, "--config", config)
    return command.parse(*command.gather(args))


def command_arguments(*words):
    import argparse

    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add_arguments(parser)
    args, args.more = parser.parse_known_args(words)
    return args


def test_flags_win_over_the_file(config):
    path = config("learning_rate: 1e-3", "beta: 0.2", "ratio_clip: [-1, 2.5]", "bf16: false")
    args = parsed("--learning-rate", "1e-4", "--save-strategy", "no", config=path)
    assert args.learning_rate == 1e-4  # and 1e-3, which YAML takes for text, is no trouble
    assert args.beta == 0.2 and args.ratio_clip == [-1.0, 2.5] and args.bf16 is False
    assert args.save_strategy == "no" and args.max_steps == 2


def test_flags_without_a_value_and_with_several(config):
    args = parsed("--padding-free", "--ratio-clip", "-1", "1", "--seed=3", config=config())
    assert args.padding_free is True and args.ratio_clip == [-1.0, 1.0] and args.seed == 3


def test_nested_options_of_the_file(config):
    args = parsed(config=config("model_init_kwargs:", "  attn_implementation: eager"))
    assert args.model_init_kwargs == {"attn_implementation": "eager"}


@pytest.mark.parametrize(
    "words, said",
    [
        (["--learning-rat", "3"], "did you mean learning_rate?"),
        (["--beta", "steep"], "--beta"),
        (["--beta", "-1"], "beta: want"),
        (["--step-reduction", "median"], "step_reduction: want one of"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--lora-alpha", "2"], "want --lora-rank"),
        (["--method", "dpo"], "method: want one of"),
        (["--method", "kto", "--step-weight", "0.5"], "step_weight: want 0"),
        (["--method", "sft", "--dry-run"], "--dry-run: want"),
        (["--method", "sft", "--ref-model", "x"], "--ref-model: want none"),
        (["stray"], "unrecognized arguments: stray"),
        (["--reference-point", "nowhere"], "reference_point: want one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_mistakes_are_one_line_without_a_traceback(config, capsys, words, said):
    try:
        status = main(["train", "--config", config(), *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("stepkto") and "error" in last
    assert said in last or said.startswith("unrecognized")


def test_a_malformed_row_names_file_line_and_field(config, capsys, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "completion": "b", "label": "yes"}\n')
    assert main(["train", "--config", config(), "--data", str(data)]) == 2
    assert f"{data}, line 1: label" in capsys.readouterr().err


@pytest.mark.parametrize("text, said", [("- a\n- b\n", "option: value"), ("a: [", "want YAML")])
def test_a_file_that_is_no_mapping(tmp_path, capsys, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_missing_options_are_named(capsys):
    assert main(["train", "--model", "m"]) == 2
    assert "--data: want it" in capsys.readouterr().err


def test_dry_run_prints_plan_and_memory_and_writes_nothing(config, capsys, tmp_path):
    assert main(["train", "--config", config("max-steps: 5"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "8 examples" in printed and "5 optimizer steps of 8 sequences" in printed
    assert "policy head" in printed and "logits of the head" in printed
    assert not (tmp_path / "out").exists()


def test_trains_evaluates_saves_and_resumes(config, capsys, inputs, tmp_path):
    path = config(f"eval_data: {inputs[1]}", "eval_strategy: steps", "eval_steps: 1")
    words = ["train", "--config", path, "--save-steps", "1", "--logging-steps", "1"]
    assert main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 1/2"] * 2 + ["step 2/2"] * 2
    assert "step/rewards/margins" in lines[0] and "eval_loss" in lines[1]
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert any("eval_loss" in entry for entry in state["log_history"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    )
    assert main([*words, "--resume", "last", "--max-steps", "3"]) == 0
    resumed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in resumed] == ["step 3/3"] * 2


def test_a_finished_training_takes_no_step_when_it_is_resumed(config, capsys, tmp_path):
    """Ended within an epoch: transformers' Trainer would take one more."""
    words = [
        "train",
        "--config",
        config(),
        "--max-steps",
        "3",
        "--per-device-train-batch-size",
        "2",
    ]
    words += ["--save-steps", "1", "--logging-steps", "1"]
    assert main(words) == 0
    before = (tmp_path / "out/model.safetensors").read_bytes()
    assert "step 3/3" in capsys.readouterr().out
    (tmp_path / "out/model.safetensors").unlink()
    assert main([*words, "--resume", "last"]) == 0
    assert "step " not in capsys.readouterr().out
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


def test_lora(config, capsys, tmp_path):
    pytest.importorskip("peft")
    assert main(["train", "--config", config(), "--lora-rank", "4"]) == 0
    assert (tmp_path / "out/adapter_model.safetensors").exists()


def test_list_options_names_all(capsys):
    from dataclasses import fields

    from stepkto_kernels.training import StepKTOArguments

    assert main(["train", "--list-options"]) == 0
    printed = capsys.readouterr().out
    for field in fields(StepKTOArguments):
        if field.init:
            assert f"--{field.name.replace('_', '-')}:" in printed


def test_help_shows_what_exists():
    from dataclasses import fields

    from stepkto_kernels.training import StepKTOArguments

    assert set(command.COMMON) <= {field.name for field in fields(StepKTOArguments)}


def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert isinstance(progress(), Lines)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(progress(), Bar)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert isinstance(progress(), Lines)
