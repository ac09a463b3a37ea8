"""The data format: rows with step and outcome labels, and how a row becomes tokens with step ids.

A row is one JSON object on a line of a file, or one row of a datasets.Dataset:

    {"prompt": "2 + 3 * 4 = ?", "completions": ["3 * 4 = 12. ", "2 + 12 = 14."],
     "labels": [true, true], "label": true}

`prompt` is a string or a list of {"role", "content"} messages; `labels` has true, false or null for
each of the steps in `completions`; `label` is the outcome, true, false or null. A KTO row, with a
`completion` in place of `completions` and `labels`, is one text without steps: a string, or as in
TRL's conversational rows a list of one assistant message. Fields that are null count as absent
(`label` excepted) and other fields are ignored.
"""

from __future__ import annotations

import codecs
import json
import os
import reprlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepkto_kernels import files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | tuple[dict[str, str], ...]
FilePath = str | os.PathLike[str]

LABEL_CODES = {True: 1, False: 0, None: -1}
NO_STEP = -1
UNLABELLED = LABEL_CODES[None]


def _bad(field: str, want: str, got: object) -> ValueError:
    return ValueError(f"{field}: want {want}, got {reprlib.repr(got)} ({type(got).__name__})")


@dataclass(frozen=True)
class StepKTOExample:
    """A prompt, a completion cut into steps, and what is known to be right.

    Args:
        prompt: a string, or messages, each {"role": ..., "content": ...}; at least one.
        completions: the completion's pieces, at least one: its steps, or without step labels the
            whole text as a single piece.
        labels: for each piece True right, False wrong, None unknown; () where there are no steps.
        label: the outcome, True right, False wrong, None unknown.
    Raises:
        ValueError: a field has another type or length, or text that UTF-8 cannot write.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    labels: tuple[bool | None, ...]
    label: bool | None

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            _check_text("prompt", self.prompt)
        else:
            _check_messages(self.prompt)
        if not isinstance(self.completions, tuple) or not self.completions:
            raise _bad("completions", "a tuple of at least one string", self.completions)
        for index, text in enumerate(self.completions):
            _check_text(f"completions[{index}]", text)
        if not isinstance(self.labels, tuple):
            raise _bad("labels", "a tuple", self.labels)
        for index, label in enumerate(self.labels):
            _check_label(f"labels[{index}]", label)
        if self.labels or len(self.completions) > 1:
            _check_label_count(self.labels, self.completions)
        _check_label("label", self.label)

    @property
    def has_steps(self) -> bool:
        """False for a KTO example: its one completion is a text that is in no step."""
        return bool(self.labels)


def _check_text(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise _bad(field, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair; no tokenizer takes it.
        raise _bad(field, "text without lone surrogates", value) from None


def _check_label(field: str, value: object) -> None:
    if value is not None and not isinstance(value, bool):
        raise _bad(field, "true, false or null", value)


def _check_label_count(labels: Sequence[Any], completions: Sequence[Any]) -> None:
    wanted, got = len(completions), len(labels)
    if wanted != got:
        raise ValueError(f"labels: want one label for each of {wanted} completions, got {got}")


def _check_messages(prompt: object, name: str = "prompt") -> None:
    if not isinstance(prompt, tuple) or not prompt:
        raise _bad(name, "a string or a sequence of at least one message", prompt)
    for index, message in enumerate(prompt):
        field = f"{name}[{index}]"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise _bad(field, "a message with the keys role and content", message)
        _check_text(f"{field}.role", message["role"])
        _check_text(f"{field}.content", message["content"])


def parse_row(row: Mapping[str, Any], where: str) -> StepKTOExample:
    """Make an example of a row in the format above.

    Args:
        row: the fields; a null field other than `label` counts as absent.
        where: the row's place, the beginning of any error message, such as "train.jsonl, line 3".
    Raises:
        ValueError: a field is missing, has another type or contradicts another; names the field.
    """
    try:
        return _parse_fields(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _parse_fields(row: object) -> StepKTOExample:
    if not isinstance(row, Mapping):
        raise _bad("row", "an object with named fields", row)
    prompt = _parse_prompt(_field(row, "prompt", "a string or a list of messages"))
    if "label" not in row:
        raise ValueError("label: want true, false or null, got no such field")
    if row.get("completion") is not None:
        for field in ("completions", "labels"):
            if row.get(field) is not None:
                raise _bad(field, "no such field beside completion", row[field])
        completion = _parse_completion(row["completion"])
        return StepKTOExample(prompt, (completion,), (), row["label"])
    completions, labels = _list_field(row, "completions"), _list_field(row, "labels")
    # An example without any labels is a KTO example; a row with its labels missing is a mistake.
    _check_label_count(labels, completions)
    return StepKTOExample(prompt, completions, labels, row["label"])


def _field(row: Mapping[str, Any], field: str, want: str) -> Any:
    if row.get(field) is None:
        got = "null" if field in row else "no such field"
        raise ValueError(f"{field}: want {want}, got {got}")
    return row[field]


def _list_field(row: Mapping[str, Any], field: str) -> tuple[Any, ...]:
    want = "a list, one entry for each step"
    value = _field(row, field, want)
    if not isinstance(value, (list, tuple)):
        raise _bad(field, want, value)
    return tuple(value)


def _parse_completion(completion: Any) -> str:
    """A text, or that of a conversation's last turn."""
    if isinstance(completion, (list, tuple)):
        messages = _parse_messages(completion)
        _check_messages(messages, "completion")
        if [message["role"] for message in messages] != ["assistant"]:
            raise _bad("completion", "one message with role assistant", completion)
        return messages[0]["content"]
    _check_text("completion", completion)
    return completion


