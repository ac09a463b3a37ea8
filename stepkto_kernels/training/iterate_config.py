"""Settings of `stepkto iterate` and `stepkto evaluate`: what decides what a run is."""

from __future__ import annotations

import difflib
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from stepkto_kernels import checks
from stepkto_kernels.training import label_command
from stepkto_kernels.training.command import METHODS, OWN, Options, as_words, lora_config, parse
from stepkto_kernels.training.prompts import PROMPTS

# not for `training:`
OURS = ("model", "data", "output", "output_dir", "method", "resume", "ref_model", "dry_run")
BACKENDS = ("transformers", "vllm")
EQUALITIES = ("text", "math-verify")
ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """A model, how it is sampled, and how its solutions are judged.

    Args:
        model: folder or hub name.
        max_new_tokens: longest completion, in tokens.
        batch_size: sequences that are decoded, or scored for log-ratios, at the same time.
        chunk: problems that are sampled, and lost by a kill, together.
        prompt: how a problem becomes a prompt: plain, steps or steps-text.
        backend: what samples, transformers or vllm. Only the first ends with the same files to the
            byte when it was killed.
        backend_options: of vllm.LLM, such as tensor_parallel_size.
        eval_num_samples, eval_temperature: of held-out problems, beside a greedy solution.
        equal: how wrong answers are told from each other in Maj@k: by normalised text, or by
            math-verify.
        resamples: of the bootstrap.
        seed: of all draws. The same for all methods, so that they see the same samples of M0.
        num_processes: of sampling with transformers, and of training, data parallel.
        device: such as cuda; auto takes a GPU where there is one.
        dtype: of the model; auto takes the one it was saved in.
        rewards: flags of `stepkto label`, without dashes.
    Raises:
        ValueError: a setting is out of range.
    """

    model: str
    max_new_tokens: int = 1024
    batch_size: int = 64
    chunk: int = 64
    prompt: str = "plain"
    backend: str = "transformers"
    backend_options: Options = field(default_factory=dict)
    eval_num_samples: int = 8
    eval_temperature: float = 1.0
    equal: str = "text"
    resamples: int = 2000
    seed: int = 0
    num_processes: int = 1
    device: str = "auto"
    dtype: str = "auto"
    rewards: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "device", "dtype"):
            value = getattr(self, name)
            checks.require(isinstance(value, str) and bool(value), name, "a string", repr(value))
        for name in (
            "max_new_tokens",
            "batch_size",
            "chunk",
            "eval_num_samples",
            "resamples",
            "num_processes",
        ):
            checks.integer(name, getattr(self, name), low=1)
        checks.integer("seed", self.seed, low=0)
        checks.number("eval_temperature", self.eval_temperature, low=0, low_open=True)
        checks.choice("prompt", self.prompt, PROMPTS)
        checks.choice("backend", self.backend, BACKENDS)
        checks.instance("backend_options", self.backend_options, dict)
        unused = self.backend_options if self.backend == "transformers" else {}
        checks.require(not unused, "backend_options", "none with transformers", unused)
        checks.choice("equal", self.equal, EQUALITIES)
        checks.instance("rewards", self.rewards, dict)
        self.reward_arguments(Path("rewards"))

    def reward_arguments(self, output: Path) -> Namespace:
        """What label_command's reward functions take; a judge's cache is beside `output`."""
        words: list[str] = []
        for name, value in self.rewards.items():
            flag = "--" + str(name).replace("_", "-")
            words += [flag] if value is True else [flag, *as_words(name, value)[1:]]
        parser = RewardParser(add_help=False, allow_abbrev=False)
        label_command.add_reward_arguments(parser)
        arguments = parser.parse_args(words)
        label_command.process_options(arguments)
        arguments.output = output
        return arguments


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SamplingConfig):
    """All settings of `stepkto evaluate`; problems, layout: as load_problems takes them."""

    problems: str
    layout: str | None = None


