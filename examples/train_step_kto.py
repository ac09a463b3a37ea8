"""Train a causal language model with Step-KTO (arXiv 2501.10799): one file to read, run and copy.

    python examples/train_step_kto.py --model M0 --data round_1.jsonl --output M1

--data has one JSON object a line with `prompt`, `completions` (the steps), `labels` (of the steps)
and `label` (of the outcome), or plain KTO rows: see stepkto_kernels/training/data.py. --output gets
the trained model and its tokenizer, metrics.jsonl and curves.png.

An optimizer step: (1) Every prompt is paired with another example's completion; how policy and
reference score these gives the KL reference points. (2) The backbones run without lm_head, and the
library makes loss and gradient of hidden states and lm_head weight, a micro-batch at a time, with
the reference points and normalizers of the whole step. (3) Clipping and AdamW. There is no dropout.

--resume goes on from the newest checkpoint, to the bit where torch is deterministic (CPU, as many
threads). Left out: several devices, LoRA, gradient checkpointing, packing, evaluation, rate decay.
Letters: B sequences, T padded length, K steps a sequence, H hidden size, V vocabulary.
"""

import argparse
import hashlib
import json
import math
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

import stepkto_kernels as stepkto
from stepkto_kernels.config import STEP_REDUCTIONS
from stepkto_kernels.training.collator import StepKTOCollator
from stepkto_kernels.training.data import EncodedExample, encode_example, read_examples
from stepkto_kernels.training.report import plot_training_curves

Batch = dict[str, Tensor]
TOKENS = ("input_ids", "attention_mask", "completion_mask", "step_ids")  # (B, T) each
LABELS = ("outcome_label", "step_labels")  # (B,), (B, K)
MISMATCHED = "mismatched_"  # prefix of the collator's tokens of mismatched pairs
FREE = ("output", "resume", "epochs", "max_steps", "save_steps")  # what --resume may change


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, stepkto.StepKTOConfig]:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.usage = "%(prog)s --model MODEL --data FILE --output DIR [options]"
    add = parser.add_argument
    add("--model", required=True, help="policy: folder or hub name of a causal language model")
    add("--ref-model", help="frozen reference; None: the policy as it starts")
    add("--data", type=Path, required=True, help="JSON-lines file with the training examples")
    add("--output", type=Path, required=True, help="folder for all that the run leaves")
    add("--resume", action="store_true", help="go on from the checkpoint in --output, if any")
    add("--learning-rate", type=at_least(0.0), default=1e-6, help="after the warm-up, constant")
    add("--warmup-steps", type=at_least(0), default=10, help="of linear warm-up")
    add("--batch-size", type=at_least(1), default=64, help="sequences an optimizer step")
    add("--micro-batch-size", type=at_least(1), default=8, help="sequences at a time")
    add("--epochs", type=at_least(1), default=1, help="passes over the data")
    add("--max-steps", type=at_least(1), help="optimizer steps after which to stop")
    add("--weight-decay", type=at_least(0.0), default=0.0, help="of AdamW")
    add("--max-grad-norm", type=at_least(0.0), default=1.0, help="0: no clipping")
    add("--beta", type=float, default=0.1, help="slope of the outcome sigmoid, per nat")
    add("--step-beta", type=float, help="slope of the step sigmoid; None: --beta")
    add("--step-weight", type=float, default=1.0, help="of the process term; 0: plain KTO")
    add("--step-reduction", choices=STEP_REDUCTIONS, default="sequence_mean", help="of step losses")
    for name in ("desirable", "undesirable", "step-desirable", "step-undesirable"):
        add(f"--{name}-weight", type=float, default=1.0, help="of these outcomes or steps")
    add("--reference-point", type=point, default="mismatched", help="zero, matched, ema, or nats")
    add("--max-length", type=at_least(2), default=2048, help="tokens; completions are cut to it")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="such as cuda:1")
    add("--seed", type=int, default=0, help="of the data order")
    add("--save-steps", type=at_least(0), default=500, help="steps a checkpoint, 0: none")
    add("--logging-steps", type=at_least(1), default=5, help="steps a line of metrics")
    args = parser.parse_args(argv)

    if not args.data.is_file():
        parser.error(f"--data: want a file, got {args.data}: no such file")
    if args.output.resolve() == Path(args.model).resolve():
        parser.error(f"--output: want another folder than --model, got {args.output} for both")
    if args.batch_size % args.micro_batch_size:
        parser.error(f"--batch-size: want a multiple of --micro-batch-size, got {args.batch_size}")
    if args.reference_point in ("matched", "ema") and args.micro_batch_size < args.batch_size:
        parser.error(f"--reference-point {args.reference_point}: want one micro-batch a step")
    if args.save_steps % args.logging_steps:
        parser.error(f"--save-steps: want a multiple of --logging-steps, got {args.save_steps}")
    options = [field.name for field in fields(stepkto.StepKTOConfig) if field.name in args]
    try:
        return args, stepkto.StepKTOConfig(**{name: getattr(args, name) for name in options})
    except ValueError as error:
        parser.error(str(error))


