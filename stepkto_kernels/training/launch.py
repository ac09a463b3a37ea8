"""Training as a process of its own: its memory is given back, and many GPUs take part."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepkto_kernels.training import checkpoints

TRAIN = ["-m", "stepkto_kernels.cli", "train"]


def train(
    options: Mapping[str, Any],
    config: Path,
    num_processes: int = 1,
    accelerate_config: str | None = None,
) -> None:
    """`stepkto train` with these options, from the newest whole checkpoint in its output.

    Args:
        options: of `stepkto train`, "output" among them.
        config: YAML file to write them to.
        num_processes: more than 1 are data parallel, started by torch.distributed.run.
        accelerate_config: file of `accelerate config`, such as for FSDP: they are started by
            `accelerate launch` with it.
    Raises:
        OSError: it failed.
    """
    import yaml

    config.write_text(yaml.safe_dump(dict(options), sort_keys=False), encoding="utf-8")
    words = [*TRAIN, "--config", str(config)]
    checkpoint = checkpoints.newest(Path(options["output"]))
    if checkpoint is not None:
        words += ["--resume", str(checkpoint)]
    if accelerate_config is not None:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", accelerate_config]
        words = [*launcher, "--num_processes", str(num_processes), *words]
    elif num_processes > 1:
        words = [*processes(num_processes), *words]
    run(words)


def processes(number: int) -> list[str]:
    """What starts several processes; accelerate without a config file starts one without GPUs."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]


def run(words: list[str]) -> None:
    """This interpreter with these arguments; it ends when we do.

    Raises:
        OSError: it ended with another status than 0.
    """
    process = subprocess.Popen([sys.executable, *words], preexec_fn=end_with_parent)
    try:
        status = process.wait()
    except BaseException:  # Ctrl-C
        process.terminate()
        process.wait()
        raise
    if status != 0:
        raise OSError(f"{' '.join(words)}: want exit status 0, got {status}")


def end_with_parent() -> None:
    """On Linux, SIGTERM for this process when its parent is gone, killed or not."""
    if sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1  # prctl(2)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def tidy(folder: Path) -> None:
    """Leave of a training's output the model: without checkpoints, an adapter merged into it.

    What is killed half-way may be done again: training from the last checkpoint, then this.
    """
    if (folder / "adapter_config.json").exists():
        merge_adapter(folder)
    for left in (*folder.glob("adapter_*"), *folder.glob("ref_logps_*")):
        left.unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def merge_adapter(folder: Path) -> None:
    """Write the model that a PEFT adapter in a folder makes of its base, into the same folder.

    The next round samples from it, trains it and compares with it as with any other model.
    """
    from peft import AutoPeftModelForCausalLM

    from stepkto_kernels.training.models import SAFE

    load: Any = AutoPeftModelForCausalLM.from_pretrained
    model = load(folder, dtype="auto", **SAFE)
    model.merge_and_unload().save_pretrained(folder)
