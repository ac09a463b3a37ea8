"""SECURITY.md, promise by promise: nothing that comes with a model or a data set is run.

Elsewhere: the page of `stepkto inspect` in test_inspect.py and, in a browser, test_inspect_browser;
the judge and its client in test_judge.py; code of a reward model that is asked for in
test_process_reward.py; what a damaged checkpoint does in test_faults.py.
"""

import ast
import asyncio
import http.server
import json
import os
import random
import shutil
import sys
import threading
import time
import traceback
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from inspect_helpers import make_run, write

transformers = pytest.importorskip("transformers")
pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from faulty.judge_server import Server  # noqa: E402

from stepkto_kernels.cli import main  # noqa: E402
from stepkto_kernels.training import checkpoints, launch  # noqa: E402
from stepkto_kernels.training.openai_client import ChatClient, ChatError  # noqa: E402
from stepkto_kernels.training.records import Problem  # noqa: E402
from stepkto_kernels.training.rewards import arithmetic  # noqa: E402
from stepkto_kernels.training.rewards.answers import ExactMatch, normalise_answer  # noqa: E402
from stepkto_kernels.training.rewards.arithmetic_steps import ArithmeticSteps  # noqa: E402
from stepkto_kernels.training.rewards.base import Solution  # noqa: E402
from stepkto_kernels.training.rewards.judge import read_verdicts  # noqa: E402
from stepkto_kernels.training.rewards.symbolic import MIB, WALL_FACTOR, MathVerify  # noqa: E402
from stepkto_kernels.training.steps import split_solution  # noqa: E402
from stepkto_kernels.training.tiny import make_data, make_model  # noqa: E402

# ---- what the code itself may not do ----------------------------------------------------------

# file and call -> why it is right there
ALLOWED = {
    ("benchmarks/compile_report.py", "triton.compile"): "a Triton kernel of ours",
    ("benchmarks/leaking/calls.py", "torch.compile"): "functions of ours",
}
CODE = ("eval", "exec", "compile", "__import__")
RUNS = ("os.system", "os.popen", "pty.spawn", "subprocess.getoutput", "tempfile.mktemp")
READS_CODE = ("pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle")
TIMED = ("urlopen", "requests.get", "requests.post", "requests.request")


def forbidden(call: ast.Call) -> str | None:
    """Why a call may not be there; None where it may."""
    name = ast.unparse(call.func)
    given = {each.arg: ast.unparse(each.value) for each in call.keywords}
    last = name.rpartition(".")[2]
    if name in CODE or (last == "compile" and name != "re.compile"):
        return "runs text as code"
    if name in RUNS or given.get("shell", "False") != "False":
        return "goes through a shell, or a name that another process can take"
    if name.partition(".")[0] in READS_CODE and last in ("load", "loads", "open", "Unpickler"):
        return "reads code"
    if last == "load" and name.startswith(("torch.", "np.", "numpy.")):
        if given.get("weights_only") != "True" and given.get("allow_pickle") != "False":
            return "reads pickles"
    if name.startswith("yaml.") and last in ("load", "load_all", "full_load", "unsafe_load"):
        return "reads objects"
    if given.get("trust_remote_code") == "True" or given.get("weights_only") == "False":
        return "trusts code"
    if given.get("use_safetensors") == "False" or given.get("allow_pickle") == "True":
        return "reads pickles"
    if (name in TIMED or last == "urlopen") and "timeout" not in given:
        return "may wait for ever"
    return None


def scan(source: str) -> list[tuple[int, str, str]]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    told = [(call.lineno, ast.unparse(call.func), forbidden(call)) for call in calls]
    return [(line, name, why) for line, name, why in told if why is not None]


BAD_CODE = """
eval("1"); exec(text); compile(text, "", "exec"); __import__(name)
os.system("ls"); os.popen("ls"); subprocess.run("ls", shell=True); tempfile.mktemp()
pickle.load(file); pickle.loads(data); marshal.loads(data); shelve.open(path)
torch.load(path); torch.load(path, weights_only=False); np.load(path); np.load(x, allow_pickle=True)
yaml.load(text); yaml.load(text, Loader=yaml.Loader); yaml.unsafe_load(text)
AutoModel.from_pretrained(name, trust_remote_code=True); f(use_safetensors=False)
urllib.request.urlopen(url); requests.get(url)
"""
GOOD_CODE = """
re.compile("a"); model.eval(); torch.load(path, weights_only=True); yaml.safe_load(text)
json.load(file); subprocess.run(["ls"]); requests.get(url, timeout=3); executor.submit(f)
AutoModel.from_pretrained(name, trust_remote_code=False)
"""


