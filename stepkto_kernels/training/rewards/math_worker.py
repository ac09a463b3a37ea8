"""The process in which math-verify looks at answers. Run as a script; see symbolic.py.

It reads one JSON list [reference, answer] a line and writes one JSON verdict a line. Its processor
time a comparison and its memory are bounded by the kernel, so that nothing in a C library, in a
regular expression or in a number with a trillion digits can hold it up for longer; and it dies on
its own where the process that started it has died.
"""

import json
import logging
import resource
import signal
import sys

if __name__ == "__main__":
    # a script's folder comes first in the path; the files in ours are no top-level modules
    sys.path.pop(0)

from math_verify import LatexExtractionConfig, parse, verify  # noqa: E402

UNDECIDED = (MemoryError, RecursionError)


def equal(reference: str, answer: str) -> bool:
    """Whether two answers are symbolically equal. Raises MemoryError and RecursionError."""
    # In a box, so that the whole of it counts and not the last number in it. As LaTeX only: the
    # other parser of math-verify goes through sympy.parse_expr, which is Python's eval.
    golds, found = (
        parse(
            f"\\boxed{{{text}}}",
            extraction_config=[LatexExtractionConfig()],
            parsing_timeout=None,
            raise_on_error=True,
        )
        for text in (reference, answer)
    )
    return any(equal_pair(gold, each) for gold in golds for each in found)


def equal_pair(gold: object, found: object) -> bool:
    try:
        return bool(verify(gold, found, timeout_seconds=None, raise_on_error=True))
    except UNDECIDED:
        raise
    except Exception:  # sympy refuses some comparisons with errors of every kind
        return False


def judge(reference: str, answer: str) -> bool | None:
    try:
        return equal(reference, answer)
    except UNDECIDED:
        return None
    except Exception:  # an answer that the parser cannot take is not the reference's
        return False


def main(seconds: float, memory: int) -> None:
    logging.disable(logging.CRITICAL)
    # what is imported and compiled at first use is not charged; and a math-verify that is called
    # otherwise must not make every answer a wrong one
    assert equal("\\frac{1}{2}", "0.5"), "math-verify finds 1/2 and 0.5 different"
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    # the default action ends the process inside of a C call too, where no Python handler runs
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    print("ready", flush=True)
    for line in sys.stdin:
        reference, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        verdict = judge(reference, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
