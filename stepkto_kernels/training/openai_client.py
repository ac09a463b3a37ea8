"""A small client of endpoints that speak OpenAI's protocol, with the standard library only.

async with ChatClient("http://localhost:8000/v1", "some-model", api_key_env=None) as client:
    text = await client.complete([{"role": "user", "content": "2 + 2?"}], temperature=0)
"""

from __future__ import annotations

import asyncio
import email.utils
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from stepkto_kernels import checks
from stepkto_kernels.training import bounded_http

Message = dict[str, str]
Parsed = TypeVar("Parsed")
MAX_REPLY = 16 * 2**20  # bytes
# A wrong key, model or address: no request will fare better. Not 403, with which gateways turn down
# single texts too.
REFUSED = (401, 404)


class ChatError(OSError):
    """A request that failed for good; `status` is the last HTTP status, None without one."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status

    @property
    def refused(self) -> bool:
        """True where no other request will fare better."""
        return self.status in REFUSED


@dataclass(frozen=True)
class Choice:
    """One completion of a reply; `finish` is the endpoint's word, None where it says none."""

    text: str
    finish: str | None


@dataclass(frozen=True)
class _Failure(Exception):
    """One attempt that failed."""

    reason: str
    status: int | None = None
    again: bool = True
    wait: float | None = None  # seconds that the server asks for


