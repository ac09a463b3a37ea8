"""Split a model-written solution into reasoning steps, and back.

Splitting only cuts: the steps joined together are the text, byte for byte. It takes time linear in
the length of the text whatever the text is, so that degenerate samples cannot stall a run.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from stepkto_kernels import checks

STYLES = ("auto", "step_prefix", "heading", "line", "paragraph")

# Repeats inside the patterns are bounded, and no two unbounded ones touch: no backtracking blow-up.
_FLAGS = re.IGNORECASE | re.MULTILINE
_HEADING = re.compile(r"^[ \t]*#{1,6}[ \t]{0,4}[*_]{0,3}step[ \t]{0,4}\d{1,4}\b", _FLAGS)
# "Step 1:", "**Step 1:**", "- Step 1.", "Step 1) ", "Step 1" alone; not "Step 1 gave us 5".
_STEP_PREFIX = re.compile(
    r"^[ \t]*(?:[-*+>][ \t]{1,4})?[*_]{0,3}step[ \t]{1,4}\d{1,4}[ \t]{0,4}[*_]{0,3}[ \t]{0,4}"
    r"(?:[:：)\-–—]|\.(?!\d)|\r?$)",
    _FLAGS,
)
# "Answer: 5", "**Final answer:** 5", "The answer is 5", or "## Final Answer" with 5 further down.
_ANSWER = re.compile(
    r"^[ \t]*(?P<head>#{1,6}[ \t]{0,4})?(?P<bold>[*_]{1,3})?"
    r"(?:the[ \t]{1,4})?(?:final[ \t]{1,4})?answer"
    r"(?:[*_]{0,3}[ \t]{0,4}[:：]|[ \t]{1,4}is\b[ \t]{0,4}[:：]?|(?P<title>[*_]{0,3}[ \t\r]*$))"
    r"[*_]{0,3}",
    _FLAGS,
)
_FENCE = re.compile(r"^[ \t]*(?P<ticks>`{3,}|~{3,})(?P<info>.*)$", re.MULTILINE)
# `\\` and `\$` come first, so that `\\[2pt]`, a line break, does not pass for a display's start.
_MATH = re.compile(r"\\[\\$]|\\[\[\]]|\$\$|\\(?:begin|end)\{[A-Za-z]{1,32}\*?\}")
_BRACE = re.compile(r"\\boxed[ \t]{0,4}\{|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True)
class SplitSolution:
    """A solution cut into steps.

    Args:
        steps: substrings of the text, in order; `"".join(steps)` is the text. Blank lines and line
            ends belong to the step they follow, whitespace at the very start to the first step. No
            step is blank unless the whole text is; an empty text has no steps.
        answer: the final answer as written, or None. It is what the last \\boxed{...} with balanced
            braces holds; without one, what follows the last line that begins with "Answer:",
            "Final answer:" or "The answer is" (in any case, bold or as a heading). Surrounding
            whitespace and one period at the end are dropped.
        ends_with_answer: True where the last step is no reasoning step but only states the answer:
            an answer line as above with nothing after it, or a line with only a \\boxed{...}.
    """

    steps: tuple[str, ...]
    answer: str | None
    ends_with_answer: bool

    @property
    def text(self) -> str:
        """The text that was split."""
        return "".join(self.steps)

    @property
    def reasoning_steps(self) -> tuple[str, ...]:
        """The steps without the line that only states the answer."""
        return self.steps[:-1] if self.ends_with_answer else self.steps


def split_solution(text: str, style: str = "auto") -> SplitSolution:
    """Cut a solution into steps and find its final answer.

    A cut is always at the start of a line, and never inside a code fence, \\[...\\], $$...$$ or
    \\begin{...}...\\end{...}. Such a block that is never closed protects nothing: one stray
    delimiter must not swallow the rest. A line at the end that only states the answer is a step of
    its own in every style.

    Args:
        text: the solution, with any line ends.
        style: where a step starts.
            "step_prefix": at "Step 1: ...", "**Step 1:** ...", "Step 1. ..." and the like.
            "heading": at "## Step 1 ...", of any level.
            "line": at every line that is not blank.
            "paragraph": at every line that follows a blank one.
            "auto": "heading" where there is at least one such heading, else "step_prefix" where
                there is one such line, else "paragraph" where a blank line separates reasoning,
                else "line".
            With "step_prefix" and "heading", text before the first marker is part of the first
            step: an introduction has no verdict of its own, and step k stays the k-th marker.
            A text without markers is then one step.
    Raises:
        ValueError: text is not a string, or style is unknown.
    """
    checks.require(isinstance(text, str), "text", "a string", type(text).__name__)
    checks.choice("style", style, STYLES)
    blocks = _Blocks(text)
    answer, answer_start = _find_answer(text, blocks)
    body = text if answer_start is None else text[:answer_start]
    cuts = _cuts(body, style, blocks)
    if answer_start is not None and body.strip():
        cuts.append(answer_start)
    edges = [0, *cuts, len(text)]
    steps = tuple(text[a:b] for a, b in zip(edges, edges[1:], strict=False) if a < b)
    return SplitSolution(steps, answer, ends_with_answer=answer_start is not None)


def _cuts(body: str, style: str, blocks: _Blocks) -> list[int]:
    """Offsets, ascending and inside of `body`, at which a step other than the first starts."""
    if style == "auto":
        for candidate in ("heading", "step_prefix"):
            if _markers(body, candidate, blocks):
                return _cuts(body, candidate, blocks)
        return _line_cuts(body, blocks, after_blank=True) or _cuts(body, "line", blocks)
    if style in ("heading", "step_prefix"):
        return _markers(body, style, blocks)[1:]  # what precedes the first is its introduction
    return _line_cuts(body, blocks, after_blank=style == "paragraph")


def _markers(body: str, style: str, blocks: _Blocks) -> list[int]:
    pattern = _HEADING if style == "heading" else _STEP_PREFIX
    starts = (match.start() for match in pattern.finditer(body))
    return [start for start in starts if not blocks.cover(start)]


def _line_cuts(body: str, blocks: _Blocks, after_blank: bool) -> list[int]:
    """Starts of lines with text, the first such line excepted."""
    cuts = []
    seen_text = previous_blank = False
    for start, line in _lines(body):
        blank = not line or line.isspace()
        if not blank:
            if seen_text and (previous_blank or not after_blank) and not blocks.cover(start):
                cuts.append(start)
            seen_text = True
        previous_blank = blank
    return cuts


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Offset and content of each line. str.splitlines would also split at form feeds and others."""
    start = 0
    for line in text.split("\n"):
        yield start, line
        start += len(line) + 1