@dataclass(frozen=True, kw_only=True)
class IterateConfig(SamplingConfig):
    """All settings of a run; the file of --config has the same names.

    Args:
        model: M0.
        problems: file of the problems that are trained on, or name of a set; see load_problems.
        eval_problems: those that are held out.
        layout, eval_layout: of which set a file is; None for records.Problem's fields.
        method: step_kto; kto, from outcomes only; sft, on samples with the right answer.
        rounds: M1 to M_rounds are trained, >= 1. The only setting that may change, and grow.
        problems_per_round: None takes all in each; else each is taken once before any comes again.
        num_samples: of a problem and round, >= 1.
        temperature: of samples, > 0.
        deduplicate: of a problem's solutions that differ in whitespace only, train on the first.
        per_problem, fill: train on so many of a problem's solutions, as selection.balance; None: on
            all. For sft, of the right ones.
        balance_outcomes: the weights of right and wrong answers are set so that the sum of all
            right ones' is this many times that of all wrong ones', and their mean is 1. None: as
            in `training`.
        log_ratios: rows a round of which log-ratios are written; None: all, 0: none.
        accelerate_config: file of `accelerate config`, such as for FSDP, to start training with.
        training: options of `stepkto train`, StepKTOArguments' among them.
    Raises:
        ValueError: a setting is out of range or not known.
    """

    problems: str
    eval_problems: str
    layout: str | None = None
    eval_layout: str | None = None
    method: str = "step_kto"
    rounds: int = 3
    problems_per_round: int | None = None
    num_samples: int = 8
    temperature: float = 1.0
    deduplicate: bool = False
    per_problem: int | None = None
    fill: bool = False
    balance_outcomes: float | None = None
    log_ratios: int | None = None
    accelerate_config: str | None = None
    training: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("method", self.method, METHODS)
        for name in ("rounds", "num_samples"):
            checks.integer(name, getattr(self, name), low=1)
        for name, low in (("problems_per_round", 1), ("log_ratios", 0)):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), low=low)
        checks.number("temperature", self.temperature, low=0, low_open=True)
        for name in ("deduplicate", "fill"):
            checks.instance(name, getattr(self, name), bool)
        if self.per_problem is not None:
            low = 1 if self.fill or self.method == "sft" else 2
            checks.integer("per_problem", self.per_problem, low=low)
        alone = self.fill and self.per_problem is None
        checks.require(not alone, "fill", "per_problem with it", "none")
        checks.instance("training", self.training, dict)
        taken = sorted(set(OURS) & self.training.keys())
        checks.require(not taken, "training", "options of training only", taken)
        if self.balance_outcomes is not None:
            checks.number("balance_outcomes", self.balance_outcomes, low=0, low_open=True)
            checks.require(self.method != "sft", "balance_outcomes", "none with method sft", "one")
            given = sorted({"desirable_weight", "undesirable_weight"} & self.training.keys())
            checks.require(not given, "training", "no weights with balance_outcomes", given)
        flags = {name.replace("-", "_") for name in OWN}
        own = {name: value for name, value in self.training.items() if name in flags}
        rest = {name: value for name, value in self.training.items() if name not in flags}
        parse({"output": "training", "method": self.method}, rest)
        lora_config(own)


class RewardParser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"rewards: {message}")


def from_mapping(kind: type[ConfigT], given: Mapping[str, Any]) -> ConfigT:
    """A config of names and values, numbers also as text.

    Raises:
        ValueError: a name is not known or missing, or as `kind`.
    """
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for name in given:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        checks.require(name in known, name, "a setting of this command", f"none{hint}")
    for name, each in known.items():
        is_needed = each.default is MISSING and each.default_factory is MISSING
        missing = is_needed and given.get(name) is None
        checks.require(not missing, name, "it as a flag or in the file of --config", "none")
    return kind(**{k: _read(k, v, str(known[k].type)) for k, v in given.items()})


def _read(name: str, value: Any, kind: str) -> Any:
    """A value as its field's type, from text or from YAML, which takes 1e-3 for text."""
    if not isinstance(value, str) or kind.startswith("str"):
        return value
    if kind == "bool":
        return {"true": True, "false": False}.get(value.lower(), value)
    try:
        return float(value) if kind.startswith("float") else int(value)
    except ValueError:
        raise ValueError(f"{name}: want a number, got {value!r}") from None
