"""The reproduction: its checkers, its statistics against known values, resuming, and its page."""

import json
import math
import random
import statistics as stdlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch  # noqa: E402
from reproduction import policy, report, statistics, study  # noqa: E402
from reproduction.task import LETTERS, TASKS, Annotator, Language, Problem  # noqa: E402

TINY = study.Size(problems=6, samples=2, held_out=6, sft_steps=3)


@pytest.fixture(params=list(TASKS))
def language(request):
    return Language(TASKS[request.param])


def right_solution(language: Language, problem: Problem) -> list[int]:
    annotator = Annotator(language, random.Random(0))
    annotator.facts, annotator.entries = {}, {}
    never = random.Random(0)
    never.random = lambda: 0.99  # no slip either
    return annotator.solve(problem, never)


def test_right_solutions_are_right(language):
    rng = random.Random(0)
    for _ in range(300):
        problem = language.draw(rng)
        solution = right_solution(language, problem)
        verdict = language.check(problem, solution)
        assert verdict.correct and verdict.complete and all(verdict.steps)
        assert not verdict.has_step_error(len(problem.operations))
        assert len(solution) <= language.longest
        assert sum(language.split(solution)[0], []) + language.split(solution)[1] == solution


def test_checker_by_hand():
    language = Language(TASKS["chain"])
    problem = Problem(3, (("+", 4), ("max", 5)), -1)
    ids = lambda text: [language.ids[word] for word in text.replace("\n", " \n").split(" ")]
    check = lambda text: language.check(problem, ids(text) + [language.eos])
    good = check(
        "Step 1: 3 +4 = 0\nStep 2: 0 max5 = 5\nAnswer: 5\n".replace("\n", "\n ").strip(" ")
    )
    assert good == type(good)(True, (True, True), language.ids["5"], True)
    slip = check("Step 1: 3 +4 = 1\n Step 2: 1 max5 = 5\n Answer: 5\n")
    assert slip.correct and slip.steps == (False, True) and slip.has_step_error(2)
    jump = check("Step 1: 3 +4 = 0\n Step 2: 1 max5 = 5\n Answer: 5\n")
    assert jump.steps == (True, False)  # does not go on from what the step before it wrote
    short = check("Step 1: 3 +4 = 0\n Answer: 5\n")
    assert short.correct and not short.complete and short.has_step_error(2)
    broken = check("Step 1: 3 +4 0\n Step 2: 0 max5 = 5\n Answer: 5\n")
    assert broken.steps == (False, False)
    assert check("Step 1: 3 +4 = 0\n").answer == -1
    assert language.check(problem, []).steps == ()
    endless = language.check(problem, ids("Answer: 5"))
    assert not endless.correct  # cut off before its end


def test_any_ids_are_judged(language):
    rng = random.Random(1)
    for _ in range(2000):
        ids = [rng.randrange(len(language.words)) for _ in range(rng.randrange(45))]
        verdict = language.check(language.draw(rng), ids)
        assert not (verdict.complete and verdict.answer < 0)


def test_letters_of_a_key_differ():
    table = Language(TASKS["coded"]).table
    for key in range(TASKS["coded"].keys):
        letters = [table[key, third] for third in range(3)]
        assert len(set(letters)) == 3 and set(letters) <= set(LETTERS)


def test_annotator_has_the_errors_that_the_task_names(language):
    task, rng = language.task, random.Random(0)
    annotator = Annotator(language, rng)
    facts = len(task._operands()) * task.modulus * 4
    assert len(annotator.facts) == pytest.approx(task.wrong_facts * facts, abs=2)
    for (symbol, n, value), (wrong, belief) in annotator.facts.items():
        assert wrong != language.result(value, symbol, n) and 0.3 <= belief <= 0.9
        assert not task.near or abs(wrong - language.result(value, symbol, n)) == 1


# Statistics


@pytest.mark.parametrize(
    "t, freedom, p",
    # Student's t at the usual quantiles, to the digits of the tables
    [(2.262157, 9, 0.05), (3.249836, 9, 0.01), (4.780913, 9, 0.001), (1.0, 1, 0.5), (0.0, 5, 1.0)],
)
def test_t_probability(t, freedom, p):
    assert statistics.t_probability(t, freedom) == pytest.approx(p, rel=1e-5)
    if 0 < p < 0.5:
        assert statistics.t_quantile(freedom, 1 - p) == pytest.approx(t, rel=1e-5)


def test_t_probability_of_many_is_normal():
    normal = 2 * (1 - stdlib.NormalDist().cdf(1.96))
    assert statistics.t_probability(1.96, 10**6) == pytest.approx(normal, rel=1e-4)


def test_paired_t_and_interval_by_hand():
    values = [-1.0, -2.0, -3.0]  # mean -2, standard error 1 / sqrt(3)
    t, p = statistics.paired_t(values)
    assert t == pytest.approx(-2 * math.sqrt(3))
    # two degrees of freedom: p = 1 - |t| / sqrt(2 + t^2)
    assert p == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t))
    mean, low, high = statistics.mean_interval(values)
    assert mean == -2 and high - mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert low + high == pytest.approx(2 * mean)


def test_sign_flip_counts_every_case():
    assert statistics.sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    assert statistics.sign_flip([1.0, -1.0]) == 1.0
    assert statistics.sign_flip([0.1] * 10) == 2 / 1024


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_matched_difference():
    slow = [(0.5, 0.30), (0.6, 0.20), (0.7, 0.10)]
    fast = [(0.5, 0.30), (0.8, 0.15)]  # at 0.7: 0.30 - 0.15 * 2 / 3
    assert statistics.matched_difference(fast, slow) == pytest.approx(0.20 - 0.10)
    assert statistics.matched_difference(slow, fast) == pytest.approx(-0.10)
    assert statistics.matched_difference(slow, slow) == 0
    assert statistics.matched_difference([(0.9, 0.1)], slow) is None


