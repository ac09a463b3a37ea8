"""Metrics of verdicts against counts by hand, and the function that samples and judges."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from stepkto_kernels.training.evaluate import (
    Evaluation,
    Verdict,
    accuracy,
    evaluate,
    majority_accuracy,
    majority_answer,
    step_accuracy,
    step_errors_in_correct,
)


def answers(*given: str | None, gold: str = "5") -> list[Verdict]:
    return [Verdict(correct=answer == gold, answer=answer) for answer in given]


def test_accuracy():
    assert accuracy(answers("5", "4", None, "5")) == 0.5
    assert math.isnan(accuracy([]))


@pytest.mark.parametrize(
    "given, winner",
    [
        (["1", "2", "2"], "2"),
        (["1", "2", "2", "1"], "1"),  # a tie goes to the first to occur
        (["2", "1", "1", "2"], "2"),
        (["3"], "3"),
        ([None, None, "4"], "4"),  # no answer is no vote
        ([None, None], None),
        ([], None),
    ],
)
def test_majority_answer(given, winner):
    assert majority_answer(answers(*given)) == winner


def test_majority_accuracy():
    sampled = [
        answers("5", "5", "4"),  # right
        answers("4", "5", "4"),  # wrong
        answers("5", "4"),  # a tie, first to occur is right
        answers("4", "5"),  # a tie, first to occur is wrong
        answers(None, None),  # no answer at all
    ]
    assert majority_accuracy(sampled) == 2 / 5
    assert math.isnan(majority_accuracy([]))


def test_majority_accuracy_against_brute_force():
    rng = random.Random(0)
    right = 0
    sampled = [answers(*rng.choices(["5", "4", "3", None], k=7)) for _ in range(200)]
    for verdicts in sampled:
        given = [v.answer for v in verdicts if v.answer is not None]
        best = max(Counter(given).values(), default=0)
        winner = next((a for a in given if given.count(a) == best), None)
        right += winner == "5"
    assert majority_accuracy(sampled) == right / 200


def test_step_errors_in_correct():
    verdicts = [
        Verdict(True, "5", (True, True)),
        Verdict(True, "5", (True, False)),  # a wrong step
        Verdict(True, "5", (True,), missing_steps=1),  # a missing one
        Verdict(True, "5", ()),  # none wanted, none wrong
        Verdict(False, "4", (False, False)),  # wrong answers do not count
    ]
    assert step_errors_in_correct(verdicts) == 2 / 4
    assert math.isnan(step_errors_in_correct(verdicts[-1:]))
    assert math.isnan(step_errors_in_correct([]))


def test_step_accuracy():
    verdicts = [Verdict(True, "5", (True, False)), Verdict(False, None, (True,), missing_steps=2)]
    assert step_accuracy(verdicts) == 2 / 5
    assert math.isnan(step_accuracy([Verdict(True, "5")]))


def test_verdict_refuses_negative_counts():
    with pytest.raises(ValueError, match="missing_steps: want >= 0, got -1"):
        Verdict(True, "5", missing_steps=-1)


def judge(problem: int, solution: str) -> Verdict:
    answer = solution or None
    return Verdict(correct=answer == str(problem), answer=answer, steps=(answer == str(problem),))


def test_evaluate_samples_and_judges():
    calls = []

    def sample(problems, number, temperature):
        calls.append((list(problems), number, temperature))
        if temperature == 0:
            return [[str(p)] for p in problems]
        return [["1", "", str(p)] for p in problems]

    result = evaluate([1, 2], sample, judge, num_samples=3, temperature=0.7)
    assert calls == [([1, 2], 1, 0.0), ([1, 2], 3, 0.7)]
    assert result.greedy_solutions == ["1", "2"]
    assert result.sampled_solutions == [["1", "", "1"], ["1", "", "2"]]
    assert result.greedy == [judge(1, "1"), judge(2, "2")]
    assert result.metrics() == {
        "pass@1": 1.0,
        "maj@3": 0.5,
        "sample_accuracy": 0.5,
        "step_errors_in_correct": 0.0,
        "step_errors_in_correct_greedy": 0.0,
        "step_accuracy": 0.5,
        "answered": 4 / 6,
    }


def test_metrics_of_nothing_are_nan():
    assert all(math.isnan(value) for value in Evaluation([], [], [], []).metrics().values())


@pytest.mark.parametrize(
    "options, name", [({"num_samples": 0}, "num_samples"), ({"temperature": 0}, "temperature")]
)
def test_evaluate_refuses_bad_options(options, name):
    with pytest.raises(ValueError, match=f"^{name}: want"):
        evaluate([1], lambda *_: [["1"]], judge, **options)


@pytest.mark.parametrize("solutions", [[], [["1"], ["1"]], [["1", "1"]], [[]]])
def test_evaluate_refuses_another_number_of_solutions(solutions):
    with pytest.raises(ValueError, match="^sample: want 1 solutions of each of 1 problems, got"):
        evaluate([1], lambda *_: solutions, judge, num_samples=1)
