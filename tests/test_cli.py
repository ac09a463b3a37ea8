"""The command line: help, doctor, plans, and one line for what does not fit."""

import pytest

from stepkto_kernels import available_backends, plan
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


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["bench", "--suite", "hed"], "'hed'"),
        (["bench", "--peers", "nobody"], "'nobody'"),
        (["bench", "--shapes", "12x34"], "want NxHxV"),
        (["bench", "--repeats", "0"], "whole number > 0"),
        (["bench", "--suite", "head", "--paths", "kto"], "want some of forward"),
        (["doctor", "--plan", "1", "2", "0"], "want numbers > 0"),
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
