"""Process reward for the arithmetic task: the exact checker, on problems that are text only."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stepkto_kernels import checks
from stepkto_kernels.training.rewards import arithmetic
from stepkto_kernels.training.rewards.base import Label, Solution


def read_problem(text: str) -> arithmetic.Problem:
    """The problem that `arithmetic.make_problem` wrote as this text.

    Raises:
        ValueError: it is no problem of that task.
    """
    for setting in arithmetic._SETTINGS:
        problem = _read_in(setting, text)
        if problem is not None:
            return problem
    raise ValueError(f"problem: want a word problem of the arithmetic task, got {text[:80]!r}")


def _read_in(setting: arithmetic._Setting, text: str) -> arithmetic.Problem | None:
    opening = _pattern(setting.opening, "|".join(arithmetic._NAMES)).match(text)
    if opening is None:
        return None
    start, at = int(opening["start"]), opening.end()
    name = opening.groupdict().get("name", "")
    operations: list[arithmetic.Operation] = []
    for ordinal in arithmetic._ORDINALS:
        found = _read_phrase(setting, name, text, at, f" {ordinal} ")
        if found is None:
            break
        operation, at = found
        operations.append(operation)
    if not operations or text[at:].strip() != setting.question.replace("{name}", name):
        return None
    answer = start
    for operation in operations:
        answer = operation.apply(answer)
    return arithmetic.Problem(text, start, tuple(operations), answer)


def _read_phrase(
    setting: arithmetic._Setting, name: str, text: str, at: int, before: str
) -> tuple[arithmetic.Operation, int] | None:
    for symbol, phrases in setting.phrases.items():
        for phrase in phrases:
            match = _pattern(before + phrase, name).match(text, at)
            if match is not None:
                return arithmetic.Operation(symbol, int(match["n"])), match.end()
    return None


def _pattern(template: str, names: str) -> re.Pattern[str]:
    """A regular expression for a sentence of a setting, with these names in it."""
    pattern = re.escape(template).replace(r"\{start\}", "(?P<start>[0-6])")
    pattern = pattern.replace(r"\{n\}", "(?P<n>[2-6])")
    return re.compile(pattern.replace(r"\{name\}", f"(?P<name>{names})"))


def _problem_of(solution: Solution) -> arithmetic.Problem:
    try:
        return read_problem(solution.problem.problem)
    except ValueError as error:
        raise ValueError(f"problem {solution.problem.id!r}: {error}") from None


class ArithmeticSteps:
    """Exact verdicts: those of `arithmetic.check_steps`, brought to the steps as they were cut.

    A step of several lines is right where all of them are; one without text is unlabelled. Lines
    from an answer line on that more steps follow are wrong.

    Raises:
        ValueError: when called: a problem is none of the arithmetic task; names its id.
    """

    def __call__(self, solutions: Sequence[Solution]) -> list[list[Label]]:
        return [self._judge(solution) for solution in solutions]

    def missing_steps(self, solution: Solution) -> int:
        """Operations of the problem for which no line was written, >= 0."""
        lines = arithmetic.split_lines(solution.text)[0]
        return max(0, len(_problem_of(solution).operations) - len(lines))

    def _judge(self, solution: Solution) -> list[Label]:
        problem = _problem_of(solution)
        lines = arithmetic.split_lines(solution.text)[0]
        verdicts = arithmetic.check_steps(problem, solution.text)
        spans, at = [], 0
        for line, verdict in zip(lines, verdicts, strict=True):
            spans.append((at, at + len(line), verdict))
            at += len(line)
        if at < len(solution.text):
            spans.append((at, len(solution.text), False))
        labels: list[Label] = []
        start = 0
        for step in solution.steps:
            end = start + len(step)
            own = [verdict for a, b, verdict in spans if a < end and start < b]
            labels.append(all(own) if step else None)
            start = end
        checks.require(start == len(solution.text), "steps", "all of the text", start)
        return labels