def _parse_prompt(prompt: Any) -> Prompt:
    return _parse_messages(prompt) if isinstance(prompt, (list, tuple)) else prompt


def _parse_messages(messages: Sequence[Any]) -> tuple[Any, ...]:
    # A datasets.Dataset fills keys that only other messages have with None.
    return tuple(
        {key: value for key, value in message.items() if value is not None}
        if isinstance(message, Mapping)
        else message
        for message in messages
    )


def read_jsonl(path: FilePath) -> list[StepKTOExample]:
    """Read a UTF-8 file with one JSON object a line; blank lines are skipped.

    Raises:
        ValueError: a line is no JSON object or breaks the format; names file, line and field.
        OSError: the file cannot be read.
    """
    examples = []
    # In binary mode only "\n" ends a line: JSON strings may hold other line separators.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                where = f"{os.fspath(path)}, line {number}"
                examples.append(parse_row(_parse_json(line, where), where))
    return examples


def _parse_json(line: bytes, where: str) -> Any:
    try:
        text = line.rstrip(b"\r\n").decode()
        return json.loads(text, object_pairs_hook=_unique_fields)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} is not UTF-8"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{where}: want a JSON object on one line, but {reason}")


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the field {name!r} is given twice")
    return fields


def read_dataset(dataset: Iterable[Mapping[str, Any]]) -> list[StepKTOExample]:
    """Read a datasets.Dataset, or any other iterable of rows.

    Raises:
        ValueError: a row breaks the format (names row index and field), or this is no iterable of
            rows, as for a DatasetDict, of which one split is wanted.
    """
    if isinstance(dataset, Mapping):
        raise _bad("dataset", "rows, as in one split of a DatasetDict", list(dataset))
    if not isinstance(dataset, Iterable) or isinstance(dataset, (str, bytes)):
        raise _bad("dataset", "an iterable of rows", dataset)
    return [parse_row(row, f"row {index}") for index, row in enumerate(dataset)]


def read_examples(source: FilePath | Iterable[Mapping[str, Any]]) -> list[StepKTOExample]:
    """Read a JSON-lines file by its path, or a dataset; errors as read_jsonl and read_dataset."""
    if isinstance(source, (str, os.PathLike)):
        return read_jsonl(source)
    return read_dataset(source)


def write_jsonl(path: FilePath, examples: Iterable[StepKTOExample]) -> None:
    """Write examples so that read_jsonl gives them back, replacing the file in one step.

    The file is complete or unchanged, also if the process dies or `examples` raises half-way.

    Raises:
        ValueError: something in `examples` is no StepKTOExample; names its index.
        OSError: the file cannot be written.
    """
    with (
        files.replacing(Path(path)) as temporary,
        open(temporary, "w", encoding="utf-8", newline="\n") as file,
    ):
        for index, example in enumerate(examples):
            if not isinstance(example, StepKTOExample):
                raise _bad(f"examples[{index}]", "a StepKTOExample", example)
            file.write(json.dumps(_row(example), ensure_ascii=False) + "\n")


def _row(example: StepKTOExample) -> dict[str, Any]:
    if not example.has_steps:
        completion = example.completions[0]
        return {"prompt": example.prompt, "completion": completion, "label": example.label}
    return {
        "prompt": example.prompt,
        "completions": example.completions,
        "labels": example.labels,
        "label": example.label,
    }


