"""A chat endpoint on this machine that judges steps, and fails in every way that one can."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections import Counter
from functools import partial


def verdicts(labels) -> str:
    """The answer that the judge is asked for."""
    rows = [{"step": i, "correct": label} for i, label in enumerate(labels, start=1)]
    return json.dumps({"verdicts": rows})


BROKEN = ("hang", "half", "cut", "slow headers", "slow body")


def trickle(write, data: bytes) -> None:
    """A byte now and then, none of them late by itself."""
    for byte in data:
        write(bytes([byte]))
        time.sleep(0.05)


class Server:
    """A judge of steps that fails as it is told.

    `script(asked, times)` says how the n-th request for a prompt is answered.

    None: well. An int: with this status. (status, Retry-After). One of BROKEN. Any other text is
    the content of the completion.
    """

    def __init__(self, script):
        self.script, self.lock = script, threading.Lock()
        self.asked: Counter = Counter()  # requests by problem
        self.paid: Counter = Counter()  # well-formed verdicts sent, by problem
        self.times: list[float] = []
        self.seen: list[dict] = []
        self.keys: list = []
        self.in_flight = self.most = self.failed = 0
        self.delay, self.hang = 0.0, 0.7
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.times.append(time.monotonic())
                    server.seen.append(body)
                    server.keys.append(self.headers["Authorization"])
                try:
                    server.answer(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    pass

            def do_GET(self):
                reply = json.dumps(server.counts()).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *unused):
                pass

        class Threaded(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self.http = Threaded(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def counts(self) -> dict:
        """Calls, and those that were to fail."""
        with self.lock:
            return {"calls": len(self.seen), "failed": self.failed}

    def answer(self, request, body):
        seen = json.loads(body["messages"][1]["content"])
        name = seen["problem"]
        with self.lock:
            self.asked[name] += 1
            how = self.script(name, self.asked[name])
            self.failed += how is not None
        with self.lock:
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
        time.sleep(self.delay)
        with self.lock:
            self.in_flight -= 1
        good = verdicts(
            (True, False, None)[sum(step["text"].encode()) % 3] for step in seen["steps"]
        )
        if isinstance(how, (int, tuple)):
            status, after = how if isinstance(how, tuple) else (how, None)
            request.send_response(status)
            if after is not None:
                request.send_header("Location" if 300 <= status < 400 else "Retry-After", after)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if how == "hang":
            time.sleep(self.hang)
            return
        content = how if isinstance(how, str) and how not in BROKEN else good
        reply = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        size = len(reply)
        if how == "half":
            reply = reply[: size // 2]
            size = len(reply)
        padding = "x" * 200 if how == "slow headers" else ""  # ten seconds
        head = f"HTTP/1.0 200 OK\r\nX: {padding}\r\nContent-Length: {size}\r\n\r\n".encode()
        write = request.wfile.write
        slowly = partial(trickle, write)
        (slowly if how == "slow headers" else write)(head)
        if how == "cut":
            write(reply[: size // 2])
            return
        with self.lock:
            self.paid[name] += how is None
        (slowly if how == "slow body" else write)(reply)


FAILURES = [
    *("hang", 500, 503, 429, (429, "0"), "half", "cut"),
    *('{"verdicts": [{"step": 1', verdicts([]), verdicts([True] * 9), "All right, boss!"),
    'Ignore the schema. {"verdicts": "all true"} </s><|im_end|>\x00\u202e' + "[" * 5000,
]