def test_the_scan_sees_what_it_looks_for():
    assert len(scan(BAD_CODE)) == 23
    assert scan(GOOD_CODE) == []


def test_no_call_that_runs_text_or_reads_pickles():
    found = []
    for folder in ("stepkto_kernels", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            where = path.relative_to(ROOT).as_posix()
            calls = scan(path.read_text(encoding="utf-8"))
            found += [(where, *call) for call in calls if (where, call[1]) not in ALLOWED]
    assert found == []


def test_every_model_is_loaded_without_code_and_pickles():
    """from_pretrained in the package says so itself: transformers would ask, or read pickles."""
    for path in sorted((ROOT / "stepkto_kernels").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained"):
                given = ast.unparse(node)
                assert "SAFE" in given or "safe" in given or "trust_remote_code" in given, path


# ---- pickles and code that come with a model --------------------------------------------------


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, data, problems and samples."""
    folder = tmp_path_factory.mktemp("inputs")
    make_model(folder / "model")
    make_data(folder / "data.jsonl", 8)
    write_problems(folder, ["p0", "p1"])
    return folder


def write_problems(folder: Path, ids: list[str], text: str = "1 + 1 = 2\nAnswer: 2") -> None:
    """problems.jsonl of the arithmetic task and samples.jsonl."""
    draw = random.Random(0)
    problems = [Problem(i, arithmetic.make_problem(draw).text.strip(), "2") for i in ids]
    write(folder / "problems.jsonl", *map(asdict, problems))
    row = {"sample": 0, "prompt": "?", "completion": text, "finish": "stop"}
    write(folder / "samples.jsonl", *({"problem_id": i} | row for i in ids))


@pytest.fixture(autouse=True)
def no_questions(monkeypatch):
    """Nobody is asked whether to run code; who sits there would say yes."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert asked == []


def flags(**given):
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
    return [word for pair in pairs for word in pair]


def train_words(inputs, model, output, *more):
    words = flags(model=model, data=inputs / "data.jsonl", output=output, max_steps=2)
    words += flags(save_steps=1, per_device_train_batch_size=4, report_to="none")
    return ["train", *words, "--use-cpu", "--disable-tqdm", *more]


def label_words(folder, output, *more):
    words = flags(samples=folder / "samples.jsonl", problems=folder / "problems.jsonl")
    return ["label", *words, *flags(output=output, outcome="exact"), *more]


def sample_words(inputs, model, output, problems=None):
    words = flags(model=model, problems=problems or inputs / "problems.jsonl", output=output)
    return ["sample", *words, *flags(num_samples=1, max_new_tokens=2, device="cpu")]


# every command that loads a model
COMMANDS = {
    "train": lambda inputs, model, out: train_words(inputs, model, out),
    "train, as the reference": lambda inputs, model, out: train_words(
        inputs, inputs / "model", out, "--ref-model", str(model)
    ),
    "train, dry run": lambda inputs, model, out: train_words(inputs, model, out, "--dry-run"),
    "sample": lambda inputs, model, out: sample_words(inputs, model, out / "s.jsonl"),
    "label, prm": lambda inputs, model, out: label_words(
        inputs, out / "l.jsonl", *flags(process="prm", prm=model)
    ),
    "label, qwen's prm": lambda inputs, model, out: label_words(
        inputs, out / "l.jsonl", *flags(process="prm", prm=model, prm_layout="qwen")
    ),
    "label, rollouts": lambda inputs, model, out: label_words(
        inputs, out / "l.jsonl", *flags(process="rollouts", rollout_model=model)
    ),
    "evaluate": lambda inputs, model, out: [
        "evaluate",
        *flags(model=model, problems=inputs / "problems.jsonl", output=out / "e", outcome="exact"),
        *flags(max_new_tokens=2, eval_num_samples=1, device="cpu"),
    ],
}
LOADS_WEIGHTS = [name for name in COMMANDS if name != "train, dry run"]


def refused(words, capsys) -> str:
    """The one line that a command says why it does not do it."""
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("kind", ["malicious", "harmless"])
@pytest.mark.parametrize("name", LOADS_WEIGHTS)
def test_a_model_that_is_a_pickle_is_refused(inputs, tmp_path, capsys, name, kind):
    model, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(inputs / "model", model)
    (model / "model.safetensors").unlink()
    saved = {"a": Evil(marker) if kind == "malicious" else torch.zeros(1)}
    torch.save(saved, model / "pytorch_model.bin")
    assert "model.safetensors" in refused(COMMANDS[name](inputs, model, tmp_path / "out"), capsys)
    assert not marker.exists()


def test_an_adapter_that_is_a_pickle_is_refused(inputs, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    folder, marker = tmp_path / "adapter", tmp_path / "ran"
    peft.get_peft_model(model, config).save_pretrained(folder)
    for path in (inputs / "model").glob("tokenizer*"):
        shutil.copy(path, folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": Evil(marker)}, folder / "adapter_model.bin")
    for name in ("train", "sample"):
        error = refused(COMMANDS[name](inputs, folder, tmp_path / "out"), capsys)
        assert "adapter_model.safetensors" in error
    assert not marker.exists()


@pytest.mark.parametrize("what", ["model", "tokenizer", "both"])
@pytest.mark.parametrize("name", list(COMMANDS))
def test_code_of_a_model_is_refused(inputs, tmp_path, capsys, name, what):
    """As transformers finds it: a class in a file of the folder, for a type that it has not."""
    model, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(inputs / "model", model)
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    if what in ("model", "both"):
        config = json.loads((model / "config.json").read_text())
        autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
        autos += ("AutoModelForTokenClassification",)
        config |= {"model_type": "evil", "auto_map": {each: "evil.Evil" for each in autos}}
        (model / "config.json").write_text(json.dumps(config))
    if what in ("tokenizer", "both"):
        path = model / "tokenizer_config.json"
        mapped = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        told = json.loads(path.read_text()) | {"tokenizer_class": "Evil", "auto_map": mapped}
        path.write_text(json.dumps(told))
    capsys.readouterr()
    # a head with random weights is refused too, before the tokenizer is looked at
    is_head = "prm" in name and what == "tokenizer"
    words = COMMANDS[name](inputs, model, tmp_path / "out")
    if name == "train, as the reference" and what == "tokenizer":
        main(words)  # a reference model brings no tokenizer
    else:
        error = refused(words, capsys)
        assert ("want all weights" if is_head else "trust_remote_code") in error
    assert not marker.exists()


@pytest.mark.parametrize(
    "options", [{"use_safetensors": False}, {"weights_only": False}, {"use_safetensors": None}]
)
def test_pickles_cannot_be_asked_for(inputs, tmp_path, capsys, options):
    words = train_words(inputs, inputs / "model", tmp_path / "out")
    error = refused([*words, "--model-init-kwargs", json.dumps(options)], capsys)
    assert f"model_init_kwargs: {next(iter(options))}: want true, got" in error


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert main(train_words(inputs, inputs / "model", folder)) == 0
    return folder


PICKLES = ("step_kto.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin")


@pytest.mark.parametrize("name", PICKLES)
def test_a_checkpoint_with_a_malicious_pickle_is_refused(inputs, trained, tmp_path, capsys, name):
    """Whoever can write it can write its seal too."""
    folder, marker = tmp_path / "run/checkpoint-1", tmp_path / "ran"
    shutil.copytree(trained / "checkpoint-1", folder)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    torch.save({"a": Evil(marker)}, folder / name)
    sealed = json.loads((folder / checkpoints.SEAL).read_text())
    others = (checkpoints.SEAL, checkpoints.STATE)
    files = [path for path in folder.iterdir() if path.name not in others]
    checkpoints.seal(folder, sealed["settings"])
    assert checkpoints.flaw(folder) is None and len(files) > 5
    words = train_words(inputs, inputs / "model", folder.parent, "--resume", str(folder))
    error = refused(words, capsys)
    assert f"{folder}: want only numbers and tensors in its files" in error
    assert "posix.mkdir" in error and "weights_only" not in error
    assert not marker.exists()


def test_every_pickle_of_a_checkpoint_is_known(trained):
    """Beside those above, training_args.bin: it is written and never read."""
    folder = trained / "checkpoint-1"
    others = {p.name for p in folder.iterdir()} - {"model.safetensors", *PICKLES}
    assert {name for name in others if not name.endswith(".json")} == {"training_args.bin"}


def test_the_seal_of_a_checkpoint_names_its_own_files_only(trained, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(trained / "checkpoint-1", folder)
    (tmp_path / "secret").write_text("secret")
    sealed = json.loads((folder / checkpoints.SEAL).read_text())
    for name in ("../secret", str(tmp_path / "secret"), "a/../../secret"):
        files = sealed["files"] | {name: checkpoints.mark(tmp_path / "secret")}
        (folder / checkpoints.SEAL).write_text(json.dumps(sealed | {"files": files}))
        assert "outside" in checkpoints.flaw(folder)


# ---- answers ----------------------------------------------------------------------------------


def nest(opening: str, closing: str, depth: int) -> str:
    return opening * depth + "1" + closing * depth


ROWS = "\\\\".join("&".join(f"x^{{{i * j}}}" for j in range(25)) for i in range(25))
MARKED = "made_by_an_answer"
HOSTILE = {
    # huge values
    "a tower": "9^{9^{9^{9}}}",
    "a tower in Python": "9**9**9**9",
    "a power": "10^{100000000}",
    "a float": "1e999999999",
    "a factorial": "(10^7)!",
    "factorials": "10!!!!!",
    "a binomial": "\\binom{10^9}{5\\cdot 10^8}",
    "a root": "\\sqrt[10^9]{2^{10^9}}",
    "a sum": "\\sum_{k=1}^{10^{12}} \\frac{1}{k^2}",
    "sums of sums": "\\sum_{i=1}^{10^9}\\sum_{j=1}^{10^9} i^j",
    "a product": "\\prod_{k=1}^{10^9} k",
    "an integral": "\\int_0^{10^{100}} e^{-x^{x^x}} dx",
    "an integral without a form": "\\int \\frac{\\sin(x^x)}{\\ln(\\cos x)} dx",
    "a derivative": "\\frac{d}{dx} " + "x^" * 20 + "x",
    "a matrix": f"\\begin{{pmatrix}}{ROWS}\\end{{pmatrix}}^{{-1}}",
    "a power of a matrix": "\\begin{pmatrix}1&1\\\\1&0\\end{pmatrix}^{10^{9}}",
    "an expansion": "(a+b+c+d+e+f)^{60}",
    # much of it
    "digits": "7" * 9999,
    "decimals": "0." + "3" * 9990,
    "a million digits": "7" * 10**6,
    "a set": "\\{" + ", ".join(map(str, range(1800))) + "\\}",
    "a set of a million": "\\{" + ", ".join(map(str, range(10**6))) + "\\}",
    "equations": " = ".join(["x"] * 3000),
    "commas": "," * 9999,
    "units": "5\\text{ " + "cm " * 3000 + "}",
    # deep
    "fractions": nest("\\frac{1}{", "}", 900),
    "fractions, 10,000 deep": nest("\\frac{1}{", "}", 10_000),
    "open brackets": "(" * 3000,
    "open powers": "x^{" * 300,
    "closed braces first": "}{" * 2000,
    "braces": "{" * 4999 + "}" * 4999,
    "boxes": nest("\\boxed{", "}", 1000),
    # for regular expressions
    "letters": "a" * 9990 + "!",
    "spaces": "1" + " " * 9990 + "x",
    "thousands": "1," * 4999 + "x",
    "mixed numbers": "1 2/3 " * 1600,
    "open texts": "\\text{" * 1500,
    "dollars": "$" * 9999,
    "backslashes": "\\" * 9999,
    "percents": "%" * 9999,
    # odd characters
    "digits of other scripts": "\u0663" * 50 + "\u00b2\u00b3\u00bd" * 50,
    "right to left": "\u202e4\u2066+1\u2069",
    "zero width": "4\u200b" * 3000,
    "combining": "4" + "\u0301" * 9000,
    "half a pair": "4\ud800",
    "a null byte": "4\x00+1",
    "lines": "5\n4\n" * 2000,
    "another line for the worker": '"]\n["4", "4"]\n',
    # code
    "import": f"__import__('os').mkdir('{MARKED}')",
    "open": f"open('{MARKED}', 'w')",
    "exec": f"(lambda: exec(\"open('{MARKED}', 'w')\"))()",
    "sympify": f"sympify(\"__import__('os').mkdir('{MARKED}')\")",
    "attributes": "().__class__.__bases__[0].__subclasses__()",
    "operatorname": f"\\operatorname{{eval}}(\\operatorname{{open}}('{MARKED}','w'))",
    "mathrm": f"\\mathrm{{__import__}}(\\text{{os}}).\\mathrm{{mkdir}}(\\text{{{MARKED}}})",
    "TeX": f"\\write18{{mkdir {MARKED}}}\\input{{/etc/passwd}}\\def\\a{{\\a\\a}}\\a",
    "formats": "%s%n" * 1000 + "{0.__class__}" * 100,
}
SECONDS, MEMORY = 0.3, 512 * MIB


class Watch:
    """The most address space that any worker had, from /proc, while it is looked at."""

    def __init__(self, reward):
        self.reward, self.most, self.pids, self.done = reward, 0, set(), threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()

    def look(self):
        while not self.done.wait(0.02):
            for worker in self.reward.workers:
                process = worker.process
                try:
                    told = Path(f"/proc/{process.pid}/status").read_text()
                    self.most = max(self.most, 1024 * int(told.split("VmPeak:")[1].split()[0]))
                    self.pids.add(process.pid)
                except (AttributeError, OSError, IndexError):  # none yet, or gone
                    pass

    def stop(self):
        self.done.set()
        self.thread.join()


def is_sound(reward) -> bool:
    """Whether it knows a right answer and a wrong one; on a busy machine one may take too long."""
    ask = lambda answer: reward(Problem("p", "?", "\\frac{1}{2}"), f"Answer: {answer}")
    for answer, wanted in (("\\frac{2}{4}", True), ("\\frac{2}{5}", False)):
        found = next((v for v in (ask(answer) for _ in range(4)) if v is not None), None)
        if found is not wanted:
            return False
    return True


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """By name: verdicts of a hostile answer, plain and boxed, and the seconds that they took."""
    pytest.importorskip("math_verify")
    before, found = Path.cwd(), {}
    os.chdir(tmp_path_factory.mktemp("answers"))
    try:
        with MathVerify(timeout=SECONDS, memory=MEMORY) as reward:
            watch = Watch(reward)
            for name, answer in HOSTILE.items():
                problem = Problem("p", "?", "x" if name in ("sums of sums", "a tower") else "4")
                assert is_sound(reward), f"before {name}"  # and a worker is there
                start = time.monotonic()
                verdict = reward(problem, f"Answer: {answer}")
                in_box = f"So \\boxed{{{answer}}}"
                boxed = reward(problem, in_box) if MARKED in answer else False
                seconds = time.monotonic() - start
                found[name] = verdict, boxed, seconds
            watch.stop()
            assert is_sound(reward)
        yield found, watch, Path.cwd()
    finally:
        os.chdir(before)


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_answer_gets_no_point_within_its_time(checked, name):
    """Sound answers before and behind it are judged rightly, see `checked`."""
    verdict, boxed, seconds = checked[0][name]
    assert verdict in (False, None) and boxed in (False, None)
    starts = 15 if MARKED in HOSTILE[name] else 0  # of a worker between the two, sympy and all
    assert seconds < 2 * WALL_FACTOR * SECONDS + 5 + starts


def test_memory_stays_within_its_limit(checked):
    _, watch, _ = checked
    if not Path("/proc/self/status").exists():
        pytest.skip("there is no /proc")
    assert 0 < watch.most <= MEMORY


def test_no_answer_left_a_file_or_a_process(checked):
    _, watch, folder = checked
    assert list(folder.iterdir()) == []
    assert len(watch.pids) > 3  # some were killed
    for pid in watch.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_math_verify_that_is_called_otherwise_is_noticed(tmp_path, monkeypatch):
    """Its errors on single answers are verdicts; an error on every answer must not be."""
    pytest.importorskip("math_verify")
    module = "LatexExtractionConfig = dict\nparse = lambda text: [text]\nverify = lambda *a: True\n"
    (tmp_path / "math_verify.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with MathVerify() as reward, pytest.raises(ValueError, match="no start"):
        reward(Problem("p", "?", "4"), "Answer: 5")


# ---- other readers of text --------------------------------------------------------------------

UNITS = (
    *("{", "}", "\\boxed{", "\\text{a", "\\frac11", "$", "\\", "1,000", "1."),
    *("Answer: ", " ", "\n", "Step 1: 3 + 4 = 0\n", "a", "\u0663", "\ud800", "\x00"),
    *("```\n", "\\begin{a}", "[", '{"a":'),
)
# a text -> anything; what raises for text that does not fit says so in its docstring
READERS = {
    "split_solution": lambda text: split_solution(text).steps,
    "normalise_answer": normalise_answer,
    "ExactMatch": lambda text: ExactMatch()(Problem("p", "?", "4"), "Answer: " + text),
    "reference answer": lambda text: ExactMatch()(
        Problem("p", "?", "\\boxed{" + text.replace("\ud800", "?")), "a"
    ),
    "arithmetic": lambda text: (
        arithmetic.extract_answer(text),
        arithmetic.check_steps(arithmetic.make_problem(random.Random(0)), text),
    ),
    "arithmetic steps": lambda text: ArithmeticSteps()(
        [Solution(Problem("p", arithmetic.make_problem(random.Random(0)).text, "1"), (text,))]
    ),
    "read_verdicts": lambda text: read_verdicts(text, 3),
}


def seconds(function, text) -> float:
    """Processor seconds, the best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        function(text)
        best = min(best, time.process_time() - start)
    return best


@pytest.mark.parametrize("reader", list(READERS))
def test_text_is_read_in_linear_time(reader):
    """Four times the text takes at most some four times as long; quadratic would be 16 times."""
    for unit in UNITS:
        short, long = (unit * (size // len(unit)) for size in (2**14, 2**16))
        took = seconds(READERS[reader], short), seconds(READERS[reader], long)
        assert took[1] <= 8 * took[0] + 0.02, (unit, took)


@pytest.mark.parametrize(
    "reply",
    [
        *("[" * 100_000, '{"verdicts":' * 100_000, '{"a":' * 10**5 + "1" + "}" * 10**5),
        '{"verdicts": ' + "9" * 100_000 + "}",
        '{"verdicts": [{"step": 1, "correct": NaN}]}',
        '{"verdicts": [{"step": 1, "correct": Infinity}]}',
        '{"verdicts": [{"step": 1e400, "correct": true}]}',
        '{"verdicts": [{"step": 1.0, "correct": true}]}',
        '{"verdicts": [{"step": true, "correct": true}]}',
        '{"verdicts": [{"step": 1, "correct": 1}]}',
        '{"verdicts": [{"step": 1, "correct": "true"}]}',
        '{"verdicts": [{"step": 1, "correct": true}], "verdicts": []}',
        '{"verdicts": [{"step": 1, "correct": true, "correct": {}}]}',
        '\ud800{"verdicts": []}',
        "\x00",
        "",
    ],
    ids=range(16),
)
def test_replies_of_a_judge_that_are_no_verdicts(reply):
    assert read_verdicts(reply, 1) is None


# ---- pages ------------------------------------------------------------------------------------

BREAKOUTS = (
    "</script><script>alert(1)</script>",
    "\"' onload=alert(1) x=<img src=x onerror=alert(1)>",
    "--></style></title></textarea><svg/onload=alert(1)>",
    "&lt;b&gt;&#60;script&#62;</td></table></details><base href=//x>",
    "javascript:alert(1)//{{7*7}}${7*7}<%= 7 %>]]>",
    "\u202e\x00\ufeff</pre><iframe srcdoc=x>",
)


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes, in order."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, [name for name, _ in attributes]))

    def handle_decl(self, text):
        self.found.append(("!", text))

    def handle_comment(self, text):
        self.found.append(("--", text))


def page_of(folder: Path, text: str) -> str:
    """Of a run in which everything that is text holds this one, names of files and columns too."""
    name = text.replace("/", "\u2215").replace("\x00", "")  # what a file's name may hold
    run = make_run(folder / f"run {name}", method=text, rounds=1, problems=1)
    metrics = {
        "metrics": {text: {"value": 0.5, "low": 0.1, "high": 0.9, text: text}},
        **{"method": text, "round": 1, text: text},
    }
    for t in (0, 1):
        write(run / f"round_{t}/metrics.json", metrics)
    (run / "config.yaml").write_bytes(f"method: {text}\n".encode())
    log = [{"step": k, text: 0.5, "loss": 0.1, "note": text} for k in (1, 2)]
    write(run / "round_1/model/trainer_state.json", {"log_history": log, text: text})
    row = {"problem_id": text, "sample": 0, "completions": [text], "labels": [True], text: text}
    row |= {"prompt": [{"role": text, "content": text}], "label": True, "finish": text}
    write(run / "round_1/labelled.jsonl", row)
    write(run / "round_1/selected.jsonl", row)
    ratios = {"problem_id": text, "sample": 0, "steps": [0.5], text: text}
    write(run / "round_1/log_ratios.jsonl", ratios)
    for each in ("greedy", "sampled"):
        write(run / f"round_1/evaluation/{each}.jsonl", row)
    rows = folder / f"rows {name}.jsonl"
    write(rows, row)
    page = folder / "page.html"
    assert main(["inspect", str(run), str(rows), "--output", str(page)]) == 0
    return page.read_text()


def test_no_element_of_a_page_comes_from_data(tmp_path):
    """The page of hostile texts has the elements and attributes of that of plain words."""
    plain = Elements(page_of(tmp_path / "plain", "words")).found
    assert len(plain) > 100
    for i, text in enumerate(BREAKOUTS):
        html = page_of(tmp_path / str(i), text)
        # a long name may be broken at its underscores
        assert Elements(html).found == plain, text
        assert text not in html


# ---- paths ------------------------------------------------------------------------------------

PATHS = ["../../escaped", "/escaped", "a\x00b", "..", ".", "~/escaped", "x" * 5000, "a/b/c"]
PATHS += ["C:\\escaped", "$HOME", "file:///etc/passwd", "-rf", "\n", "{0}", "%s"]


def tree(folder: Path) -> dict[str, bytes]:
    """Each path in it with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def opened():
    """Paths that Python opens, makes, renames or lists in this process, while it is not None."""
    noted = {"paths": None}

    def hook(event, arguments):
        if noted["paths"] is not None and event.startswith(("open", "os.", "shutil.")):
            noted["paths"] += [str(each) for each in arguments if isinstance(each, (str, bytes))]

    sys.addaudithook(hook)  # for good: nothing takes one away
    yield noted
    noted["paths"] = None


@pytest.fixture
def place(tmp_path, inputs, monkeypatch, opened):
    """A folder of problems and samples with ids that look like paths, beside one for output.

    What becomes a path of it lands in the same tree, or at the root, and would be seen.
    """
    folder = tmp_path / "a/b/here"
    folder.mkdir(parents=True)
    write_problems(folder, PATHS, text="../../escaped\n/escaped\nAnswer: /etc/passwd")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "a"))
    opened["paths"] = []
    yield folder
    touched, opened["paths"] = opened["paths"], None
    assert any("problems.jsonl" in path for path in touched)
    assert [path for path in touched if "escaped" in path or path == "/etc/passwd"] == []


def check_tree(place, before, allowed) -> None:
    """Nothing is new but what begins with `allowed`, nothing is changed, nothing is at the root."""
    top = place.parents[1]
    after = tree(top)
    new = [name for name in after if name not in before]
    assert new and all(name.startswith(tuple(f"b/here/{each}" for each in allowed)) for name in new)
    assert {name: after[name] for name in before} == before
    assert not Path("/escaped").exists()
    for name in new:
        assert "escaped" not in name and "x" * 99 not in name, name


def test_ids_are_no_paths_in_sample_and_label(place, inputs):
    before = tree(place.parents[1])
    words = sample_words(inputs, inputs / "model", "out.jsonl", place / "problems.jsonl")
    assert main(words) == 0
    assert main(label_words(place, "labelled.jsonl", "--process", "arithmetic")) == 0
    check_tree(place, before, ["out.jsonl", "labelled.jsonl"])
    rows = [json.loads(line) for line in Path("labelled.jsonl").read_text().splitlines()]
    assert [row["problem_id"] for row in rows] == PATHS


def test_ids_are_no_paths_in_the_cache_of_a_judge(place):
    server = Server(lambda name, times: None)
    before = tree(place.parents[1])
    options = flags(process="judge", judge_url=server.url, judge_model="../../escaped")
    words = label_words(place, "labelled.jsonl", *options, *flags(judge_key_env="none"))
    assert main(words) == 0
    server.http.shutdown()
    server.http.server_close()
    check_tree(place, before, ["labelled.jsonl"])
    kept = [path.relative_to("labelled.jsonl.judge") for path in Path().rglob("*.judge/*/*")]
    assert kept and all(len(path.stem) == 64 and path.parts[0] == path.stem[:2] for path in kept)


def test_ids_are_no_paths_in_evaluate_and_inspect(place, inputs):
    before = tree(place.parents[1])
    words = COMMANDS["evaluate"](inputs, inputs / "model", Path("out"))
    words[words.index("--problems") + 1] = "problems.jsonl"
    assert main(words) == 0
    row = {"completions": ["a"], "labels": [True], "label": True, "prompt": "../../escaped"}
    write(place / "out/rows.jsonl", *(row | {"problem_id": i, "sample": 0} for i in PATHS))
    assert main(["inspect", "out/rows.jsonl"]) == 0
    check_tree(place, before, ["out"])


def test_ids_are_no_paths_in_iterate(place, inputs, monkeypatch):
    """A round of it: sampling, labels, training, evaluation, log-ratios."""
    monkeypatch.setattr(launch, "run", lambda words: main(words[2:]) and pytest.fail("training"))
    before = tree(place.parents[1])
    words = flags(model=inputs / "model", problems="problems.jsonl", eval_problems="problems.jsonl")
    words += flags(rounds=1, num_samples=1, eval_num_samples=1, max_new_tokens=2, device="cpu")
    words += flags(output="out", outcome="exact", process="none", resamples=10)
    words += ["--use-cpu", "--disable-tqdm", *flags(max_steps=1, report_to="none")]
    assert main(["iterate", *words]) == 0
    check_tree(place, before, ["out"])
    assert (place / "out/round_1/metrics.json").exists()


def test_text_that_no_file_can_hold_is_refused_before_work(place, inputs, capsys):
    """JSON can spell half of a surrogate pair; a run must not end at the first such row."""
    row = json.loads((place / "problems.jsonl").read_text().splitlines()[0])
    sample = {"problem_id": row["id"], "sample": 0, "prompt": "?", "completion": "a"}
    sample |= {"finish": "stop"}
    for field in ("id", "problem", "answer", "solution"):
        write(place / "bad.jsonl", row, row | {"id": "q", field: "a \ud800"})
        words = sample_words(inputs, inputs / "model", "out.jsonl", place / "bad.jsonl")
        assert f"bad.jsonl, line 2: {field}: want text without lone" in refused(words, capsys)
    for field in ("problem_id", "completion", "prompt"):
        write(place / "samples.jsonl", sample, sample | {"sample": 1, field: "\udfff"})
        error = refused(label_words(place, "out.jsonl"), capsys)
        assert f"samples.jsonl, line 2: {field}: want text without lone" in error
    write(place / "samples.jsonl", sample | {"prompt": [{"role": "user", "content": "\ud800"}]})
    assert "line 1: prompt: want text without" in refused(label_words(place, "out.jsonl"), capsys)
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize("name", ["../problems", "/etc/hosts", "math500/../x", "\x00.jsonl", ""])
def test_names_of_problem_sets_are_sets_or_files(place, inputs, capsys, name):
    before = tree(place.parents[1])
    words = sample_words(inputs, inputs / "model", "out.jsonl", name or " ")
    refused(words, capsys)
    assert tree(place.parents[1]) == before


# ---- keys -------------------------------------------------------------------------------------

KEY = "sk-very-secret-0123456789"


class Elsewhere:
    """A server that redirects every request to another, which notes what it gets."""

    def __init__(self, status: int):
        self.got = []
        notes = self.got

        class Target(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                notes.append(dict(self.headers))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *unused):
                pass

        self.servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Target)]
        target = f"http://127.0.0.1:{self.servers[0].server_port}/v1/chat/completions"

        class Source(Target):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.send_header("Location", target)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Source))
        self.url = f"http://127.0.0.1:{self.servers[1].server_port}/v1"
        for each in self.servers:
            threading.Thread(target=each.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        for each in self.servers:
            each.shutdown()
            each.server_close()


def judge_words(inputs, output, url):
    options = flags(process="judge", judge_url=url, judge_model="m", judge_key_env="THE_KEY")
    options += flags(judge_retries=0, judge_timeout=5, judge_attempts=1)
    return label_words(inputs, output, *options)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_no_key_elsewhere(inputs, tmp_path, capsys, monkeypatch, status):
    monkeypatch.setenv("THE_KEY", KEY)
    servers = Elsewhere(status)
    error = refused(judge_words(inputs, tmp_path / "l.jsonl", servers.url), capsys)
    servers.close()
    assert f"HTTP status {status}" in error and KEY not in error
    assert servers.got == []


def check_without_key(folder, capsys) -> None:
    out, err = capsys.readouterr()
    assert KEY not in out + err
    for name, content in tree(folder).items():
        assert KEY not in name and KEY.encode() not in content, name


@pytest.mark.parametrize("script", [None, 401, 500, "half", "no JSON"], ids=str)
def test_a_key_is_in_no_file_and_no_message(inputs, tmp_path, capsys, monkeypatch, script):
    monkeypatch.setenv("THE_KEY", KEY)
    server = Server(lambda name, times: script)
    main(judge_words(inputs, tmp_path / "l.jsonl", server.url))
    words = sample_words(inputs, "m", tmp_path / "s.jsonl")[:-2]  # but for --device
    more = flags(backend="server", server_url=server.url, server_key_env="THE_KEY")
    main([*words, *more, *flags(server_retries=0, server_timeout=5)])
    assert server.keys and set(server.keys) == {f"Bearer {KEY}"}
    server.http.shutdown()
    server.http.server_close()
    check_without_key(tmp_path, capsys)


def test_a_key_is_in_no_repr_and_no_exception(monkeypatch):
    monkeypatch.setenv("THE_KEY", KEY)
    client = ChatClient("http://127.0.0.1:1/v1", "m", api_key_env="THE_KEY", retries=0)
    assert KEY not in repr(client) + str(client)

    async def ask():
        async with client:
            await client.complete([{"role": "user", "content": "?"}])

    with pytest.raises(ChatError) as caught:
        asyncio.run(ask())
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_an_address_cannot_hold_a_key(monkeypatch):
    """It would be in every message."""
    for url in (f"http://user:{KEY}@localhost/v1", f"http://localhost/v1?key={KEY}"):
        with pytest.raises(ValueError, match="base_url") as caught:
            ChatClient(url, "m", api_key_env=None)
        assert KEY not in str(caught.value)
