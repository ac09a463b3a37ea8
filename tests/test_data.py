"""Rows of the data format, and which tokens belong to which step."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stepkto_kernels.training.data import (
    EncodedExample,
    StepKTOExample,
    encode_example,
    parse_row,
    read_dataset,
    read_examples,
    read_jsonl,
    write_jsonl,
)

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
LINES = [
    "Step 1: we add 2 and 3, so 2 + 3 = 5.\n",
    "Step 2: The answer is 5.\n\n",
    "user a b é Step Step",
]
BYTE_LEVEL = ("bytes", "bytes_trimmed")  # offsets with and without the leading space of "Ġword"
KINDS = (*BYTE_LEVEL, "words", "metaspace")


def make_tokenizer(kind: str, bos: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    """A small tokenizer; `bos` and `eos` say which of the two it adds to a text by itself."""
    special = [BOS, EOS, UNK]
    if kind == "words":  # gives whitespace no token
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=UNK))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        metaspace = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.pre_tokenizer = metaspace if kind == "metaspace" else byte_level
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=special,
            initial_alphabet=[] if kind == "metaspace" else byte_level.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    if kind in BYTE_LEVEL:
        tokenizer.decoder = decoders.ByteLevel()
    template = processors.TemplateProcessing(
        single=f"{BOS} " * bos + "$A" + f" {EOS}" * eos, special_tokens=[(BOS, 0), (EOS, 1)]
    )
    byte_offsets = [processors.ByteLevel(trim_offsets=kind == "bytes_trimmed")]
    tokenizer.post_processor = processors.Sequence(
        [*(byte_offsets if kind in BYTE_LEVEL else []), template]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNK
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


TOKENIZERS = {kind: make_tokenizer(kind) for kind in KINDS}
STEPS = StepKTOExample("2 + 3 = ?\n", ("Step 1: 2 + 3\n", "Step 2: 5\n"), (True, False), True)
KTO = StepKTOExample("2 + 3 = ?\n", ("The answer is 5.",), (), False)
CHAT = StepKTOExample(
    ({"role": "user", "content": "add 2 and 3"},), ("2 + 3 ", "= 5"), (None, True), None
)


# Rows


def test_parse_row() -> None:
    row = {"prompt": "p", "completions": ["a", ""], "labels": [True, None], "label": False, "x": 1}
    assert parse_row(row, "here") == StepKTOExample("p", ("a", ""), (True, None), False)
    messages = [{"role": "user", "content": "é", "name": None}]
    row = {"prompt": messages, "completion": "a", "label": None, "completions": None}
    example = parse_row(row, "here")
    expected = StepKTOExample(({"role": "user", "content": "é"},), ("a",), (), None)
    assert example == expected
    assert not example.has_steps
    row["completion"] = [{"role": "assistant", "content": "a"}]  # TRL's conversational rows
    assert parse_row(row, "here") == expected
    assert STEPS.has_steps


GOOD = {"prompt": "p", "completions": ["a", "b"], "labels": [True, False], "label": True}
GOOD_KTO = {"prompt": "p", "completion": "a", "label": True}
MISSING = object()
# A good row, the fields that break it, and the message.
MALFORMED = [
    (GOOD, {"prompt": MISSING}, "prompt: want a string or a list of messages, got no such field"),
    (GOOD, {"prompt": None}, "prompt: want a string or a list of messages, got null"),
    (GOOD, {"prompt": 3}, r"prompt: want a string or .* message, got 3 \(int\)"),
    (GOOD, {"prompt": {"role": "user", "content": "a"}}, "prompt: want a string"),
    (GOOD, {"prompt": []}, "prompt: want a string or a sequence of at least one message"),
    (GOOD, {"prompt": ["a"]}, r"prompt\[0\]: want a message with the keys role and content"),
    (GOOD, {"prompt": [{"role": "user"}]}, r"prompt\[0\]: want a message with the keys"),
    (GOOD, {"prompt": [{"role": "a", "content": "b", "name": "c"}]}, r"prompt\[0\]: want a mess"),
    (GOOD, {"prompt": [{"role": 1, "content": "a"}]}, r"prompt\[0\]\.role: want a string, got 1"),
    (GOOD, {"prompt": [{"role": "a", "content": ["b"]}]}, r"prompt\[0\]\.content: want a string"),
    (GOOD, {"prompt": "\ud800"}, "prompt: want text without lone surrogates"),
    (GOOD, {"completions": MISSING}, "completions: want a list, .* got no such field"),
    (GOOD, {"completions": None}, "completions: want a list, .* got null"),
    (GOOD, {"completions": "ab"}, r"completions: want a list, .* got 'ab' \(str\)"),
    (GOOD, {"completions": [], "labels": []}, "completions: want .* at least one string"),
    (GOOD, {"completions": ["a", 1]}, r"completions\[1\]: want a string, got 1 \(int\)"),
    (GOOD, {"completions": ["a", None]}, r"completions\[1\]: want a string, got None"),
    (GOOD, {"completions": ["a"]}, "labels: want one label for each of 1 completions, got 2"),
    (GOOD, {"labels": MISSING}, "labels: want a list, .* got no such field"),
    (GOOD, {"labels": None}, "labels: want a list, .* got null"),
    (GOOD, {"labels": True}, "labels: want a list"),
    (GOOD, {"labels": []}, "labels: want one label for each of 2 completions, got 0"),
    (GOOD, {"completions": ["a"], "labels": []}, "labels: want one label for each of 1"),
    (GOOD, {"labels": [True, 1]}, r"labels\[1\]: want true, false or null, got 1 \(int\)"),
    (GOOD, {"labels": [True, "true"]}, r"labels\[1\]: want true, false or null, got 'true'"),
    (GOOD, {"labels": [float("nan"), True]}, r"labels\[0\]: want true, .* got nan \(float\)"),
    (GOOD, {"label": MISSING}, "label: want true, false or null, got no such field"),
    (GOOD, {"label": 0}, r"label: want true, false or null, got 0 \(int\)"),
    (GOOD, {"label": float("nan")}, "label: want true, false or null, got nan"),
    (GOOD, {"label": "yes"}, "label: want true, false or null, got 'yes'"),
    (GOOD, {"completion": "ab"}, "completions: want no such field beside completion"),
    (GOOD_KTO, {"completion": MISSING}, "completions: want a list, .* got no such field"),
    (GOOD_KTO, {"completion": ["a"]}, r"completion\[0\]: want a message with the keys"),
    (GOOD_KTO, {"completion": [{"role": "user", "content": "a"}]}, "completion: want one message"),
    (GOOD_KTO, {"completion": 3}, "completion: want a string, got 3"),
    (GOOD_KTO, {"labels": [True]}, "labels: want no such field beside completion"),
    (GOOD_KTO, {"label": MISSING}, "label: want true, false or null, got no such field"),
]


@pytest.mark.parametrize(("good", "change", "message"), MALFORMED)
def test_malformed_row(good: dict, change: dict, message: str, tmp_path: Path) -> None:
    row = {key: value for key, value in {**good, **change}.items() if value is not MISSING}
    with pytest.raises(ValueError, match=rf"^here: {message}"):
        parse_row(row, "here")
    with pytest.raises(ValueError, match=rf"^row 1: {message}"):
        read_dataset([good, row])
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(good)}\n \n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: {message}"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "p"', "line 2: want a JSON object on one line, but .* at column 15"),
        (b'{"prompt": "\xff"}', "line 2: want a JSON object .*, but byte 13 is not UTF-8"),
        (b'{"a": 1, "label": true, "label": null}', "line 2: .* the field 'label' is given twice"),
        (b"[" * 10**6, "line 2: .* nested too deeply"),
        (b"9" * 10**4, "line 2: want a JSON object"),
        (b"[1, 2]", r"line 2: row: want an object with named fields, got \[1, 2\] \(list\)"),
        (b"null", "line 2: row: want an object with named fields, got None"),
        (b'{"prompt": "p", "completion": "c", "label": NaN}', "line 2: label: .* got nan"),
    ],
)
def test_malformed_line(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=message):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (([{"role": "a", "content": "b"}], ("a",), (True,), True), "prompt: want a string or a"),
        (("p", ["a"], (True,), True), "completions: want a tuple"),
        (("p", ("a",), [True], True), "labels: want a tuple"),
        (("p", ("a", "b"), (), True), "labels: want one label for each of 2 completions, got 0"),
        (("p", ("a",), (1,), True), r"labels\[0\]: want true, false or null, got 1"),
    ],
)
def test_malformed_example(fields: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepKTOExample(*fields)


# Files and datasets


def random_text(rng: random.Random) -> str:
    pieces = ["Step", " 1", ":", " ", "  ", "\n", "\u2028", "\r", "é", "日本", "answer", ".", '"']
    return "".join(rng.choices(pieces, k=rng.randrange(6)))


def random_example(rng: random.Random) -> StepKTOExample:
    labels = (True, False, None)
    steps = rng.randrange(5)
    return StepKTOExample(
        prompt="user " + random_text(rng),
        completions=tuple(random_text(rng) for _ in range(steps)) or ("a" + random_text(rng),),
        labels=tuple(rng.choices(labels, k=steps)),
        label=rng.choice(labels),
    )


def test_jsonl_round_trip(tmp_path: Path) -> None:
    rng = random.Random(0)
    examples = [STEPS, KTO, CHAT, *(random_example(rng) for _ in range(200))]
    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    with open(path) as reader:
        write_jsonl(path, iter(examples))
        assert reader.read() == "old"  # who reads the old file goes on reading it
    assert read_jsonl(path) == examples
    assert read_examples(str(path)) == examples
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes().count(b"\n") == len(examples)
    assert b"\r" not in path.read_bytes()


def test_jsonl_reads_byte_order_mark_and_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n  ")
    assert read_jsonl(path) == [StepKTOExample("p", ("a", "b"), (True, False), True)]
    path.write_bytes(b"")
    assert read_jsonl(path) == []
    with pytest.raises(FileNotFoundError):
        read_jsonl(tmp_path / "none.jsonl")


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [KTO])
    with pytest.raises(ValueError, match=r"examples\[1\]: want a StepKTOExample, got .*\(dict\)"):
        write_jsonl(path, [STEPS, GOOD])
    assert read_jsonl(path) == [KTO]
    assert list(tmp_path.iterdir()) == [path]


def test_dataset(tmp_path: Path) -> None:
    examples = [STEPS, StepKTOExample(STEPS.prompt, ("a",), (None,), None)]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, examples)
    dataset = Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()])
    assert read_examples(dataset) == read_dataset(dataset) == examples
    # Rows of both kinds in one table: what the other kind has is null.
    fields = {"completion": [None, "a"], "completions": [["a", "b"], None]}
    fields |= {"prompt": ["p", "p"], "labels": [[True, None], None], "label": [None, True]}
    mixed = read_dataset(Dataset.from_dict(fields))
    assert [example.has_steps for example in mixed] == [True, False]
    assert mixed[0].labels == (True, None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            DatasetDict(train=Dataset.from_list([GOOD_KTO])),
            r"dataset: .* DatasetDict, got \['train",
        ),
        (3, r"dataset: want an iterable of rows, got 3 \(int\)"),
        (b"rows.jsonl", "dataset: want an iterable of rows, got b'rows.jsonl'"),
        (["train"], "row 0: row: want an object with named fields, got 'train'"),
    ],
)
def test_bad_source(source: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_examples(source)


# Tokens


def owners_by_character(example: StepKTOExample, prompt: str, separator: str) -> list[int]:
    """The step of each character of the joined text, -1 in the prompt; separators go left."""
    owners = [-1] * len(prompt)
    for step, text in enumerate(example.completions):
        last = step == len(example.completions) - 1
        owners += [step] * len(text + separator * (not last))
    return owners


@pytest.mark.parametrize("kind", ["bytes", "words", "metaspace"])
@pytest.mark.parametrize("separator", ["", " ", "\n"])
def test_every_token_is_in_the_step_in_which_it_starts(kind: str, separator: str) -> None:
    tokenizer = TOKENIZERS[kind]
    rng = random.Random(0)
    for _ in range(150):
        example = random_example(rng)
        text = example.prompt + separator.join(example.completions)
        encoding = tokenizer(text, return_offsets_mapping=True)
        encoded = encode_example(example, tokenizer, step_separator=separator)
        assert encoded.input_ids == encoding["input_ids"] + [tokenizer.eos_token_id]

        owners = owners_by_character(example, example.prompt, separator)
        expected = [-1]  # BOS
        for begin, end in encoding["offset_mapping"][1:]:
            inside = [c for c in range(begin, end) if not text[c].isspace()] or [begin]
            expected.append(owners[inside[0]])
        start = next((i for i, owner in enumerate(expected) if owner >= 0), len(expected))
        assert encoded.completion_start == start
        if not example.has_steps:
            expected = [-1] * len(expected)
        assert encoded.step_ids == expected + [-1]
        assert encoded.step_labels == [
            {True: 1, False: 0, None: -1}[label] if step in expected else -1
            for step, label in enumerate(example.labels)
        ]
        assert encoded.outcome_label == {True: 1, False: 0, None: -1}[example.label]


@pytest.mark.parametrize("separator", ["", " ", "  ", "\n"])
def test_steps_do_not_depend_on_spaces_in_offsets(separator: str) -> None:
    rng = random.Random(3)
    for _ in range(150):
        example = random_example(rng)
        whole, trimmed = (
            encode_example(example, TOKENIZERS[kind], step_separator=separator)
            for kind in BYTE_LEVEL
        )
        assert whole == trimmed


def pieces_of(encoded: EncodedExample, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of the tokens of the prompt, of each step and of the rest of the completion."""
    start = encoded.completion_start
    groups = [encoded.input_ids[:start]]
    for wanted in (*range(len(encoded.step_labels)), -1):
        tokens = zip(encoded.input_ids[start:], encoded.step_ids[start:], strict=True)
        groups.append([token for token, step in tokens if step == wanted])
    return [tokenizer.decode(group) for group in groups]


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@pytest.mark.parametrize(
    ("completions", "separator", "pieces"),
    [
        (("Step 1: 2\n", "Step 2: 5\n"), "", ["Step 1: 2\n", "Step 2: 5\n"]),
        (("Step 1: 2", "Step 2: 5"), "\n", ["Step 1: 2\n", "Step 2: 5"]),
        # " Step" is one token: it goes where its word is, wherever the space is.
        (("Step 1:", " Step 2: 5"), "", ["Step 1:", " Step 2: 5"]),
        (("Step 1: ", "Step 2: 5"), "", ["Step 1:", " Step 2: 5"]),
        (("Step 1:", "Step 2: 5"), " ", ["Step 1:", " Step 2: 5"]),
        (("2  ", " \n"), "", ["2  ", " \n"]),
        # "answer" is one token, and starts in the first step.
        (("the ans", "wer is"), "", ["the answer", " is"]),
        (("the ", "answer", "", " is"), "", ["the", " answer", "", " is"]),
        (("the answer", "", "is"), "\n", ["the answer\n", "\n", "is"]),
    ],
)
def test_boundaries(kind: str, completions: tuple, separator: str, pieces: list[str]) -> None:
    example = StepKTOExample("user a\n", completions, (True,) * len(completions), None)
    encoded = encode_example(example, TOKENIZERS[kind], step_separator=separator)
    assert pieces_of(encoded, TOKENIZERS[kind]) == ["<s>user a\n", *pieces, EOS]
    assert encoded.step_labels == [1 if piece else -1 for piece in pieces]


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_word_after_a_prompt_that_ends_with_a_space_is_completion(kind: str) -> None:
    example = StepKTOExample("The answer is ", ("5",), (True,), True)
    encoded = encode_example(example, TOKENIZERS[kind])
    assert pieces_of(encoded, TOKENIZERS[kind]) == ["<s>The answer is", " 5", EOS]
    # A token that starts with a letter of the prompt is the prompt's.
    encoded = encode_example(
        StepKTOExample("The ans", ("wer is",), (True,), True), TOKENIZERS[kind]
    )
    assert pieces_of(encoded, TOKENIZERS[kind]) == ["<s>The answer", " is", EOS]


