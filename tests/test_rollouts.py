"""Rollouts from every prefix, by a model here or by a server: what they go on from, and labels."""

import http.server
import json
import random
import threading

import pytest

transformers = pytest.importorskip("transformers")

from stepkto_kernels.cli import main  # noqa: E402
from stepkto_kernels.training.openai_client import ChatClient, ChatError  # noqa: E402
from stepkto_kernels.training.records import Problem, Sample, as_row  # noqa: E402
from stepkto_kernels.training.rewards import arithmetic  # noqa: E402
from stepkto_kernels.training.rewards.answers import ExactMatch  # noqa: E402
from stepkto_kernels.training.rewards.base import Solution  # noqa: E402
from stepkto_kernels.training.rewards.continuations import (  # noqa: E402
    ModelContinuations,
    ServerContinuations,
)
from stepkto_kernels.training.rewards.rollouts import MonteCarlo  # noqa: E402
from stepkto_kernels.training.sampling import generate_from_ids  # noqa: E402
from stepkto_kernels.training.tiny import make_model  # noqa: E402

PROBLEM = Problem("p", "2 + 2?", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def solutions():
    rng = random.Random(0)
    annotator = arithmetic.SloppyAnnotator(random.Random(1))
    found = []
    for i in range(3):
        problem = arithmetic.make_problem(rng)
        steps = arithmetic.split_lines(annotator.solve(problem, rng))[0]
        about = Problem(str(i), problem.text, str(problem.answer))
        found.append(Solution(about, tuple(steps), problem.text))
    return found


def test_a_model_goes_on_from_prompt_and_prefix(model, tokenizer, solutions):
    nearly_greedy = ModelContinuations(model, tokenizer, temperature=1e-4, max_new_tokens=6)
    found = nearly_greedy(solutions, 2, 0)
    ids = [tokenizer(each.prompt + each.text)["input_ids"] for each in solutions]
    want = generate_from_ids(model, tokenizer, ids, temperature=0, max_new_tokens=6)
    assert found == [[each[0].text] * 2 for each in want]


def test_a_model_draws_anew_and_the_same_again(model, tokenizer, solutions):
    draw = ModelContinuations(model, tokenizer, max_new_tokens=8)
    assert draw(solutions, 4, 0) == draw(solutions, 4, 0) != draw(solutions, 4, 4)


def test_a_prefix_without_room_has_no_continuation(model, tokenizer, solutions):
    lengths = [len(tokenizer(each.prompt + each.text)["input_ids"]) for each in solutions]
    limit = sorted(lengths)[1]
    draw = ModelContinuations(model, tokenizer, max_new_tokens=4, max_length=limit + 4)
    found = draw(solutions, 2, 0)
    assert [texts == [None, None] for texts in found] == [n > limit for n in lengths]
    judge = MonteCarlo(draw, ExactMatch(), rollouts=2)
    labels = judge([solutions[lengths.index(max(lengths))]])[0]
    assert labels[-1] is None and judge.unknown >= 2


def test_a_prompt_is_needed(model, tokenizer):
    bare = [Solution(PROBLEM, ("a\n",))]
    with pytest.raises(ValueError, match="problem 'p': prompt: want one to go on from, got none"):
        ModelContinuations(model, tokenizer)(bare, 1, 0)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"temperature": 0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 0}, "max_length"),
        ({"seed": -1}, "seed"),
    ],
)
def test_refused_options(model, tokenizer, options, match):
    with pytest.raises(ValueError, match=f"{match}: want"):
        ModelContinuations(model, tokenizer, **options)


# Servers


@pytest.fixture
def serve():
    """Start a server that ends a right prefix in the right answer; `refuse(body)` gives 400."""
    servers = []

    def start(refuse=lambda body: False):
        seen = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append((self.path, body))
                chat = "messages" in body
                prefix = body["messages"][-1]["content"] if chat else body["prompt"]
                text = "Answer: 5" if "wrong" in prefix else "Answer: 4"
                choice = {"message": {"content": text}} if chat else {"text": text}
                reply = json.dumps({"choices": [choice | {"finish_reason": "stop"}]}).encode()
                self.send_response(400 if refuse(body) else 200)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *unused):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        return ChatClient(url, "m", api_key_env=None, retries=0), seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


