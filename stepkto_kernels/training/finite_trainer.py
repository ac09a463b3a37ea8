"""A trainer that looks at every optimizer step before it is applied: stop, or skip the bad rows.

While a step runs, the number of tensors that are not finite is counted on the device. It is read
once, summed over the ranks, when the last micro-batch's gradients are there and neither clipping
nor the optimizer has touched anything. Only where it is not 0 the step's examples are run again,
without gradient, to find out why.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stepkto_kernels.integrations.transformers import HeadFunction, HeadOutput
from stepkto_kernels.metrics import StepKTOMetrics
from stepkto_kernels.step_kto import KLBaseline, KLTotals, LossNormalizer
from stepkto_kernels.training import finite, head_calls
from stepkto_kernels.training.arguments import StepKTOArguments
from stepkto_kernels.training.batch import IGNORED, TrainerCollator, unlabelled
from stepkto_kernels.training.data import EncodedExample
from stepkto_kernels.training.dataset import StepKTODataset
from stepkto_kernels.training.finite import Fault, Findings, Place
from stepkto_kernels.training.resumable import ResumableTrainer

Batch = dict[str, Any]
Placed = tuple[Place, EncodedExample]
T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """An optimizer step, and what is as it was before it."""

    batches: Sequence[Batch]
    metrics: StepKTOMetrics | None
    loss: Tensor


@dataclass(frozen=True)
class StepContext:
    """What all micro-batches of an optimizer step, on all ranks, have in common.

    baseline: reference points; None where the config fixes them, or takes them from a batch that is
    the whole step. normalizer: divisors of the loss; None: the batch's own counts. observed:
    whether the running value moves towards the baseline.
    """

    baseline: KLBaseline | None
    normalizer: LossNormalizer | None
    micro_batches: int = 1
    observed: bool = False


class FiniteTrainer(ResumableTrainer):
    """ResumableTrainer that applies no step in which anything is not finite.

    A subclass adds what its forward passes meet to `_watch`, and says what a step's micro-batches
    have in common (`_step_context`), what it pairs and what it compares with.
    """

    args: StepKTOArguments
    collate: TrainerCollator
    _context: StepContext
    _totals: dict[str, StepKTOMetrics | None]
    _to_device: Callable[[Batch], Batch]
    _sum_over_ranks: Callable[[Tensor], Tensor]
    _step: Step | None = None
    _bad: Tensor | None = None  # () tensors of this step that are not finite
    _skipped = 0  # rows since the last log, of all ranks

    # What a subclass has to say

    @property
    def _logit_options(self) -> dict[str, Any]:
        raise NotImplementedError

    def _step_context(
        self, model: nn.Module, batches: Sequence[Batch], pairs: KLTotals | None = None
    ) -> StepContext:
        raise NotImplementedError

    def _pairs(self, batches: Sequence[Batch]) -> list[EncodedExample]:
        """The mismatched pair of each example, where there are any."""
        return []

    def _reference_logps(self, model: nn.Module, batch: Batch) -> Tensor | None:
        return None

    def _scored(self, batch: Batch) -> Tensor:
        """Tokens that the loss depends on, bool in the shape of the targets."""
        return finite.scored_tokens(batch["segments"], batch["target"])

    def _pair_totals(self, logps: Tensor, ref: Tensor | None, segments: Any) -> KLTotals:
        raise NotImplementedError

    def _step_is_finite(self) -> None:
        """Called once for each step that will be applied."""

    def _evaluation_pairs(self, dataset: StepKTODataset) -> list[EncodedExample]:
        """The mismatched pairs of all of its examples, where there are any."""
        return []

    # A step

    def _begin_step(self, batches: Sequence[Batch]) -> None:
        self._step = Step(batches, self._totals["train"], self._tr_loss.clone())
        self._bad = None
        self._context = self._step_context(self.model_wrapped, batches)

    def _watch(self, *values: Tensor) -> None:
        bad = finite.not_finite(*values)
        self._bad = bad if self._bad is None else self._bad + bad

    def _run_head(self, model: nn.Module, batch: Batch, head_fn: HeadFunction) -> HeadOutput:
        """As head_calls.run. Where fp16 has a scaler, a step's hidden states are watched too.

        A scaler takes every gradient that is not finite for an overflow of its own. It would skip,
        for good, the steps with a hidden state that only the backbone's gradient depends on.
        """
        if self.accelerator.scaler is None or not model.training:
            return head_calls.run(model, batch, head_fn)

        def watched(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            fault = finite.hidden_fault(hidden, batch.get("attention_mask"))
            return head_fn(hidden, weight, bias), fault

        output = head_calls.run(model, batch, watched)
        value, fault = output.value
        self._watch(fault)
        return HeadOutput(value, output.aux_loss)

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> Tensor:
        """As Trainer's. The last of an optimizer step returns only if all of the step is finite.

        Raises:
            FloatingPointError: it is not, and rows are not to be skipped, or that would not help.
                The weights are those of before the step. Infinite gradients are left to the scaler
                of fp16, which skips such steps.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._watch(loss)
        step = self._step
        if step is None or inputs is not step.batches[-1]:
            return loss
        if self._is_bad(model):
            loss = self._without_bad_rows(model, step, num_items_in_batch)
        self._step_is_finite()
        self._step = None
        return loss

    def _is_bad(self, model: nn.Module) -> bool:
        """Of all ranks; the one wait for the device in a step."""
        norm = finite.gradient_norm(model) if self.accelerator.scaler is None else None
        if norm is not None:
            self._watch(norm)
        assert self._bad is not None
        return bool(self._sum_over_ranks(self._bad) > 0)

    def _bad_gradients(self, model: nn.Module) -> list[str]:
        """Names of parameters, of all ranks; a scaler looks at gradients itself."""
        if self.accelerator.scaler is not None:
            return []
        mine = finite.bad_gradients(self.accelerator.unwrap_model(model))
        return list(dict.fromkeys(name for own in self._gather(mine) for name in own))

    def _without_bad_rows(self, model: nn.Module, step: Step, items: Any) -> Tensor:
        """Run a step again without the examples that are not finite; its loss."""
        name = f"step {self.state.global_step + 1}"
        gradients = self._bad_gradients(model)
        # now, as after a forward pass FSDP may hold whole parameters, and these are the shards' own
        model.zero_grad()
        found, pairs, whole = self._diagnose(model, step.batches, self._pairs(step.batches))
        found.gradients = gradients
        told = found.text(self.args.world_size, "micro-batch")
        if self.args.nonfinite == "stop" or not found.can_skip:
            raise FloatingPointError(f"{name}: {told}; the weights are those of before it")
        bad = {fault.place for fault in found.rows}
        batches = [
            self._cut(batch, [p in bad for p in self._places(batch, index)], whole)
            for index, batch in enumerate(step.batches)
        ]
        self._totals |= {"train": step.metrics, "step": None}
        self._tr_loss.copy_(step.loss)
        self._bad = None
        self._context = self._step_context(model, batches, pairs)
        losses = []
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, batch, items))
            self._watch(losses[-1])
        if self._is_bad(model):
            again = Findings(gradients=self._bad_gradients(model))
            rest = again.text(self.args.world_size, "micro-batch")
            raise FloatingPointError(f"{name}: {told}; without these rows {rest}")
        self._skipped += len(found.rows)
        if self.is_world_process_zero():
            warnings.warn(f"{name}: {told}; left out", stacklevel=2)
        return torch.stack(losses).sum()

    def _cut(self, batch: Batch, bad: Sequence[bool], whole: EncodedExample) -> Batch:
        """A micro-batch without its bad examples.

        One of which nothing is left runs with an example that it learns nothing from: all ranks
        have to take the same number of forward and backward passes.
        """
        if not any(bad):
            return batch
        kept = [e for e, is_bad in zip(batch["examples"], bad, strict=True) if not is_bad]
        if kept:
            return self._to_device(self.collate(kept))
        stand_in = self._to_device(self.collate([unlabelled(whole)]))
        return stand_in | {"target": torch.full_like(stand_in["target"], IGNORED)}

    def _take_skipped(self) -> dict[str, float]:
        """For the log: rows that were left out since the last call, of all ranks."""
        skipped, self._skipped = self._skipped, 0
        return {"skipped": skipped} if self.args.nonfinite == "skip" else {}

    def _check_finite(self, logs: dict[str, float]) -> None:
        watched = ["loss", "train_loss"] if self.args.fp16 else ["loss", "train_loss", "grad_norm"]
        for name in watched:
            if not math.isfinite(logs.get(name, 0.0)):
                step = self.state.global_step
                raise FloatingPointError(f"step {step}: {name} is {logs[name]}; see {logs}")

    # Why

    def _places(self, batch: Batch, index: int) -> list[Place]:
        rank = self.args.process_index
        return [Place(e.row, rank, index, k) for k, e in enumerate(batch["examples"])]

    @torch.no_grad()
    def _diagnose(
        self, model: nn.Module, batches: Sequence[Batch], pairs: Sequence[EncodedExample] = ()
    ) -> tuple[Findings, KLTotals | None, EncodedExample]:
        """Run the examples of all ranks again: the same number of forward passes on each.

        Returns:
            what was found on all ranks; the totals of this rank's pairs that are finite, None where
            there are none; and an example that is finite, of whichever rank, if one is.
        """
        placed = [
            (place, example)
            for index, batch in enumerate(batches)
            for place, example in zip(self._places(batch, index), batch["examples"], strict=True)
        ]
        mine = Findings(examples=len(placed))
        for unit, batch in self._units(model, placed):
            self._look_at(model, unit, batch, mine)
        bad = {fault.place for fault in mine.rows}
        whole = next((example for place, example in placed if place not in bad), placed[0][1])
        if mine.names or any(fault.tensor == finite.HIDDEN for fault in mine.rows):
            mine.parameters = finite.bad_parameters(self.accelerator.unwrap_model(model))
        found, stand_in, is_whole = Findings(), whole, False
        for other, example in self._gather((mine, whole)):
            if not is_whole:
                stand_in, is_whole = example, len(other.rows) < other.examples
            found.merge(other)
        totals = None
        if pairs:
            totals = self._look_at_pairs(model, placed, pairs, found)
        return found, totals, stand_in

    def _units(
        self, model: nn.Module, placed: Sequence[Placed]
    ) -> Iterator[tuple[list[Placed], Batch]]:
        """Examples to be run together, and their batch; nothing but the batch for company.

        Those of a micro-batch if they are padded. In a packed row what is not finite would reach
        the others: a masked key has the weight 0, and 0 * NaN is NaN.
        """
        units: list[list[Placed]] = []
        for place, example in placed:
            is_new = not units or units[-1][0][0].batch != place.batch
            if is_new or self.collate.padding_free:
                units.append([])
            units[-1].append((place, example))
        rounds = max(self._gather(len(units)))
        for turn in range(rounds):
            unit = units[min(turn, len(units) - 1)]
            batch = self._to_device(self.collate([example for _, example in unit]))
            yield unit if turn < len(units) else [], batch

    def _look(self, model: nn.Module, batch: Batch) -> tuple[finite.Look, Tensor | None, bool]:
        with self.compute_loss_context_manager():
            output = finite.look(model, batch, self._logit_options)
            ref_logps = self._reference_logps(model, batch)
        aux_loss = output.aux_loss
        return output.value, ref_logps, aux_loss is None or bool(aux_loss.isfinite())

    def _look_at(
        self, model: nn.Module, unit: Sequence[Placed], batch: Batch, mine: Findings
    ) -> None:
        seen, ref_logps, aux_is_finite = self._look(model, batch)
        if not unit:
            return
        numbers = lambda mask, name: (f"{name} {i}" for i in mask.nonzero()[:, 0].tolist())
        mine.add(finite.WEIGHT, numbers(seen.vocabulary, "vocabulary row"))
        mine.add(finite.BIAS, numbers(seen.bias, "vocabulary entry"))
        examples = [example for _, example in unit]
        # in a packed row also what no loss depends on reaches others
        packed = self.collate.padding_free
        scored = batch["target"] != IGNORED if packed else self._scored(batch)
        tensors = finite.tensors_of_examples(seen, ref_logps, scored, examples)
        faults = [
            Fault(tensor, place)
            for (place, _), tensor in zip(unit, tensors, strict=True)
            # those of the weight are all that there are
            if tensor not in (None, finite.WEIGHT, finite.BIAS)
        ]
        mine.rows += faults
        if not aux_is_finite and not faults:
            mine.add(finite.AUX_LOSS, [""])

    def _look_at_pairs(
        self,
        model: nn.Module,
        placed: Sequence[Placed],
        pairs: Sequence[EncodedExample],
        found: Findings,
    ) -> KLTotals | None:
        """Adds the pairs that are not finite although both of their rows are; their prompt's row
        counts. Totals of this rank's finite pairs, None where no rank has one."""
        bad = {fault.place.row for fault in found.rows if fault.place.row is not None}
        mine = Findings()
        parts: list[KLTotals] = []
        prompts = [(place, pair) for (place, _), pair in zip(placed, pairs, strict=True)]
        for unit, batch in self._units(model, prompts):
            seen, ref_logps, _ = self._look(model, batch)
            if not unit:
                continue
            scored = batch["segments"].sequence_index.view(batch["target"].shape) >= 0
            tensors = finite.tensors_of_examples(seen, ref_logps, scored, [e for _, e in unit])
            out = [k for k, tensor in enumerate(tensors) if tensor is not None]
            kept = finite.without(batch["segments"], out)
            parts.append(self._pair_totals(seen.logps, ref_logps, kept))
            for place, pair in (unit[k] for k in out):
                if place.row not in bad and pair.row not in bad:
                    detail = f"prompt of row {place.row} with completion of row {pair.row}"
                    mine.rows.append(Fault(finite.PAIR, place, detail))
        for other in self._gather(mine):
            found.merge(other)
        total = sum(parts[1:], parts[0])
        return total if bool(self._sum_over_ranks(total.totals)[1] > 0) else None

    def _gather(self, value: T) -> list[T]:
        return finite.gather(value, self.args.world_size)

    # Evaluation

    def _begin_evaluation(self) -> None:
        self._seen: list[tuple[Tensor, list[int]]] = []  # faults () and rows of each batch
        self._points: Tensor | None = None  # () faults of the reference points

    def _saw(self, model: nn.Module, inputs: Batch, *values: Tensor) -> None:
        """Remember whether a batch of an evaluation was finite."""
        self._eval_model = model
        rows = [example.row for example in inputs["examples"]]
        self._seen.append((finite.not_finite(*values), rows))

    def _saw_points(self, totals: Tensor) -> None:
        """The same of what its reference points are made of."""
        self._points = finite.not_finite(totals)

    def _check_evaluation(self, dataset: Any) -> None:
        """One reduction and one wait for an evaluation.

        Raises:
            FloatingPointError: on all ranks, if something of it was not finite.
        """
        if not self._seen:
            return
        faults = torch.stack([count for count, _ in self._seen])
        points = torch.zeros_like(faults[0]) if self._points is None else self._points
        total = self._sum_over_ranks(torch.stack([faults.sum(), points])).tolist()
        if not any(total):
            return
        where = f"evaluation after step {self.state.global_step}"
        if not isinstance(dataset, StepKTODataset):
            raise FloatingPointError(f"{where}: not finite")
        bad = set(faults.nonzero()[:, 0].tolist())
        batches: list[Batch] = [
            {"examples": [dataset[row] for row in rows] if number in bad else []}
            for number, (_, rows) in enumerate(self._seen)
        ]
        if not bad:  # for company
            batches = [{"examples": [dataset[0]]}]
        model = self._eval_model
        found, *_ = self._diagnose(model, batches)
        pairs = self._evaluation_pairs(dataset) if total[1] else []
        if pairs:
            after = lambda k: (k + 1) % len(pairs)
            pairs = [replace(pair, row=after(k)) for k, pair in enumerate(pairs)]
            cut = lambda row: divmod(row, self.args.eval_batch_size)
            everything = [(Place(row, 0, *cut(row)), dataset[row]) for row in range(len(pairs))]
            self._look_at_pairs(model, everything, pairs, found)
        raise FloatingPointError(f"{where}: {found.text(self.args.world_size, 'batch')}")
