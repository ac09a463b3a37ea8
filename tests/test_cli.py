"""The command line: help, doctor, plans, and one line for what does not fit."""

import json

import pytest

from stepkto_kernels import available_backends, plan, scaling
from stepkto_kernels.cli import COMMANDS, main


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"stepkto {command}" in capsys.readouterr().out


def test_doctor_names_every_backend_with_its_state(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name, state in available_backends().items():
        assert name in out and state in out


def test_plan_shows_what_plan_chooses(capsys):
    N, H, V = 2048, 64, 32000
    budget = 100  # MiB: fewer rows than N
    assert main(["doctor", "--plan", str(N), str(H), str(V), "--budget", str(budget)]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    rows = {(row[0], row[1]): row for row in cells}
    for device in ("cpu", "cuda"):
        assert [rows[device, path][3] for path in ("forward", "frozen", "recompute")] == list("124")
        chosen = plan.plan_head(
            N,
            V,
            4,
            device,
            needs_hidden=True,
            needs_weight=True,
            memory_budget=budget * plan.MIB,
        )
        cached = rows[device, "cached"]
        assert cached[6] == str(chosen.cached_rows)
        assert float(cached[3]) == pytest.approx(4 - chosen.cached_rows / N, rel=1e-3)
        assert rows[device, "fused"][3] == "3"


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_plan_of_a_model_prints_times_memory_and_links(capsys):
    arguments = ["--model", "llama3-70b", "--gpus", "64", "--tensor", "8", "--samples", "1"]
    assert main(["doctor", "--plan", *arguments]) == 0
    out = capsys.readouterr().out
    rows = {row[0]: row[1:] for row in map(cells, out.splitlines()) if row}
    for name in ("policy head", "reference backbone", "KL policy head", "FSDP: head"):
        assert name in rows
    found = scaling.estimate(
        scaling.MODELS["llama3-70b"],
        scaling.Job(gpus=64, tensor=8, samples=1),
        scaling.DEVICES["h200"],
    )
    assert float(rows["step"][0]) == pytest.approx(found.seconds, rel=0.01)
    assert float(rows["all"][0]) == pytest.approx(found.bytes / scaling.GB, rel=0.01)
    assert "no figure for a GPU was measured" in out and "Sampling 256 solutions" in out


def test_plan_of_a_model_by_its_config_and_flags(tmp_path, capsys):
    """A directory with a config.json, sizes by flags, and other rates give the same or another."""
    shape = {"hidden": 512, "vocabulary": 32000, "layers": 4}
    config = {"hidden_size": 512, "vocab_size": 32000, "num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = [f"--{name}={value}" for name, value in shape.items()]

    def printed(*arguments):
        assert main(["doctor", "--plan", *arguments]) == 0
        return capsys.readouterr().out

    assert printed("--model", str(tmp_path), "--layers", "4") == printed(*flags)
    assert printed(*flags) != printed(*flags, "--network-gb-s", "1", "--gpus", "16")
    on_cpu = printed(*flags, "--device", "cpu", "--sequences", "8", "--completion", "64")
    assert "on 1 x CPU" in on_cpu and "measured" not in on_cpu
    huge = printed("--model", "llama3-405b", "--gpus", "8", "--lora-rank", "4")
    assert "Does not fit" in huge and "LoRA of rank 4" in huge


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["bench", "--suite", "hed"], "'hed'"),
        (["bench", "--peers", "nobody"], "'nobody'"),
        (["bench", "--shapes", "12x34"], "want NxHxV"),
        (["bench", "--repeats", "0"], "whole number > 0"),
        (["bench", "--suite", "head", "--paths", "kto"], "want some of forward"),
        (["doctor", "--plan", "1", "2", "0"], "want numbers > 0"),
        (["doctor", "--plan", "1", "2"], "want N H V or no numbers"),
        (["doctor", "--plan", "1", "2", "3", "--gpus", "8"], "--gpus: want --plan without"),
        (["doctor", "--gpus", "8"], "--gpus: want --plan before it"),
        (["doctor", "--plan", "--hidden", "8"], "got no --vocabulary"),
        (["doctor", "--plan", "--model", "nobody"], "--model: want one of llama3-8b"),
        (["doctor", "--plan", "--model", __file__], "want JSON"),
        (["doctor", "--plan", "--model", "llama3-8b", "--gpus", "0"], "gpus: want a whole"),
        (["doctor", "--plan", "--model", "llama3-8b", "--mfu", "2"], "mfu: want a number in"),
        (["doctor", "--plan", "--model", "llama3-8b", "--mfu", "nan"], "mfu: want a number"),
        (["doctor", "--plan", "--model", "llama3-8b", "--kl", "none"], "'none'"),
        (["doctor", "--plan", "--model", "llama3-8b", "--dtype", "float32"], "--dtype: want it"),
        (["train-faster"], "train-faster"),
        ([], "COMMAND"),
    ],
    ids=" ".join,
)
def test_what_does_not_fit_is_said_in_one_line(arguments, wanted, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("stepkto") and "error: " in captured.err
    assert wanted in captured.err
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
