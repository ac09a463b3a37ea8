"""`stepkto sample`: a model solves problems, several times each."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from stepkto_kernels import checks, files
from stepkto_kernels.training import sample_parts
from stepkto_kernels.training.label_command import keep_settings
from stepkto_kernels.training.problems import SOURCES, load_problems
from stepkto_kernels.training.prompts import PROMPTS
from stepkto_kernels.training.records import Problem, RowWriter, as_row
from stepkto_kernels.training.sample import sample_into
from stepkto_kernels.training.sample_parts import Ranks
from stepkto_kernels.training.sampler import Sampler

DESCRIPTION = "Sample solutions of problems from a model, vLLM or a server."
EPILOG = f"""\
A run that was stopped at any point goes on where it was, with the same options and --output.

--problems is a JSON-lines, JSON or Parquet file, or a set on the hub: {", ".join(SOURCES)}.
--layout says of which set a downloaded file is. Without it a row is as `stepkto label` takes it:
  {{"id": "7", "problem": "2 + 3 * 4 = ?", "answer": "14", "solution": null}}

examples:
  stepkto sample --model M0 --problems problems.jsonl --output samples.jsonl
  stepkto sample --model M0 --problems math500 --prompt steps --num-samples 8 \\
      --output samples.jsonl --save-problems math500.jsonl
  accelerate launch --num-processes 8 -m stepkto_kernels.cli sample --model M0 \\
      --problems gsm8k_test.parquet --layout gsm8k --output samples.jsonl
  stepkto sample --backend vllm --vllm-options '{{"tensor_parallel_size": 4}}' --model M0 ...
  stepkto sample --backend server --server-url http://localhost:8000/v1 --server-key-env none \\
      --model NAME ...

Of many processes, each takes problems of its own; the last one joins OUTPUT.rank0, OUTPUT.rank1 ...
`transformers serve` draws at random only where the model's generation config says so, or with
  --server-body '{{"generation_config": "{{\\"do_sample\\": true, \\"top_k\\": 0}}"}}'
"""
BACKENDS = ("transformers", "vllm", "server")
# Flags of one backend only: type, default, help. Those that do not decide what the samples are may
# differ between the runs that write a file.
TRANSFORMERS: dict[str, tuple[Any, Any, str]] = {
    "batch_size": (int, 64, "solutions at once, default 64"),
    "device": (str, "auto", "such as cpu or cuda:1; default: this process' GPU if there is one"),
    "dtype": (str, "auto", "such as bfloat16; default: as the model was saved"),
}
VLLM: dict[str, tuple[Any, Any, str]] = {
    "vllm_options": (str, "{}", "of vllm.LLM, as JSON, such as '{\"tensor_parallel_size\": 4}'"),
}
SERVER: dict[str, tuple[Any, Any, str]] = {
    "server_url": (str, None, "up to where /chat/completions follows"),
    "server_key_env": (str, "OPENAI_API_KEY", "environment variable with the key, `none` for none"),
    "server_concurrency": (int, 8, "requests at the same time, default 8"),
    "server_per_minute": (float, None, "requests a minute at most, default any number"),
    "server_timeout": (float, 600.0, "seconds of a request, default 600"),
    "server_retries": (int, 5, "attempts after a failed one, default 5"),
    "server_per_request": (int, 1, "solutions a request (the field n), default 1"),
    "server_body": (str, "{}", "further fields of every request, as JSON"),
}
FLAGS = {"transformers": TRANSFORMERS, "vllm": VLLM, "server": SERVER}
SETTINGS = ("model", "backend", "prompt", "num_samples", "temperature", "max_new_tokens", "seed")
DECIDING = ("batch_size", "dtype", "vllm_options", "server_per_request", "server_body")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name; with a server, its name there")
    add("--problems", required=True, metavar="FILE_OR_SET", help="what to solve, see below")
    add("--output", required=True, type=Path, metavar="FILE", help="to write, or to go on with")
    add("--backend", choices=BACKENDS, default="transformers", help="default transformers")
    told = "the problem's text (default), or steps and a boxed answer asked for: messages or text"
    add("--prompt", choices=PROMPTS, default="plain", help=told)
    add("--num-samples", type=int, default=8, help="solutions of a problem, default 8")
    add("--temperature", type=float, default=1.0, help="default 1; 0 is greedy")
    add("--max-new-tokens", type=int, default=1024, help="of a solution, default 1024")
    add("--seed", type=int, default=0, help="default 0")
    add("--chunk", type=int, default=64, help="problems at once, and lost by a kill; default 64")
    add("--layout", choices=tuple(SOURCES), help="the set whose fields a file of --problems has")
    add("--split", help="of a set on the hub, default: test, or train where there is no other")
    add("--limit", type=int, help="problems to take, from the first; default all")
    add(
        "--save-problems", type=Path, metavar="FILE", help="write them, as stepkto label reads them"
    )
    for backend, table in FLAGS.items():
        group = parser.add_argument_group(f"--backend {backend}")
        for name, (kind, _, told) in table.items():
            group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="VALUE", help=told)


def run(args: argparse.Namespace) -> int:
    """Sample, and say how many solutions there are and how many were cut off.

    Raises:
        ValueError: an option or a problem does not fit, or the output is of another run.
        OSError: a file or the model cannot be read, or the server cannot be reached.
        ImportError: the backend is not installed.
    """
    for name in ("num_samples", "max_new_tokens", "chunk"):
        checks.integer("--" + name.replace("_", "-"), getattr(args, name), low=1)
    options = backend_options(args)
    ranks = sample_parts.ranks()
    if ranks.world_size > 1 and args.backend != "transformers":
        raise ValueError(
            f"--backend: want transformers in {ranks.world_size} processes, as {args.backend} "
            "spreads its work by itself from one, got " + args.backend
        )
    problems = load_problems(args.problems, args.layout, split=args.split, limit=args.limit)
    checks.require(bool(problems), "--problems", "at least one problem", "none")
    if args.save_problems is not None and ranks.rank == 0:
        text = "".join(json.dumps(as_row(each), ensure_ascii=False) + "\n" for each in problems)
        files.write_text(args.save_problems, text)
    wanted = {name: getattr(args, name) for name in (*SETTINGS, "chunk")}
    wanted |= {name: options[name] for name in DECIDING if name in options}
    texts = json.dumps([(each.id, each.problem) for each in problems])
    wanted["problems"] = hashlib.sha256(texts.encode()).hexdigest()[:16]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    keep_settings(args.output, wanted)
    if ranks.world_size == 1 and not sample_parts.parts(args.output):
        finished = fill(args, args.output, problems, options, ranks, set())
    else:
        finished = fill_part(args, problems, options, ranks, wanted)
    if finished:
        print(summary(args.output), end="")
    else:
        print(f"rank {ranks.rank}: done, the last one joins the parts")
    return 0


def fill_part(
    args: argparse.Namespace,
    problems: list[Problem],
    options: dict[str, Any],
    ranks: Ranks,
    wanted: dict[str, Any],
) -> bool:
    """Sample this process' share into a file of its own; True where that completed the output."""
    part = sample_parts.part_path(args.output, ranks.rank)
    with sample_parts.lock(args.output):
        others = [path for path in sample_parts.parts(args.output) if path != part]
        for path in (*others, part):
            keep_settings(path, wanted)
        done = {sample_parts.key(row) for row in sample_parts.rows_of([args.output, *others])}
    fill(args, part, problems, options, ranks, done)
    return sample_parts.join(args.output, problems, args.num_samples)


