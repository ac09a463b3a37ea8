"""`stepkto iterate` end to end on the arithmetic task, killed and gone on with."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("yaml")

from stepkto_kernels.cli import main  # noqa: E402
from stepkto_kernels.training import checkpoints, iterate, launch, run_folder  # noqa: E402
from stepkto_kernels.training.arguments import StepKTOArguments  # noqa: E402
from stepkto_kernels.training.completion_trainer import CompletionTrainer  # noqa: E402
from stepkto_kernels.training.iterate import balanced_weights  # noqa: E402
from stepkto_kernels.training.records import Problem, RowWriter  # noqa: E402
from stepkto_kernels.training.rewards import arithmetic  # noqa: E402
from stepkto_kernels.training.run_folder import write_rows  # noqa: E402
from stepkto_kernels.training.tiny import make_data, make_model  # noqa: E402
from stepkto_kernels.training.trainer import StepKTOTrainer  # noqa: E402

METHODS = ("step_kto", "kto", "sft")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A first model that writes solutions, and problems."""
    folder = tmp_path_factory.mktemp("inputs")
    args = StepKTOArguments(
        output_dir=str(folder / "m0"),
        use_cpu=True,
        max_steps=200,
        learning_rate=6e-3,
        warmup_steps=10,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model, data = make_model(folder / "new"), make_data(folder / "sft.jsonl", 1000)
    trainer = CompletionTrainer(str(model), args=args, train_dataset=str(data))
    trainer.train()
    trainer.save_model()
    draw = random.Random(0)
    for name, number in (("train", 10), ("test", 6)):
        problems = [arithmetic.make_problem(draw) for _ in range(number)]
        rows = [
            asdict(Problem(f"{name} {i}", each.text.strip(), str(each.answer)))
            for i, each in enumerate(problems)
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Training in this process, where transformers is loaded."""

    def run(words):
        assert words[:3] == launch.TRAIN
        assert main(words[2:]) == 0

    monkeypatch.setattr(launch, "run", run)


def words(inputs, run, method="step_kto", *more):
    config = inputs / f"{method}.yaml"
    config.write_text(
        f"""
model: {inputs / "m0"}
problems: {inputs / "train.jsonl"}
eval_problems: {inputs / "test.jsonl"}
method: {method}
rounds: 2
num_samples: 4
eval_num_samples: 4
max_new_tokens: 48
chunk: 4
rewards: {{outcome: exact, process: arithmetic}}
training: {{use_cpu: true, per_device_train_batch_size: 4, learning_rate: 1e-4, max_steps: 5,
  save_steps: 2, logging_steps: 1, disable_tqdm: true}}
"""
    )
    return ["iterate", "--config", str(config), "--output", str(run), *more]


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """A run of each method, made when it is first asked for."""
    made = {}

    def get(method="step_kto"):
        if method not in made:
            made[method] = tmp_path_factory.mktemp("runs") / method
            assert main(words(inputs, made[method], method)) == 0
        return made[method]

    return get


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_two_rounds(undisturbed, method):
    run = undisturbed(method)
    for t in range(3):
        metrics = json.loads((run / f"round_{t}" / "metrics.json").read_text())
        assert metrics["round"] == t and metrics["method"] == method
        assert metrics["num_problems"] == 6 and metrics["num_samples"] == 4
        for name in ("pass@1", "pass@4", "maj@4", "sample_accuracy", "step_accuracy", "answered"):
            found = metrics["metrics"][name]
            assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
    for t in (1, 2):
        here = run / f"round_{t}"
        labelled = rows(here / "labelled.jsonl")
        assert len(rows(here / "samples.jsonl")) == len(labelled) == 40
        assert len(rows(here / "log_ratios.jsonl")) == 40
        selected = rows(here / "selected.jsonl")
        right = [row for row in labelled if row["label"]]
        assert 0 < len(right) < 40
        assert all(row["missing_steps"] >= 0 for row in labelled)
        assert selected == (right if method == "sft" else labelled)
        state = json.loads((here / "model" / "trainer_state.json").read_text())
        assert state["global_step"] == 5 and state["log_history"]
        assert not list(here.glob("*.part")) and not list(here.glob("model/checkpoint*"))
        weights = [(r / "model.safetensors").read_bytes() for r in (here / "model", before(run, t))]
        assert weights[0] != weights[1]


def before(run, t):
    return run / f"round_{t - 1}" / "model" if t > 1 else Path(model_of(run))


def model_of(run):
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text())["model"]


def test_methods_start_from_the_same_samples_and_part_ways(undisturbed):
    first = {(undisturbed(m) / "round_1" / "samples.jsonl").read_bytes() for m in METHODS}
    second = {(undisturbed(m) / "round_2" / "samples.jsonl").read_bytes() for m in METHODS}
    assert len(first) == 1 and len(second) == 3


def test_log_ratios_are_those_of_the_models(undisturbed):
    """Against full logits of both models, and a log-softmax in fp64."""
    import torch

    run = undisturbed()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "round_2" / "model")
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(run / f"round_{t}" / "model").eval()
        for t in (2, 1)
    ]
    written = rows(run / "round_2" / "log_ratios.jsonl")
    found = {(row["problem_id"], row["sample"]): row["steps"] for row in written}
    for row in rows(run / "round_2" / "labelled.jsonl")[::7]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        pieces = [tokenizer(piece)["input_ids"] for piece in row["completions"]]
        ids = torch.tensor([prompt + sum(pieces, [])])
        with torch.no_grad():
            logps = [model(ids).logits.double().log_softmax(-1)[0, :-1] for model in models]
        ratio = (logps[0] - logps[1]).gather(1, ids[0, 1:, None])[:, 0]
        parts = ratio[len(prompt) - 1 :].split([len(piece) for piece in pieces])
        wanted = [float(part.sum()) for part in parts]
        assert found[row["problem_id"], row["sample"]] == pytest.approx(wanted, abs=2e-5)


def die_in(method_of, name, count, when=lambda *args: True, torn=None):
    """Make the count-th call of a method the last thing that this process does."""
    original, left = getattr(method_of, name), [count]

    def deadly(*args, **kwargs):
        if when(*args):
            left[0] -= 1
            if left[0] == 0:
                if torn is not None:
                    torn(*args)
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(method_of, name, deadly)


def tear(writer, rows):
    """Half of the rows, the last of them cut off."""
    text = "\n".join(json.dumps(row) for row in rows)
    writer._file.write(text[: len(text) // 2].encode())
    writer._file.flush()


def is_file(name):
    return lambda writer, rows: writer.path.name == name


DEATHS = {
    "evaluating M0": lambda: die_in(
        RowWriter, "write_all", 2, is_file("sampled_samples.jsonl"), tear
    ),
    "judging M0": lambda: die_in(RowWriter, "write_all", 1, is_file("sampled.jsonl"), tear),
    "naming metrics": lambda: die_in(run_folder.os, "replace", 2),
    "sampling": lambda: die_in(RowWriter, "write_all", 2, is_file("samples.jsonl.part"), tear),
    "labelling": lambda: die_in(RowWriter, "write_all", 1, is_file("labelled.jsonl.part"), tear),
    "selecting": lambda: die_in(iterate, "write_rows", 1),
    "before a checkpoint": lambda: die_in(StepKTOTrainer, "compute_loss", 2),
    "behind a checkpoint": lambda: die_in(StepKTOTrainer, "compute_loss", 4),
    "in a checkpoint": lambda: die_in(StepKTOTrainer, "_save_optimizer_and_scheduler", 1),
    "removing checkpoints": lambda: die_in(launch.shutil, "rmtree", 1),
    "naming the model": lambda: die_in(run_folder.os, "replace", 1, lambda a, b: b.name == "model"),
    "comparing": lambda: die_in(iterate, "write_rows", 1),
}


def test_killed_anywhere_it_goes_on_to_the_same_files(inputs, undisturbed, tmp_path):
    whole, run = undisturbed(), tmp_path / "run"
    for name, arm in DEATHS.items():
        pid = os.fork()
        if pid == 0:
            try:
                arm()
                main(words(inputs, run))
            finally:
                os._exit(17)  # it went on to the end: the test that forked must not go on here
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, name
        if name == "in a checkpoint":  # from scratch it would have died in that of step 2
            assert (run / "round_1" / "model.part" / "checkpoint-4").exists()
    assert main(words(inputs, run)) == 0
    compared = 0
    for path in sorted(whole.rglob("*")):
        ours = run / path.relative_to(whole)
        if path.suffix in (".json", ".jsonl", ".safetensors") and path.name != "trainer_state.json":
            assert ours.read_bytes() == path.read_bytes(), path
            compared += 1
    assert compared > 20


def test_sampling_is_shared_by_processes(inputs, undisturbed, tmp_path, monkeypatch):
    """Each of them samples its chunks, here one after the other, to the same file as one does."""
    wanted = rows(undisturbed() / "round_0" / "evaluation" / "sampled.jsonl")

    def run(words):
        for rank in range(2):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
            for name, value in environment.items():
                monkeypatch.setenv(name, str(value))
            assert words[:5] == launch.processes(2) and words[5:7] == launch.TRAIN[:2]
            assert main(words[7:]) == 0
            assert rank or not list((folder / "evaluation.part").glob("*/samples.jsonl"))

    monkeypatch.setattr(launch, "run", run)
    config = evaluation_config(inputs)
    folder = tmp_path / "e"
    command = ["evaluate", "--config", str(config), "--output", str(folder), "--num-processes", "2"]
    assert main([*command, "--device", "cpu"]) == 0
    found = rows(folder / "evaluation" / "sampled.jsonl")
    assert found == wanted
    assert not list(folder.rglob("*.work"))


def test_weights_are_balanced_and_adapters_merged(inputs, tmp_path):
    pytest.importorskip("peft")
    run = tmp_path / "run"
    more = ["--balance-outcomes", "1.33", "--lora-rank", "4", "--reference-point", "zero"]
    assert main(words(inputs, run, "step_kto", "--log-ratios", "3", *more)) == 0
    for t in (1, 2):
        here = run / f"round_{t}"
        labels = [row["label"] for row in rows(here / "selected.jsonl")]
        text = (here / "training.yaml").read_text()
        for name, value in balanced_weights(labels, 1.33).items():
            assert f"{name}: {value}" in text
        assert not list((here / "model").glob("adapter*"))
        state = transformers.AutoModelForCausalLM.from_pretrained(here / "model").state_dict()
        assert not any("lora" in name for name in state)
        assert len(rows(here / "log_ratios.jsonl")) == 3
        assert any(abs(x) > 1e-6 for x in rows(here / "log_ratios.jsonl")[0]["steps"])


def test_killed_for_real_it_takes_its_training_with_it(inputs, tmp_path, monkeypatch):
    """The command as users start it, its training in a process of its own."""
    run = tmp_path / "run"
    more = ["--rounds", "1", "--max-steps", "100000", "--log-ratios", "0"]
    command = [sys.executable, "-m", "stepkto_kernels.cli", *words(inputs, run, "kto", *more)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = run / "round_1" / "model.part"
    try:
        wait_for(lambda: checkpoints.newest(part) is not None)
        assert main(words(inputs, run, "kto", *more)) == 2  # two at a time would be one too many
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not trains(run))
    assert checkpoints.newest(part) is not None


def wait_for(what, seconds=300):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def trains(run):
    """Whether a process trains for this run."""
    mine = str(run / "round_1" / "training.yaml").encode()
    commands = Path("/proc").glob("[0-9]*/cmdline")
    return any(mine in read(path) for path in commands)


def read(path):
    try:
        return path.read_bytes()
    except OSError:  # gone
        return b""


def test_a_finished_run_does_nothing_again(inputs, undisturbed, capsys):
    run = undisturbed()
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "lock"}
    assert main(words(inputs, run)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "round" not in capsys.readouterr().out


def test_evaluate_is_a_round_s_evaluation(inputs, undisturbed, tmp_path, capsys):
    folder = tmp_path / "e"
    command = ["evaluate", "--config", str(evaluation_config(inputs)), "--output", str(folder)]
    for _ in range(2):  # the second time from what stands
        assert main(command) == 0
        assert "| pass@4" in capsys.readouterr().out
    wanted, found = undisturbed() / "round_0", folder
    for name in ("evaluation/greedy.jsonl", "evaluation/sampled.jsonl"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes()
    metrics = [json.loads((f / "metrics.json").read_text())["metrics"] for f in (found, wanted)]
    assert metrics[0] == metrics[1]
    assert main([*command, "--process", "none"]) == 2
    assert "labels.process: want 'arithmetic'" in capsys.readouterr().err
    assert main([*command, "--workers", "3"]) == 0  # decides no label


def evaluation_config(inputs):
    path = inputs / "evaluate.yaml"
    path.write_text(
        f"model: {inputs / 'm0'}\nproblems: {inputs / 'test.jsonl'}\neval-num-samples: 4\n"
        "max_new_tokens: 48\nchunk: 4\nrewards: {outcome: exact, process: arithmetic}\n"
    )
    return path
