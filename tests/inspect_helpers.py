"""Runs to look at, and a headless browser to look at them with."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

BROWSERS = (
    "chromium-headless-shell",
    "chrome-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
)
PATIENCE = 60  # seconds
HOSTILE = (
    "</script><script>window.hostile = 1</script><img src=x onerror='window.hostile = 2'>"
    "<!--<script> \u2028\u2029\u202e\x00\x1b[31m & &lt;b&gt; ${alert(1)} $data"
)


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def solution(problem, sample=0, *, label=True, labels=(True, True, None), text="2 + 2 = 4\n"):
    return {
        "problem_id": f"p{problem}",
        "sample": sample,
        "prompt": f"What is problem {problem}?\n",
        "completions": [text] * len(labels),
        "labels": list(labels),
        "label": label,
    }


def make_run(folder, *, method="step_kto", rounds=2, problems=4, shift=0.0):
    """A run as `stepkto iterate` leaves it: round 0 and `rounds` more."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model: M0\nmethod: {method}\nrounds: {rounds}\n")
    for t in range(rounds + 1):
        place = folder / f"round_{t}"
        value = 0.4 + 0.1 * t + shift
        metrics = {
            "pass@1": {"value": value, "low": value - 0.1, "high": value + 0.1},
            "step_errors_in_correct": {"value": 0.3 - 0.05 * t - shift, "low": 0.0, "high": 0.5},
        }
        about = {"round": t, "method": method, "num_problems": problems, "num_samples": 2}
        write(place / "metrics.json", about | {"metrics": metrics})
        held_out = [solution(f"e{i}", label=i % 2 == 0) for i in range(problems)]
        write(place / "evaluation" / "greedy.jsonl", *held_out)
        write(place / "evaluation" / "sampled.jsonl", *held_out)
        if t == 0:
            continue
        rows = [
            solution(i, k, label=k == 0, labels=(True, k == 0, None))
            for i in range(problems)
            for k in range(2)
        ]
        write(place / "labelled.jsonl", *rows)
        write(place / "selected.jsonl", *rows[:2])
        ratios = [
            {"problem_id": row["problem_id"], "sample": row["sample"], "steps": [0.5, -0.25, 1e-6]}
            for row in rows
        ]
        write(place / "log_ratios.jsonl", *ratios)
        log = [{"step": k, "epoch": k / 4, "loss": 1 / (k + t)} for k in range(1, 5)]
        write(place / "model" / "trainer_state.json", {"log_history": log})
    return folder


def find_browser():
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Browser:
    """A page in a headless Chromium, spoken to over a pipe (the DevTools protocol)."""

    def __init__(self, program):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [program, "--headless", "--remote-debugging-pipe", "--no-first-run"]
        command += ["--disable-gpu", "--hide-scrollbars", f"--user-data-dir={self.profile.name}"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium refuses to be root inside of it
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # far from 3 and 4, which they become in the browser
        given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs_in, theirs_out)]
        launch = (
            f"import os, sys; os.dup2({given[0]}, 3); os.dup2({given[1]}, 4); "
            "os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", launch, *command],
            pass_fds=given,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (theirs_in, theirs_out, *given):
            os.close(fd)
        self.out, self.inp = open(ours_out, "wb", 0), open(ours_in, "rb", 0)
        self.events, self.rest, self.number, self.session = [], b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.out.close()
        self.inp.close()
        self.profile.cleanup()

    def _message(self):
        while b"\0" not in self.rest:
            assert select.select([self.inp], [], [], PATIENCE)[0], f"no word in {PATIENCE} s"
            read = self.inp.read(1 << 20)
            assert read, "the browser has ended"
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path):
        """Load a file; what happens from then on is in `events`."""
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def run(self, expression):
        """The value of a JavaScript expression; promises are waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression, seconds=10):
        end = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < end, f"not in {seconds} s: {expression}"
            time.sleep(0.02)

    def choose(self, control, value):
        """Set a control of the page as a user does."""
        self.run(
            f"(() => {{ const it = document.getElementById({json.dumps(control)});"
            f"it.value = {json.dumps(value)};"
            "it.dispatchEvent(new Event('input', {bubbles: true}));"
            "it.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def press(self, key):
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def complaints(self):
        """Uncaught errors, and what the page or the browser wrote to the console."""
        told = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        self.run("0")  # lets what is under way arrive
        return [event for event in self.events if event["method"] in told]

    def requests(self):
        sent = (e for e in self.events if e["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]
