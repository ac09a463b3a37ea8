"""Which labelled solutions are trained on: no doubles, and a balance that a seed decides."""

from collections import Counter

import pytest

from stepkto_kernels.training.selection import balance, deduplicate


def row(problem, sample, label, text=None):
    text = f"{problem} {sample}" if text is None else text
    pieces = [text[:3], text[3:]]
    return {"problem_id": problem, "sample": sample, "completions": pieces, "label": label}


def rows_of(counts):
    """By problem so many right, wrong and unlabelled ones, mixed."""
    found = []
    for name, (right, wrong, unknown) in counts.items():
        labels = [True] * right + [False] * wrong + [None] * unknown
        labels = labels[1::2] + labels[::2]
        found += [row(name, k, label) for k, label in enumerate(labels)]
    return found


def counts_of(rows):
    found = Counter((each["problem_id"], each["label"]) for each in rows)
    names = dict.fromkeys(each["problem_id"] for each in rows)
    return {name: (found[name, True], found[name, False]) for name in names}


def test_doubles_differ_in_whitespace_only():
    rows = [
        row("a", 0, True, "1 + 1 = 2\nAnswer: 2"),
        row("a", 1, False, " 1 +  1 = 2\n\nAnswer:\t2 \n"),
        row("b", 0, True, "1 + 1 = 2\nAnswer: 2"),
        row("a", 2, True, "1+1 = 2\nAnswer: 2"),
        row("a", 3, True, ""),
        row("a", 4, True, " \n"),
    ]
    assert deduplicate(rows) == [rows[0], rows[2], rows[3], rows[4]]
    assert deduplicate([]) == []


COUNTS = {
    "even": (5, 5, 2),
    "few": (1, 7, 0),
    "right": (6, 0, 0),
    "wrong": (0, 6, 0),
    "no": (0, 0, 3),
}


@pytest.mark.parametrize(
    "most, fill, expected",
    [
        (4, False, {"even": (2, 2), "few": (1, 1)}),
        (5, False, {"even": (2, 2), "few": (1, 1)}),
        (99, False, {"even": (5, 5), "few": (1, 1)}),
        (4, True, {"even": (2, 2), "few": (1, 3), "right": (4, 0), "wrong": (0, 4)}),
        (5, True, {"even": (3, 2), "few": (1, 4), "right": (5, 0), "wrong": (0, 5)}),
        (1, True, {"even": (1, 0), "few": (1, 0), "right": (1, 0), "wrong": (0, 1)}),
        (99, True, {"even": (5, 5), "few": (1, 7), "right": (6, 0), "wrong": (0, 6)}),
    ],
)
def test_how_many_of_each(most, fill, expected):
    rows = rows_of(COUNTS)
    chosen = balance(rows, most, seed=0, fill=fill)
    assert counts_of(chosen) == expected
    places = [rows.index(each) for each in chosen]
    assert places == sorted(set(places))


def test_the_seed_and_the_problem_decide():
    rows = rows_of({"a": (9, 9, 0), "b": (9, 9, 0)})
    chosen = balance(rows, 4, seed=0)
    assert balance(rows, 4, seed=0) == chosen
    assert balance(rows, 4, seed=1) != chosen
    of = lambda rows, name: [each["sample"] for each in rows if each["problem_id"] == name]
    alone = balance([each for each in rows if each["problem_id"] == "b"], 4, seed=0)
    assert of(alone, "b") == of(chosen, "b") != of(chosen, "a")


def test_every_solution_is_chosen_as_often():
    rows = rows_of({"a": (4, 4, 0)})
    seen = Counter(each["sample"] for s in range(800) for each in balance(rows, 4, seed=s))
    assert len(seen) == 8 and all(320 < number < 480 for number in seen.values())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"per_problem": 0, "fill": True}, "per_problem: want an int >= 1, got 0"),
        ({"per_problem": 1}, "per_problem: want an int >= 2, got 1"),
        ({"per_problem": 4, "seed": -1}, "seed: want an int >= 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        balance([], **({"seed": 0} | options))