def at_least(low: float):
    def number(text: str) -> float:
        value = type(low)(text)
        if low <= value < math.inf:
            return value
        raise argparse.ArgumentTypeError(f"want a finite number >= {low}, got {text}")

    return number


def point(text: str) -> str | float:
    return float(text) if text[-1:].isdigit() else text


def read_data(path: Path, tokenizer, max_length: int) -> list[EncodedExample]:
    examples, where = [], "--data"
    try:
        for number, example in enumerate(read_examples(path), start=1):
            where = f"{path}, example {number}"
            examples.append(encode_example(example, tokenizer, max_length=max_length))
    except ValueError as error:
        raise SystemExit(f"{where}: {error}") from None
    if not examples:
        raise SystemExit(f"--data: want at least one example, got none in {path}")
    return examples


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """A batch, `size` rows at a time and without the padding that all of these have."""
    pieces = []
    for start in range(0, len(batch["input_ids"]), size):
        piece = {name: batch[name][start : start + size] for name in TOKENS + LABELS}
        longest = int(piece["attention_mask"].sum(1).max())
        piece |= {name: piece[name][:, :longest] for name in TOKENS}
        pieces.append(piece)
    return pieces


def shifted(batch: Batch) -> tuple[Tensor, stepkto.StepSegments]:
    """What position t predicts: targets (B, T - 1), -100 where not scored, and their segments.

    On the CPU, like the batch: segments that are moved from there let the loss run ahead of a GPU.
    """
    mask, step_ids = batch["completion_mask"][:, 1:], batch["step_ids"][:, 1:]
    target = torch.where(mask, batch["input_ids"][:, 1:], -100)
    labels = batch["outcome_label"], batch["step_labels"]
    return target, stepkto.StepSegments.from_padded(step_ids, mask, *labels)


def ahead(x, device: torch.device | str):
    """Move a tensor or segments from the CPU without waiting for what the device is doing."""
    return x.to(device, non_blocking=True)


def logit_options(config: PretrainedConfig) -> dict:
    """What a model family does to the lm_head's output before the softmax."""
    config = config.get_text_config()
    read = lambda name: getattr(config, name, None)
    scale = read("logit_scale") or read("lm_head_multiplier") or 1.0  # Cohere, Falcon-H1
    if read("logits_scaling"):  # a divisor (Granite), except in HyperCLOVA X
        scale *= config.logits_scaling ** (1 if config.model_type == "hyperclovax" else -1)
    softcap = read("final_logit_softcapping") or read("logits_soft_cap")  # Gemma, RecurrentGemma
    return {"logit_scale": scale, "softcap": softcap}


def head_inputs(model: PreTrainedModel, batch: Batch, dtype: str) -> tuple:
    """Hidden states (B, T - 1, H) of the backbone, lm_head weight (V, H) and bias (V,) or None."""
    ids, kind = ahead(batch["input_ids"], model.device), getattr(torch, dtype)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=kind == torch.bfloat16):
        # No attention mask: padding is on the right, where no token of a causal model looks.
        out = model.base_model(input_ids=ids, use_cache=False)
    head = model.get_output_embeddings()
    bias = None if head.bias is None else head.bias.to(kind)
    return out.last_hidden_state[:, :-1].to(kind), head.weight.to(kind), bias


@torch.no_grad()
def log_probs(model: PreTrainedModel, batch: Batch, dtype: str) -> Tensor:
    """Log-probabilities of the completion tokens, in nats, 0 elsewhere. (B, T - 1) fp32."""
    hidden, weight, bias = head_inputs(model, batch, dtype)
    options = logit_options(model.config)
    target = ahead(shifted(batch)[0], hidden.device)
    return stepkto.linear_logprobs(hidden, weight, target, bias, **options)


def mismatched_baseline(models: tuple, batch: Batch, config, args) -> stepkto.KLBaseline:
    """Reference points of an optimizer step: mean log-ratios of all of its mismatched pairs."""
    pairs = batch | {name: batch[MISMATCHED + name] for name in TOKENS}  # labels play no part
    target, segments = shifted(pairs)
    pieces, logps = micro_batches(pairs, args.micro_batch_size), []
    for model in models:
        parts = [log_probs(model, piece, args.dtype) for piece in pieces]
        logps.append(torch.cat([pad(p, (0, target.shape[1] - p.shape[1])) for p in parts]))
    return stepkto.kl_baseline(*logps, ahead(segments, args.device), config=config)


def accumulate_gradient(policy, reference, loss_fn, batch: Batch, args) -> Tensor:
    """Add an optimizer step's gradient to the policy's; gives its loss and metric totals, (n,)."""
    baseline = None  # from the config, or for a batch of one from loss_fn's earlier batches
    if args.reference_point == "mismatched" and MISMATCHED + "input_ids" in batch:
        baseline = mismatched_baseline((policy, reference), batch, loss_fn.config, args)
    counts = stepkto.loss_normalizer(shifted(batch)[1], loss_fn.config)
    pieces, rows = micro_batches(batch, args.micro_batch_size), []
    for piece in pieces:
        ref_logps = log_probs(reference, piece, args.dtype)
        hidden, weight, bias = head_inputs(policy, piece, args.dtype)
        target, segments = (ahead(x, args.device) for x in shifted(piece))
        given = hidden, weight, target, segments, ref_logps, baseline, bias, counts
        loss, metrics = loss_fn(*given, update_running=piece is pieces[-1])  # moves once a step
        loss.backward()
        rows.append(torch.cat([loss.detach().double()[None], metrics.totals]))
    return torch.stack(rows).sum(0)


