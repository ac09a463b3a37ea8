"""What the policy is compared with: another model, a switched-off adapter, or cached log-probs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepkto_kernels import checks
from stepkto_kernels.integrations.transformers import causal_lm, logit_options, route_head
from stepkto_kernels.training import finite, head_calls, reference_logps
from stepkto_kernels.training.arguments import StepKTOArguments
from stepkto_kernels.training.batch import TrainerCollator
from stepkto_kernels.training.data import EncodedExample
from stepkto_kernels.training.dataset import StepKTODataset

LogProbs = Callable[[list[EncodedExample]], Tensor]


class ReferenceModel:
    """The frozen reference of a training run.

    Args:
        policy: the model that is trained, unwrapped and as it starts.
        model: the reference; None takes a copy of the policy, or the policy itself where PEFT can
            switch off its adapters.
        args: of the run.
        accelerator: accelerate's.
        mismatched: whether training scores mismatched pairs, which are in no dataset and so need
            the model itself even where log-probs are cached.
    """

    def __init__(
        self,
        policy: nn.Module,
        model: nn.Module | None,
        args: StepKTOArguments,
        accelerator: Any,
        *,
        mismatched: bool,
    ):
        self.policy, self.model = policy, model
        self.args, self.accelerator = args, accelerator
        self.is_adapter = model is None and hasattr(policy, "disable_adapter")
        self.needed = mismatched or not args.precompute_ref_log_probs
        self._ready = False

    def prepare(
        self,
        datasets: Mapping[str, StepKTODataset],
        collate: TrainerCollator,
        to_device: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        """Freeze and place the model, and precompute log-probs where that is asked for; once.

        datasets: get their log-probs, those with them already keep them.
        Raises:
            FloatingPointError: a log-prob is not finite; on all ranks, and nothing of it is kept.
        """
        if self._ready:
            return
        # the policy is sharded later, and serves as its own reference only until it is trained
        sharded = self.accelerator.distributed_type.name == "FSDP"
        precomputed = self.args.precompute_ref_log_probs
        wanted = (self.needed and not self.is_adapter) or (sharded and precomputed)
        if self.model is None and wanted:
            self.model = copy.deepcopy(self.policy)
        todo = {}
        if precomputed:
            fingerprint = reference_logps.model_fingerprint(
                self._source, with_adapters=not self.is_adapter
            )
            options = logit_options(causal_lm(self._source).config)
            precision = f"{self.args.mixed_precision} {options}"
            for name, dataset in datasets.items():
                if dataset.ref_logps is None:  # the key, before weights are sharded
                    todo[name] = reference_logps.cache_key(fingerprint, dataset, precision)
        if self.model is not None:
            self.model = self._placed(self.model)
        for name, key in todo.items():
            datasets[name].ref_logps = self._precomputed(
                name, datasets[name], key, collate, to_device
            )
        if self.is_adapter or not self.needed:
            self.model = None
        self._ready = True

    @property
    def _source(self) -> nn.Module:
        """Whose log-probs these are: with an adapter, when that is switched off."""
        return self.policy if self.model is None else self.model

    def _placed(self, model: nn.Module) -> nn.Module:
        route_head(model)
        model.requires_grad_(False).eval()
        if self.accelerator.distributed_type.name == "FSDP":
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            return fsdp2_prepare_model(self.accelerator, model)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _precomputed(
        self,
        name: str,
        dataset: StepKTODataset,
        key: str,
        collate: TrainerCollator,
        to_device: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> Tensor:
        args = self.args
        path = reference_logps.cache_path(args.ref_logps_cache or args.output_dir or ".", key)
        found = reference_logps.load(path, key, dataset.completion_tokens)
        # a rank may not see the others' disk, and all have to do the same
        have = torch.tensor(float(found is not None), device=args.device)
        if float(self.accelerator.reduce(have, "sum")) == args.world_size:
            assert found is not None
            return found

        def of_examples(examples: list[EncodedExample]) -> Tensor:
            return self._log_probs(self._source, to_device(collate(examples)))

        def log_probs(batch: dict[str, Any]) -> Tensor:
            logps = self._log_probs(self._source, to_device(batch))
            # on all ranks or none, and before anything is kept
            if self.accelerator.reduce(finite.not_finite(logps), "sum") > 0:
                rows = self._bad_rows(batch["examples"], of_examples)
                text = finite.rows_text(rows)
                raise FloatingPointError(f"{name} dataset: not finite: {finite.REFERENCE}{text}")
            return logps

        logps = reference_logps.compute(
            dataset,
            collate,
            log_probs,
            args.eval_batch_size,
            args.process_index,
            args.world_size,
        )
        logps = self.accelerator.reduce(logps.to(args.device), "sum").cpu()
        if args.should_save:
            reference_logps.save(path, key, logps)
        return logps

    def _bad_rows(self, examples: list[EncodedExample], log_probs: LogProbs) -> list[int | None]:
        """Rows of all ranks' batches whose log-probs are not finite; by all ranks.

        One example at a time: in a packed row what is not finite reaches the others.
        """
        rounds = finite.gather(len(examples), self.args.world_size)
        rows = []
        for turn in range(max(rounds)):
            example = examples[min(turn, len(examples) - 1)]
            if not bool(log_probs([example]).isfinite().all()):
                rows.append(example.row)
        return [row for own in finite.gather(rows, self.args.world_size) for row in own]

    def log_probs(self, policy: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Of the batch's targets, nats, in their shape, fp32: cached ones, or from the model.

        policy: the policy with whatever wraps it, which serves where an adapter is switched off.
        Raises:
            ValueError: there are none in the batch, and the model is not kept.
        """
        if "ref_logps" in batch:
            return batch["ref_logps"]
        kept = self.model is not None or self.is_adapter
        want = "False, or the dataset given when the trainer is made: the reference is gone"
        checks.require(kept, "args.precompute_ref_log_probs", want, True)
        return self._log_probs(policy if self.model is None else self.model, batch)

    def _log_probs(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        source: Any = self._source
        switched_off = source.disable_adapter() if self.is_adapter else contextlib.nullcontext()
        options = logit_options(causal_lm(source).config) | {"backend": self.args.backend}
        # a policy that accelerate has not wrapped yet knows nothing of mixed precision
        with switched_off, self.accelerator.autocast():
            return head_calls.token_logps(model, batch, options)
