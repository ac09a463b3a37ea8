"""Settings of `stepkto iterate`: what decides what a run is."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from stepkto_kernels import checks
from stepkto_kernels.training import label_command
from stepkto_kernels.training.command import METHODS, Options, as_words, parse

OURS = ("model", "data", "output", "method", "resume", "ref_model")  # not for `training:`
MAY_GROW = "rounds"


@dataclass(frozen=True)
class IterateConfig:
    """All settings of a run; the file of --config has the same names.

    Args:
        model: folder or hub name of M0.
        problems: JSON-lines file of the problems that are trained on.
        eval_problems: one of held-out problems.
        method: step_kto; kto, from outcomes only; sft, on samples with the right answer.
        rounds: M1 to M_rounds are trained, >= 1. The only setting that may change, and grow.
        problems_per_round: None takes all in each; else each is taken once before any comes again.
        num_samples: of a problem and round, >= 1.
        temperature: of samples, > 0.
        max_new_tokens: longest completion.
        batch_size: sequences that are decoded, or scored for log-ratios, at the same time.
        prompt: how a problem becomes a prompt.
        eval_num_samples, eval_temperature: of held-out problems, beside a greedy solution.
        balance_outcomes: the weights of right and wrong answers are set so that the sum of all
            right ones' is this many times that of all wrong ones', and their mean is 1. None: as
            in `training`.
        log_ratios: rows a round of which log-ratios are written; None: all, 0: none.
        num_processes: of training; more than 1 are started by accelerate.
        seed: of all draws. It is the same for all methods, so that they see the same M0 samples.
        device: of sampling and log-ratios, such as cuda; auto takes a GPU where there is one.
        dtype: of the model there; auto takes the one it was saved in.
        rewards: flags of `stepkto label`, without dashes.
        training: options of `stepkto train`, StepKTOArguments' among them.
    Raises:
        ValueError: a setting is out of range or not known.
    """

    model: str
    problems: str
    eval_problems: str
    method: str = "step_kto"
    rounds: int = 3
    problems_per_round: int | None = None
    num_samples: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 1024
    batch_size: int = 64
    prompt: str = "plain"
    eval_num_samples: int = 8
    eval_temperature: float = 1.0
    balance_outcomes: float | None = None
    log_ratios: int | None = None
    num_processes: int = 1
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    rewards: Options = field(default_factory=dict)
    training: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "problems", "eval_problems"):
            value = getattr(self, name)
            checks.require(isinstance(value, str) and bool(value), name, "a path", repr(value))
        checks.choice("method", self.method, METHODS)
        for name in ("rounds", "num_samples", "max_new_tokens", "batch_size", "eval_num_samples"):
            checks.integer(name, getattr(self, name), low=1)
        checks.integer("num_processes", self.num_processes, low=1)
        checks.integer("seed", self.seed, low=0)
        for name, low in (("problems_per_round", 1), ("log_ratios", 0)):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), low=low)
        for name in ("temperature", "eval_temperature"):
            checks.number(name, getattr(self, name), low=0, low_open=True)
        if self.balance_outcomes is not None:
            checks.number("balance_outcomes", self.balance_outcomes, low=0, low_open=True)
            checks.require(self.method != "sft", "balance_outcomes", "a method with weights", "sft")
            given = {"desirable_weight", "undesirable_weight"} & self.training.keys()
            want = "none in `training` with balance_outcomes"
            checks.require(not given, "weights", want, sorted(given))
        for name in ("rewards", "training"):
            checks.instance(name, getattr(self, name), dict)
        taken = sorted(set(OURS) & self.training.keys())
        checks.require(not taken, "training", "options of training only", taken)
        self.reward_arguments(Path("rewards"))
        parse({"output": "training"}, self.training)

    def reward_arguments(self, output: Path) -> Namespace:
        """What label_command's reward functions take; a judge's cache is beside `output`."""
        words: list[str] = []
        for name, value in self.rewards.items():
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [flag, *as_words(name, value)[1:]]
        parser = RewardParser(add_help=False, allow_abbrev=False)
        label_command.add_reward_arguments(parser)
        arguments = parser.parse_args(words)
        label_command.process_options(arguments)
        arguments.output = output
        return arguments


class RewardParser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"rewards: {message}")


def from_mapping(given: Mapping[str, Any]) -> IterateConfig:
    """A config of names and values, numbers also as text.

    Raises:
        ValueError: a name is not known or missing, or as IterateConfig.
    """
    kinds = {each.name: str(each.type) for each in fields(IterateConfig)}
    for name in given:
        close = difflib.get_close_matches(name, kinds, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        checks.require(name in kinds, name, f"a setting of stepkto iterate{hint}", "another")
    for name in ("model", "problems", "eval_problems"):
        checks.require(given.get(name) is not None, name, "a path", "none")
    return IterateConfig(**{name: read(name, v, kinds[name]) for name, v in given.items()})


def read(name: str, value: Any, kind: str) -> Any:
    """A value as its field's type, from text or from YAML, which takes 1e-3 for text."""
    if value is None or not isinstance(value, (str, int, float)) or kind.startswith("str"):
        return value
    number = float if kind.startswith("float") else int
    try:
        return number(value) if isinstance(value, str) or number is float else value
    except ValueError:
        raise ValueError(f"{name}: want a number, got {value!r}") from None


def as_saved(config: IterateConfig) -> Options:
    """The settings and the digests of both files of problems, as RUN/config.yaml has them.

    Raises:
        OSError: a file of problems cannot be read.
    """
    found = json.loads(json.dumps(asdict(config)))  # plain lists and dicts
    for name in ("model", "problems", "eval_problems"):
        if os.path.exists(found[name]):
            found[name] = os.path.abspath(found[name])
    for name in ("problems", "eval_problems"):
        content = Path(found[name]).read_bytes()
        found[f"{name}_sha256"] = hashlib.sha256(content).hexdigest()
    return found


def keep_config(path: Path, config: IterateConfig) -> None:
    """Write RUN/config.yaml, or see that it has the same settings; `rounds` may grow.

    Raises:
        ValueError: a setting, or a file of problems, is another one; names it.
    """
    import yaml

    from stepkto_kernels.training.command import read_yaml

    wanted = as_saved(config)
    if path.exists():
        found = read_yaml(path)
        for name in sorted({*wanted, *found}):
            same = wanted.get(name) == found.get(name)
            if name == MAY_GROW and not same:
                want = f"at least the {found[name]} of {path}"
                checks.require(wanted[name] >= found[name], name, want, wanted[name])
            elif not same:
                want = f"{found.get(name)!r}, as {path.parent} was made"
                checks.require(False, name, want, repr(wanted.get(name)))
        if wanted == found:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(yaml.safe_dump(wanted, sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)
