"""`stepkto sample`: files, kills, several processes, and options that do not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from stepkto_kernels import cli
from stepkto_kernels.training import sample_command
from stepkto_kernels.training.records import read_problems, read_samples
from stepkto_kernels.training.sample_parts import Ranks, part_path, parts, ranks
from stepkto_kernels.training.tiny import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def command(folder, tmp_path):
    """Arguments of a run of 9 problems, 3 samples each, 2 problems a chunk; the output is out."""
    path = tmp_path / "problems.jsonl"
    rows = [
        {"id": f"p{i}", "problem": f"A clock with 7 hours shows {i}.", "answer": "1"}
        for i in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(output="out.jsonl", **options):
        given = {"model": folder, "problems": path, "output": tmp_path / output}
        given |= {"num-samples": 3, "max-new-tokens": 4, "chunk": 2, "device": "cpu"} | options
        flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
        return ["sample", *(word for flag in flags for word in flag)]

    return make


@pytest.fixture
def as_rank(monkeypatch):
    def make(rank, world_size):
        found = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
        for name, value in found.items():
            monkeypatch.setenv(name, str(value))

    return make


def test_every_problem_is_solved_and_a_finished_file_needs_no_model(
    command, tmp_path, capsys, monkeypatch
):
    assert cli.main(command()) == 0
    assert "27 solutions of 9 problems" in capsys.readouterr().out
    samples = read_samples(tmp_path / "out.jsonl")
    assert [each.key for each in samples] == [(f"p{i}", k) for i in range(9) for k in range(3)]
    assert samples[4].prompt == "A clock with 7 hours shows 1.\n"
    before = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.setattr(sample_command, "make_sampler", lambda *_: pytest.fail("a model is loaded"))
    assert cli.main(command()) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert not parts(tmp_path / "out.jsonl")


def test_problems_of_a_set_are_written_for_label(command, tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps({"question": "A clock with 7?", "answer": "x\n#### 4"}) + "\n")
    saved = tmp_path / "saved.jsonl"
    assert cli.main(command(problems=path, layout="gsm8k", save_problems=saved)) == 0
    (problem,) = read_problems(saved)
    assert (problem.id, problem.answer) == ("gsm8k-0", "4")
    assert {each.problem_id for each in read_samples(tmp_path / "out.jsonl")} == {problem.id}


def test_samples_can_be_labelled(command, tmp_path):
    assert cli.main(command()) == 0
    files = [tmp_path / name for name in ("out.jsonl", "problems.jsonl", "labelled.jsonl")]
    flags = zip(("--samples", "--problems", "--output"), map(str, files), strict=True)
    words = [word for flag in flags for word in flag]
    assert cli.main(["label", *words, "--outcome", "exact"]) == 0
    samples = read_samples(files[0])
    rows = [json.loads(line) for line in files[2].read_text().splitlines()]
    assert [(row["problem_id"], row["sample"]) for row in rows] == [each.key for each in samples]


@pytest.mark.parametrize("killed_after", [1, 3])
def test_a_killed_run_ends_with_the_same_file(command, tmp_path, killed_after):
    assert cli.main(command("whole.jsonl")) == 0
    output = tmp_path / "out.jsonl"
    program = [sys.executable, "-m", "stepkto_kernels.cli", *command()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for _ in range(killed_after):
            assert process.stdout.readline().startswith("out.jsonl: ")
        process.kill()
    assert 6 * killed_after <= len(output.read_bytes().splitlines()) < 27
    assert cli.main(command()) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_ranks_end_with_the_file_of_one_process(command, tmp_path, as_rank, capsys):
    assert cli.main(command("one.jsonl")) == 0
    output = tmp_path / "out.jsonl"
    for rank in (2, 0, 1):
        assert not output.exists()
        as_rank(rank, 3)
        assert cli.main(command()) == 0
    assert output.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not parts(output) and not list(tmp_path.glob("*.rank*"))
    said = capsys.readouterr().out
    assert said.count("the last one joins the parts") == 2 and said.count("27 solutions") == 2
    as_rank(1, 2)
    assert cli.main(command()) == 0  # what is complete stays so
    assert output.read_bytes() == (tmp_path / "one.jsonl").read_bytes() and not parts(output)


def test_another_number_of_ranks_goes_on_with_the_parts(command, tmp_path, as_rank, monkeypatch):
    """Rank 1 of 3 was killed while it wrote; then there is one process only."""
    assert cli.main(command("one.jsonl")) == 0
    output = tmp_path / "out.jsonl"
    for rank in (0, 1):
        as_rank(rank, 3)
        assert cli.main(command()) == 0
    content = part_path(output, 1).read_bytes()
    part_path(output, 1).write_bytes(content[: content.rfind(b"\n", 0, -1) + 9])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    calls = []
    make = sample_command.make_sampler

    def watched(*arguments):
        sampler = make(*arguments)
        return lambda prompts, **options: calls.append(prompts) or sampler(prompts, **options)

    monkeypatch.setattr(sample_command, "make_sampler", watched)
    assert cli.main(command()) == 0
    assert output.read_bytes() == (tmp_path / "one.jsonl").read_bytes() and not parts(output)
    assert len(calls) == 2  # the chunk of rank 2, and the one with a torn line


def test_parts_of_another_run_are_refused(command, tmp_path, as_rank, capsys):
    as_rank(0, 2)
    assert cli.main(command()) == 0
    as_rank(1, 2)
    assert cli.main(command(seed=1)) == 2
    assert "--seed: want 0, as" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_torchrun(command, tmp_path):
    """Two real processes at the same time."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["-m", "stepkto_kernels.cli", *command()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "27 solutions of 9 problems" in done.stdout
    assert cli.main(command("one.jsonl")) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not parts(tmp_path / "out.jsonl")


