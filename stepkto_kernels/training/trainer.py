"""StepKTOTrainer: transformers' Trainer with the Step-KTO loss (arXiv 2501.10799).

What an optimizer step needs is known before its first gradient: `get_batch_samples` gets all of its
micro-batches, and from them come the global normalizers and the reference points. Then the gradient
does not depend on how the step is cut into micro-batches and ranks. The head runs inside the
model's own forward pass (integrations/transformers.py), so that DistributedDataParallel and FSDP
see it.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput

from stepkto_kernels import checks
from stepkto_kernels.integrations.transformers import (
    causal_lm,
    check_head,
    check_packing,
    logit_options,
    route_head,
)
from stepkto_kernels.metrics import StepKTOMetrics
from stepkto_kernels.module import StepKTOLoss
from stepkto_kernels.step_kto import (
    KLBaseline,
    KLTotals,
    LossNormalizer,
    kl_totals,
    loss_normalizer,
)
from stepkto_kernels.training import head_calls
from stepkto_kernels.training.arguments import StepKTOArguments
from stepkto_kernels.training.batch import TrainerCollator, mismatched_pairs, unlabelled
from stepkto_kernels.training.data import EncodedExample
from stepkto_kernels.training.dataset import StepKTODataset, encode_dataset
from stepkto_kernels.training.finite_trainer import Batch, FiniteTrainer, StepContext
from stepkto_kernels.training.models import (
    add_adapter,
    disable_dropout,
    load_model,
    load_tokenizer,
    trusts_code,
)
from stepkto_kernels.training.reference_logps import sharded_batches
from stepkto_kernels.training.reference_model import ReferenceModel

STATE_FILE = "step_kto.pt"  # in a checkpoint: the running reference points
GLOO_REST = 0.2  # seconds, see StepKTOTrainer.train


def encode(source: Any, tokenizer: PreTrainedTokenizerBase, args: StepKTOArguments) -> Any:
    """A dataset, a dict of them, or None, tokenized as the arguments say."""
    if source is None:
        return None
    if isinstance(source, dict):
        return {name: encode(rows, tokenizer, args) for name, rows in source.items()}
    return encode_dataset(
        source,
        tokenizer,
        max_length=args.max_length,
        step_separator=args.step_separator,
        add_eos=args.add_eos,
    )


def collator(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, args: StepKTOArguments
) -> TrainerCollator:
    pad = tokenizer.pad_token_id
    varlen = str(config._attn_implementation).startswith("flash_attention")
    return TrainerCollator(
        tokenizer.eos_token_id if pad is None else pad,
        padding_free=args.padding_free,
        varlen=args.padding_free and varlen,
        pad_to_multiple_of=args.pad_to_multiple_of,
    )


class StepKTOTrainer(FiniteTrainer):
    """Train a causal language model on stepwise and outcome labels.

    Args:
        model: a PreTrainedModel with an lm_head, a PEFT model of one, or a name or folder for
            from_pretrained.
        ref_model: the frozen reference; None takes the policy as it starts, or with PEFT the model
            with its adapters switched off (pass one if the adapters were trained before).
        args: StepKTOArguments; None takes their defaults.
        train_dataset, eval_dataset: a JSON-lines file or rows (a list, a datasets.Dataset) in the
            format of training/data.py: steps and labels, plain KTO rows, or TRL's unpaired
            conversational rows. A dict of datasets is evaluated one by one.
        processing_class: a fast tokenizer; None loads the model's.
        callbacks, optimizers: as Trainer.
        peft_config: wraps the model in a new PEFT adapter.
    Raises:
        ValueError: a model, dataset or option that does not fit; a model whose log-probs are not
            those of its lm_head and config.
    """

    _tag_names = ["step-kto"]
    args: StepKTOArguments

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str,
        ref_model: PreTrainedModel | nn.Module | str | None = None,
        args: StepKTOArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ):
        if args is None:
            args = StepKTOArguments(output_dir="step_kto_output")
        checks.instance("args", args, StepKTOArguments)
        want = "one GPU in each process: use accelerate launch, or CUDA_VISIBLE_DEVICES"
        checks.require(args.n_gpu <= 1, "args", want, f"{args.n_gpu} GPUs in this one")
        shared = ref_model is not None and ref_model is model
        checks.require(not shared, "ref_model", "another module than model, or None", "the same")
        policy = load_model(model, args)
        reference = None if ref_model is None else load_model(ref_model, args)
        if peft_config is not None:
            policy = add_adapter(policy, peft_config)
        if args.disable_dropout:
            for each in filter(None, (policy, reference)):
                disable_dropout(each)
        config = causal_lm(policy).config
        if processing_class is None:
            processing_class = load_tokenizer(config._name_or_path, trusts_code(args))
        encoded = [encode(rows, processing_class, args) for rows in (train_dataset, eval_dataset)]
        self.collate = collator(processing_class, config, args)
        super().__init__(
            model=policy,
            args=args,
            data_collator=self.collate,
            train_dataset=encoded[0],
            eval_dataset=encoded[1],
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # the loss is divided by what all micro-batches of a step have, not again by their number
        self.loss_is_scaled_for_ga = True
        self._refuse_what_is_not_supported()
        route_head(policy)
        if self.place_model_on_device:  # else there may be no weights here yet
            with self.accelerator.autocast():
                check_head(policy, args.backend)
                if args.padding_free:
                    check_packing(policy, args.backend)
        self.loss_fn = StepKTOLoss(
            args.step_kto_config(),
            memory_budget=args.memory_budget,
            gradient_bound=args.gradient_bound,
            backend=args.backend,
            **logit_options(config),  # type: ignore[arg-type]
        ).to(args.device)
        self.reference = ReferenceModel(
            policy, reference, args, self.accelerator, mismatched=self._is_mismatched
        )
        self._context = StepContext(None, None)
        self._eval_context: StepContext | None = None
        self._evaluated: StepKTODataset | None = None
        self._totals: dict[str, StepKTOMetrics | None] = {"train": None, "eval": None, "step": None}
        self._warned = False

    def _refuse_what_is_not_supported(self) -> None:
        want = "FSDP version 2 or data parallelism"
        checks.require(not self.is_deepspeed_enabled, "args.deepspeed", want, "DeepSpeed")
        if self.is_fsdp_enabled:
            version = self.accelerator.state.fsdp_plugin.fsdp_version
            checks.require(version == 2, "fsdp_version", want, version)
        layout = getattr(self.accelerator, "parallelism_config", None)
        cut = layout is not None and (layout.cp_enabled or layout.sp_enabled or layout.tp_enabled)
        checks.require(not cut, "parallelism_config", "whole sequences and layers", layout)
        sharded = self.is_distributed_loading_by_transformers
        checks.require(not sharded, "model", "one that this trainer shards", "a sharded model")

    @property
    def _is_mismatched(self) -> bool:
        config = self.loss_fn.config
        return config.fixed_reference_point is None and config.reference_point == "mismatched"

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ResumableTrainer's; the policy as it is now is the reference, if there is no other."""
        self._prepare_reference()
        self._totals = dict.fromkeys(self._totals)
        self._skipped = 0
        output = super().train(*args, **kwargs)
        if self.args.world_size > 1 and torch.distributed.get_backend() == "gloo":
            # The last collective was a gather. Gloo's thread needs the interpreter once more, to
            # drop its tensors, and aborts a process that ends before. Nothing tells when it has.
            time.sleep(GLOO_REST)
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer.evaluate; another dataset may have any of the formats of __init__.

        Raises:
            ValueError: also where that needs a reference model that is not kept.
        """
        return super().evaluate(self._encoded(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As `evaluate`; there are metrics and no predictions."""
        return super().predict(self._encoded(test_dataset), *args, **kwargs)

    def _encoded(self, source: Any) -> Any:
        named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if isinstance(source, str) and source in named:  # Trainer evaluates a dict name by name
            return source
        return encode(source, self.processing_class, self.args)  # type: ignore[arg-type]

    def _prepare_reference(self) -> None:
        evaluated = self.eval_dataset
        named = evaluated if isinstance(evaluated, dict) else {"eval": evaluated}
        named = {f"eval {name}": dataset for name, dataset in named.items()}
        named = {"train": self.train_dataset} | named
        datasets = {k: v for k, v in named.items() if isinstance(v, StepKTODataset)}
        self.reference.prepare(datasets, self.collate, self._to_device)

    def _to_device(self, batch: Batch) -> Batch:
        move = lambda value: value.to(self.args.device) if hasattr(value, "to") else value
        return {name: move(value) for name, value in batch.items()}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """The micro-batches of an optimizer step; works out what they have in common."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._begin_step(batches)
        return batches, items

    @torch.no_grad()
    def _step_context(
        self, model: nn.Module, batches: Sequence[Batch], pairs: KLTotals | None = None
    ) -> StepContext:
        """pairs: of this rank's mismatched pairs, where they are known."""
        config = self.loss_fn.config
        self._observe_last_step()
        found: list[Any] = [loss_normalizer(batch["segments"], config) for batch in batches]
        counts = [torch.stack(tuple(normalizer)) for normalizer in found]
        normalizer = LossNormalizer(*self._sum_over_ranks(torch.stack(counts).sum(0)))
        baseline = None
        observed = False
        if self._is_mismatched:
            scored = None if pairs is not None else self._mismatched_pairs(batches)
            observed = pairs is not None or bool(scored)
            if pairs is not None:
                baseline = KLTotals(self._sum_over_ranks(pairs.totals)).baseline()
            else:
                baseline = self._baseline(model, scored) if scored else self._running_baseline()
        elif config.reference_point == "matched" and (len(batches) > 1 or self.args.world_size > 1):
            baseline = self._baseline(model, batches)
        elif config.reference_point == "ema":
            baseline = self.loss_fn.running_baseline()
        return StepContext(baseline, normalizer, len(batches), observed)

    def _step_is_finite(self) -> None:
        baseline = self._context.baseline
        if self._context.observed and baseline is not None:
            self.loss_fn.observe_baseline(baseline)

    def _pairs(self, batches: Sequence[Batch]) -> list[EncodedExample]:
        pieces = self._mismatched_pairs(batches) if self._is_mismatched else []
        return [pair for piece in pieces for pair in piece["examples"]]

    def _mismatched_pairs(self, batches: Sequence[Batch]) -> list[Batch]:
        """KTO's pairs: in one ring through all micro-batches of all ranks."""
        examples = [example for batch in batches for example in batch["examples"]]
        after = None
        if self.args.world_size > 1:
            firsts: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(firsts, examples[0])
            after = firsts[(self.args.process_index + 1) % self.args.world_size]
        pairs = mismatched_pairs(examples, after, self.args.max_length)
        size = max(len(batch["examples"]) for batch in batches)
        pieces = [pairs[i : i + size] for i in range(0, len(pairs), size)]
        return [self._to_device(self.collate(piece)) for piece in pieces]

    def _baseline(self, model: nn.Module, batches: Sequence[Batch]) -> KLBaseline:
        """Mean log-ratios of batches on all ranks, of sequences and of steps, at least 0."""
        parts = [self._kl_totals(model, batch) for batch in batches]
        totals = sum(parts[1:], parts[0]).totals
        self._watch(totals)  # a mean of -inf would be the reference point 0
        return KLTotals(self._sum_over_ranks(totals)).baseline()

    def _kl_totals(self, model: nn.Module, batch: Batch) -> KLTotals:
        ref_logps = self.reference.log_probs(model, batch)
        logps = head_calls.token_logps(model, batch, self._logit_options)
        return self._pair_totals(logps, ref_logps, batch["segments"])

    def _reference_logps(self, model: nn.Module, batch: Batch) -> Tensor | None:
        return self.reference.log_probs(model, batch)

    def _pair_totals(self, logps: Tensor, ref: Tensor | None, segments: Any) -> KLTotals:
        assert ref is not None
        return kl_totals(
            logps,
            ref,
            segments,
            config=self.loss_fn.config,
            labelled_only=self.loss_fn.config.reference_point == "matched",
        )

    def _running_baseline(self) -> KLBaseline:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "a step of one sequence has no mismatched pair: using the running mean of the "
                "reference points of earlier steps",
                stacklevel=2,
            )
        return self.loss_fn.running_baseline()

    def _observe_last_step(self) -> None:
        """Move "ema" reference points; the last step's metrics are complete only now."""
        totals, self._totals["step"] = self._totals["step"], None
        if totals is not None and self.loss_fn.config.reference_point == "ema":
            self.loss_fn.observe_metrics(StepKTOMetrics(self._sum_over_ranks(totals.totals)))

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return value.to(self.args.device)
        return self.accelerator.reduce(value.to(self.args.device, copy=True), "sum")

    @property
    def _logit_options(self) -> dict[str, Any]:
        names = ("logit_scale", "softcap", "backend")
        return {name: self.loss_fn.options[name] for name in names}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """A micro-batch's share of the step's loss, which the ranks' mean of gradients turns into
        the gradient of the whole step."""
        loss, metrics, bad = self._loss(model, inputs, self._context)
        self._watch(bad)
        for kind in ("train", "step"):
            self._add_metrics(kind, metrics)
        return (loss, metrics) if return_outputs else loss

    def _loss(
        self, model: nn.Module, batch: Batch, context: StepContext
    ) -> tuple[Tensor, StepKTOMetrics, Tensor]:
        """Loss, metrics, and () what tells by not being finite that something else is not."""
        ref_logps = self.reference.log_probs(model, batch)

        def head_fn(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            return self.loss_fn(
                hidden,
                weight,
                batch["target"],
                batch["segments"],
                ref_logps,
                context.baseline,
                bias,
                context.normalizer,
                update_running=False,  # once a step, and with all ranks' values
            )

        output = self._run_head(model, batch, head_fn)
        loss, metrics = output.value
        if model.training:  # the ranks' gradients will be averaged
            loss = loss * self.args.world_size
        if output.aux_loss is not None:
            loss = loss + output.aux_loss / context.micro_batches
        # log-probs are summed in the metrics; an infinity that is clipped is in no sum
        scored_ref = ref_logps.masked_fill(~self._scored(batch), 0.0).sum(dtype=torch.float64)
        return loss, metrics, loss.detach() + metrics.totals.sum() + scored_ref

    def _add_metrics(self, kind: str, metrics: StepKTOMetrics) -> None:
        before = self._totals[kind]
        self._totals[kind] = metrics if before is None else before + metrics

    def _take_metrics(self, kind: str) -> dict[str, float]:
        """Means since the last call, over all ranks: one reduction and one wait for the device."""
        metrics, self._totals[kind] = self._totals[kind], None
        if metrics is None:
            return {}
        return StepKTOMetrics(self._sum_over_ranks(metrics.totals)).compute()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer.log, with the loss's metrics.

        Raises:
            FloatingPointError: loss or gradient norm is not finite. A gradient norm may be with
                fp16, whose scaler skips such steps.
        """
        if "loss" in logs:
            metrics = self._take_metrics("train")
            metrics.pop("loss", None)
            logs.update(metrics)
            logs.update(self._take_skipped())
        self._check_finite(logs)
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of one batch; there are no predictions, as there are no logits."""
        with torch.no_grad(), self.compute_loss_context_manager():
            if self._eval_context is None:
                self._eval_context = self._evaluation_context(model)
            inputs = self._prepare_inputs(self._without_repeated(inputs))
            loss, metrics, bad = self._loss(model, inputs, self._eval_context)
        self._add_metrics("eval", metrics)
        self._saw(model, inputs, bad)
        return loss.detach(), None, None

    def _evaluation_pairs(self, dataset: StepKTODataset) -> list[EncodedExample]:
        if not self._is_mismatched:
            return []
        return mismatched_pairs(dataset.examples, max_length=self.args.max_length)

    def _evaluation_context(self, model: nn.Module) -> StepContext:
        """One pair of reference points for all batches of a dataset."""
        kind, dataset = self.loss_fn.config.reference_point, self._evaluated
        baseline = None
        if self._is_mismatched or kind == "ema":
            baseline = self.loss_fn.running_baseline()
        if self._is_mismatched and dataset is not None:
            pairs = self._evaluation_pairs(dataset)
            dataset = StepKTODataset(pairs) if pairs else None
        if dataset is not None and (self._is_mismatched or kind == "matched"):
            baseline = self._dataset_baseline(model, dataset)
        return StepContext(baseline, None)

    def _dataset_baseline(self, model: nn.Module, dataset: StepKTODataset) -> KLBaseline:
        """As `_baseline`, of a dataset that all ranks have."""
        args = self.args
        totals = KLTotals(torch.zeros(4, dtype=torch.float64, device=args.device))
        for indices, own in sharded_batches(
            dataset, args.eval_batch_size, args.process_index, args.world_size
        ):
            batch = self._to_device(self.collate([dataset[i] for i in indices]))
            found = self._kl_totals(model, batch)  # by all ranks, as models may be sharded
            totals = totals + found if own else totals
        self._saw_points(totals.totals)
        return KLTotals(self._sum_over_ranks(totals.totals)).baseline()

    def _without_repeated(self, inputs: Batch) -> Batch:
        """The last batch, without labels where accelerate repeats examples to fill all ranks'."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        own = state.remainder - self.args.process_index * self.args.eval_batch_size
        examples = inputs["examples"]
        kept = [e if i < own else unlabelled(e) for i, e in enumerate(examples)]
        return self._to_device(self.collate(kept))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As Trainer's, with the loss's metrics; the loss is that of all examples as one batch."""
        self._prepare_reference()
        self._observe_last_step()
        self._totals["eval"] = self._eval_context = None
        self._evaluated = dataloader.dataset
        self._begin_evaluation()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        self._check_evaluation(self._evaluated)
        found = self._take_metrics("eval")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return output._replace(metrics={**(output.metrics or {}), **metrics})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_finite({"loss": float(self._tr_loss)})  # since the last log
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._observe_last_step()
        if self.args.should_save:
            torch.save(self.loss_fn.state_dict(), os.path.join(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = os.path.join(checkpoint, STATE_FILE)
            self.loss_fn.load_state_dict(torch.load(path, weights_only=True))
