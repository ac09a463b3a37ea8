"""Every Triton kernel compiles for GPUs that are not here, without a spill.

benchmarks/compile_report.py does the work in a process of its own: here Triton interprets.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "benchmarks" / "compile_report.py"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """sm -> exit status and reports of all its configurations; the three are compiled at once."""
    cache = tmp_path_factory.mktemp("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    start = lambda sm: subprocess.Popen(
        [sys.executable, str(REPORT), "--sm", sm],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    running = {sm: start(sm) for sm in ("80", "90", "100")}
    out = {}
    for sm, process in running.items():
        stdout, stderr = process.communicate()
        out[sm] = process.returncode, [json.loads(line) for line in stdout.splitlines()], stderr
    return out


@pytest.mark.parametrize("sm", ["80", "90", "100"])
def test_no_spill_and_shared_memory_that_fits(reports, sm):
    status, found, stderr = reports[sm]
    bad = [report for report in found if report["problems"]]
    assert not bad, bad
    assert status == 0, stderr
    kernels = {report["kernel"] for report in found}
    assert kernels == {"_forward_kernel", "_dlogits_kernel", "_fold_kernel", "_finish_kernel"}


@pytest.mark.parametrize("sm, instruction", [("80", "HMMA"), ("90", "HGMMA"), ("100", "UTCHMMA")])
def test_bf16_runs_on_the_tensor_cores(reports, sm, instruction):
    """And loads through TMA where descriptors are used."""
    gemms = [r for r in reports[sm][1] if r["config"].startswith(("bf16 p", "bf16 d"))]
    assert gemms
    for report in gemms:
        assert instruction in report["opcodes"], report
        assert ("UTMALDG" in report["opcodes"]) == ("descriptors" in report["config"]), report


def test_the_result_has_every_mixture_of_these_kernels():
    """Thousands take half an hour: benchmarks/compile_report.py --all, kept in a file."""
    kernels = ROOT / "stepkto_kernels/kernels"
    names = ("gemm_epilogue.py", "rows.py", "tiles.py")
    text = b"".join((kernels / name).read_bytes() for name in names)
    found = json.loads((ROOT / "benchmarks/results/compile.json").read_text())["all"]
    assert found["sources"] == hashlib.sha256(text).hexdigest(), "run compile_report.py --all"
    assert found["compiled"] == found["mixtures"] > 3000
    for group in found["most"]:
        assert group["with_problems"] == 0 and group["stack_bytes"] == 0, group
    assert sum(group["compiled"] for group in found["most"]) == found["compiled"]
