"""Reference log-probs of a dataset, computed once and kept in a file that knows what made it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stepkto_kernels import files
from stepkto_kernels.training.batch import IGNORED
from stepkto_kernels.training.data import EncodedExample
from stepkto_kernels.training.dataset import StepKTODataset

ADAPTER_NAMES = ("lora_", "modules_to_save", "prompt_encoder", "ia3_")
LAYOUT = 2  # of the file, and of what its key is made of
# Per-token log-probs of the targets of a collated batch, in its shape.
LogProbFunction = Callable[[dict[str, Any]], Tensor]


def model_fingerprint(model: nn.Module, *, with_adapters: bool = True) -> str:
    """SHA-256 of config, weights and saved buffers. Reads every weight once.

    with_adapters: False leaves PEFT's adapters out, and is that of the model they were put on.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        values = config.to_dict()
        for name in ("_name_or_path", "transformers_version", "use_cache"):  # change nothing
            values.pop(name, None)
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if with_adapters or not any(part in name for part in ADAPTER_NAMES):
            # a PEFT model's base layers have the names of the plain model's
            plain = name.removeprefix("base_model.model.")
            for wrapper in (".base_layer.", ".original_module."):
                plain = plain.replace(wrapper, ".")
            digest.update(f"{plain} {tuple(tensor.shape)} {tensor.dtype}".encode())
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(data.numpy().data)
    return digest.hexdigest()


def cache_key(fingerprint: str, dataset: StepKTODataset, precision: str) -> str:
    """Names the log-probs of one dataset under one model; precision: how matrices are multiplied.

    Another model, tokenizer, text, max_length or precision gives another key.
    """
    parts = (str(LAYOUT), fingerprint, dataset.fingerprint(), precision)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def cache_path(folder: str | os.PathLike[str], key: str) -> Path:
    return Path(folder) / f"ref_logps_{key[:16]}.safetensors"


def load(path: Path, key: str, tokens: int) -> Tensor | None:
    """The log-probs in a file, (tokens,) fp32; None where there is no file.

    Raises:
        ValueError: the file is damaged, holds something else, or numbers that are not finite.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("key")
            logps = file.get_tensor("ref_logps") if found == key else None
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: want reference log-probs, got an unreadable file: {error}; "
            "delete it to compute them again"
        ) from None
    if logps is None or logps.shape != (tokens,) or logps.dtype != torch.float32:
        raise ValueError(
            f"{path}: want {tokens} reference log-probs of this model and dataset, got "
            "others; delete it to compute them again"
        )
    bad = int((~logps.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{path}: want finite reference log-probs, got {bad} that are not; delete it to "
            "compute them again"
        )
    return logps


def save(path: Path, key: str, logps: Tensor) -> None:
    """Write the file, complete or not at all."""
    with files.replacing(path) as temporary:
        save_file({"ref_logps": logps}, temporary, metadata={"key": key})


def compute(
    dataset: StepKTODataset,
    collate: Callable[[list[EncodedExample]], dict[str, Any]],
    log_probs: LogProbFunction,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """Log-probs of all completion tokens, in order: (dataset.completion_tokens,) fp32 on the CPU.

    Longest first, so that a batch has little padding and memory runs out at once if it does. With
    several ranks each does every world_size-th batch, all the same number of them as models may be
    sharded, and the caller adds the ranks' results: elements of others are 0.
    """
    out = torch.zeros(dataset.completion_tokens)
    for indices, own in sharded_batches(dataset, batch_size, rank, world_size):
        batch = collate([dataset[i] for i in indices])
        logps = log_probs(batch).cpu()
        if own:
            # both in the order of the examples, and of the tokens in them
            rows = torch.cat([torch.arange(*dataset.starts[i : i + 2]) for i in indices])
            out[rows] = logps[batch["target"].cpu() != IGNORED]
    return out


def sharded_batches(
    dataset: StepKTODataset, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[list[int], bool]]:
    """Indices of a rank's batches, and whether they are its own: some may be done for company.

    Longest first; as many batches for every rank.
    """
    lengths = [len(example.input_ids) for example in dataset.examples]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rounds = -(-len(batches) // world_size)
    for turn in range(rounds):
        number = turn * world_size + rank
        yield batches[number % len(batches)], number < len(batches)
