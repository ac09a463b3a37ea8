"""The flags of `stepkto label --process rollouts`, and the reward they describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepkto_kernels import checks
from stepkto_kernels.training.rewards.base import OutcomeReward
from stepkto_kernels.training.rewards.rollouts import MonteCarlo, Sampler

HERE: dict[str, tuple[Any, Any, str]] = {
    "rollout_batch_size": (int, 32, "sequences at once, default 32"),
    "rollout_device": (str, "cpu", "such as cuda, default cpu"),
    "rollout_dtype": (str, "float32", "float32 (default), bfloat16 or float16"),
}
SERVER: dict[str, tuple[Any, Any, str]] = {
    "rollout_key_env": (str, "OPENAI_API_KEY", "environment variable with its key, or `none`"),
    "rollout_concurrency": (int, 8, "requests at the same time, default 8"),
    "rollout_per_minute": (float, None, "requests a minute at most, default any number"),
    "rollout_timeout": (float, 120.0, "seconds of a request, default 120"),
    "rollout_retries": (int, 5, "attempts after a failed one, default 5"),
}
ROLLOUTS: dict[str, tuple[Any, Any, str]] = {
    "rollout_model": (str, None, "folder or hub name; with --rollout-url its name there"),
    "rollout_url": (
        str,
        None,
        "server that goes on from an unfinished last message, as vLLM does: up to where "
        "/chat/completions follows; without it the model runs here",
    ),
    "rollouts": (int, 8, "continuations of a prefix at most, default 8"),
    "rollout_threshold": (float, 0.5, "share of right ones from which a step is, default 0.5"),
    "rollout_temperature": (float, 1.0, "default 1"),
    "rollout_max_new_tokens": (int, 512, "of a continuation, default 512"),
    "rollout_seed": (int, 0, "of the random numbers, default 0"),
    **HERE,
    **SERVER,
}
DECIDING = (
    "rollout_model",
    "rollouts",
    "rollout_threshold",
    "rollout_temperature",
    "rollout_max_new_tokens",
    "rollout_seed",
    "rollout_dtype",
)


def check_place(given: Mapping[str, Any]) -> None:
    """Flags of a model that runs here do not go with a server, nor the other way round.

    Args:
        given: the flags' values, None where one is not given.
    Raises:
        ValueError: one that would change nothing.
    """
    is_server = given["rollout_url"] is not None
    want = "none with --rollout-url" if is_server else "--rollout-url with it"
    for name in HERE if is_server else SERVER:
        flag = "--" + name.replace("_", "-")
        checks.require(given[name] is None, flag, want, given[name])


def make_reward(
    options: Mapping[str, Any], outcome: OutcomeReward, *, stop_at_error: bool
) -> MonteCarlo:
    """The reward that the flags describe.

    Args:
        options: of ROLLOUTS, all.
        outcome: judges the answers of the rollouts.
        stop_at_error: draw nothing behind a first wrong step.
    Raises:
        ValueError: a value does not fit, or there is no key.
        OSError: there is no such model.
    """
    return MonteCarlo(
        make_server_sampler(options) if options["rollout_url"] else make_model_sampler(options),
        outcome,
        rollouts=options["rollouts"],
        threshold=options["rollout_threshold"],
        stop_at_error=stop_at_error,
    )


def make_model_sampler(options: Mapping[str, Any]) -> Sampler:
    from stepkto_kernels.training.models import load_for_sampling, load_tokenizer
    from stepkto_kernels.training.rewards.continuations import ModelContinuations

    name = options["rollout_model"]
    return ModelContinuations(
        load_for_sampling(name, options["rollout_device"], options["rollout_dtype"]),
        load_tokenizer(name),
        temperature=options["rollout_temperature"],
        max_new_tokens=options["rollout_max_new_tokens"],
        batch_size=options["rollout_batch_size"],
        seed=options["rollout_seed"],
    )


def make_server_sampler(options: Mapping[str, Any]) -> Sampler:
    from stepkto_kernels.training.openai_client import ChatClient
    from stepkto_kernels.training.rewards.continuations import ServerContinuations

    key = options["rollout_key_env"]
    client = ChatClient(
        options["rollout_url"],
        options["rollout_model"],
        api_key_env=None if key == "none" else key,
        timeout=options["rollout_timeout"],
        concurrency=options["rollout_concurrency"],
        retries=options["rollout_retries"],
        per_minute=options["rollout_per_minute"],
    )
    return ServerContinuations(
        client,
        temperature=options["rollout_temperature"],
        max_new_tokens=options["rollout_max_new_tokens"],
        seed=options["rollout_seed"],
    )
