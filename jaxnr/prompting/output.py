"""The output format of the policy, and its strict parser.

An output is an optional reasoning block, then a JSON array of query strings, and nothing else but white space:

    <think>reads about storms and rowing</think>["hurricane landfall florida", "rowing world cup"]

Whether an output keeps to this is the structural reward, so the parser is strict: it repairs nothing. A query that is
written twice is no fault of structure but of diversity, which has a reward of its own: where repeats make a list
worthless, a policy learns to write about anything rather than about the same interest again.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from jaxnr.config import PromptConfig

THINK_START, THINK_END = "<think>", "</think>"

PROBLEMS = {
    "no_array": "neither an array nor a reasoning block followed by one",
    "cut": "a reasoning block or an array that was opened and never closed",
    "not_json": "an array that is not JSON",
    "trailing_text": "text after the array",
    "not_strings": "an array with something other than strings in it",
    "bad_characters": "a query with control characters, lone surrogates, unassigned code points or a special token",
    "empty_query": "a query without a letter or a digit",
    "too_few": "fewer queries than `min_queries`",
    "too_many": "more queries than `max_queries`",
    "too_long": "a query of more than `max_query_words` words or of absurdly long ones",
}
"""Why an output is refused, by the name that ``ParsedList.problem`` carries; the first that holds, in this order."""

_MAX_WORD_CHARACTERS = 40
"""A limit in words alone would let one word without spaces be of any length."""


class ParsedList(NamedTuple):
    """The queries of one output, or no queries and the name of the problem (a key of ``PROBLEMS``)."""

    queries: tuple[str, ...]
    problem: str | None


def format_list(queries: Sequence[str], reasoning: str | None = None) -> str:
    """The output that carries these queries; the inverse of ``parse_list`` on valid lists.

    Without blanks between the queries: `","` is one token.
    """
    array = json.dumps(list(queries), ensure_ascii=False, separators=(",", ":"))
    return array if reasoning is None else f"{THINK_START}{reasoning}{THINK_END}{array}"


def parse_list(text: str, cfg: PromptConfig) -> ParsedList:
    """The queries of an output, white space normalised, or why there are none. Never raises, whatever the text."""
    array, problem = _strip_reasoning(text)
    if problem is None:
        values, problem = _decode(array)
        if problem is None:
            queries = tuple(" ".join(value.split()) for value in values)
            problem = _problem(queries, cfg)
            if problem is None:
                return ParsedList(queries, None)
    return ParsedList((), problem)


def _strip_reasoning(text: str) -> tuple[str, str | None]:
    """The text from the array on, or why there is no array."""
    text = text.strip()
    if text.startswith(THINK_START):
        _, closed, text = text.partition(THINK_END)
        if not closed:
            return "", "cut"
        text = text.lstrip()
    return text, None if text.startswith("[") else "no_array"


def _decode(array: str) -> tuple[list[str], str | None]:
    """The strings of a JSON array that is all of the text, or why they cannot be had."""
    try:
        values, end = json.JSONDecoder().raw_decode(array)
    except (ValueError, RecursionError):  # also integers of thousands of digits, and brackets nested as deep
        return [], "not_json" if "]" in array else "cut"
    if array[end:].strip():
        return [], "trailing_text"
    if not all(isinstance(value, str) for value in values):
        return [], "not_strings"
    return values, None


def _problem(queries: tuple[str, ...], cfg: PromptConfig) -> str | None:
    """The first problem of decoded, normalised queries, or None."""
    if any(unicodedata.category(character) in ("Cc", "Cs", "Cn") for character in "".join(queries)):
        return "bad_characters"
    if any("<|" in query for query in queries):  # how special tokens begin, when decoding keeps them
        return "bad_characters"
    if not all(any(character.isalnum() for character in query) for query in queries):
        return "empty_query"
    if len(queries) < cfg.min_queries:
        return "too_few"
    if len(queries) > cfg.max_queries:
        return "too_many"
    if any(_too_long(query.split(" "), cfg) for query in queries):
        return "too_long"
    return None


def _too_long(words: list[str], cfg: PromptConfig) -> bool:
    return len(words) > cfg.max_query_words or any(len(word) > _MAX_WORD_CHARACTERS for word in words)
