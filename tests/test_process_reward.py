"""Process rewards: the exact checker, reward models and rollouts, against a second computation."""

import random

import pytest
import torch

from stepkto_kernels.training.records import Problem
from stepkto_kernels.training.rewards import arithmetic
from stepkto_kernels.training.rewards.arithmetic_steps import ArithmeticSteps, read_problem
from stepkto_kernels.training.rewards.base import Solution, judge_steps
from stepkto_kernels.training.rewards.rollouts import MonteCarlo

PROBLEM = Problem("p", "w1 w2", "4")


def solution(*steps: str) -> Solution:
    return Solution(PROBLEM, steps)


# ---- the exact checker ------------------------------------------------------------------------


def test_every_problem_is_read_back():
    rng = random.Random(0)
    for _ in range(1000):
        problem = arithmetic.make_problem(rng)
        assert read_problem(problem.text) == problem


def test_checker_says_what_check_steps_says():
    rng = random.Random(1)
    annotator = arithmetic.SloppyAnnotator(rng)
    solutions, wanted = [], []
    for i in range(300):
        problem = arithmetic.make_problem(rng)
        text = annotator.solve(problem, rng)
        steps = tuple(arithmetic.split_lines(text)[0])
        solutions.append(Solution(Problem(str(i), problem.text, str(problem.answer)), steps))
        wanted.append(arithmetic.check_steps(problem, text))
    assert judge_steps(ArithmeticSteps(), solutions) == wanted
    assert {True, False} == {label for labels in wanted for label in labels}


def test_checker_of_steps_that_are_not_lines():
    rng = random.Random(2)
    problem = arithmetic.make_problem(rng)
    rng = random.Random(2)
    lines, value = [], problem.start
    for number, operation in enumerate(problem.operations, start=1):
        result = operation.apply(value)
        lines.append(arithmetic.format_step(number, value, operation, result))
        value = result
    judge = lambda *steps: ArithmeticSteps()(
        [Solution(Problem("p", problem.text, ""), tuple(steps))]
    )[0]
    assert judge(*lines) == [True] * len(lines)
    assert judge(lines[0] + lines[1], *lines[2:]) == [True] * (len(lines) - 1)
    assert judge(lines[0], "so\n" + lines[1])[1] is False
    assert judge(lines[0], "") == [True, None]
    for kept in range(len(lines) + 1):
        part = Solution(Problem("p", problem.text, ""), tuple(lines[:kept]))
        assert ArithmeticSteps().missing_steps(part) == len(lines) - kept
    assert ArithmeticSteps().missing_steps(Solution(part.problem, tuple(lines * 2))) == 0
    assert judge(lines[0], f"Answer: {value}\n", lines[1]) == [True, False, False]
    assert judge() == []


@pytest.mark.parametrize("text", ["", "What is 2 + 2?", "A clock with 7 hours shows 9."])
def test_checker_refuses_other_problems(text):
    with pytest.raises(ValueError, match="problem 'x': problem: want a word problem"):
        ArithmeticSteps()([Solution(Problem("x", text, ""), ("a",))])


# ---- reward models ----------------------------------------------------------------------------

