"""A task with exact outcome and step labels: word problems in arithmetic modulo 7.

    A clock with 7 hours shows 3. First, it moves forward 4 hours. Second, it rises to 5 if it
    shows less. What does it show?

    Step 1: 3 + 4 = 0
    Step 2: 0 max 5 = 5
    Answer: 5

`max` and `min` forget what was before them, so a solution with a wrong step can still end in the
right answer: the error that Step-KTO is about. This file has the problems, an annotator who writes
solutions with systematic mistakes (to train the first model on), a tokenizer and the checkers. The
checkers look at a solution's text only, take any text and never evaluate any of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepkto_kernels import checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODULUS = 7
OPERANDS = range(2, MODULUS)
NUM_OPERATIONS = (4, 5)  # a problem has one of these numbers of operations

_APPLY: dict[str, Callable[[int, int], int]] = {
    "+": lambda value, operand: (value + operand) % MODULUS,
    "-": lambda value, operand: (value - operand) % MODULUS,
    "max": max,
    "min": min,
}
_SYMBOL_WEIGHTS = {"+": 0.35, "-": 0.35, "max": 0.15, "min": 0.15}

_ORDINALS = ("First,", "Second,", "Third,", "Fourth,", "Fifth,")


@dataclass(frozen=True)
class _Setting:
    """One world: its opening sentence ({start}), phrases by operation ({n}), and its question."""

    opening: str
    phrases: dict[str, tuple[str, ...]]
    question: str


_CLOCK = _Setting(
    opening="A clock with 7 hours shows {start}.",
    phrases={
        "+": ("it moves forward {n} hours.", "it runs on {n} hours."),
        "-": ("it moves back {n} hours.", "it falls back {n} hours."),
        "max": ("if still below {n}, it is set to that.", "it rises to {n} if it shows less."),
        "min": ("if still above {n}, it is set to that.", "it drops to {n} if it shows more."),
    },
    question="What does it show?",
)
_TRAM = _Setting(
    opening="A tram line is a ring of 7 stops and the tram is at stop {start}.",
    phrases={
        "+": ("it moves forward {n} stops.", "it rolls on {n} stops."),
        "-": ("it moves back {n} stops.", "it rolls back {n} stops."),
        "max": ("if still below {n}, it goes there.", "it climbs to {n} if it is lower."),
        "min": ("if still above {n}, it goes there.", "it drops to {n} if it is higher."),
    },
    question="At which stop is it?",
)
_PLAYER = _Setting(
    opening="{name} is on tile {start} of a ring of 7 tiles.",
    phrases={
        "+": ("{name} moves forward {n} tiles.", "{name} walks on {n} tiles."),
        "-": ("{name} moves back {n} tiles.", "{name} falls back {n} tiles."),
        "max": ("if still below {n}, {name} goes there.", "{name} climbs to {n} if lower."),
        "min": ("if still above {n}, {name} goes there.", "{name} drops to {n} if higher."),
    },
    question="On which tile is {name}?",
)
_SETTINGS = (_CLOCK, _TRAM, _PLAYER)
_NAMES = ("Ada", "Ben", "Mia", "Tom")


@dataclass(frozen=True)
class Operation:
    """One operation of a problem: `symbol` is "+", "-", "max" or "min"; `operand` is 2 to 6."""

    symbol: str
    operand: int

    def __post_init__(self) -> None:
        checks.choice("symbol", self.symbol, tuple(_APPLY))
        checks.require(self.operand in OPERANDS, "operand", "an int from 2 to 6", self.operand)

    def apply(self, value: int) -> int:
        """The operation's exact result on `value` (0 to 6), again 0 to 6."""
        return _APPLY[self.symbol](value, self.operand)


@dataclass(frozen=True)
class Problem:
    """A word problem and what its solutions are checked against.

    `text` is the prompt and ends in a newline; `start` and the gold `answer` are 0 to 6.
    """

    text: str
    start: int
    operations: tuple[Operation, ...]
    answer: int


def make_problem(rng: random.Random) -> Problem:
    """Draw a problem with 4 or 5 operations; the same generator state gives the same problem."""
    start = rng.randrange(MODULUS)
    symbols = rng.choices(
        list(_SYMBOL_WEIGHTS), list(_SYMBOL_WEIGHTS.values()), k=rng.choice(NUM_OPERATIONS)
    )
    operations = tuple(Operation(symbol, rng.choice(OPERANDS)) for symbol in symbols)
    answer = start
    for operation in operations:
        answer = operation.apply(answer)
    return Problem(_word_problem(start, operations, rng), start, operations, answer)


def _word_problem(start: int, operations: tuple[Operation, ...], rng: random.Random) -> str:
    setting, name = rng.choice(_SETTINGS), rng.choice(_NAMES)
    sentences = [setting.opening]
    for ordinal, operation in zip(_ORDINALS, operations, strict=False):
        phrase = rng.choice(setting.phrases[operation.symbol])
        sentences.append(f"{ordinal} {phrase}".replace("{n}", str(operation.operand)))
    sentences.append(setting.question)
    text = " ".join(sentences) + "\n"
    return text.replace("{name}", name).replace("{start}", str(start))


def format_step(number: int, value: int, operation: Operation, result: int) -> str:
    """A step's line, with its newline: `Step 1: 3 + 4 = 0`."""
    return f"Step {number}: {value} {operation.symbol} {operation.operand} = {result}\n"