class ChatClient:
    """Asks an endpoint, at most `concurrency` requests at the same time.

    Tried again, after an exponentially growing random time or what Retry-After says: status 408,
    429 and 5xx, failed connections, timeouts and replies cut short. The key is sent to `base_url`
    only; redirects are not followed.

    Args:
        base_url: up to where "/chat/completions" or "/completions" follows, http or https, without
            a user or a query: keys come from the environment.
        model: its name there.
        api_key_env: environment variable with the key; None where none is needed.
        timeout: seconds for one attempt as a whole, > 0.
        concurrency: requests in flight, >= 1.
        retries: attempts after the first, >= 0.
        backoff: seconds before the first retry, on average, >= 0; each next is twice as long.
        longest_wait: seconds between two attempts at most, >= 0; a server that asks for more is
            not asked again.
        per_minute: requests begun a minute at most, > 0; None for any number.
    Raises:
        ValueError: an argument outside of the above, or no key in the variable.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = "OPENAI_API_KEY",
        timeout: float = 120.0,
        concurrency: int = 8,
        retries: int = 5,
        backoff: float = 1.0,
        longest_wait: float = 120.0,
        per_minute: float | None = None,
    ):
        is_http = isinstance(base_url, str) and base_url.startswith(("http://", "https://"))
        checks.require(is_http, "base_url", "http://... or https://...", repr(base_url))
        parts = urllib.parse.urlsplit(base_url)
        is_plain = parts.username is None and not parts.query and not parts.fragment
        # not shown: it may be a key, as messages have the address in them
        checks.require(is_plain, "base_url", "no user, query or fragment in it", "one that has")
        checks.require(bool(model), "model", "a name", repr(model))
        checks.number("timeout", timeout, low=0, low_open=True)
        checks.integer("concurrency", concurrency, low=1)
        checks.integer("retries", retries, low=0)
        checks.number("backoff", backoff, low=0)
        checks.number("longest_wait", longest_wait, low=0)
        if per_minute is not None:
            checks.number("per_minute", per_minute, low=0, low_open=True)
        self.base, self.model = base_url.rstrip("/"), model
        self.timeout, self.concurrency, self.retries = timeout, concurrency, retries
        self.backoff, self.longest_wait, self.per_minute = backoff, longest_wait, per_minute
        self._headers = {"Content-Type": "application/json"}
        if api_key_env is not None:
            key = os.environ.get(api_key_env, "").strip()
            checks.require(bool(key), api_key_env, "a key in this environment variable", "none")
            self._headers["Authorization"] = f"Bearer {key}"
        self._opener = bounded_http.opener()
        self._next_start = 0.0  # of time.monotonic
        self._random = random.Random()
        self.counts: Counter[str] = Counter()  # "attempts", "retries", "failed"

    async def __aenter__(self) -> ChatClient:
        self._slots = asyncio.Semaphore(self.concurrency)
        self._refusal: ChatError | None = None  # then nothing that waits for a slot is sent
        self._threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix="chat")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def complete(self, messages: Sequence[Message], **body: Any) -> str:
        """The text of the endpoint's first choice.

        Args:
            messages: the conversation.
            body: further fields of the request, such as temperature.
        Raises:
            ChatError: refused, or failed at every attempt.
        """
        return await self._ask("/chat/completions", {**body, "messages": list(messages)}, _content)

    async def choices(self, prompt: str | Sequence[Message], **body: Any) -> list[Choice]:
        """All completions of a reply: of messages by the chat endpoint, of text by the plain one.

        A choice without text that was cut off, as when a model is still thinking, is "".

        Args:
            prompt: messages, or text that no chat template is put around.
            body: further fields of the request, such as n.
        Raises:
            ChatError: refused, or failed at every attempt.
        """
        if isinstance(prompt, str):
            return await self._ask("/completions", {**body, "prompt": prompt}, _choices)
        return await self._ask("/chat/completions", {**body, "messages": list(prompt)}, _choices)

    async def _ask(
        self, path: str, body: dict[str, Any], parse: Callable[[bytes], Parsed]
    ) -> Parsed:
        data = json.dumps({**body, "model": self.model}).encode()
        for attempt in range(self.retries + 1):
            try:
                async with self._slots:
                    await self._pace()
                    if self._refusal is not None:
                        raise self._refusal
                    self.counts["attempts"] += 1
                    loop = asyncio.get_running_loop()
                    return await loop.run_in_executor(self._threads, self._post, path, data, parse)
            except _Failure as failure:
                wait = self._wait(attempt, failure)
                if wait is None:
                    self.counts["failed"] += 1
                    text = f"{self.base}{path}: {failure.reason}, after {attempt + 1} attempts"
                    error = ChatError(text, failure.status)
                    self._refusal = error if error.refused else self._refusal
                    raise error from None
            self.counts["retries"] += 1
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, attempt: int, failure: _Failure) -> float | None:
        """Seconds before the next attempt, None where there is none."""
        if not failure.again or attempt == self.retries:
            return None
        if failure.wait is not None and failure.wait > self.longest_wait:
            return None
        # between half and one and a half, so that clients that failed together come back apart
        own = self.backoff * 2**attempt * self._random.uniform(0.5, 1.5)
        return max(min(own, self.longest_wait), failure.wait or 0.0)

    async def _pace(self) -> None:
        if self.per_minute is None:
            return
        start = max(time.monotonic(), self._next_start)
        self._next_start = start + 60.0 / self.per_minute
        await asyncio.sleep(start - time.monotonic())

    def _post(self, path: str, data: bytes, parse: Callable[[bytes], Parsed]) -> Parsed:
        """One attempt, in a thread. Raises _Failure."""
        request = urllib.request.Request(self.base + path, data, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                reply = _read(response)
        except urllib.error.HTTPError as error:
            with error:
                again = error.code in (408, 429) or error.code >= 500
                wait = _retry_after(error.headers.get("Retry-After")) if again else None
                raise _Failure(f"HTTP status {error.code}", error.code, again, wait) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts too
            raise _Failure(f"{type(error).__name__}: {error}") from None
        return parse(reply)


def _read(response: http.client.HTTPResponse) -> bytes:
    parts, size = [], 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if size > MAX_REPLY:
            raise _Failure(f"a reply of more than {MAX_REPLY} bytes", again=False)
    if response.length:  # read1 does not raise where the connection ends early
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _content(reply: bytes) -> str:
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise _Failure("no chat completion in the reply")
    return text


def _choices(reply: bytes) -> list[Choice]:
    try:
        found = [_choice(each) for each in json.loads(reply)["choices"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        found = []
    if not found:
        raise _Failure("no completion in the reply")
    return found


def _choice(each: Any) -> Choice:
    text, finish = each["message"]["content"] if "message" in each else each["text"], None
    if isinstance(each.get("finish_reason"), str):
        finish = each["finish_reason"]
    if text is None and finish == "length":
        text = ""
    if not isinstance(text, str):
        raise TypeError("want a text")
    return Choice(text, finish)


def _retry_after(header: str | None) -> float | None:
    """Seconds, of a number of seconds or a date; None for neither."""
    if header is None:
        return None
    if header.strip().isascii() and header.strip().isdigit():
        return float(header)
    try:
        date = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time())