class _Blocks:
    """The spans of a text in which a line end separates nothing: code fences and displayed math."""

    def __init__(self, text: str) -> None:
        self.spans: list[tuple[int, int]] = []
        fences = _fence_spans(text)
        self._set(fences)
        self._set(fences + _math_spans(text, fences=self))

    def _set(self, spans: list[tuple[int, int]]) -> None:
        merged: list[tuple[int, int]] = []
        for start, end in sorted(spans):
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self.spans = merged
        self.starts = [start for start, _ in merged]

    def around(self, offset: int) -> tuple[int, int] | None:
        """The span that `offset` is inside of; a span's first offset is not inside."""
        index = bisect_left(self.starts, offset) - 1
        return self.spans[index] if index >= 0 and offset < self.spans[index][1] else None

    def cover(self, offset: int) -> bool:
        return bool(self.spans) and self.around(offset) is not None


def _fence_spans(text: str) -> list[tuple[int, int]]:
    """Code fences as in Markdown: closed by a bare fence of the same kind, as long or longer."""
    fences = [m for m in _FENCE.finditer(text) if "`" not in m["info"] or m["ticks"][0] == "~"]
    # Look from the end for what can be closed at all: an opener must not search the whole text.
    longest = {"`": 0, "~": 0}
    closable = []
    for fence in reversed(fences):
        kind, length = fence["ticks"][0], len(fence["ticks"])
        closable.append(longest[kind] >= length)
        if not fence["info"].strip():
            longest[kind] = max(longest[kind], length)
    spans = []
    opener: re.Match[str] | None = None
    for fence, can_open in zip(fences, reversed(closable), strict=True):
        if opener is None:
            opener = fence if can_open else None
        elif fence["ticks"].startswith(opener["ticks"]) and not fence["info"].strip():
            spans.append((opener.start(), fence.end()))
            opener = None
    return spans