@pytest.mark.parametrize("kind", KINDS)
def test_kto_row_has_no_steps(kind: str) -> None:
    encoded = encode_example(KTO, TOKENIZERS[kind])
    assert encoded.step_labels == []
    assert set(encoded.step_ids) == {-1}
    as_steps = StepKTOExample(KTO.prompt, KTO.completions, (None,), KTO.label)
    with_steps = encode_example(as_steps, TOKENIZERS[kind])
    assert with_steps.input_ids == encoded.input_ids
    assert with_steps.completion_start == encoded.completion_start
    assert set(with_steps.step_ids) == {-1, 0}
    assert with_steps.step_labels == [-1]


@pytest.mark.parametrize("kind", KINDS)
def test_one_eos_whoever_writes_it(kind: str) -> None:
    written = StepKTOExample(STEPS.prompt, ("Step 1", "Step 2" + EOS), (True, False), True)
    unwritten = StepKTOExample(STEPS.prompt, ("Step 1", "Step 2"), (True, False), True)
    appends = make_tokenizer(kind, eos=True)
    expected = encode_example(unwritten, TOKENIZERS[kind])
    assert expected.input_ids.count(1) == 1 and expected.input_ids[-1] == 1
    assert expected.step_ids[-1] == -1 and expected.step_ids[-2] == 1
    assert encode_example(unwritten, appends) == expected
    assert encode_example(unwritten, appends, add_eos=False) == expected
    assert encode_example(written, TOKENIZERS[kind]) == expected
    bare = encode_example(unwritten, TOKENIZERS[kind], add_eos=False)
    assert bare.input_ids == expected.input_ids[:-1]
    assert bare.step_ids == expected.step_ids[:-1]


