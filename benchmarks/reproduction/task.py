"""Two synthetic tasks with exact labels, as token ids: problems, a sloppy annotator, checkers.

    chain                                   coded
    start 3 1: +4 2: max5                   start 3 1: +4 2: max5 key k2
    Step 1: 3 +4 = 0                        Step 1: 3 +4 = 7
    Step 2: 0 max5 = 5                      Step 2: 7 max5 = 7
    Answer: 5                               Answer: d

In `chain` the last result is the answer, so right steps imply a right answer. In `coded` the answer
is a letter that the key and the third (0-2, 3-5, 6-8) of the last result decide, by a table. A step
that is off by one mostly leaves the third as it is: right answers with wrong steps are common, and
an outcome says little about steps. No step label covers the table: only outcomes can mend that.

The annotator, on whose solutions the first model learns, has fixed wrong results for some facts
(operation, operand, value), each with a probability of its own, and in `coded` for some entries of
the table. So the first model has systematic errors. The chain goes on from what was written.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

OPERATIONS: dict[str, Callable[[int, int, int], int]] = {
    "+": lambda value, operand, modulus: (value + operand) % modulus,
    "-": lambda value, operand, modulus: (value - operand) % modulus,
    "max": lambda value, operand, modulus: max(value, operand),
    "min": lambda value, operand, modulus: min(value, operand),
}
LENGTHS = (4, 5)  # operations of a problem
LETTERS = "abcdef"
THIRD = 3  # values that share a letter
SLIP = 0.02  # probability of a random wrong result where the annotator knows the fact
BELIEF = (0.3, 0.9)  # the probabilities of the annotator's wrong results are spread over this
TABLE_SEED = "letters of the coded task"  # the table is part of the task, not of a seed


@dataclass(frozen=True)
class Task:
    """A task: see the module.

    Args:
        name: "chain" or "coded".
        modulus: values are 0 to modulus - 1.
        operands: of every operation, the first and the last.
        weights: how often each of OPERATIONS is drawn.
        wrong_facts: share of the facts of each operation that the annotator has wrong.
        near: wrong results differ by one from the right one, instead of being any.
        keys: number of keys; 0: the value is the answer.
        wrong_entries: share of the table's entries that the annotator has wrong.
    """

    name: str
    modulus: int
    operands: tuple[int, int]
    weights: tuple[float, float, float, float]
    wrong_facts: float
    near: bool = False
    keys: int = 0
    wrong_entries: float = 0.0

    def tokens(self) -> list[str]:
        """The vocabulary; the id of a token is its place."""
        words = ["<eos>", "\n", "start", "Step", "Answer:", "=", "key"]
        words += [f"{i}:" for i in range(1, max(LENGTHS) + 1)]
        words += [str(value) for value in range(self.modulus)]
        words += [f"{symbol}{n}" for symbol in OPERATIONS for n in self._operands()]
        if self.keys:
            words += [f"k{i}" for i in range(1, self.keys + 1)] + list(LETTERS)
        return words

    def _operands(self) -> range:
        return range(self.operands[0], self.operands[1] + 1)

    def table(self) -> dict[tuple[int, int], str]:
        """The letter of (key, third); the letters of a key differ."""
        rng = random.Random(TABLE_SEED)
        thirds = range(-(-self.modulus // THIRD))
        return {
            (key, third): letter
            for key in range(self.keys)
            for third, letter in zip(thirds, rng.sample(LETTERS, len(thirds)), strict=True)
        }


CHAIN = Task("chain", 7, (2, 6), (0.35, 0.35, 0.15, 0.15), wrong_facts=0.35)
CODED = Task(
    "coded", 9, (2, 7), (0.3, 0.3, 0.2, 0.2), wrong_facts=0.15, near=True, keys=6, wrong_entries=0.4
)
TASKS = {task.name: task for task in (CHAIN, CODED)}


@dataclass(frozen=True)
class Problem:
    """A problem; `key` is -1 where the task has none."""

    start: int
    operations: tuple[tuple[str, int], ...]
    key: int


@dataclass(frozen=True)
class Verdict:
    """What is right in a solution.

    Args:
        correct: the answer, however it was reached.
        steps: each line before the answer.
        answer: its token id, -1 where the solution has none.
        complete: all steps, the answer and the end of sequence are there, each in its form.
    """

    correct: bool
    steps: tuple[bool, ...]
    answer: int
    complete: bool

    def has_step_error(self, wanted: int) -> bool:
        """Whether a step is wrong or one of `wanted` is missing."""
        return len(self.steps) < wanted or not all(self.steps)


class Language:
    """Texts of a task as token ids, and their checker."""

    def __init__(self, task: Task):
        self.task, self.words = task, task.tokens()
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.eos, self.newline, self.answer = 0, self.ids["\n"], self.ids["Answer:"]
        self.table = task.table()
        self.longest = 7 * max(LENGTHS) + 4  # tokens of a solution: steps, answer, newline, end

    def draw(self, rng: random.Random) -> Problem:
        task = self.task
        symbols = rng.choices(list(OPERATIONS), task.weights, k=rng.choice(LENGTHS))
        operations = tuple((symbol, rng.randint(*task.operands)) for symbol in symbols)
        key = rng.randrange(task.keys) if task.keys else -1
        return Problem(rng.randrange(task.modulus), operations, key)

    def prompt(self, problem: Problem) -> list[int]:
        words = ["start", str(problem.start)]
        for i, (symbol, n) in enumerate(problem.operations, start=1):
            words += [f"{i}:", f"{symbol}{n}"]
        if problem.key >= 0:
            words += ["key", f"k{problem.key + 1}"]
        return [self.ids[word] for word in (*words, "\n")]

    def result(self, value: int, symbol: str, operand: int) -> int:
        return OPERATIONS[symbol](value, operand, self.task.modulus)

    def answer_of(self, value: int, key: int) -> str:
        return self.table[key, value // THIRD] if key >= 0 else str(value)

    def gold(self, problem: Problem) -> str:
        value = problem.start
        for symbol, n in problem.operations:
            value = self.result(value, symbol, n)
        return self.answer_of(value, problem.key)

    def step(self, number: int, value: int, symbol: str, operand: int, result: int) -> list[int]:
        """Ids of one line, the newline included."""
        words = ("Step", f"{number}:", str(value), f"{symbol}{operand}", "=", str(result), "\n")
        return [self.ids[word] for word in words]

    def ending(self, answer: str) -> list[int]:
        return [self.answer, self.ids[answer], self.newline, self.eos]

    def split(self, solution: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """Lines before the answer, their newlines kept, and the rest from the answer on."""
        lines: list[list[int]] = []
        line: list[int] = []
        for at, token in enumerate(solution):
            if not line and token in (self.answer, self.eos):
                return lines, list(solution[at:])
            line.append(token)
            if token == self.newline:
                lines.append(line)
                line = []
        return (lines + [line] if line else lines), []

    def check(self, problem: Problem, solution: Sequence[int]) -> Verdict:
        """Judge a solution, any ids at all.

        A step is judged by itself: it has to begin with the value that the step before it wrote, so
        a step after a wrong one can be right, and one after a line that is no step cannot.
        """
        lines, ending = self.split(solution)
        steps: list[bool] = []
        value: int | None = problem.start
        for i, line in enumerate(lines):
            known = i < len(problem.operations) and value is not None
            steps.append(known and line == self._right_step(i, value, problem))
            written = self.words[line[5]] if len(line) == 7 else ""
            value = int(written) if written.isdigit() else None
        answer = ending[1] if len(ending) > 1 and ending[0] == self.answer else -1
        correct = answer == self.ids[self.gold(problem)]
        ends = answer >= 0 and ending[2:] == [self.newline, self.eos]
        complete = ends and len(steps) == len(problem.operations)
        return Verdict(correct and ends, tuple(steps), answer, complete)

    def _right_step(self, i: int, value: int | None, problem: Problem) -> list[int]:
        assert value is not None
        symbol, n = problem.operations[i]
        return self.step(i + 1, value, symbol, n, self.result(value, symbol, n))

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids).replace("\n ", "\n")


class Annotator:
    """Writes solutions with systematic errors; which facts are wrong is drawn from `rng`."""

    def __init__(self, language: Language, rng: random.Random):
        self.language, task = language, language.task
        self.facts: dict[tuple[str, int, int], tuple[int, float]] = {}
        for symbol in OPERATIONS:
            every = [(symbol, n, v) for n in task._operands() for v in range(task.modulus)]
            wrong = rng.sample(every, round(task.wrong_facts * len(every)))
            for fact, belief in zip(wrong, _spread(len(wrong)), strict=True):
                self.facts[fact] = self._wrong_result(fact, rng), belief
        entries = list(language.table)
        wrong_entries = rng.sample(entries, round(task.wrong_entries * len(entries)))
        self.entries: dict[tuple[int, int], tuple[str, float]] = {}
        for entry, belief in zip(wrong_entries, _spread(len(wrong_entries)), strict=True):
            others = [letter for letter in LETTERS if letter != language.table[entry]]
            self.entries[entry] = rng.choice(others), belief

    def _wrong_result(self, fact: tuple[str, int, int], rng: random.Random) -> int:
        symbol, n, value = fact
        modulus, right = self.language.task.modulus, self.language.result(value, symbol, n)
        if self.language.task.near:
            return rng.choice([r for r in (right - 1, right + 1) if 0 <= r < modulus])
        return rng.choice([r for r in range(modulus) if r != right])

    def solve(self, problem: Problem, rng: random.Random) -> list[int]:
        """Token ids of a solution, the end of sequence included."""
        language, value, ids = self.language, problem.start, []
        for i, (symbol, n) in enumerate(problem.operations, start=1):
            result = language.result(value, symbol, n)
            wrong, belief = self.facts.get((symbol, n, value), (-1, 0.0))
            if rng.random() < belief:
                result = wrong
            elif rng.random() < SLIP:
                result = self._wrong_result((symbol, n, value), rng)
            ids += language.step(i, value, symbol, n, result)
            value = result
        answer = language.answer_of(value, problem.key)
        letter, belief = self.entries.get((problem.key, value // THIRD), (answer, 0.0))
        return ids + language.ending(letter if rng.random() < belief else answer)


def _spread(number: int) -> list[float]:
    low, high = BELIEF
    return [low + (high - low) * (i + 0.5) / number for i in range(number)]
