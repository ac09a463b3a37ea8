"""Peak memory of every mode against N and V, each in a fresh process.

    python benchmarks/memory.py                  # a table, and benchmarks/results/memory_cpu.json
    python benchmarks/memory.py --device cuda    # the same with the CUDA allocator's counters

Extra memory is the peak during forward and backward, less what was there before and less the
gradients. It must stay below the memory that plan.py plans, plus the (N, H) rows that a mode keeps
aside, plus SLACK; the script exits with 1 where it does not.
Letters: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import platform
import subprocess
import sys
from typing import Any

import torch

import stepkto_kernels as sk
from stepkto_kernels import plan, reference

MIB = 2**20
SLACK = 48  # MiB: weight chunk, partial sums, log_softmax of a tile, allocator
H = 256
SIZES = [(1024, 16384), (4096, 16384), (1024, 65536), (4096, 65536)]  # (N, V)
BUDGET = 128 * MIB
MODES = ("forward", "frozen", "cached", "recompute", "fused", "naive")
STEPS, SEQUENCE = 4, 256  # steps and tokens of a sequence, for the fused loss


def run(mode: str, N: int, V: int, device: str) -> None:
    """One forward and, but for "forward", one backward pass."""
    torch.manual_seed(0)
    hidden = torch.randn(N, H, device=device, requires_grad=mode != "forward")
    weight = torch.randn(V, H, device=device, requires_grad=mode not in ("forward", "frozen"))
    target = torch.randint(0, V, (N,), device=device)
    before = start_measuring(device)
    if mode == "fused":
        sequences = max(N // SEQUENCE, 1)
        step_ids = (torch.arange(N, device=device) * STEPS // SEQUENCE % STEPS).view(sequences, -1)
        labels = torch.arange(sequences, device=device) % 2
        segments = sk.StepSegments.from_padded(
            step_ids, torch.ones_like(step_ids), labels, labels[:, None].expand(-1, STEPS)
        )
        loss, _ = sk.fused_linear_step_kto_loss(
            hidden,
            weight,
            target,
            segments,
            torch.zeros(N, device=device),
            config=sk.StepKTOConfig(reference_point="zero"),
            memory_budget=BUDGET,
        )
        loss.backward()
    elif mode == "naive":
        reference.linear_logprobs(hidden, weight, target).sum().backward()
    else:
        budget = BUDGET if mode == "cached" else None
        logps = sk.linear_logprobs(hidden, weight, target, memory_budget=budget)
        if mode != "forward":
            logps.sum().backward()
    gradients = sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    print(json.dumps((peak(device) - before - gradients) / MIB))


def start_measuring(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    warm = torch.randn(64, 64, requires_grad=True)  # thread pools and code pages of torch
    sk.linear_logprobs(warm, warm.detach(), torch.zeros(64, dtype=torch.int64)).sum().backward()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # peak resident size := resident size
    return resident("VmRSS")


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def resident(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def planned(mode: str, N: int, V: int, device: str) -> float:
    """MiB that plan.py lets the mode hold: a logits tile, rows kept, (N, H) rows set aside."""
    tile = min(plan.token_chunk(device), N) * plan.vocab_chunk(V, device) * 4
    extra = {
        "forward": 0,
        "frozen": N * H * 4,
        "cached": plan.cached_rows(N, V, 4, BUDGET, device) * V * 4,
        "recompute": 0,
        "fused": min(plan.fused_rows(V, BUDGET, device), N) * V * 4,
    }
    return (tile + extra[mode]) / MIB


def environment(device: str) -> dict[str, str]:
    root = pathlib.Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    )
    cpu = [
        line.partition(":")[2].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{cpu[0]}, {len(cpu)} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "stepkto_kernels": sk.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="peak memory of every mode of the head")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--output", type=pathlib.Path, help="default: benchmarks/results/memory_DEVICE.json"
    )
    parser.add_argument(
        "--case", nargs=3, metavar=("MODE", "N", "V"), help="run one case, print MiB"
    )
    args = parser.parse_args()
    if args.case:
        mode, N, V = args.case
        run(mode, int(N), int(V), args.device)
        return 0
    rows = [measure(mode, N, V, args.device) for mode in MODES for N, V in SIZES]
    result = {
        "benchmark": "memory",
        **environment(args.device),
        "budget_mib": BUDGET // MIB,
        "rows": rows,
    }
    output = args.output or pathlib.Path(__file__).parent / f"results/memory_{args.device}.json"
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {output}")
    over = [r for r in rows if r["planned_mib"] and r["extra_mib"] > r["planned_mib"] + SLACK]
    for row in over:
        print(f"more than planned: {row}", file=sys.stderr)
    return 1 if over else 0


def measure(mode: str, N: int, V: int, device: str) -> dict[str, Any]:
    """One case in a fresh process, printed as a line and returned as a row of the results."""
    case = ["--device", device, "--case", mode, str(N), str(V)]
    done = subprocess.run([sys.executable, __file__, *case], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{mode} N={N} V={V} failed:\n{done.stderr}")
    row = {"mode": mode, "N": N, "H": H, "V": V, "extra_mib": round(json.loads(done.stdout), 1)}
    row["planned_mib"] = None if mode == "naive" else round(planned(mode, N, V, device), 1)
    print(
        f"{mode:<10} N = {N:>5}  V = {V:>6}  logits {N * V * 4 / MIB:>6.0f} MiB"
        f"  extra {row['extra_mib']:>7.1f} MiB  planned {row['planned_mib'] or '-':>6} MiB"
    )
    return row


if __name__ == "__main__":
    sys.exit(main())