class SloppyAnnotator:
    """Writes solutions with systematic mistakes, for a first model that has some to unlearn.

    A fact is one (operation, value) pair: 35 for each of the 4 symbols. For each symbol, 12 facts
    have a fixed wrong result each, which is written with a probability between 0.3 and 0.9 (spread
    evenly over the 12); any other result is random with probability 0.02. A solution goes on from
    what was written, right or wrong.

    Args:
        rng: draws the mistakes, once.
    """

    WRONG_FACTS = 12  # of the 35 of each symbol
    SLIP = 0.02

    def __init__(self, rng: random.Random) -> None:
        self._mistakes: dict[tuple[Operation, int], tuple[int, float]] = {}
        for symbol in _APPLY:
            facts = [(Operation(symbol, n), value) for n in OPERANDS for value in range(MODULUS)]
            for i, (operation, value) in enumerate(rng.sample(facts, self.WRONG_FACTS)):
                others = [r for r in range(MODULUS) if r != operation.apply(value)]
                probability = 0.3 + 0.6 * i / (self.WRONG_FACTS - 1)
                self._mistakes[operation, value] = (rng.choice(others), probability)

    def solve(self, problem: Problem, rng: random.Random) -> str:
        """A solution's text, without a newline at its end; `rng` draws which mistakes are made."""
        lines, value = [], problem.start
        for number, operation in enumerate(problem.operations, start=1):
            result = self._result(operation, value, rng)
            lines.append(format_step(number, value, operation, result))
            value = result
        return "".join(lines) + f"Answer: {value}"

    def _result(self, operation: Operation, value: int, rng: random.Random) -> int:
        wrong, probability = self._mistakes.get((operation, value), (0, 0.0))
        if rng.random() < probability:
            return wrong
        if rng.random() < self.SLIP:
            return rng.randrange(MODULUS)
        return operation.apply(value)


# [0-9], not \d, which takes digits of every script. Anchored by fullmatch.
_STEP = re.compile(r"Step ([1-9]): ([0-6]) (\+|-|max|min) ([2-6]) = ([0-6])\n?")
_ANSWER = re.compile(r"Answer: ([0-6])\n?")
_ANSWER_PREFIX = "Answer:"


def split_lines(solution_text: str) -> tuple[list[str], str]:
    """Cut a solution into its step lines, newlines kept, and the rest from the answer line on.

    Every line before the first that starts with "Answer:" is a step, blank or not; without such a
    line the rest is "". The parts joined are the text.
    """
    lines = re.findall(r"[^\n]*\n|[^\n]+", solution_text)
    cut = next((i for i, line in enumerate(lines) if line.startswith(_ANSWER_PREFIX)), len(lines))
    return lines[:cut], "".join(lines[cut:])


def extract_answer(solution_text: str) -> str | None:
    """The answer as written; None unless the text ends in one line `Answer: <0 to 6>`."""
    match = _ANSWER.fullmatch(split_lines(solution_text)[1])
    return match[1] if match else None


def check_outcome(problem: Problem, solution_text: str) -> bool:
    """Whether the solution's answer is the gold answer, however it was reached."""
    return extract_answer(solution_text) == str(problem.answer)


def check_steps(problem: Problem, solution_text: str) -> list[bool]:
    """One verdict for each line before the answer line, in order.

    A step is judged on its own: it is right if its number, operation and operand are the problem's
    for that place, the value it starts from is the one that the line before it wrote, and its
    result is exact for that value. So a step after a wrong one can be right. Malformed lines and
    lines beyond the problem's last operation are wrong, and so is a step after a malformed line,
    which has no value to start from. A solution that stops early has fewer verdicts than the
    problem has operations.
    """
    verdicts: list[bool] = []
    previous: int | None = problem.start
    for index, line in enumerate(split_lines(solution_text)[0]):
        match = _STEP.fullmatch(line)
        if match is None:
            verdicts.append(False)
            previous = None
            continue
        number, value, result = int(match[1]), int(match[2]), int(match[5])
        written = Operation(match[3], int(match[4]))
        verdicts.append(
            index < len(problem.operations)
            and number == index + 1
            and value == previous
            and written == problem.operations[index]
            and result == written.apply(value)
        )
        previous = result
    return verdicts


# A token is an operation (" + 4"), a newline, a digit ("1:" for a step's number) or a word with its
# punctuation. The space before it belongs to it, so that tokens joined by nothing are the text
# again. With operator and operand as one token a small model learns to look them up in 300 steps
# of training for every seed; as two tokens it sometimes takes 1000.
_TOKEN = r" (?:\+|-|max|min) [0-9]|\n| ?[0-9]:?| ?[^\s0-9]+"
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer for this task; decode(encode(text)) gives problems and solutions back.

    Text outside of the task's words becomes `<unk>`. Needs transformers (pip extra `train`).
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((PAD, EOS, UNK, *_vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK
    )


def _vocabulary() -> list[str]:
    """Every token that problems and solutions can contain, sorted."""
    tokens: set[str] = set()
    for text in _every_text():
        tokens.update(re.findall(_TOKEN, text))
    return sorted(tokens)


def _every_text() -> Iterator[str]:
    """Texts that hold every token in each of its forms (with and without a space before it)."""
    for setting in _SETTINGS:
        sentences = [setting.opening, setting.question]
        for phrases in setting.phrases.values():
            sentences += [f"{ordinal} {phrase}" for ordinal in _ORDINALS for phrase in phrases]
        for sentence in sentences:
            for name in _NAMES:
                for n in range(MODULUS):
                    filled = sentence.replace("{name}", name)
                    filled = filled.replace("{start}", str(n)).replace("{n}", str(n))
                    yield filled  # the first sentence of a text
                    yield f" {filled}\n"
    for number in range(1, max(NUM_OPERATIONS) + 1):
        for symbol in _APPLY:
            for operand in OPERANDS:
                for n in range(MODULUS):
                    yield format_step(number, n, Operation(symbol, operand), n) + f"Answer: {n}"