# The study


def test_sampling_keeps_to_the_model(language):
    """Greedy ids are those of the whole sequence again; samples have the model's frequencies."""
    torch.manual_seed(0)
    model = policy.new_model(len(language.words)).eval()
    rng = random.Random(0)
    problems = [language.draw(rng) for _ in range(5)]
    for (solution,) in policy.sample(model, language, problems, 1, 0, 0.0):
        ids = torch.tensor([[*solution.prompt, *solution.ids]])
        best = model(input_ids=ids).logits[0, len(solution.prompt) - 1 : -1].argmax(-1)
        assert best.tolist() == list(solution.ids)
    (group,) = policy.sample(model, language, problems[:1], 4000, 0)
    firsts = torch.tensor([s.ids[0] for s in group]).bincount(minlength=len(language.words))
    chances = model(input_ids=torch.tensor([group[0].prompt])).logits[0, -1].softmax(-1)
    error = (firsts / 4000 - chances).abs()
    assert (error <= 5 * (chances * (1 - chances) / 4000).sqrt() + 1e-3).all()


def test_training_lowers_the_loss_of_each_method(language):
    torch.manual_seed(0)
    model = policy.first_model(language, 0, 30)
    start = {name: p.clone() for name, p in model.state_dict().items()}
    rng = random.Random(0)
    problems = [language.draw(rng) for _ in range(16)]
    right = [right_solution(language, problem) for problem in problems]
    solutions = []
    for problem, ids in zip(problems, right, strict=True):
        others = [token for token in range(len(language.words)) if token not in (ids[-3], 0)]
        for last in (ids, [*ids[:-3], others[-1], *ids[-2:]]):
            prompt, verdict = tuple(language.prompt(problem)), language.check(problem, last)
            solutions.append(policy.Solution(problem, prompt, tuple(last), verdict))
    gain = {}
    for name, method in study.METHODS.items():
        model.load_state_dict(start)
        before = mean_logp(model, solutions)
        for seed in range(4):
            policy.train(model, language, method, solutions, 1e-3, seed)
        gain[name] = [a - b for a, b in zip(mean_logp(model, solutions), before, strict=True)]
    for name, (good, bad) in gain.items():
        assert good > bad, name  # right answers gain on wrong ones
    assert gain["rft"][0] > 0


def mean_logp(model, solutions) -> tuple[float, float]:
    rows = [(s.prompt, s.ids) for s in solutions]
    with torch.no_grad():
        logps = policy.token_logps(model, *policy.shifted(rows)).sum(1)
    clean = torch.tensor([s.verdict.correct and all(s.verdict.steps) for s in solutions])
    return logps[clean].mean().item(), logps[~clean].mean().item()


def test_labels_up_to_the_first_error():
    method = study.CONTROLS["labels up to the first error"]
    assert policy.kept_labels(method, [True, False, True]) == [1, 0]
    assert policy.kept_labels(study.METHODS["step_kto"], [True, False, True]) == [1, 0, 1]


def test_a_run_is_the_same_again_and_goes_on(tmp_path, capsys):
    runs = [study.Run("coded", name, 1e-3, 0) for name in study.METHODS]
    rows = study.execute(runs[:2], tmp_path, TINY, 2)
    rows = study.execute(runs, tmp_path, TINY, 1)  # only the third is done
    assert "1/1" in capsys.readouterr().out
    assert sorted(map(study.key, rows)) == sorted(map(study.key, runs))
    again = study.one_run(runs[1], tmp_path, TINY)
    known = {study.key(row): row for row in rows}[study.key(runs[1])]
    assert json.dumps(again["rounds"]) == json.dumps(known["rounds"])  # as text: NaN is NaN
    with pytest.raises(ValueError, match="want runs of"):
        study.execute(runs, tmp_path, study.Size(), 1)


def fake_rows(task: str) -> list[dict]:
    """Reported runs with errors that Step-KTO has 5 points fewer of."""
    rows = []
    for run in study.reported_runs([task], {(task, m): 1e-4 for m in study.METHODS}):
        lower = 0.05 if run.method == "step_kto" else 0.0
        rounds = [
            dict.fromkeys(report.SHOWN, 0.6 + 0.1 * number)
            | {"errors": 0.3 - 0.02 * number - lower * (number > 0) + 0.001 * run.seed * number}
            for number in range(study.ROUNDS + 1)
        ]
        row = {"task": run.task, "method": run.method, "rate": run.rate, "seed": run.seed}
        rows.append(row | {"rounds": rounds, "seconds": 1.0})
    return rows


def test_report_of_known_rows(tmp_path):
    rates = {("coded", method): 1e-4 for method in study.METHODS}
    found = report.collect(fake_rows("coded"), rates, TINY)
    (comparison,) = found["comparisons"]
    assert comparison["seeds"] == 10 and found["missing_runs"] == 0
    for each in comparison["rounds"]:
        assert each["errors"]["mean"] == pytest.approx(-0.05)
    assert comparison["matched"]["mean"] == pytest.approx(-0.05)
    page = report.tables(found)
    assert "| coded: errors at matched accuracy" in page["comparisons"] and "-5.0" in str(page)
    report.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_page_has_the_figures_of_the_result():
    found = json.loads((ROOT / "benchmarks/results/reproduction.json").read_text())
    page = (ROOT / "docs/REPRODUCTION.md").read_text()
    for name, table in report.tables(found).items():
        assert f"<!-- begin: {name} -->\n{table}<!-- end: {name} -->" in page, name
