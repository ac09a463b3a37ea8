"""The demo runs from start to end and leaves what it says."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_quick_demo(tmp_path):
    command = [sys.executable, "examples/demo.py", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    left = {path.name for path in tmp_path.iterdir()}
    assert {"table.md", "rounds.png", "results.json", "samples.txt", "round_1.jsonl"} <= left
    rounds = json.loads((tmp_path / "results.json").read_text())["rounds"]
    assert list(rounds) == ["M0", "M1", "M2"]
    assert (tmp_path / "table.md").read_text() in done.stdout
    for name in ("M1", "M2"):
        curves = (tmp_path / name / "curves.png").read_bytes()
        assert curves.startswith(b"\x89PNG")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        # 8 problems, 2 solutions of each, 8 solutions a step
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
    first = json.loads((tmp_path / "M1" / "metrics.jsonl").read_text().splitlines()[0])
    # the reference is the policy itself, and a model's log-ratio with itself is exactly 0
    assert first["kl"] == first["step/kl"] == 0.0
    assert first.get("rewards/chosen", 0.0) == first.get("rewards/rejected", 0.0) == 0.0
