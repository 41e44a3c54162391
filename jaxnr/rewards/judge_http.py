"""A language model behind an OpenAI-compatible endpoint as the judge."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import hashlib
import json
import math
import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import httpx2
import numpy as np
from anyio.from_thread import start_blocking_portal

from jaxnr.config import JudgeConfig
from jaxnr.errors import InputError
from jaxnr.files import open_sqlite
from jaxnr.rewards.criteria import Criterion
from jaxnr.rewards.judge import WRITTEN_TOKENS, context, request

Read = TypeVar("Read")

FIRST_DELAY = 0.5
"""Seconds before the first retry, on average; each later one waits twice as long."""

LONGEST_DELAY = 60.0
"""Seconds that a retry waits at most, also where the server asks for more."""

LARGEST_RESPONSE = 2**20
"""Bytes of a response that are read; a longer one is a failure."""

FEWEST_FAILURES = 10
"""So many questions have to fail before their share can stop a run; or all, of a batch that has fewer."""

_RETRIED = frozenset({408, 429})  # and 5xx
_ANSWER_TOKENS = 8
_TOP_LOGPROBS = 5  # as many as every server gives


class HttpJudge:
    """Asks ``<url>/chat/completions`` each question, many at a time, and remembers the answers on disk.

    P(yes) is that of the answer's first token, against no, where the server gives log-probabilities; otherwise 1 or 0
    by the answer's text. Timeouts, lost connections and the statuses 408, 429 and 5xx are tried again, with exponential
    backoff and jitter, or as late as Retry-After says. What fails for good is NaN and counted in ``failed``.

    Args:
        config: url (up to and including /v1), model and limits.
        token: for the endpoint, empty for none. It is sent there and nowhere else; messages have it blotted out.
        cache: SQLite file of the answers, by content; None for none.
    """

    def __init__(self, config: JudgeConfig, *, token: str, cache: Path | None):
        self._config, self._token, self._cache = config, token, cache
        self.asked, self.failed = 0, 0

    def __call__(self, lists: Sequence[Sequence[str]], criteria: Sequence[Sequence[Criterion]]) -> np.ndarray:
        """See ``Judge``. Raises InputError where more than ``max_failed_share`` of the questions fail."""
        texts = [
            [context(queries) + request(criterion) for criterion in asked]
            for queries, asked in zip(lists, criteria, strict=True)
        ]
        different = list(dict.fromkeys(text for asked in texts for text in asked))
        with start_blocking_portal() as portal:  # its own thread: a notebook has an event loop already
            yes_of = dict(zip(different, portal.call(self._answer, different), strict=True))
        yes_NC = np.full((len(texts), max(map(len, texts), default=0)), np.nan, np.float32)
        for row, asked in enumerate(texts):
            yes_NC[row, : len(asked)] = [yes_of[text] for text in asked]
        return yes_NC

    def write(self, messages: Sequence[str]) -> list[str]:
        """See ``Writer``. Raises InputError where more than ``max_failed_share`` of the messages get no reply."""
        bodies = {row: _body(self._config.model, message, WRITTEN_TOKENS) for row, message in enumerate(messages)}
        replies = [""] * len(messages)
        with start_blocking_portal() as portal:
            portal.call(self._ask_all, bodies, text_of, replies.__setitem__, len(messages))
        return replies

    async def _answer(self, texts: Sequence[str]) -> list[float]:
        """P(yes) of each message, from the cache where it is known; NaN where there is no answer."""
        likeliest = {"logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        bodies = [_body(self._config.model, text, _ANSWER_TOKENS) | likeliest for text in texts]

        def settle(row: int, yes: float) -> None:
            yes_N[row] = yes
            _remember(cache, bodies[row], yes)

        with _open_cache(self._cache) as cache:
            yes_N = [_cached(cache, body) for body in bodies]
            unknown = {row: bodies[row] for row in np.flatnonzero(np.isnan(yes_N)).tolist()}
            await self._ask_all(unknown, p_yes, settle, len(texts))
        return yes_N

    async def _ask_all(
        self,
        bodies: Mapping[int, dict],
        read: Callable[[bytes], Read | None],
        settle: Callable[[int, Read], None],
        asked: int,
    ) -> None:
        """Sends ``bodies``, what is left of ``asked`` messages; ``settle`` gets what is read from each, as it comes."""
        slots = asyncio.Semaphore(self._config.concurrency)
        failures: list[str] = []

        async def ask(row: int, body: dict) -> None:
            async with slots:
                try:
                    settle(row, await self._ask_patiently(client, body, read))
                except _Failure as failure:
                    failures.append(str(failure))
                    self.failed += 1
                    self._check_share(failures, asked)

        async def ask_each() -> None:
            async with asyncio.TaskGroup() as tasks:
                for row, body in bodies.items():
                    tasks.create_task(ask(row, body))

        self.asked += asked
        async with self._client() as client:
            try:
                await ask_each()
            except ExceptionGroup as group:  # the first to stop has cancelled the others
                raise group.exceptions[0] from None

    def _check_share(self, failures: Sequence[str], asked: int) -> None:
        few = len(failures) < min(FEWEST_FAILURES, asked)
        if not few and len(failures) > self._config.max_failed_share * asked:
            raise InputError(
                f"The judge at {self._config.url} failed on {len(failures)} of {asked} questions of a batch, more than "
                f"the share of {self._config.max_failed_share} that `max_failed_share` allows; the last one: "
                f"{failures[-1]}."
            )

    def _client(self) -> httpx2.AsyncClient:
        headers = {"Accept-Encoding": "identity"}  # so that the bytes that are counted are those that are parsed
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        limits = httpx2.Limits(max_connections=self._config.concurrency)
        return httpx2.AsyncClient(headers=headers, timeout=self._config.timeout, limits=limits)

    async def _ask_patiently(
        self, client: httpx2.AsyncClient, body: dict, read: Callable[[bytes], Read | None]
    ) -> Read:
        """What the response says, after retries where they may help.

        The slot is kept while waiting: a busy server is asked less.
        """
        for attempt in range(self._config.retries + 1):
            try:
                return await self._ask(client, body, read)
            except _Failure as failure:
                if not failure.passing or attempt == self._config.retries:
                    raise
                delay = failure.retry_after or FIRST_DELAY * 2**attempt * random.uniform(0.5, 1.5)
                await asyncio.sleep(min(delay, LONGEST_DELAY))
        raise AssertionError("unreachable")

    async def _ask(self, client: httpx2.AsyncClient, body: dict, read: Callable[[bytes], Read | None]) -> Read:
        """What the response to one request says. Raises _Failure."""
        try:
            async with (
                asyncio.timeout(self._config.timeout),  # httpx bounds each read, this bounds them together
                client.stream("POST", f"{self._config.url.rstrip('/')}/chat/completions", json=body) as response,
            ):
                content = await _read(response)
        except TimeoutError:
            raise _Failure(f"no answer within {self._config.timeout} s", passing=True) from None
        except httpx2.TransportError as error:
            raise _Failure(f"{type(error).__name__}: {self._shown(str(error))}", passing=True) from None
        except (httpx2.InvalidURL, httpx2.HTTPError) as error:
            raise _Failure(f"{type(error).__name__}: {self._shown(str(error))}") from None
        if response.status_code != 200:
            raise _Failure(
                f"HTTP status {response.status_code}: {self._shown(content.decode(errors='replace'))}",
                passing=response.status_code in _RETRIED or response.status_code >= 500,
                retry_after=_retry_after(response.headers.get("Retry-After")),
            )
        found = read(content)
        if found is None:
            raise _Failure(f"no answer in the response: {self._shown(content.decode(errors='replace'))}")
        return found

    def _shown(self, text: str) -> str:
        """The beginning of a text, for a message, without the token: servers quote those that they refuse."""
        text = text.replace(self._token, "***") if self._token else text
        return " ".join(text[:1000].split())[:200]


class _Failure(Exception):
    """Why a request gave no answer; ``passing`` where the next may."""

    def __init__(self, reason: str, *, passing: bool = False, retry_after: float | None = None):
        super().__init__(reason)
        self.passing, self.retry_after = passing, retry_after


def p_yes(content: bytes) -> float | None:
    """P(yes) of a chat completion in JSON; None where it is none, or answers something else.

    With log-probabilities it is yes / (yes + no) over the likeliest first tokens, whatever their case and blanks.
    """
    try:
        choice = json.loads(content)["choices"][0]
        masses = {"yes": 0.0, "no": 0.0}
        for token in _first_token(choice):
            word = token["token"].strip().lower()
            if word in masses:
                masses[word] += math.exp(min(float(token["logprob"]), 0.0))
        if total := sum(masses.values()):
            return masses["yes"] / total if math.isfinite(total) else None
        answer = re.match(r"\W*(yes|no)\b", _without_thoughts(choice["message"]["content"]), re.IGNORECASE)
        return float(answer[1].lower() == "yes") if answer else None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def text_of(content: bytes) -> str | None:
    """The text of a chat completion in JSON; None where it is none."""
    try:
        return _without_thoughts(json.loads(content)["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None


def _without_thoughts(text: str) -> str:
    return re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)


def _first_token(choice: dict) -> list[dict]:
    """The likeliest first tokens of an answer with their log-probabilities; none where the server gives none."""
    tokens = (choice.get("logprobs") or {}).get("content") or []
    return (tokens[0].get("top_logprobs") or []) if tokens else []


def _body(model: str, text: str, max_tokens: int) -> dict:
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }


async def _read(response: httpx2.Response) -> bytes:
    content = bytearray()
    async for part in response.aiter_raw():
        content += part
        if len(content) > LARGEST_RESPONSE:
            raise _Failure(f"a response of more than {LARGEST_RESPONSE} bytes")
    return bytes(content)


def _retry_after(value: str | None) -> float | None:
    """Seconds until the time that the header names, as a number or as a date; None where there is none."""
    with contextlib.suppress(TypeError, ValueError):
        seconds = float(value or "")
        return seconds if math.isfinite(seconds) and seconds > 0 else None
    with contextlib.suppress(TypeError, ValueError):
        return max(email.utils.parsedate_to_datetime(value or "").timestamp() - time.time(), 0.0) or None
    return None


@contextlib.contextmanager
def _open_cache(path: Path | None) -> Iterator[sqlite3.Connection]:
    """The table of answers. A write-ahead log: a kill loses no answer that was written and harms none.

    Raises InputError for a file that is something else.
    """
    with open_sqlite(path, "the judge's cache") as cache:
        cache.execute("PRAGMA journal_mode = WAL")
        cache.execute("PRAGMA synchronous = NORMAL")
        cache.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, yes REAL NOT NULL)")
        yield cache


def _cached(cache: sqlite3.Connection, body: dict) -> float:
    """P(yes) that a question got before; NaN where it got none."""
    row = cache.execute("SELECT yes FROM answers WHERE key = ?", (_key(body),)).fetchone()
    return row[0] if row else math.nan


def _remember(cache: sqlite3.Connection, body: dict, yes: float) -> None:
    cache.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (_key(body), yes))


def _key(body: dict) -> str:
    """What an answer depends on: model and messages."""
    return hashlib.sha256(json.dumps([body["model"], body["messages"]]).encode()).hexdigest()
