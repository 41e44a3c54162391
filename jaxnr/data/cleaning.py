"""Cheap, language-agnostic rules that keep what says something about a person's interests (the paper's first step).

Nothing here learns and nothing reads more than the text itself and the user's few texts before it, so a text is kept or
dropped by what was known when it happened: cleaning a whole log and then cutting it at a time gives what cutting first
and then cleaning gives.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

MAX_WORDS = 16
"""Longer texts are cut: page titles trail off into section and site names, and prompts have little room."""
MAX_CHARACTERS = 160
"""The same limit for scripts that put no spaces between words, and for words that are really data."""
DUPLICATE_WINDOW = 5
"""A text is compared with this many kept texts before it: open A, open B, like A is one A."""
DUPLICATE_SIMILARITY = 0.8
"""Jaccard similarity of character trigrams from which two texts count as one: `oil price`, `oil prices`."""

# What UTF-8 read as Latin-1 looks like (`Ã©`, `â€™`, `Ð¡`), and the replacement character. The no-break space is left
# out: upper-case Portuguese has words that end in Ã.
_MOJIBAKE = re.compile("[ÃÂÐÑ][\x80-\x9f¡-¿]|â€|ï¿½|\ufffd")
# Control characters other than white space, lone surrogates, the private use area, non-characters.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ue000-\uf8ff\ufffe\uffff]")
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
_ESCAPES = re.compile(r"%20|%[0-9A-Fa-f]{2}\S*%[0-9A-Fa-f]{2}")
_URL_PART = re.compile(r"https?:|://|[?&][\w.-]+=|^/[\w.-]*/|\S\.(?:html?|php|aspx?|jsp)\b", re.IGNORECASE)

_NOT_A_WORD = re.compile(r"[\W_]")

_VISIT = r"(?: (?:log ?in|sign ?in|sign ?up|home ?page|home|mail|app|site|website|entrar|online))?"
# A few endings rather than `any two letters`: `node.js` and `vue.js` are topics.
_ENDING = (
    "(?:com|net|org|edu|gov|info|biz|io|tv"
    "|br|pt|uk|de|fr|es|it|nl|be|ch|at|se|no|dk|fi|pl|ru|in|jp|cn|kr|us|ca|au|mx|ar)"
)
_ADDRESS = re.compile(
    rf"(?:https?://\S+|www\.\S+|(?:[\w-]+\.)+{_ENDING}(?::\d+)?(?:/\S*)?){_VISIT}",
    re.IGNORECASE,
)
# Navigational queries (Broder 2002): the name of a large site, alone or with `login`, asks for the site and says
# nothing about interests. The list holds names that lead published rankings of top queries and that mean the site when
# they stand alone; `apple` or `tesla` are topics too and are not in it.
_SITES = (
    "amazon|bing|craigslist|ebay|facebook|fb|gmail|google|google (?:docs|drive|maps|translate)|hotmail|instagram"
    "|linkedin|msn|netflix|outlook|paypal|pinterest|reddit|spotify|tiktok|twitter|whatsapp(?: web)?|wikipedia|yahoo"
    "|you ?tube"
)
# Page titles that every site has.
_PLACES = (
    "home|home ?page|index|inbox|log ?in|sign ?in|sign ?up|new tab|untitled|(?:404 )?(?:page )?not found"
    "|search|google search"
)
_NAVIGATION = re.compile(rf"(?:(?:{_SITES}){_VISIT}|{_PLACES})", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleaningReport:
    """What cleaning did to the texts it saw: ``total`` = ``kept`` + the sum of ``dropped``."""

    total: int
    kept: int
    cut: int
    """Kept texts that were overlong and lost their end."""
    dropped: dict[str, int]
    """Reason to count: empty, non_text, navigation, duplicate."""


def clean_text(text: str) -> str | None:
    """The text with white space normalised and an overlong end cut off; None where it is refused."""
    return judge_text(text).text


def refusal_reason(text: str) -> str | None:
    """Why ``clean_text`` gives None: empty, non_text or navigation; None where it keeps the text."""
    return judge_text(text).reason


class Outcome(NamedTuple):
    """What became of one text: it, clean, or why it is dropped; and whether it lost its end."""

    text: str | None
    reason: str | None
    overlong: bool


class HistoryRules:
    """The rules for one user's events, given oldest first.

    Beyond ``clean_text`` this drops a text that (nearly) repeats one of the last kept texts in the same domain. The
    earlier one stays, so that a text never vanishes because of a later one.
    """

    __slots__ = ("_recent",)

    def __init__(self) -> None:
        self._recent: dict[str, tuple[str, ...]] = {}  # texts: their trigrams take fifty times the memory

    def __call__(self, domain: str, outcome: Outcome) -> Outcome:
        """The outcome of a text alone, or that it is a duplicate."""
        if outcome.text is None:
            return outcome
        trigrams = _trigrams(outcome.text)
        before = self._recent.get(domain, ())
        if any(_similar(trigrams, _trigrams(other)) for other in before):
            return Outcome(None, "duplicate", False)
        self._recent[domain] = (*before, outcome.text)[-DUPLICATE_WINDOW:]
        return outcome


def clean_histories(
    users: Sequence, domains: Sequence[str], texts: Sequence[str], rules: bool = True
) -> tuple[list[str | None], CleaningReport]:
    """Cleans the histories of many users, each contiguous and oldest first, by ``HistoryRules``.

    Without ``rules`` only a blank text is dropped. Returns the clean texts aligned with the input, None where dropped,
    and the counts.
    """
    judge = judge_text if rules else normalise_text
    outcomes = {text: judge(text) for text in set(texts)}
    cleaned: list[str | None] = []
    dropped: Counter[str] = Counter()
    cut = 0
    history = HistoryRules()
    current = object()
    for user, domain, text in zip(users, domains, texts, strict=True):
        if user != current:
            current, history = user, HistoryRules()
        outcome = history(domain, outcomes[text]) if rules else outcomes[text]
        cut += outcome.overlong
        if outcome.reason is not None:
            dropped[outcome.reason] += 1
        cleaned.append(outcome.text)
    kept = len(cleaned) - dropped.total()
    return cleaned, CleaningReport(total=len(cleaned), kept=kept, cut=cut, dropped=dict(sorted(dropped.items())))


def judge_text(text: str) -> Outcome:
    """What the rules make of one text by itself."""
    text = _normalise(text)
    reason = _refusal(text)
    return Outcome(None, reason, False) if reason else _shortened(text)


def normalise_text(text: str) -> Outcome:
    """The text with white space normalised and an overlong end cut off; dropped only where it is blank."""
    text = _normalise(text)
    return _shortened(text) if text else Outcome(None, "empty", False)


def _shortened(text: str) -> Outcome:
    short = _cut(text)
    return Outcome(short, None, len(short) < len(text))


def _normalise(text: str) -> str:
    return " ".join(_INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())


def _refusal(text: str) -> str | None:
    if not text:
        return "empty"
    if _ADDRESS.fullmatch(text) or _NAVIGATION.fullmatch(text.strip(" .!-|")):
        return "navigation"
    if _MOJIBAKE.search(text) or _CONTROL.search(text) or _ESCAPES.search(text) or _URL_PART.search(text):
        return "non_text"
    characters = text.replace(" ", "").casefold()
    if not any(map(str.isalpha, characters)) or 2 * _symbols(characters) > len(characters):
        return "non_text"
    if len(characters) > 2 and len(set(characters)) == 1:
        return "non_text"
    return None


def _symbols(characters: str) -> int:
    """How many are neither letters nor digits nor marks: half of a word in Devanagari or Thai is marks."""
    return sum(unicodedata.category(character)[0] != "M" for character in _NOT_A_WORD.findall(characters))


def _cut(text: str) -> str:
    """At most MAX_WORDS words and MAX_CHARACTERS characters; inside a word only where the first word is longer."""
    words = text.split(" ", MAX_WORDS)[:MAX_WORDS]
    text = " ".join(words)
    if len(text) <= MAX_CHARACTERS:
        return text
    end = text.rfind(" ", 0, MAX_CHARACTERS + 1)
    return text[: end if end > 0 else MAX_CHARACTERS]


@functools.lru_cache(maxsize=2**14)
def _trigrams(text: str) -> frozenset[str]:
    text = text.casefold()
    return frozenset(text[i : i + 3] for i in range(max(1, len(text) - 2)))


def _similar(a: frozenset[str], b: frozenset[str]) -> bool:
    # The sizes alone rule most pairs out.
    if min(len(a), len(b)) < DUPLICATE_SIMILARITY * max(len(a), len(b)):
        return False
    shared = len(a & b)
    return shared >= DUPLICATE_SIMILARITY * (len(a) + len(b) - shared)