def fill(
    args: argparse.Namespace,
    path: Path,
    problems: list[Problem],
    options: dict[str, Any],
    ranks: Ranks,
    done: set[sample_parts.Key],
) -> bool:
    with RowWriter(path) as writer:
        present = done | {sample_parts.key(row) for row in writer.rows}
        if all((each.id, k) in present for each in problems for k in range(args.num_samples)):
            return True  # without loading a model
        chunks = sample_into(
            writer,
            problems,
            make_sampler(args, options, ranks),
            num_samples=args.num_samples,
            temperature=args.temperature,
            seed=args.seed,
            chunk=args.chunk,
            prompt=args.prompt,
            rank=ranks.rank,
            world_size=ranks.world_size,
            done=done,
        )
        for rows in chunks:
            print(f"{path.name}: {rows}/{len(problems) * args.num_samples}", flush=True)
    return True


def backend_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of the backend that was chosen, with their defaults; JSON is read.

    Raises:
        ValueError: a flag of another one is given, one that is needed is not, or it is no JSON.
    """
    found: dict[str, Any] = {}
    for backend, table in FLAGS.items():
        for name, (_, default, _) in table.items():
            value, flag = getattr(args, name), "--" + name.replace("_", "-")
            if args.backend == backend:
                found[name] = default if value is None else value
            elif value is not None:
                raise ValueError(f"{flag}: want --backend {backend} with it, got {args.backend}")
    if args.backend == "server" and found["server_url"] is None:
        raise ValueError("--server-url: want it with --backend server, got none")
    for name in ("vllm_options", "server_body"):
        if name in found:
            found[name] = read_object("--" + name.replace("_", "-"), found[name])
    return found


def read_object(flag: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{flag}: want a JSON object, got {text!r}")
    return value


def make_sampler(args: argparse.Namespace, options: dict[str, Any], ranks: Ranks) -> Sampler:
    from stepkto_kernels.training import sampler

    length = args.max_new_tokens
    if args.backend == "vllm":
        return sampler.VLLMSampler(args.model, max_new_tokens=length, **options["vllm_options"])
    if args.backend == "server":
        from stepkto_kernels.training.openai_client import ChatClient

        key = options["server_key_env"]
        client = ChatClient(
            options["server_url"],
            args.model,
            api_key_env=None if key == "none" else key,
            timeout=options["server_timeout"],
            concurrency=options["server_concurrency"],
            retries=options["server_retries"],
            per_minute=options["server_per_minute"],
        )
        return sampler.ServerSampler(
            client,
            max_new_tokens=length,
            per_request=options["server_per_request"],
            body=options["server_body"],
        )
    from stepkto_kernels.training.models import load_for_sampling, load_tokenizer

    return sampler.TransformersSampler(
        load_for_sampling(args.model, own_device(options["device"], ranks), options["dtype"]),
        load_tokenizer(args.model),
        max_new_tokens=length,
        batch_size=options["batch_size"],
    )


def own_device(device: str, ranks: Ranks) -> str:
    """Of this process; many of them never share a GPU by accident.

    Raises:
        ValueError: there are fewer GPUs than processes on this machine.
    """
    import torch

    if device != "auto" or ranks.world_size == 1 or not torch.cuda.is_available():
        return device
    if ranks.local_rank >= torch.cuda.device_count():
        have = torch.cuda.device_count()
        raise ValueError(f"LOCAL_RANK: want less than the {have} GPUs, got {ranks.local_rank}")
    return f"cuda:{ranks.local_rank}"


def summary(output: Path) -> str:
    rows = sample_parts.rows_of([output])
    cut = sum(row["finish"] == "length" for row in rows)
    problems = len({row["problem_id"] for row in rows})
    return f"{len(rows)} solutions of {problems} problems in {output}, {cut} of them were cut off\n"
