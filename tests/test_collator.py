"""Padding, and KTO's mismatched pairs."""

import random
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stepkto_kernels.segments import StepSegments
from stepkto_kernels.training.collator import StepKTOCollator
from stepkto_kernels.training.data import EncodedExample

PAD = 99
TOKEN_KEYS = ("input_ids", "attention_mask", "completion_mask", "step_ids")
SHORT = EncodedExample([1, 2, 3, 4], 2, [-1, -1, 0, -1], 1, [0])
LONG = EncodedExample([5, 6, 7, 8, 9, 10], 1, [-1, 0, 0, 2, 2, -1], 0, [1, -1, -1])
KTO = EncodedExample([11, 12, 13], 1, [-1, -1, -1], -1, [])


def random_example(rng: random.Random) -> EncodedExample:
    prompt, steps = rng.randint(1, 6), rng.randrange(4)
    step_ids = [step for step in range(steps) for _ in range(rng.randrange(4))]
    length = prompt + len(step_ids) + 1
    return EncodedExample(
        input_ids=[rng.randrange(50) for _ in range(length)],
        completion_start=prompt,
        step_ids=[-1] * prompt + step_ids + [-1],
        outcome_label=rng.choice([1, 0, -1]),
        step_labels=rng.choices([1, 0, -1], k=steps),
    )


def random_examples(seed: int, count: int) -> list[EncodedExample]:
    rng = random.Random(seed)
    return [random_example(rng) for _ in range(count)]


def rows(batch: dict[str, Tensor], prefix: str = "") -> list[tuple[list[int], list[int], int]]:
    """Tokens, step ids and completion start of every row; what is padded is checked and dropped."""
    ids, attention, completion, steps = (batch[prefix + key] for key in TOKEN_KEYS)
    out = []
    for row in range(len(ids)):
        length, scored = int(attention[row].sum()), int(completion[row].sum())
        padding = ids.shape[1] - length
        start = length - scored
        assert attention[row].tolist() == [1] * length + [0] * padding
        assert completion[row].tolist() == [False] * start + [True] * scored + [False] * padding
        assert ids[row, length:].tolist() == [PAD] * padding
        assert steps[row, length:].tolist() == [-1] * padding
        out.append((ids[row, :length].tolist(), steps[row, :length].tolist(), start))
    return out


def test_batch() -> None:
    batch = StepKTOCollator(PAD)([SHORT, LONG, KTO])
    expected = {
        "input_ids": [[1, 2, 3, 4, 99, 99], [5, 6, 7, 8, 9, 10], [11, 12, 13, 99, 99, 99]],
        "attention_mask": [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 1, 0, 0, 0]],
        "completion_mask": [[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]],
        "step_ids": [[-1, -1, 0, -1, -1, -1], [-1, 0, 0, 2, 2, -1], [-1] * 6],
        "outcome_label": [1, 0, -1],
        "step_labels": [[0, -1, -1], [1, -1, -1], [-1, -1, -1]],
        "mismatched_input_ids": [
            [1, 2, 6, 7, 8, 9, 10],
            [5, 12, 13, 99, 99, 99, 99],
            [11, 3, 4, 99, 99, 99, 99],
        ],
        "mismatched_attention_mask": [[1] * 7, [1, 1, 1] + [0] * 4, [1, 1, 1] + [0] * 4],
        "mismatched_completion_mask": [[0, 0, 1, 1, 1, 1, 1], *[[0, 1, 1, 0, 0, 0, 0]] * 2],
        "mismatched_step_ids": [[-1, -1, 0, 0, 2, 2, -1], [-1] * 7, [-1, 0] + [-1] * 5],
    }
    assert list(batch) == list(expected)
    for key, value in expected.items():
        assert batch[key].tolist() == value, key
    for prefix in ("", "mismatched_"):
        assert batch[prefix + "input_ids"].dtype == torch.int64
        assert batch[prefix + "attention_mask"].dtype == torch.int64
        assert batch[prefix + "completion_mask"].dtype == torch.bool
        assert batch[prefix + "step_ids"].dtype == torch.int64
    assert batch["outcome_label"].dtype == torch.int8
    assert batch["step_labels"].dtype == torch.int8


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_random_batches(size: int) -> None:
    for seed in range(30):
        examples = random_examples(seed, size)
        batch = StepKTOCollator(PAD)(examples)
        assert rows(batch) == [(e.input_ids, e.step_ids, e.completion_start) for e in examples]
        assert batch["input_ids"].shape[1] == max(len(e.input_ids) for e in examples)
        assert batch["outcome_label"].tolist() == [e.outcome_label for e in examples]
        most = max(len(e.step_labels) for e in examples)
        assert batch["step_labels"].shape == (size, most)
        for row, example in zip(batch["step_labels"].tolist(), examples, strict=True):
            assert row == example.step_labels + [-1] * (most - len(example.step_labels))
        if size == 1:
            assert not any(key.startswith("mismatched_") for key in batch)
            continue
        for i, (ids, step_ids, start) in enumerate(rows(batch, "mismatched_")):
            prompt, other = examples[i], examples[(i + 1) % size]
            assert start == prompt.completion_start
            assert ids[:start] == prompt.input_ids[:start]
            assert step_ids[:start] == [-1] * start
            assert ids[start:] == other.input_ids[other.completion_start :]
            assert step_ids[start:] == other.step_ids[other.completion_start :]