MESSAGES = ({"role": "user", "content": "2 + 2?"},)


@pytest.mark.parametrize("prompt", ["2 + 2?\n", MESSAGES], ids=["text", "messages"])
def test_a_server_goes_on_from_the_prefix(serve, prompt):
    client, seen = serve()
    judge = MonteCarlo(ServerContinuations(client), ExactMatch(), rollouts=4, at_once=2)
    steps = ("one\n", "two\n", "wrong\n", "three\n")
    assert judge([Solution(PROBLEM, steps, prompt)]) == [[True, True, False, False]]
    seeds = [body["seed"] for _, body in seen]
    assert len(set(seeds)) == len(seeds) and judge.drawn == len(seen)
    for path, body in seen:
        if isinstance(prompt, str):
            assert path == "/v1/completions" and body["prompt"].startswith("2 + 2?\none\n")
        else:
            assert path == "/v1/chat/completions" and body["messages"][0] == MESSAGES[0]
            assert body["messages"][1]["role"] == "assistant"
            assert body["continue_final_message"] and not body["add_generation_prompt"]


def test_what_a_server_turns_down_is_unlabelled(serve):
    client, _ = serve(lambda body: "two" in body["prompt"])
    judge = MonteCarlo(ServerContinuations(client), ExactMatch(), rollouts=2)
    assert judge([Solution(PROBLEM, ("one\n", "two\n"), "q\n")]) == [[True, None]]
    client, _ = serve(lambda body: True)
    with pytest.raises(ChatError, match="400"):
        MonteCarlo(ServerContinuations(client), ExactMatch())([Solution(PROBLEM, ("a\n",), "q\n")])


# The command


@pytest.fixture
def words(tmp_path, solutions):
    answers = "Answer: 0\n"
    rows = {
        "problems": [as_row(each.problem) for each in solutions],
        "samples": [
            as_row(Sample(each.problem.id, 0, each.prompt, each.text + answers, "stop"))
            for each in solutions
        ],
    }
    found = ["label", "--output", str(tmp_path / "out.jsonl"), "--outcome", "exact"]
    for name, content in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        found += [f"--{name}", str(path)]
    return [*found, "--process", "rollouts"]


def test_command(words, folder, tmp_path, capsys, solutions):
    words += ["--rollout-model", str(folder), "--rollouts", "3", "--rollout-max-new-tokens", "8"]
    assert main(words) == 0
    text = (tmp_path / "out.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [len(row["labels"]) for row in rows] == [len(each.steps) + 1 for each in solutions]
    # an untrained model reaches no answer: every step that it was asked about is wrong
    assert all(set(row["labels"][:-1]) == {False} for row in rows)
    assert "rollouts: " in capsys.readouterr().out
    (tmp_path / "out.jsonl").write_text(text[: len(text) // 2])
    assert main(words) == 0 and (tmp_path / "out.jsonl").read_text() == text


@pytest.mark.parametrize(
    "more, match",
    [
        ([], "--rollout-model: want it with --process rollouts, got none"),
        (["--rollout-model", "m", "--outcome", "none"], "--outcome: want a judge of the rollouts"),
        (
            ["--rollout-model", "m", "--rollout-url", "http://x/v1", "--rollout-device", "cpu"],
            "--rollout-device: want none with --rollout-url",
        ),
        (
            ["--rollout-model", "m", "--rollout-timeout", "3"],
            "--rollout-timeout: want --rollout-url with it",
        ),
    ],
)
def test_command_refuses_what_does_not_fit(words, capsys, more, match):
    assert main([*words, *more]) == 2
    assert match in capsys.readouterr().err