SEPARATOR = "<extra_0>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + ' ' + m['content'] + '<|end|>' }}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def prm_tokenizer():
    """Bytes as tokens, as Qwen's tokenizer falls back to; special tokens in a chat."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        pad_token="<pad>",
        additional_special_tokens=["<|start|>", "<|end|>", SEPARATOR],
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def prm_model(prm_tokenizer):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(prm_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        num_labels=2,
        initializer_range=0.5,
    )
    return transformers.Qwen2ForTokenClassification(config).eval()


STEPS = ("Step 1: a = 3\n", "Step 2: é = 4\n\n", "  Step 3: so 12")
BATCH = [solution(*STEPS), solution("one\n"), solution(), solution("x\n", "y" * 90), PROBLEM]
BATCH[-1] = Solution(Problem("q", "Another, longer problem", ""), STEPS[::-1])


def probability(model, ids: list[int]) -> float:
    """That the last token is of class "right", of a row by itself."""
    with torch.no_grad():
        wrong, right = model(input_ids=torch.tensor([ids])).logits[0, -1].double().tolist()
    return 1 / (1 + torch.tensor(wrong - right, dtype=torch.float64).exp().item())


def trl_rows(tokenizer, each: Solution) -> list[list[int]]:
    """Ids up to each separator: bos, prompt, then step and separator, as PRMTrainer joins them."""
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False)
    row, rows = [tokenizer.bos_token_id, *ids(each.problem.problem)], []
    for step in each.steps:
        row = row + ids(step.strip()) + ids("\n")
        rows.append(row)
    return rows


def qwen_rows(tokenizer, each: Solution) -> list[list[int]]:
    """The conversation written out by hand, cut behind each separator."""
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    text = f"<|start|>system {system}<|end|><|start|>user {each.problem.problem}<|end|>"
    text += "<|start|>assistant "
    rows = []
    for step in each.steps:
        text += step.strip() + SEPARATOR
        rows.append(tokenizer.encode(text, add_special_tokens=False))
    return rows


@pytest.mark.parametrize("layout", ["trl", "qwen"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_are_those_of_the_model_at_each_separator(
    layout, batch_size, prm_model, prm_tokenizer
):
    from stepkto_kernels.training.rewards import prm

    reward = prm.ProcessRewardModel(
        prm_model, prm_tokenizer, prm.LAYOUTS[layout], batch_size=batch_size
    )
    rows = {"trl": trl_rows, "qwen": qwen_rows}[layout]
    wanted = [[probability(prm_model, row) for row in rows(prm_tokenizer, s)] for s in BATCH]
    found = reward.scores(BATCH)
    assert [len(each) for each in found] == [len(each.steps) for each in BATCH]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert len({round(p, 3) for each in wanted for p in each}) > 5  # not all the same


def test_labels_by_threshold(prm_model, prm_tokenizer):
    from stepkto_kernels.training.rewards import prm

    make = lambda t: prm.ProcessRewardModel(prm_model, prm_tokenizer, prm.TRLLayout(), threshold=t)
    scores = make(0.5).scores(BATCH)
    middle = sorted(p for each in scores for p in each)[4]
    for threshold in (0.0, middle, 1.0):
        wanted = [[p >= threshold for p in each] for each in scores]
        assert judge_steps(make(threshold), BATCH) == wanted


def test_what_has_no_score_has_no_verdict(prm_model, prm_tokenizer):
    from stepkto_kernels.training.rewards import prm

    row = trl_rows(prm_tokenizer, BATCH[0])
    reward = prm.ProcessRewardModel(
        prm_model, prm_tokenizer, prm.TRLLayout(), max_length=len(row[1])
    )
    whole = prm.ProcessRewardModel(prm_model, prm_tokenizer, prm.TRLLayout())
    assert reward.scores(BATCH[:1])[0][:2] == pytest.approx(whole.scores(BATCH[:1])[0][:2])
    assert reward.scores(BATCH[:1])[0][2] is None
    assert reward(BATCH[:1])[0][2] is None and reward.missing == 1

    hostile = prm.ProcessRewardModel(prm_model, prm_tokenizer, prm.QwenLayout())
    assert hostile([solution("a", f"b{SEPARATOR}c"), solution("a")])[0] == [None, None]
    assert hostile.missing == 2

    broken = prm.ProcessRewardModel(prm_model, prm_tokenizer, prm.TRLLayout())
    broken._forward = lambda rows: torch.full((len(rows), max(map(len, rows))), torch.nan)
    assert broken([solution("a", "b")]) == [[None, None]]


def test_checkpoint_of_a_token_classifier(prm_model, prm_tokenizer, tmp_path):
    from stepkto_kernels.training.rewards import prm

    prm_model.save_pretrained(tmp_path)
    prm_tokenizer.save_pretrained(tmp_path)
    for layout in prm.LAYOUTS:
        loaded = prm.load_prm(str(tmp_path), layout)
        kept = prm.ProcessRewardModel(prm_model, prm_tokenizer, prm.LAYOUTS[layout])
        assert loaded.scores(BATCH) == kept.scores(BATCH)


def test_no_head_is_made_up(prm_model, prm_tokenizer, tmp_path):
    from stepkto_kernels.training.rewards import prm

    prm_model.model.save_pretrained(tmp_path)  # without the head
    prm_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="want all weights of it, got none for .*score"):
        prm.load_prm(str(tmp_path), "trl")
    with pytest.raises(ValueError, match="layout: want one of 'trl', 'qwen'"):
        prm.load_prm(str(tmp_path), "other")


QWEN_CODE = """
import torch
from transformers import Qwen2Config, Qwen2Model, Qwen2PreTrainedModel