def test_what_the_launcher_says():
    found = ranks({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert found == Ranks(5, 8, 1) and ranks({}) == Ranks(0, 1, 0)
    with pytest.raises(ValueError, match="RANK: want a number in this environment variable"):
        ranks({"RANK": "x"})


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert sample_command.own_device("auto", Ranks(3, 4, 1)) == "cuda:1"
    assert sample_command.own_device("auto", Ranks(0, 1, 0)) == "auto"
    assert sample_command.own_device("cpu", Ranks(3, 4, 3)) == "cpu"
    with pytest.raises(ValueError, match="LOCAL_RANK: want less than the 2 GPUs, got 2"):
        sample_command.own_device("auto", Ranks(2, 4, 2))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backend": "server"}, "--device: want --backend transformers with it, got server"),
        ({"server-url": "http://x"}, "--server-url: want --backend server with it"),
        ({"vllm-options": "{}"}, "--vllm-options: want --backend vllm with it"),
        ({"num-samples": 0}, "--num-samples: want an int >= 1, got 0"),
        ({"temperature": -1}, "temperature: want"),
        ({"problems": "none"}, "problems: want one of math500"),
        ({"limit": 0}, "limit: want an int >= 1"),
        ({"model": "/none"}, "/none"),
        ({"prompt": "steps"}, "prompt: want a string, as the tokenizer has no template"),
        ({"dtype": "float7"}, "dtype: want auto or a torch dtype"),
    ],
)
def test_what_does_not_fit_is_one_line(command, capsys, options, message, tmp_path):
    assert cli.main(command(**options)) == 2
    error = capsys.readouterr().err
    assert message in error.strip().splitlines()[-1]
    output = tmp_path / "out.jsonl"
    assert not output.exists() or not output.read_bytes()


def test_options_of_a_backend(folder, capsys, as_rank, tmp_path):
    base = ["sample", "--model", "m", "--problems", "p.jsonl", "--output", str(tmp_path / "o")]
    for flags, message in (
        (["--backend", "server"], "--server-url: want it with --backend server, got none"),
        (["--backend", "vllm", "--vllm-options", "[1]"], "--vllm-options: want a JSON object"),
        (["--backend", "vllm", "--vllm-options", "{"], "--vllm-options: want a JSON object"),
    ):
        assert cli.main([*base, *flags]) == 2 and message in capsys.readouterr().err
    as_rank(1, 2)
    assert cli.main([*base, "--backend", "vllm"]) == 2
    assert "--backend: want transformers in 2 processes, as vllm" in capsys.readouterr().err
