"""How a problem becomes a prompt."""

from __future__ import annotations

from stepkto_kernels import checks
from stepkto_kernels.training.data import Prompt
from stepkto_kernels.training.records import Problem

# The form of solutions in the Step-KTO paper (arXiv 2501.10799), which is that of Llama 3's
# evaluations on MATH; steps.py cuts solutions of this form.
STEPS = """\
Solve the following math problem efficiently and clearly:

- For simple problems (2 steps or fewer):
Provide a concise solution with minimal explanation.

- For complex problems (3 steps or more):
Use this step-by-step format:

## Step 1: [Concise description]
[Brief explanation and calculations]

## Step 2: [Concise description]
[Brief explanation and calculations]

...

Regardless of the approach, always conclude with:

The final answer is: $\\boxed{answer}$

where answer is just the final number or expression that solves the problem.

Problem: """
PROMPTS = ("plain", "steps", "steps-text")


def make_prompt(problem: Problem, name: str = "plain") -> Prompt:
    """The prompt that asks for a solution.

    Args:
        problem: what is asked.
        name: "plain", the problem's text and a newline, for models trained on nothing else;
            "steps", one message that asks for `## Step 1: ...` and a boxed answer, for a chat
            template; "steps-text", the same as text, for models without one.
    Raises:
        ValueError: another name.
    """
    checks.choice("prompt", name, PROMPTS)
    if name == "plain":
        return problem.problem.rstrip("\n") + "\n"
    text = STEPS + problem.problem.strip()
    if name == "steps-text":
        return text + "\n\nSolution:\n"
    return ({"role": "user", "content": text},)