def test_other_special_token_at_the_end_is_in_no_step() -> None:
    tokenizer = make_tokenizer("bytes", eos=True)
    tokenizer.eos_token = UNK  # what the tokenizer appends is now another special token
    encoded = encode_example(STEPS, tokenizer)
    expected = encode_example(STEPS, TOKENIZERS["bytes"])
    assert encoded.input_ids == [*expected.input_ids, 2]
    assert encoded.step_ids == [*expected.step_ids, -1]


def test_eos_of_the_prompt_is_not_the_completions() -> None:
    example = StepKTOExample("a" + EOS, ("",), (True,), True)
    encoded = encode_example(example, TOKENIZERS["bytes"])
    assert encoded.input_ids[-2:] == [1, 1]
    assert encoded.completion_start == len(encoded.input_ids) - 1
    assert encoded.step_ids[-1] == -1
    assert encoded.step_labels == [-1]  # the step has no tokens


@pytest.mark.parametrize("kind", KINDS)
def test_chat_template(kind: str) -> None:
    tokenizer = make_tokenizer(kind, eos=True)
    encoded = encode_example(CHAT, tokenizer)
    prompt = "<s>user: add 2 and 3\n<s>assistant: "
    joined = tokenizer(prompt + "2 + 3 = 5", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids == joined + [1]
    same = StepKTOExample(prompt, CHAT.completions, CHAT.labels, CHAT.label)
    assert encode_example(same, make_tokenizer(kind, bos=False)) == encoded
    assert encoded.step_labels == [-1, 1]
    assert encoded.outcome_label == -1


def test_truncation() -> None:
    tokenizer = TOKENIZERS["bytes"]
    whole = encode_example(STEPS, tokenizer)
    length, start = len(whole.input_ids), whole.completion_start
    assert encode_example(STEPS, tokenizer, max_length=length) == whole
    seen = set()
    for max_length in range(start + 1, length):
        cut = encode_example(STEPS, tokenizer, max_length=max_length)
        assert cut.input_ids == whole.input_ids[:max_length]
        assert cut.step_ids == whole.step_ids[:max_length]
        assert cut.completion_start == start
        assert cut.outcome_label == whole.outcome_label
        cut_steps = set(whole.step_ids[max_length:])
        labels = [-1 if step in cut_steps else label for step, label in enumerate((1, 0))]
        assert cut.step_labels == labels
        seen.add(tuple(labels))
    assert seen == {(1, 0), (1, -1), (-1, -1)}  # (1, 0): only the EOS is cut
    for max_length in (start, 1):
        with pytest.raises(ValueError, match=rf"max_length: .* prompt's {start} .* {max_length}$"):
            encode_example(STEPS, tokenizer, max_length=max_length)


def without(name: str, **kwargs: bool) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer("bytes", **kwargs)
    setattr(tokenizer, name, None)
    return tokenizer


class SlowTokenizer:
    is_fast = False
    eos_token_id = 1


NO_PROMPT = StepKTOExample("", ("a",), (True,), True)
NO_COMPLETION = StepKTOExample("a", ("",), (True,), True)
TOOL = StepKTOExample(({"role": "tool", "content": "a"},), ("a",), (True,), True)


@pytest.mark.parametrize(
    ("example", "make", "options", "message"),
    [
        (GOOD, None, {}, r"example: want a StepKTOExample, got .*\(dict\)"),
        (STEPS, SlowTokenizer, {}, "tokenizer: want a fast tokenizer .* got SlowTokenizer"),
        (STEPS, str, {}, "tokenizer: want a fast tokenizer .* got str"),
        (STEPS, lambda: without("eos_token"), {}, "add_eos: want a tokenizer with an EOS token"),
        (STEPS, None, {"max_length": 0}, "max_length: want a positive int or None, got 0"),
        (STEPS, None, {"max_length": 9.0}, "max_length: want a positive int or None, got 9.0"),
        (STEPS, None, {"max_length": True}, "max_length: want a positive int or None, got True"),
        (STEPS, None, {"step_separator": None}, "step_separator: want a string, got None"),
        (STEPS, None, {"add_eos": 1}, "add_eos: want True or False, got 1"),
        (CHAT, lambda: without("chat_template"), {}, "prompt: want a string, .* got messages"),
        (TOOL, None, {}, "prompt: want messages for the chat template, but no tools"),
        (
            NO_PROMPT,
            lambda: make_tokenizer("bytes", bos=False),
            {},
            "prompt: want at least one tok",
        ),
        (NO_COMPLETION, None, {"add_eos": False}, "completions: want at least one token, got none"),
    ],
)
def test_bad_encode_arguments(
    example: object, make: Callable[[], object] | None, options: dict, message: str
) -> None:
    tokenizer = TOKENIZERS["bytes"] if make is None else make()
    with pytest.raises(ValueError, match=message):
        encode_example(example, tokenizer, **options)


def test_empty_prompt_starts_after_bos() -> None:
    example = StepKTOExample("", ("a b",), (True,), True)
    assert encode_example(example, TOKENIZERS["bytes"]).completion_start == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion_start": 4}, r"completion_start: want an index in \[0, L = 3\], got 4"),
        ({"step_ids": [-1, 0]}, "step_ids: want L = 3 entries"),
        ({"step_ids": [-1, 0, 1]}, r"step_ids: want entries in \[-1, K = 1\)"),
        ({"step_ids": [-1, 0, -2]}, r"step_ids: want entries in \[-1, K = 1\)"),
        ({"step_ids": [0, 0, -1]}, "step_ids: want -1 for every prompt token"),
        ({"outcome_label": 2}, "outcome_label: want 1, 0 or -1, got 2"),
        ({"step_labels": [None]}, "step_labels: want 1, 0 or -1 for each step"),
    ],
)
def test_bad_encoded_example(change: dict, message: str) -> None:
    good = {"input_ids": [5, 6, 7], "completion_start": 1, "step_ids": [-1, 0, -1]}
    good |= {"outcome_label": 1, "step_labels": [0]}
    EncodedExample(**good)
    with pytest.raises(ValueError, match=message):
        EncodedExample(**{**good, **change})


def test_importing_needs_neither_transformers_nor_datasets() -> None:
    code = (
        "import sys, stepkto_kernels.training.data, stepkto_kernels.training.steps;"
        "print(sorted({'transformers', 'datasets', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