@dataclass(frozen=True)
class EncodedExample:
    """An example as tokens. L tokens, K steps.

    Args:
        input_ids: L token ids, prompt first.
        completion_start: index of the first completion token, in [0, L].
        step_ids: for each of the L tokens its step in [0, K), or -1: in no step. The prompt's
            tokens and an EOS that ends the sequence are in no step.
        outcome_label: 1 right, 0 wrong, -1 unlabelled.
        step_labels: the same for each of the K steps.
        ref_logps: log-prob of each completion token under the reference model, nats; None where
            they are not known.
        row: number in the dataset it was taken from, for messages; not compared.
    Raises:
        ValueError: the fields do not fit together.
    """

    input_ids: list[int]
    completion_start: int
    step_ids: list[int]
    outcome_label: int
    step_labels: list[int]
    ref_logps: list[float] | None = None
    row: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        length, steps = len(self.input_ids), len(self.step_labels)
        if not 0 <= self.completion_start <= length:
            raise _bad("completion_start", f"an index in [0, L = {length}]", self.completion_start)
        if len(self.step_ids) != length:
            raise _bad("step_ids", f"L = {length} entries", self.step_ids)
        if self.step_ids and not NO_STEP <= min(self.step_ids) <= max(self.step_ids) < steps:
            raise _bad("step_ids", f"entries in [-1, K = {steps})", self.step_ids)
        if any(step != NO_STEP for step in self.step_ids[: self.completion_start]):
            raise _bad("step_ids", "-1 for every prompt token", self.step_ids)
        codes = tuple(LABEL_CODES.values())
        if self.outcome_label not in codes:
            raise _bad("outcome_label", "1, 0 or -1", self.outcome_label)
        if any(label not in codes for label in self.step_labels):
            raise _bad("step_labels", "1, 0 or -1 for each step", self.step_labels)
        completion = length - self.completion_start
        if self.ref_logps is not None and len(self.ref_logps) != completion:
            raise _bad("ref_logps", f"{completion} numbers or None", self.ref_logps)


def encode_example(
    example: StepKTOExample,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    step_separator: str = "",
    add_eos: bool = True,
) -> EncodedExample:
    """Tokenize prompt and completion as one text, and find the step of every token.

    The joined text is tokenized once, so that step boundaries never change the tokens. A token
    that straddles a boundary belongs to the piece (prompt or step) in which it starts, and a
    separator to the step that it follows. Whitespace that a token begins with does not count:
    " word" belongs to the step of "word" even where the space ends the step before, or the prompt.
    Byte-level tokenizers would otherwise give a step's first word to its predecessor, and whether
    they do would depend on whether their offsets include the space. A token of whitespace alone
    starts at its first character.

    An EOS at the very end, whether the text, the tokenizer or `add_eos` put it there, is a
    completion token in no step; special tokens that the tokenizer puts in front of the text are
    prompt tokens. A conversational prompt goes through the chat template, with the generation
    prompt, and then no special tokens are added by the tokenizer.

    Args:
        example: what to encode.
        tokenizer: a fast tokenizer of transformers, with a chat template for messages.
        max_length: most tokens to keep. The end of the completion is cut off, its EOS first. A step
            of which tokens were cut off is unlabelled, as its verdict is on the whole step; the
            outcome label stays.
        step_separator: text between steps.
        add_eos: append the tokenizer's EOS token unless the completion ends with it already. False
            appends none; one that the tokenizer itself adds stays.
    Returns:
        EncodedExample. A step without tokens is unlabelled.
    Raises:
        ValueError: the tokenizer is slow, or has no chat template or EOS token where one is needed;
            the chat template refuses the messages; prompt or completion has no tokens; the prompt
            leaves no room within max_length; an argument has another type.
    """
    _check_encode_arguments(example, tokenizer, max_length, step_separator, add_eos)
    prompt = prompt_text(example.prompt, tokenizer)
    text = prompt + step_separator.join(example.completions)
    encoding = tokenizer(
        text,
        add_special_tokens=isinstance(example.prompt, str),
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,  # nothing is fed to a model yet: no warning about its maximum length
    )
    input_ids = list(encoding["input_ids"])
    starts = [0, *_piece_starts(len(prompt), example.completions, step_separator)]
    pieces = _token_pieces(
        text, encoding["offset_mapping"], encoding["special_tokens_mask"], starts
    )
    completion_start = bisect_right(pieces, 0)
    ends_with_eos = len(input_ids) > completion_start and input_ids[-1] == tokenizer.eos_token_id
    if ends_with_eos:
        pieces[-1] = len(starts)
    elif add_eos:
        input_ids.append(tokenizer.eos_token_id)
        pieces.append(len(starts))
    _check_lengths(completion_start, len(input_ids), max_length)

    in_step = range(1, len(starts)) if example.has_steps else ()
    step_ids = [piece - 1 if piece in in_step else NO_STEP for piece in pieces]
    kept = step_ids[:max_length]
    whole, left = Counter(step_ids), Counter(kept)
    return EncodedExample(
        input_ids=input_ids[:max_length],
        completion_start=completion_start,
        step_ids=kept,
        outcome_label=LABEL_CODES[example.label],
        step_labels=[
            LABEL_CODES[label] if 0 < whole[step] == left[step] else UNLABELLED
            for step, label in enumerate(example.labels)
        ],
    )


