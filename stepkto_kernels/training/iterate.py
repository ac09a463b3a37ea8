"""The rounds of iterated training: sample, label, select, train, evaluate.

A round is a folder, and each of its stages makes one file or folder of it, under a temporary name
until it is complete. So what stands is done, and a killed run goes on with the first that is not.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from stepkto_kernels import checks
from stepkto_kernels.training import evaluation_files as files
from stepkto_kernels.training import launch
from stepkto_kernels.training.drawing import Draw, derived_seed, draw
from stepkto_kernels.training.evaluation_files import list_rows
from stepkto_kernels.training.iterate_config import IterateConfig
from stepkto_kernels.training.label import Labeller
from stepkto_kernels.training.models import load_for_sampling, load_tokenizer
from stepkto_kernels.training.records import Problem
from stepkto_kernels.training.run_folder import complete, lock, write_rows
from stepkto_kernels.training.selection import Row, balance, deduplicate

EVERY = 20.0  # seconds between two lines of progress


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
        self.problems = files.load("problems", config.problems, config.layout)
        self.held_out = files.load("eval_problems", config.eval_problems, config.eval_layout)
        problems = {"problems": self.problems, "eval_problems": self.held_out}
        files.keep_config(folder, config, problems, may_grow=("rounds",))

    def __call__(self) -> None:
        """Do all that is not done.

        Raises:
            ValueError: something does not fit.
            OSError: a file cannot be read or written, or training failed.
        """
        with lock(self.folder):
            for t in range(self.config.rounds + 1):
                for name, make in self.stages(t).items():
                    if not (self._round(t) / name).exists():
                        self.say(f"round {t}: {name}")
                        complete(self._round(t) / name, partial(make, t))

    def stages(self, t: int) -> dict[str, Callable[[int, Path], None]]:
        """What round t makes, in order, and what makes it; round 0 only evaluates M0."""
        table: dict[str, Callable[[int, Path], None]] = {
            "samples.jsonl": self._sample,
            "labelled.jsonl": self._label,
            "selected.jsonl": self._select,
            "model": self._train,
            "evaluation": self._evaluate,
            "metrics.json": self._measure,
            "log_ratios.jsonl": self._compare,
        }
        if self.config.log_ratios == 0:
            del table["log_ratios.jsonl"]
        return table if t else {name: table[name] for name in ("evaluation", "metrics.json")}

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

    def _labeller(self, problems: Sequence[Problem]) -> AbstractContextManager[Labeller]:
        # one cache of verdicts for all rounds
        arguments = self.config.reward_arguments(self.folder / "rewards")
        return files.make_labeller(arguments, problems)

    def _sample(self, t: int, part: Path) -> None:
        c = self.config
        how = Draw(c.num_samples, c.temperature, self._seed(t, "sample"))
        follow = partial(self._follow, t, "samples")
        draw(c, self.model(t - 1), self.problems_of(t), {part: how}, follow)

    def _label(self, t: int, part: Path) -> None:
        with self._labeller(self.problems) as labeller:
            judged = files.judge(self._round(t) / "samples.jsonl", part, labeller)
            self._follow(t, "labelled", judged)

    def _follow(self, t: int, what: str, counts: Iterable[int]) -> None:
        """Do it, and say now and then how far it is."""
        said = time.monotonic()
        for count in counts:
            if time.monotonic() - said > EVERY:
                said = time.monotonic()
                self.say(f"round {t}: {count} {what}")

    def _select(self, t: int, part: Path) -> None:
        c = self.config
        rows: list[Row] = list_rows(self._round(t) / "labelled.jsonl")
        if c.method == "sft":
            rows = [row for row in rows if row["label"] is True]
        if c.deduplicate:
            rows = deduplicate(rows)
        if c.per_problem is not None:
            fill = c.fill or c.method == "sft"
            rows = balance(rows, c.per_problem, seed=self._seed(t, "select"), fill=fill)
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
        launch.train(
            own | options,
            self._round(t) / "training.yaml",
            c.num_processes,
            c.accelerate_config,
        )
        launch.tidy(part)

    def _evaluate(self, t: int, part: Path) -> None:
        labeller = partial(self._labeller, self.held_out)
        seed = self._seed(t, "evaluate")
        files.evaluate_into(part, self.config, self.model(t), self.held_out, seed, labeller)

    def _measure(self, t: int, part: Path) -> None:
        c = self.config
        found = files.measure(self._round(t) / "evaluation", c)
        model = f"round_{t}/model" if t else c.model  # RUN may be moved
        about = {"round": t, "method": c.method, "model": model}
        about |= {"num_problems": len(self.held_out), "num_samples": c.eval_num_samples}
        files.write_metrics(part, about, found)
        self.say(f"round {t}: {files.shown(found)}")

    def _compare(self, t: int, part: Path) -> None:
        from stepkto_kernels.training.log_ratios import log_ratios

        c = self.config
        rows = list_rows(self._round(t) / "labelled.jsonl")[: c.log_ratios]
        models = (load_for_sampling(self.model(i), c.device, c.dtype) for i in (t, t - 1))
        tokenizer = load_tokenizer(self.model(t))
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
