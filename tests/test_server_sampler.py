"""Sampling from a server: one that is made up here, and `transformers serve` with a tiny model."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stepkto_kernels import cli
from stepkto_kernels.training.openai_client import ChatClient, ChatError
from stepkto_kernels.training.records import read_samples
from stepkto_kernels.training.sampler import Completion, ServerSampler, TransformersSampler
from stepkto_kernels.training.tiny import make_model

TEXTS = ["A clock with 7 hours shows 3.", "Ben is on tile 2", "First, it rises to 5"]
MESSAGES = ({"role": "user", "content": "A clock with 7 hours"},)
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}Answer:"
WAIT = 60  # seconds for a server to start; it takes about 8


def client(url, **options):
    options = {"api_key_env": None, "backoff": 0.01, "retries": 1, "timeout": 30} | options
    return ChatClient(url, options.pop("model", "m"), **options)


class Server:
    """Answers with `choices(path, body)`, or the HTTP status where that gives a number."""

    def __init__(self):
        self.seen, self.choices = [], self.named
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.seen.append((self.path, body))
                found = server.choices(self.path, body)
                status = found if isinstance(found, int) else 200
                reply = json.dumps({"choices": found}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *unused):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @staticmethod
    def named(path, body):
        """Choices that say what was asked; every second one is cut off."""
        number = body.get("n", 1)
        if path.endswith("/chat/completions"):
            text = lambda k: {"message": {"content": f"{body['messages'][0]['content']} {k}"}}
        else:
            text = lambda k: {"text": f"{body['prompt']} {k}"}
        return [text(k) | {"finish_reason": ("stop", "length")[k % 2]} for k in range(number)]


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_text_and_messages_go_to_their_endpoints(server):
    sampler = ServerSampler(client(server.url), max_new_tokens=9, per_request=4)
    found = sampler([TEXTS[0], MESSAGES], num_samples=6, temperature=0.7, seed=11)
    ends = ["stop", "length", "stop", "length", "stop", "length"]
    for text, each in ((TEXTS[0], found[0]), (MESSAGES[0]["content"], found[1])):
        assert each == [Completion(f"{text} {k % 4}", ends[k]) for k in range(6)]
    asked = sorted((path, body["n"]) for path, body in server.seen)
    plain, chat = "/v1/completions", "/v1/chat/completions"
    assert asked == [(chat, 2), (chat, 4), (plain, 2), (plain, 4)]
    for _, body in server.seen:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.7, 9)
        assert body["top_p"] == 1.0
    assert len({body["seed"] for _, body in server.seen}) == 4


def test_one_completion_a_request_asks_for_no_number(server):
    sampler = ServerSampler(client(server.url))
    found = sampler(TEXTS, num_samples=5, temperature=1.0, seed=2**40)
    assert [len(each) for each in found] == [5, 5, 5] and len(server.seen) == 15
    assert all("n" not in body for _, body in server.seen)
    seeds = {body["seed"] for _, body in server.seen}
    assert len(seeds) == 15 and max(seeds) < 2**31
    sampler(TEXTS, num_samples=5, temperature=0, seed=0)
    assert len(server.seen) == 15 + 3  # greedy samples are copies


def test_further_fields_win_and_null_leaves_out(server):
    body = {"seed": None, "max_tokens": None, "max_completion_tokens": 7, "top_p": 0.9}
    ServerSampler(client(server.url), body=body)(TEXTS[:1], num_samples=1, temperature=1, seed=0)
    ((_, asked),) = server.seen
    assert asked == {
        "model": "m",
        "prompt": TEXTS[0],
        "temperature": 1,
        "max_completion_tokens": 7,
        "top_p": 0.9,
    }


def test_a_server_without_n_is_noticed(server):
    server.choices = lambda path, body: server.named(path, body)[:1]
    sampler = ServerSampler(client(server.url), per_request=2)
    with pytest.raises(ValueError, match="per_request: want as many completions, got 1"):
        sampler(TEXTS, num_samples=2, temperature=1.0, seed=0)


@pytest.mark.parametrize(
    "choices, message",
    [
        (400, "HTTP status 400, after 1 attempts"),
        (503, "HTTP status 503, after 2 attempts"),
        ([], "no completion in the reply, after 2 attempts"),
        ([{"text": None, "finish_reason": "stop"}], "no completion"),
        ([{"finish_reason": "stop"}], "no completion"),
        (["text"], "no completion"),
    ],
)
def test_requests_that_fail_for_good(server, choices, message):
    server.choices = lambda path, body: choices
    with pytest.raises(ChatError, match=f"{server.url}/completions: {message}"):
        ServerSampler(client(server.url))(TEXTS, num_samples=1, temperature=1.0, seed=0)


def test_a_thought_that_was_cut_off_has_no_text(server):
    server.choices = lambda path, body: [{"message": {"content": None}, "finish_reason": "length"}]
    found = ServerSampler(client(server.url))([MESSAGES], num_samples=1, temperature=1.0, seed=0)
    assert found == [[Completion("", "length")]]


def test_text_that_no_file_can_hold_is_mended(server):
    server.choices = lambda path, body: [{"text": "a\ud83d b\U0001f600", "finish_reason": "stop"}]
    found = ServerSampler(client(server.url))(TEXTS[:1], num_samples=1, temperature=1.0, seed=0)
    assert found == [[Completion("a? b\U0001f600", "stop")]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a chat template, whose generation config draws at random."""
    folder = make_model(tmp_path_factory.mktemp("served"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = GenerationConfig.from_pretrained(folder)
    config.update(do_sample=True, top_k=0)
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    """URL of `transformers serve`, with packages of the extra `test`."""
    for name in ("fastapi", "uvicorn", "openai", "requests"):
        pytest.importorskip(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(url, process, log):
    end = time.monotonic() + WAIT
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"transformers serve did not start:\n{log.read_text()[-3000:]}")


def test_transformers_serve_gives_what_the_model_gives(served, folder):
    """Greedy, of text and of messages through its chat template, beside the model in process."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    local = TransformersSampler(model, AutoTokenizer.from_pretrained(folder), max_new_tokens=6)
    remote = ServerSampler(client(served, model=str(folder)), max_new_tokens=6)
    options = {"num_samples": 2, "temperature": 0, "seed": 0}
    prompts = [*TEXTS, MESSAGES]
    found = remote(prompts, **options)
    assert found == local(prompts, **options)
    assert len({each[0].text for each in found}) > 1 and all(each[0].text for each in found)


def test_stepkto_sample_with_transformers_serve(served, folder, tmp_path, capsys):
    problems, output = tmp_path / "p.jsonl", tmp_path / "s.jsonl"
    rows = [{"id": str(i), "problem": text, "answer": "1"} for i, text in enumerate(TEXTS)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["sample", "--backend", "server", "--server-url", served, "--model", str(folder)]
    command += ["--server-key-env", "none", "--problems", str(problems), "--output", str(output)]
    command += ["--num-samples", "3", "--max-new-tokens", "6", "--prompt", "steps", "--chunk", "2"]
    assert cli.main(command) == 0
    assert "9 solutions of 3 problems" in capsys.readouterr().out
    samples = read_samples(output)
    assert [each.key for each in samples] == [(str(i), k) for i in range(3) for k in range(3)]
    assert len({each.completion for each in samples}) > 6  # drawn at random
    assert samples[0].prompt[0]["content"].endswith(TEXTS[0])
    before = output.read_bytes()
    assert cli.main([*command, "--server-retries", "0"]) == 0 and output.read_bytes() == before