def _math_spans(text: str, fences: _Blocks) -> list[tuple[int, int]]:
    """Displays and environments outside of code, possibly nested; only closed ones."""
    spans = []
    open_at: dict[str, list[int]] = {}  # closing delimiter -> offsets of its open openers
    for match in _MATH.finditer(text):
        token = match.group()
        if token in ("\\\\", "\\$") or fences.cover(match.start()):
            continue
        if open_at.get(token):
            spans.append((open_at[token].pop(), match.end()))
        elif token == "$$":
            open_at.setdefault(token, []).append(match.start())
        elif token == "\\[":
            open_at.setdefault("\\]", []).append(match.start())
        elif token.startswith("\\begin"):
            open_at.setdefault(token.replace("begin", "end", 1), []).append(match.start())
    return spans


def _find_answer(text: str, blocks: _Blocks) -> tuple[str | None, int | None]:
    """The answer, and where the line starts that states it and nothing else and ends the text."""
    boxed = _last_boxed(text)
    stated, start = _stated_answer(text, blocks)
    if boxed is None:
        return stated, start
    if start is None:
        start = _boxed_line_start(text, boxed, blocks)
    return _tidy(text[boxed.content_start : boxed.end - 1]) or None, start


def _stated_answer(text: str, blocks: _Blocks) -> tuple[str | None, int | None]:
    """What the last answer line says, and its start where nothing follows what it says."""
    last = None
    for match in _ANSWER.finditer(text):
        # "answer" alone on a line is a title only if it looks like one.
        is_title = match["title"] is None or match["head"] or match["bold"]
        if is_title and not blocks.cover(match.start()):
            last = match
    if last is None:
        return None, None
    end = len(text.rstrip())
    start = len(text) - len(text[last.end() :].lstrip())
    stop = text.find("\n", start, end)
    while stop != -1 and blocks.cover(stop):
        stop = text.find("\n", stop + 1, end)
    answer = _tidy(text[start : end if stop == -1 else stop])
    answer = _tidy(answer.removeprefix("**").removesuffix("**"))  # "**Answer: 5.**"
    return answer or None, last.start() if stop == -1 else None


def _tidy(answer: str) -> str:
    return answer.strip().removesuffix(".").rstrip()


@dataclass(frozen=True)
class _Boxed:
    start: int  # of \boxed
    content_start: int
    end: int  # behind the closing brace


def _last_boxed(text: str) -> _Boxed | None:
    """The last \\boxed{...} whose braces balance; `\\{` and `\\}` are characters, not braces."""
    if "\\boxed" not in text:
        return None
    last: _Boxed | None = None
    open_braces: list[re.Match[str]] = []
    for match in _BRACE.finditer(text):
        token = match.group()
        if token == "{" or token.startswith("\\boxed"):
            open_braces.append(match)
        elif token == "}" and open_braces:
            opener = open_braces.pop()
            is_boxed = opener.group() != "{"
            if is_boxed and (last is None or opener.start() > last.start):
                last = _Boxed(opener.start(), opener.end(), match.end())
    return last


def _boxed_line_start(text: str, boxed: _Boxed, blocks: _Blocks) -> int | None:
    """Where the line starts that holds only this box, its math delimiters and emphasis."""
    if text[boxed.end :].strip(" \t\r\n$.*") not in ("", "\\]", "\\)"):
        return None
    display = blocks.around(boxed.start)
    if display is None:
        before = text[: boxed.start].rstrip(" \t*")
        before = before.removesuffix("$").removesuffix("\\(")
    else:
        before, opener_size = text[: display[0]], len("\\[")  # also the size of "$$"
        if text[display[0] + opener_size : boxed.start].strip():
            return None
    before = before.rstrip(" \t*")
    return len(before) if not before or before.endswith("\n") else None