def test_equal_examples_are_paired() -> None:
    batch = StepKTOCollator(PAD)([SHORT, SHORT])
    for key in TOKEN_KEYS:
        assert torch.equal(batch[f"mismatched_{key}"], batch[key])


def test_batch_without_steps() -> None:
    batch = StepKTOCollator(PAD)([KTO, KTO])
    assert batch["step_labels"].shape == (2, 0)
    assert batch["step_labels"].dtype == torch.int8


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_pad_to_multiple_of(multiple: int) -> None:
    for seed in range(20):
        examples = random_examples(seed, 3)
        plain = StepKTOCollator(PAD)(examples)
        padded = StepKTOCollator(PAD, pad_to_multiple_of=multiple)(examples)
        for prefix in ("", "mismatched_"):
            width, least = (b[f"{prefix}input_ids"].shape[1] for b in (padded, plain))
            assert width % multiple == 0 and least <= width < least + multiple
            assert rows(padded, prefix) == rows(plain, prefix)


def test_mismatched_sequences_are_cut() -> None:
    # Prompt of SHORT with the completion of LONG is 7 tokens, its steps 0, 0, 2, 2 and the end.
    step_ids = {
        7: [-1, -1, 0, 0, 2, 2, -1],
        6: [-1, -1, 0, 0, 2, 2],
        5: [-1, -1, 0, 0, -1],
        4: [-1, -1, 0, 0],
        3: [-1, -1, -1],
    }
    for max_length, expected in step_ids.items():
        batch = StepKTOCollator(PAD, max_length=max_length)([SHORT, LONG])
        ids, steps, start = rows(batch, "mismatched_")[0]
        assert ids == [1, 2, 6, 7, 8, 9, 10][:max_length]
        assert steps == expected
        assert start == 2
        assert rows(batch)[1][0] == LONG.input_ids  # the examples themselves are as they were
    with pytest.raises(ValueError, match="max_length: want more than a prompt's 2 tokens, got 2"):
        StepKTOCollator(PAD, max_length=2)([SHORT, LONG])


def test_fits_the_segment_layout() -> None:
    batch = StepKTOCollator(PAD)(random_examples(5, 6))
    labels = (batch["outcome_label"], batch["step_labels"])
    for prefix, (outcome, steps) in {
        "": labels,
        "mismatched_": tuple(label.roll(-1, 0) for label in labels),
    }.items():
        masks = (batch[prefix + "step_ids"], batch[prefix + "completion_mask"])
        segments = StepSegments.from_padded(*masks, outcome, steps)
        segments.validate()
        scored = (segments.sequence_index >= 0).sum()
        assert scored == batch[prefix + "completion_mask"].sum() > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers: int) -> None:
    examples = random_examples(9, 23)  # batches of 4: the last one has 3
    make = partial(DataLoader, examples, batch_size=4, collate_fn=StepKTOCollator(PAD))
    loader = make(shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(0))
    prompts = {tuple(e.input_ids[: e.completion_start]): e for e in examples}
    seen = []
    for batch in loader:
        matched, mismatched = rows(batch), rows(batch, "mismatched_")
        seen += [ids for ids, _, _ in matched]
        for i, (ids, _, start) in enumerate(mismatched):
            other_ids, _, other_start = matched[(i + 1) % len(matched)]
            assert tuple(ids[:start]) in prompts
            assert ids == matched[i][0][: matched[i][2]] + other_ids[other_start:]
    assert len(loader) == 6
    assert sorted(seen) == sorted(e.input_ids for e in examples)
    assert seen != [e.input_ids for e in examples]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pad_token_id": None}, "pad_token_id: want an int >= 0, got None"),
        ({"pad_token_id": -1}, "pad_token_id: want an int >= 0, got -1"),
        ({"pad_token_id": True}, "pad_token_id: want an int >= 0, got True"),
        ({"pad_token_id": 0, "pad_to_multiple_of": 0}, "pad_to_multiple_of: want an int >= 1"),
        ({"pad_token_id": 0, "pad_to_multiple_of": 8.0}, "pad_to_multiple_of: want .* got 8.0"),
        ({"pad_token_id": 0, "max_length": 0}, "max_length: want an int >= 1, got 0"),
    ],
)
def test_bad_options(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepKTOCollator(**arguments)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "examples: want at least one, got none"),
        ([SHORT, {"input_ids": [1]}], r"examples\[1\]: want an EncodedExample, got dict"),
    ],
)
def test_bad_batch(examples: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepKTOCollator(PAD)(examples)