class RewardModel(Qwen2PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = Qwen2Model(config)
        width = config.hidden_size
        self.score = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 2)
        )
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **unused):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return (self.score(hidden),)
"""


def test_code_of_a_checkpoint_runs_only_when_asked(prm_model, prm_tokenizer, tmp_path, monkeypatch):
    """A checkpoint as Qwen2.5-Math-PRM's: two-layer head, AutoModel in its own file."""
    from stepkto_kernels.training.rewards import prm

    space: dict = {}
    exec(QWEN_CODE, space)  # ours, see above
    torch.manual_seed(3)
    model = space["RewardModel"](prm_model.config).eval()
    model.config.auto_map = {"AutoModel": "modeling_prm.RewardModel"}
    folder = tmp_path / "prm"
    model.save_pretrained(folder)
    del prm_model.config.auto_map
    prm_tokenizer.save_pretrained(folder)
    marker = tmp_path / "ran"
    (folder / "modeling_prm.py").write_text(QWEN_CODE + f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="want all weights"):
        prm.load_prm(str(folder), "qwen")
    assert not marker.exists()
    reward = prm.load_prm(str(folder), "qwen", trust_remote_code=True)
    assert marker.exists()
    with torch.no_grad():
        wanted = [
            model(input_ids=torch.tensor([row]))[0][0, -1].softmax(-1)[1].item()
            for row in qwen_rows(prm_tokenizer, BATCH[0])
        ]
    assert reward.scores(BATCH[:1])[0] == pytest.approx(wanted, abs=1e-5)


# ---- rollouts ---------------------------------------------------------------------------------


class Script:
    """A sampler that says, rollout by rollout, what a prefix of k steps is worth."""

    def __init__(self, by_steps: dict[int, str]):
        self.by_steps, self.calls = by_steps, []
        self.drawn: dict[int, int] = {}

    def __call__(self, prefixes, number, drawn):
        assert all(self.drawn.get(len(each.steps), 0) == drawn for each in prefixes)
        self.calls.append(len(prefixes))
        texts = []
        for prefix in prefixes:
            k = len(prefix.steps)
            at = self.drawn.get(k, 0)
            self.drawn[k] = at + number
            texts.append([f"|{c}" for c in self.by_steps[k][at : at + number]])
        return texts


def outcome(problem, completion):
    return {"r": True, "w": False, "?": None}[completion.rpartition("|")[2]]


def test_share_of_right_answers_against_the_threshold():
    steps = ("a", "b", "c", "d", "e")
    script = {1: "rrrrrrrr", 2: "wwwwrrrr", 3: "wwwwwrrr", 4: "wrwrwr??", 5: "wwww???r"}
    whole = MonteCarlo(Script(script), outcome, rollouts=8, threshold=0.5, at_once=8)
    assert judge_steps(whole, [solution(*steps)]) == [[True, True, False, None, None]]
    for at_once in (1, 2, 3, 4):
        sampler = Script(script)
        early = MonteCarlo(sampler, outcome, rollouts=8, threshold=0.5, at_once=at_once)
        assert judge_steps(early, [solution(*steps)]) == [[True, True, False, None, None]]
        assert sampler.drawn[1] < 8 and early.drawn == sum(sampler.drawn.values())
    assert Script(script)([], 1, 0) == []


@pytest.mark.parametrize("threshold", [1e-9, 0.1, 0.3, 0.5, 0.7, 1.0])
def test_early_stop_changes_no_verdict(threshold):
    rng = random.Random(0)
    for _ in range(50):
        script = {1: "".join(rng.choices("rw", k=10))}
        wanted = script[1].count("r") / 10 >= threshold
        for at_once in (1, 3, 10):
            reward = MonteCarlo(
                Script(script), outcome, rollouts=10, threshold=threshold, at_once=at_once
            )
            assert reward([solution("a")]) == [[wanted]]


def test_nothing_is_drawn_behind_an_error_where_asked():
    sampler = Script({1: "r", 2: "w", 3: "r"})
    reward = MonteCarlo(sampler, outcome, rollouts=1, threshold=1.0, stop_at_error=True)
    assert reward([solution("a", "b", "c"), solution()]) == [[True, False, None], []]
    assert sampler.drawn == {1: 1, 2: 1}


def test_sampler_that_gives_another_number():
    with pytest.raises(ValueError, match="sampler: want 4 continuations of each of 1 prefixes"):
        MonteCarlo(lambda prefixes, number, drawn: [["a"]], outcome)([solution("a")])
