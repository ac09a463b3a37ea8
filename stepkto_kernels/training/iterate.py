"""The rounds of iterated training: sample, label, select, train, evaluate.

A round is a folder, and each of its stages makes one file or folder of it, under a temporary name
until it is complete. So what stands is done, and a killed run goes on with the first that is not.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from stepkto_kernels import checks
from stepkto_kernels.training import evaluation_files as files
from stepkto_kernels.training import launch
from stepkto_kernels.training.evaluation_files import Draw, derived_seed, list_rows
from stepkto_kernels.training.iterate_config import IterateConfig, keep_config
from stepkto_kernels.training.label import Labeller
from stepkto_kernels.training.models import load_for_sampling, sampling_model
from stepkto_kernels.training.records import Problem, read_problems


class Stage(NamedTuple):
    """What makes a file or folder; done when that stands."""

    path: Path
    make: Callable[[Path], None]  # called with the temporary path, which may be of a killed run


class Run:
    """A folder in which a model is trained in rounds.

    Args:
        folder: RUN, made where there is none.
        config: its settings.
        say: takes a line about what is done.
    Raises:
        ValueError: the folder is of a run with other settings, or problems do not fit.
        OSError: a file cannot be read or written.
    """

    def __init__(self, folder: Path, config: IterateConfig, say: Callable[[str], None] = print):
        self.folder, self.config, self.say = folder, config, say
        self.problems = read_problems(config.problems)
        self.held_out = read_problems(config.eval_problems)
        for name, problems in (("problems", self.problems), ("eval_problems", self.held_out)):
            checks.require(len(problems) > 0, name, "at least one problem", "none")
        keep_config(folder / "config.yaml", config)

    def __call__(self) -> None:
        """Do all that is not done.

        Raises:
            ValueError: something does not fit.
            OSError: a file cannot be read or written, or training failed.
        """
        with launch.lock(self.folder / "lock"):
            for t in range(self.config.rounds + 1):
                for stage in self.stages(t):
                    self._do(t, stage)

    def stages(self, t: int) -> list[Stage]:
        """What round t makes, in order; round 0 only evaluates M0."""
        table: dict[str, Callable[[int, Path], None]] = {
            "samples.jsonl": self._sample,
            "labelled.jsonl": self._label,
            "selected.jsonl": self._select,
            "model": self._train,
            "evaluation": self._evaluate,
            "metrics.json": self._measure,
            "log_ratios.jsonl": self._compare,
        }
        names = list(table) if t else ["evaluation", "metrics.json"]
        if self.config.log_ratios == 0:
            names = [name for name in names if name != "log_ratios.jsonl"]
        return [Stage(self._round(t) / name, partial(table[name], t)) for name in names]

    def _do(self, t: int, stage: Stage) -> None:
        if stage.path.exists():
            return
        self.say(f"round {t}: {stage.path.name}")
        stage.path.parent.mkdir(parents=True, exist_ok=True)
        part = stage.path.with_name(stage.path.name + ".part")
        stage.make(part)
        os.replace(part, stage.path)

    def _round(self, t: int) -> Path:
        return self.folder / f"round_{t}"

    def model(self, t: int) -> str:
        """Folder or name of M_t."""
        return self.config.model if t == 0 else str(self._round(t) / "model")

    def problems_of(self, t: int) -> list[Problem]:
        """Those of round t >= 1, in order: each problem once before any comes again."""
        number = min(self.config.problems_per_round or len(self.problems), len(self.problems))
        at = (t - 1) * number
        orders: dict[int, list[Problem]] = {}
        for turn in range(at // len(self.problems), (at + number - 1) // len(self.problems) + 1):
            orders[turn] = list(self.problems)
            random.Random(f"{self.config.seed} problems {turn}").shuffle(orders[turn])
        places = (divmod(i, len(self.problems)) for i in range(at, at + number))
        chosen = [orders[turn][place] for turn, place in places]
        # a round that spans two turns may draw a problem of both: one is enough
        return list({problem.id: problem for problem in chosen}.values())

    def _seed(self, t: int, what: str) -> int:
        return derived_seed(self.config.seed, what, t)  # the same for every method

    def _sampler(self, t: int) -> AbstractContextManager[Any]:
        return sampling_model(self.model(t), self.config)

    def _labeller(self, problems: Sequence[Problem]) -> AbstractContextManager[Labeller]:
        # one cache of verdicts for all rounds
        arguments = self.config.reward_arguments(self.folder / "rewards")
        return files.make_labeller(arguments, problems)

    def _sample(self, t: int, part: Path) -> None:
        c = self.config
        how = Draw(c.num_samples, c.temperature, self._seed(t, "sample"), c.prompt)
        with self._sampler(t - 1) as sampler:
            for rows in files.draw(part, self.problems_of(t), sampler, how):
                self.say(f"round {t}: {rows} samples")

    def _label(self, t: int, part: Path) -> None:
        with self._labeller(self.problems) as labeller:
            for rows in files.judge(self._round(t) / "samples.jsonl", part, labeller):
                self.say(f"round {t}: {rows} labelled")

    def _select(self, t: int, part: Path) -> None:
        rows = list_rows(self._round(t) / "labelled.jsonl")
        if self.config.method == "sft":
            rows = [row for row in rows if row["label"] is True]
        checks.require(len(rows) > 0, f"round {t}", "a row to train on", "none that was selected")
        write_rows(part, rows)

    def _train(self, t: int, part: Path) -> None:
        c = self.config
        data = self._round(t) / "selected.jsonl"
        options: dict[str, Any] = {
            "seed": self._seed(t, "train"),
            "save_total_limit": 2,
        } | c.training
        if c.balance_outcomes is not None:
            labels = [row["label"] for row in list_rows(data)]
            options |= balanced_weights(labels, c.balance_outcomes)
        own = {"model": self.model(t - 1), "data": str(data), "output": str(part)}
        own["method"] = c.method
        launch.train(own | options, self._round(t) / "training.yaml", c.num_processes)
        for left in (*part.glob("checkpoint-*"), *part.glob("ref_logps_*")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _evaluate(self, t: int, part: Path) -> None:
        c = self.config
        draws = {
            "greedy": Draw(1, 0.0, 0, c.prompt),
            "sampled": Draw(
                c.eval_num_samples, c.eval_temperature, self._seed(t, "evaluate"), c.prompt
            ),
        }
        labeller = partial(self._labeller, self.held_out)
        files.evaluate_into(part, self.held_out, partial(self._sampler, t), labeller, draws)

    def _measure(self, t: int, part: Path) -> None:
        c = self.config
        found = files.measure(self._round(t) / "evaluation", seed=c.seed)
        model = f"round_{t}/model" if t else c.model  # RUN may be moved
        about = {"round": t, "method": c.method, "model": model}
        about |= {"num_problems": len(self.held_out), "num_samples": c.eval_num_samples}
        files.write_metrics(part, about, found)
        self.say(f"round {t}: " + ", ".join(f"{name} {e.value:.3f}" for name, e in found.items()))

    def _compare(self, t: int, part: Path) -> None:
        from transformers import AutoTokenizer

        from stepkto_kernels.training.log_ratios import log_ratios

        c = self.config
        rows = list_rows(self._round(t) / "labelled.jsonl")[: c.log_ratios]
        models = (load_for_sampling(self.model(i), c.device, c.dtype) for i in (t, t - 1))
        tokenizer = AutoTokenizer.from_pretrained(self.model(t))
        write_rows(part, log_ratios(rows, models, tokenizer, batch_size=c.batch_size))


def balanced_weights(labels: Iterable[bool | None], ratio: float) -> dict[str, float]:
    """Outcome weights by which all right answers weigh `ratio` times what all wrong ones do.

    Their mean over labelled rows is 1, so that the loss stays of its size. 1 and 1 where all
    labelled rows are of one kind.
    """
    known = [label for label in labels if label is not None]
    right = sum(known)
    wrong = len(known) - right
    if not right or not wrong:
        return {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    share = len(known) / (1 + ratio)
    return {"desirable_weight": ratio * share / right, "undesirable_weight": share / wrong}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file anew, on disk when this returns."""
    with open(path, "wb") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