def _check_encode_arguments(
    example: object, tokenizer: Any, max_length: object, step_separator: object, add_eos: object
) -> None:
    if not isinstance(example, StepKTOExample):
        raise _bad("example", "a StepKTOExample", example)
    if not getattr(tokenizer, "is_fast", False):
        # Only fast tokenizers know which characters a token stands for.
        name = type(tokenizer).__name__
        raise ValueError(f"tokenizer: want a fast tokenizer of transformers, got {name}")
    valid = isinstance(max_length, int) and not isinstance(max_length, bool) and max_length > 0
    if max_length is not None and not valid:
        raise _bad("max_length", "a positive int or None", max_length)
    _check_text("step_separator", step_separator)
    if not isinstance(add_eos, bool):
        raise _bad("add_eos", "True or False", add_eos)
    if add_eos and tokenizer.eos_token_id is None:
        raise ValueError("add_eos: want a tokenizer with an EOS token, got one without")


def _check_lengths(completion_start: int, length: int, max_length: int | None) -> None:
    if completion_start == 0:
        raise ValueError(
            "prompt: want at least one token, for the first completion token to be predicted from, "
            "got none"
        )
    if completion_start == length:
        raise ValueError("completions: want at least one token, got none")
    if max_length is not None and completion_start >= max_length:
        raise ValueError(
            f"max_length: want room for a completion after the prompt's {completion_start} tokens, "
            f"got {max_length}"
        )


def prompt_text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as text: messages go through the chat template, with the generation prompt.

    Raises:
        ValueError: there is no template for messages, or it refuses them.
    """
    if isinstance(prompt, str):
        return prompt
    if not tokenizer.chat_template:
        raise ValueError("prompt: want a string, as the tokenizer has no template, got messages")
    try:
        return str(
            tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        )
    except Exception as error:  # templates raise errors of jinja2, which is not imported here
        raise ValueError(f"prompt: want messages for the chat template, but {error}") from error


def _piece_starts(start: int, completions: Sequence[str], separator: str) -> list[int]:
    """Character offset at which each completion starts."""
    starts = []
    for completion in completions:
        starts.append(start)
        start += len(completion) + len(separator)
    return starts


def _token_pieces(
    text: str, offsets: Sequence[tuple[int, int]], special: Sequence[int], starts: Sequence[int]
) -> list[int]:
    """Piece of each token, never decreasing: that in which it starts, see encode_example.

    Args:
        text: what was tokenized.
        offsets: characters [begin, end) of each token.
        special: 1 for tokens that the tokenizer added to the text; their offsets mean nothing.
        starts: first character of each piece, starts[0] = 0 for the prompt. Of empty pieces and
            the one after them, which start together, the last one gets the tokens.
    Returns:
        For each token an index into starts, or len(starts) for special tokens after the text.
    """
    text_tokens = len(special)
    while text_tokens and special[text_tokens - 1]:
        text_tokens -= 1
    pieces = []
    piece = previous_end = 0
    for (begin, end), is_special in zip(offsets[:text_tokens], special, strict=False):
        if not is_special:
            if begin == end:
                # Offsets that leave out leading spaces leave nothing of a token of spaces.
                begin = min(previous_end, begin)
            token = text[begin:end]
            word = token.lstrip()
            first = begin + len(token) - len(word) if word else begin
            piece = max(piece, bisect_right(starts, first) - 1)
            previous_end = end
        pieces.append(piece)
    return pieces + [len(starts)] * (len(offsets) - text_tokens)