def write_metrics(path: Path, window: list[Tensor], line: dict) -> dict:
    """A line for the steps since the last one; nothing else in the loop waits for a GPU."""
    rows = torch.stack(window).cpu()
    for step, (norm, loss) in enumerate(rows[:, :2].tolist(), line["step"] - len(rows) + 1):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise SystemExit(f"step {step}: stopped, as loss is {loss}, gradient norm {norm}")
    metrics = stepkto.StepKTOMetrics(rows[:, 2:].sum(0)).compute()
    line = line | {"grad_norm": rows[:, 0].mean().item()} | metrics
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def save_checkpoint(output: Path, policy: PreTrainedModel, state: dict) -> None:
    older = list(output.glob("checkpoint-*"))
    temporary = output / "incomplete-checkpoint"
    shutil.rmtree(temporary, ignore_errors=True)
    policy.save_pretrained(temporary)
    torch.save(state, temporary / "state.pt")
    shutil.copy(output / "metrics.jsonl", temporary)
    temporary.rename(output / f"checkpoint-{state['step']:08d}")
    for folder in older:
        shutil.rmtree(folder)


def load_checkpoint(args, settings: dict[str, str]) -> tuple[Path | None, dict]:
    folder = max(args.output.glob("checkpoint-*"), default=None)
    if folder is None:
        return None, {"step": 0}
    if not args.resume:
        raise SystemExit(f"--output: want a folder without {folder.name}, or --resume")
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    changed = [name for name in settings if state["settings"].get(name) != settings[name]]
    if changed:
        raise SystemExit(f"--resume: {folder} was made with another {', '.join(changed)}")
    return folder, state


def main(argv: list[str] | None = None) -> None:
    args, config = parse_args(argv)
    settings = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    settings["data"] = hashlib.sha256(args.data.read_bytes()).hexdigest()
    checkpoint, state = load_checkpoint(args, settings)

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        policy, reference = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(args.device)
            for path in (checkpoint or args.model, args.ref_model or args.model)
        )
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise SystemExit(f"--model, --ref-model, --device: {error}") from None
    examples = read_data(args.data, tokenizer, args.max_length)
    collate = StepKTOCollator(tokenizer.pad_token_id or 0, max_length=args.max_length)
    loss_fn = stepkto.StepKTOLoss(config, **logit_options(policy.config)).to(args.device)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=args.weight_decay)
    epoch_steps = math.ceil(len(examples) / args.batch_size)
    total = min(args.epochs * epoch_steps, args.max_steps or math.inf)

    args.output.mkdir(parents=True, exist_ok=True)
    metrics_path = args.output / "metrics.jsonl"
    metrics_path.write_text("")
    torch.manual_seed(args.seed)
    if checkpoint:
        optimizer.load_state_dict(state["optimizer"])
        loss_fn.load_state_dict(state["loss_fn"])
        torch.set_rng_state(state["rng"])
        shutil.copy(checkpoint / "metrics.jsonl", metrics_path)

    first, window = state["step"], []  # window: what the next line of metrics is made of
    bar = tqdm(range(first + 1, total + 1), initial=first, total=total, disable=None)
    for step in bar:
        epoch, index = divmod(step - 1, epoch_steps)
        generator = torch.Generator().manual_seed(args.seed + epoch)
        order = torch.randperm(len(examples), generator=generator).split(args.batch_size)
        batch = collate([examples[i] for i in order[index].tolist()])
        row = accumulate_gradient(policy, reference, loss_fn, batch, args)
        norm = clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf)
        learning_rate = args.learning_rate * min(1.0, step / max(1, args.warmup_steps))
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        window.append(torch.cat([norm.double()[None], row]))
        if step % args.logging_steps == 0 or step == total:
            line = {"step": step, "epoch": step / epoch_steps, "learning_rate": learning_rate}
            line = write_metrics(metrics_path, window, line)
            bar.set_postfix(loss=line["loss"], margins=line.get("rewards/margins"))
            window = []
        if args.save_steps and step % args.save_steps == 0:
            state = {"step": step, "settings": settings, "rng": torch.get_rng_state()}
            state |= {"optimizer": optimizer.state_dict(), "loss_fn": loss_fn.state_dict()}
            save_checkpoint(args.output, policy, state)

    policy.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    plot_training_curves(metrics_path, args.output / "curves.png", title=f"Step-KTO: {args.output}")
    print(f"{total} steps: model, tokenizer, metrics.jsonl and curves.png are in {args.output}")


if __name__ == "__main__":
    main()
