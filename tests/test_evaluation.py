"""Metrics of judged rows: against the counts of evaluate.py, brute force, and known coverage."""

import json
import math
import random
from itertools import combinations

import pytest

np = pytest.importorskip("numpy")

from stepkto_kernels.training import bootstrap  # noqa: E402
from stepkto_kernels.training.bootstrap import ratio_estimates  # noqa: E402
from stepkto_kernels.training.evaluate import Evaluation  # noqa: E402
from stepkto_kernels.training.evaluation import (  # noqa: E402
    as_json,
    estimates,
    group,
    pass_at_k,
    powers_of_two,
    verdicts,
)
from stepkto_kernels.training.evaluation_files import equality  # noqa: E402


def row(problem, answer, label, steps=(), sample=0, **more):
    pieces = [f"Step {i + 1}: so\n" for i in range(len(steps))]
    pieces.append("no idea" if answer is None else f"Answer: {answer}")
    labels = [*steps, None]
    return {
        **{"problem_id": problem, "sample": sample, "prompt": "?"},
        **{"completions": pieces, "labels": labels, "label": label},
        **more,
    }


def random_rows(seed, problems=30, samples=8):
    draw = random.Random(seed)
    rows = []
    for i in range(problems):
        for k in range(samples):
            answer = draw.choice(["5", "4", "3", None])
            steps = draw.choices([True, False, None], [4, 1, 1], k=draw.randrange(5))
            missing = draw.choice([0, 0, 0, 1])
            rows.append(row(f"p{i}", answer, answer == "5", steps, k, missing_steps=missing))
    return rows


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(1000, 500, 999) == 1.0


