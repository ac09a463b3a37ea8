"""Code on the pages of docs/ runs, and the commands on them are commands."""

import os
import re
import shlex
from pathlib import Path

import pytest

from stepkto_kernels import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
    """All blocks of a page in one namespace, in an empty folder."""
    code = blocks(page, "python")
    if any("stepkto_kernels.training" in block for block in code):
        for name in ("transformers", "peft", "trl"):
            pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    space: dict = {}
    for block in code:
        exec(block, space)  # our own page


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_commands_parse(page, monkeypatch):
    """Every `stepkto` line names a command and flags that there are; nothing is run."""
    called = []
    for name, command in cli.COMMANDS.items():
        stub = command._replace(run=lambda args, name=name: called.append(name) or 0)
        monkeypatch.setitem(cli.COMMANDS, name, stub)
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("stepkto ")]
    for line in commands:
        assert cli.main(shlex.split(line, comments=True)[1:]) == 0, line
    assert len(called) == len(commands)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if "://" not in target:
            assert os.path.exists(page.parent / target), target


def test_yaml_has_options_that_exist():
    """The file on the page is one that stepkto train takes."""
    pytest.importorskip("transformers")
    import argparse

    import yaml

    from stepkto_kernels.training import command

    (text,) = blocks(ROOT / "docs/HUGGING_FACE.md", "yaml")
    options = yaml.safe_load(text)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([])
    args.more = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert command.parse(*command.gather(args)).learning_rate == 1e-6


def test_data_rows_on_the_page_are_read():
    import json

    from stepkto_kernels.training.data import parse_row

    (text,) = blocks(ROOT / "docs/HUGGING_FACE.md", "json")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 4
    for row in rows:
        parse_row(row, "the page")
