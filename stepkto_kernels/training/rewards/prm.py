"""Process reward models: checkpoints that score every step of a solution in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from stepkto_kernels import checks
from stepkto_kernels.training.rewards.base import Label, Solution

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RIGHT = 1  # class of a right step, of 2, in both layouts
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each step the index of the token at which its score stands."""

    input_ids: list[int]
    positions: list[int]


class Layout(Protocol):
    """How a checkpoint wants a solution; None where the text cannot be written in it."""

    def __call__(
        self, solution: Solution, tokenizer: PreTrainedTokenizerBase
    ) -> Encoded | None: ...


@dataclass(frozen=True)
class TRLLayout:
    """As TRL's PRMTrainer trains: prompt, then each step and a separator; scored at its last token.

    The prompt is the problem's text. Pieces are tokenized one by one, without special tokens, after
    a beginning-of-sequence token where the tokenizer has one.

    Args:
        separator: what the checkpoint was trained with, PRMTrainer's `step_separator`.
        strip: whether to take whitespace off both ends of a step, as training data without
            separators in its steps has them.
    """

    separator: str = "\n"
    strip: bool = True

    def __call__(self, solution: Solution, tokenizer: PreTrainedTokenizerBase) -> Encoded | None:
        encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        separator = encode(self.separator)
        checks.require(bool(separator), "separator", "at least one token", repr(self.separator))
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids, positions = [*bos, *encode(solution.problem.problem)], []
        for step in solution.steps:
            ids += [*encode(step.strip() if self.strip else step), *separator]
            positions.append(len(ids) - 1)
        return Encoded(ids, positions)


@dataclass(frozen=True)
class QwenLayout:
    """As Qwen2.5-Math-PRM: a chat of which the answer has `<extra_0>` after each step.

    A problem or a step with the separator in its own text would move the scores: no verdicts.
    """

    separator: str = "<extra_0>"
    system: str = "Please reason step by step, and put your final answer within \\boxed{}."

    def __call__(self, solution: Solution, tokenizer: PreTrainedTokenizerBase) -> Encoded | None:
        separator = tokenizer(self.separator, add_special_tokens=False)["input_ids"]
        one = len(separator) == 1 and separator[0] != tokenizer.unk_token_id
        checks.require(one, "tokenizer", f"one token for {self.separator}", separator)
        marked = "".join(step.strip() + self.separator for step in solution.steps)
        messages = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": solution.problem.problem},
            {"role": "assistant", "content": marked},
        ]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        positions = [i for i, token in enumerate(ids) if token == separator[0]]
        return Encoded(ids, positions) if len(positions) == len(solution.steps) else None


LAYOUTS: dict[str, Layout] = {"trl": TRLLayout(), "qwen": QwenLayout()}


class ProcessRewardModel:
    """A step is right where the model's probability of that is at least `threshold`.

    Steps beyond `max_length` tokens, solutions that the layout cannot write and scores that are not
    finite have no verdict; `missing` counts such steps.

    Args:
        model: gives logits (B, T, 2), as `.logits` or first of its outputs; in eval mode.
        tokenizer: its tokenizer.
        layout: where the scores stand.
        threshold: in [0, 1].
        batch_size: solutions at once, >= 1.
        max_length: tokens that the model takes, >= 1; None for what its config says.
    Raises:
        ValueError: an argument outside of the above; when called: logits of another shape.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        *,
        threshold: float = 0.5,
        batch_size: int = 8,
        max_length: int | None = None,
    ):
        checks.number("threshold", threshold, low=0, high=1)
        checks.integer("batch_size", batch_size, low=1)
        if max_length is None:
            max_length = getattr(model.config, "max_position_embeddings", None) or 2**31
        checks.integer("max_length", max_length, low=1)
        self.model, self.tokenizer, self.layout = model.eval(), tokenizer, layout
        self.threshold, self.batch_size, self.max_length = threshold, batch_size, max_length
        self.missing = 0

    def __call__(self, solutions: Sequence[Solution]) -> list[list[Label]]:
        labels = [[self._label(p) for p in scores] for scores in self.scores(solutions)]
        self.missing += sum(label is None for each in labels for label in each)
        return labels

    def _label(self, probability: float | None) -> Label:
        return None if probability is None else probability >= self.threshold

    def scores(self, solutions: Sequence[Solution]) -> list[list[float | None]]:
        """Probability that each step is right; None where there is none."""
        found: list[list[float | None]] = [[None] * len(each.steps) for each in solutions]
        encoded: list[tuple[int, Encoded]] = []
        for i, solution in enumerate(solutions):
            one = self.layout(solution, self.tokenizer) if solution.steps else None
            if one is not None:
                encoded.append((i, one))
        encoded.sort(key=lambda pair: len(pair[1].input_ids))  # of a like length, little is padding
        for first in range(0, len(encoded), self.batch_size):
            batch = encoded[first : first + self.batch_size]
            right = self._forward([one.input_ids[: self.max_length] for _, one in batch])
            for (i, one), row in zip(batch, right.tolist(), strict=True):
                for step, position in enumerate(one.positions):
                    if position < self.max_length and row[position] == row[position]:  # not NaN
                        found[i][step] = row[position]
        return found

    @torch.no_grad()
    def _forward(self, rows: list[list[int]]) -> Tensor:  # (B, longest row) fp32
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):  # on the right, so that positions stay as they are
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        device = self.model.device
        output: Any = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        logits = output.logits if hasattr(output, "logits") else output[0]
        shape = tuple(logits.shape)
        checks.require(shape == (*ids.shape, 2), "model", f"logits {(*ids.shape, 2)}", shape)
        return logits.float().softmax(-1)[..., RIGHT].cpu()


def load_prm(
    name: str,
    layout: str,
    *,
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    **options: Any,
) -> ProcessRewardModel:
    """A process reward model from a folder or the hub.

    Args:
        name: folder or hub name.
        layout: "trl", a token classification checkpoint of PRMTrainer; "qwen", Qwen2.5-Math-PRM
            and what is built like it, whose code is the checkpoint's own.
        trust_remote_code: run code that comes with the checkpoint. Nothing is run unless asked.
        device: where to run.
        dtype: float32, bfloat16 or float16.
        options: of ProcessRewardModel.
    Raises:
        ValueError: an argument outside of the above, or weights of the model that are missing: a
            head with random weights would invent its verdicts.
        OSError: there is no such model, or none with safetensors.
    """
    from transformers import AutoModel, AutoModelForTokenClassification

    from stepkto_kernels.training.models import load_tokenizer

    checks.choice("layout", layout, tuple(LAYOUTS))
    checks.choice("dtype", dtype, tuple(DTYPES))
    kind: Any = AutoModel if layout == "qwen" and trust_remote_code else None
    kind = kind or AutoModelForTokenClassification
    safe: dict[str, Any] = {"trust_remote_code": trust_remote_code, "use_safetensors": True}
    model, info = kind.from_pretrained(name, dtype=DTYPES[dtype], output_loading_info=True, **safe)
    missing = sorted(info["missing_keys"])
    checks.require(not missing, f"model {name}", "all weights of it", f"none for {missing[:4]}")
    tokenizer = load_tokenizer(name, trust_remote_code)
    return ProcessRewardModel(model.to(device), tokenizer, LAYOUTS[layout], **options)