@pytest.mark.parametrize("arguments", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses(arguments):
    with pytest.raises(ValueError, match="want"):
        pass_at_k(*arguments)


def test_values_are_those_of_evaluate():
    greedy, sampled = random_rows(0, samples=1), random_rows(1)
    found = estimates(greedy, sampled, resamples=10)
    by_problem = group(sampled)
    wanted = Evaluation(
        greedy_solutions=[],
        greedy=[verdicts([each])[0] for each in greedy],
        sampled_solutions=[],
        sampled=[verdicts(rows) for rows in by_problem.values()],
    ).metrics()
    assert wanted.keys() <= found.keys()
    for name, value in wanted.items():
        assert found[name].value == pytest.approx(value), name
    right = [sum(r["label"] for r in rows) for rows in by_problem.values()]
    for k in (2, 4, 8):
        mean = sum(pass_at_k(8, c, k) for c in right) / len(right)
        assert found[f"pass@{k}"].value == pytest.approx(mean)
    assert found["pass@8"].value == pytest.approx(sum(c > 0 for c in right) / len(right))


def test_powers_of_two():
    assert [powers_of_two(k) for k in (1, 2, 3, 4, 6)] == [[], [2], [2, 3], [2, 4], [2, 4, 6]]


def test_an_outcome_without_a_verdict_is_not_right_and_a_step_without_one_does_not_count():
    rows = [row("p", "5", None, [True, None, True])]
    found = estimates(rows, rows, resamples=10)
    assert found["pass@1"].value == 0 and found["step_accuracy"].value == 1
    assert math.isnan(found["step_errors_in_correct"].value)
    assert as_json(found)["step_errors_in_correct"] == dict.fromkeys(("value", "low", "high"))
    json.dumps(as_json(found), allow_nan=False)


def test_without_step_labels_there_are_no_step_metrics():
    rows = [row("p", "5", True, [None, None])]
    assert not [name for name in estimates(rows, rows, resamples=5) if "step" in name]


def test_answers_are_classes():
    rows = [
        row("p", "1/2", True),
        row("p", "0.5", True, sample=1),  # the outcome reward says that it is the same
        row("p", "$4$", False, sample=2),
        row("p", "4.0", False, sample=3),
        row("p", "right", False, sample=4),  # no answer can be taken for the right one
        row("p", None, False, sample=5),
    ]
    names = [verdict.answer for verdict in verdicts(rows)]
    assert names[0] == names[1] and names[2] == names[3] and names[5] is None
    assert len(set(names)) == 4
    assert estimates(rows[:1], rows[:4] + rows[:1], resamples=5)["maj@5"].value == 1
    halves = [row("p", "3/6", False), row("p", "0.5", False), row("p", "7", False)]
    same = lambda a, b: {a, b} == {"3/6", "0.5"}
    assert [v.answer for v in verdicts(halves, same)] == ["=3/6", "=3/6", "=7"]
    assert [v.answer for v in verdicts(halves)] == ["=3/6", "=0.5", "=7"]


def test_math_verify_tells_answers_from_each_other():
    pytest.importorskip("math_verify")
    with equality("math-verify") as equal:
        assert equal("1/2", "0.5") and equal("x+1", "1+x")
        assert not equal("1/2", "0.6")
        assert not equal("4", "5} \\boxed{4") and not equal("4", "5\nAnswer: 4")
    with equality("text") as equal:
        assert equal is None


@pytest.mark.parametrize(
    "greedy, sampled, said",
    [
        ([row("p", "5", True)], [row("q", "5", True)], "greedy: want the problems"),
        ([row("p", "5", True)] * 2, [row("p", "5", True)], "one row for each problem"),
        (
            [row("p", "5", True), row("q", "5", True)],
            [row("p", "5", True), row("p", "5", True), row("q", "5", True)],
            "as many rows",
        ),
    ],
)
def test_rows_that_do_not_fit(greedy, sampled, said):
    with pytest.raises(ValueError, match=said):
        estimates(greedy, sampled)


def column(values):
    return np.asarray(values, float)[:, None]


def test_interval_of_a_share_is_the_binomial_one():
    """The bootstrap of a mean of 0s and 1s is a binomial draw divided by P: its quantiles."""
    problems, right = 400, 100
    values = column([1] * right + [0] * (problems - right))
    found = ratio_estimates(values, np.ones_like(values), resamples=20000)[0]
    p = right / problems
    cumulated, low, high = 0.0, None, None
    for k in range(problems + 1):
        log_mass = math.lgamma(problems + 1) - math.lgamma(k + 1) - math.lgamma(problems - k + 1)
        cumulated += math.exp(log_mass + k * math.log(p) + (problems - k) * math.log(1 - p))
        low = k / problems if low is None and cumulated >= 0.025 else low
        high = k / problems if high is None and cumulated >= 0.975 else high
    assert found.value == p
    assert found.low == pytest.approx(low, abs=1.5 / problems)
    assert found.high == pytest.approx(high, abs=1.5 / problems)


def test_coverage_of_a_ratio_of_clusters():
    """The solutions of a problem share its difficulty: the interval has the true share in it about
    95 times of 100, and one that took solutions for independent has not."""
    rng = np.random.default_rng(0)
    runs, problems, covered, naive = 400, 60, 0, 0
    true = 1 / 3  # of Beta(1, 2), whatever the weights that do not depend on it
    for _ in range(runs):
        wholes = rng.integers(1, 9, problems)
        parts = rng.binomial(wholes, rng.beta(1, 2, problems))
        found = ratio_estimates(column(parts), column(wholes), resamples=400)[0]
        covered += found.low <= true <= found.high
        half = 1.96 * math.sqrt(found.value * (1 - found.value) / wholes.sum())
        naive += abs(found.value - true) <= half
    assert 0.905 < covered / runs < 0.975
    assert naive / runs < 0.85


def test_draws_are_seeded_and_the_same_in_any_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    wholes = rng.integers(0, 9, (20, 3))
    parts = rng.binomial(wholes, 0.4)
    first = ratio_estimates(parts, wholes, resamples=300)
    assert ratio_estimates(parts, wholes, resamples=300) == first
    assert ratio_estimates(parts, wholes, resamples=300, seed=1) != first
    monkeypatch.setattr(bootstrap, "AT_ONCE", 7 * 20)
    assert ratio_estimates(parts, wholes, resamples=300) == first


def test_draws_in_which_a_share_is_of_nothing_are_left_out():
    parts, wholes = column([1, 0, 0]), column([2, 0, 0])
    found = ratio_estimates(parts, wholes, resamples=200)[0]
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    for empty in (ratio_estimates(column([0]), column([0]))[0], ratio_estimates(*EMPTY)[0]):
        assert all(math.isnan(x) for x in (empty.value, empty.low, empty.high))


EMPTY = (np.zeros((0, 1)), np.zeros((0, 1)))


@pytest.mark.parametrize(
    "options, said",
    [({"resamples": 0}, "resamples"), ({"level": 1.0}, "level"), ({"level": 0}, "level")],
)
def test_bootstrap_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        ratio_estimates(column([1]), column([1]), **options)
    with pytest.raises(ValueError, match="wholes: want shape"):
        ratio_estimates(column([1]), column([1, 2]))
