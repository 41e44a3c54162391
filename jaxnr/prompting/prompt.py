"""From an example to the token ids that the policy reads: a chat of one user message, the latest signal first."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from jaxnr.config import PromptConfig
from jaxnr.errors import InputError
from jaxnr.prompting.output import THINK_END, THINK_START
from jaxnr.rewards.specificity import TermStatistics, telling_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxnr.data.examples import Example, Signal

LABELS = {"search": "search", "web": "page", "news": "news"}
"""What a signal's line begins with, by domain."""

REASONING_REQUEST = f"Reason first, between {THINK_START} and {THINK_END}."


class EncodedPrompt(NamedTuple):
    """The ids of one prompt, up to and including the header of the answer, and how many signals did not fit."""

    ids: list[int]
    dropped: int


def as_shown(example: Example, terms: TermStatistics, words: int) -> Example:
    """The example with its signals as a prompt shows them, the latest first: at most ``words`` telling words each, or
    whole texts where that is 0.

    Of signals whose lines begin with the same two words or end with the same one, the latest alone is shown. Most
    are on one subject, and a reader tells by the end of a line which comes next, and by its beginning how it goes on.
    """
    latest_first = example.signals[::-1]
    if not words:
        return example._replace(signals=latest_first)
    shown: list[Signal] = []
    ends: set[tuple[str, ...]] = set()
    for signal in latest_first:
        text = telling_words(signal.text, terms, words)
        text_words = text.casefold().split()
        its_ends = {tuple(text_words[:2]), tuple(text_words[-1:])}
        if not its_ends & ends:
            shown.append(signal._replace(text=text))
            ends |= its_ends
    return example._replace(signals=tuple(shown))


def render_signals(signals: Sequence[Signal]) -> str:
    """One line a signal, in the order given: `search: storm florida`. Line breaks within a text become spaces."""
    return "\n".join(f"{LABELS[signal.domain]}: {' '.join(signal.text.split())}" for signal in signals)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, example: Example, cfg: PromptConfig) -> EncodedPrompt:
    """The prompt of an example, without its last signals as far as it would be longer than `max_prompt_tokens`.

    Names of special tokens inside a signal are broken up, so nothing that a user typed or read can end a turn or open
    another. Raises InputError where the instructions alone are too long.
    """
    pattern = special_names(tokenizer)
    lines = [pattern.sub(r"\1 ", render_signals([signal])) for signal in example.signals]
    fixed = _fixed_length(tokenizer, cfg)
    if fixed > cfg.max_prompt_tokens:
        raise InputError(
            f"prompt.max_prompt_tokens is {cfg.max_prompt_tokens}, but prompt.instructions and the chat template of "
            f"the tokenizer take {fixed} tokens before any signal: raise the former or shorten the instructions."
        )
    kept = len(lines)
    if len(ids := _chat_ids(tokenizer, lines, cfg)) > cfg.max_prompt_tokens:
        kept = _lines_within(tokenizer, lines, cfg.max_prompt_tokens - fixed)
        # Lengths of single lines add up exactly for byte-level tokenizers; others may merge across lines.
        while len(ids := _chat_ids(tokenizer, lines[:kept], cfg)) > cfg.max_prompt_tokens:
            kept -= 1
    return EncodedPrompt(ids, len(lines) - kept)


def special_names(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches where the name of a special token begins; ``.sub(r"\1 ", text)`` breaks the names up."""
    return _special_names(tuple(token.content for token in tokenizer.added_tokens_decoder.values()))


def pad_prompts(
    prompts: Sequence[Sequence[int]], bucket_lengths: Sequence[int], pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded tokens_BS (int32) and mask_BS (bool), S the smallest bucket that holds the longest prompt.

    Raises InputError where no bucket does.
    """
    longest = max(map(len, prompts))
    fitting = [length for length in bucket_lengths if length >= longest]
    if not fitting:
        raise InputError(
            f"A prompt has {longest} tokens, but the longest of prompt.prompt_buckets is {max(bucket_lengths)}: the "
            "last bucket has to be as long as prompt.max_prompt_tokens."
        )
    tokens_BS = np.full((len(prompts), min(fitting)), pad_id, dtype=np.int32)
    mask_BS = np.zeros(tokens_BS.shape, dtype=bool)
    for row, ids in enumerate(prompts):
        start = tokens_BS.shape[1] - len(ids)
        tokens_BS[row, start:] = ids
        mask_BS[row, start:] = True
    return tokens_BS, mask_BS


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of an output and the end token. Names of special tokens inside the text stay text."""
    ids = cast(list[int], tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return [*ids, cast(int, tokenizer.eos_token_id)]


def _chat_ids(tokenizer: PreTrainedTokenizerBase, lines: Sequence[str], cfg: PromptConfig) -> list[int]:
    """The ids of the whole chat. `enable_thinking` is for the templates that know it (Qwen3); others ignore it."""
    request = f"{cfg.instructions} {REASONING_REQUEST}" if cfg.reasoning else cfg.instructions
    messages = [{"role": "user", "content": request + "\n\n" + "\n".join(lines)}]
    ids = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False, enable_thinking=cfg.reasoning
    )
    return cast(list[int], ids)


@functools.lru_cache(maxsize=4)
def _fixed_length(tokenizer: PreTrainedTokenizerBase, cfg: PromptConfig) -> int:
    """Tokens of a prompt without signals."""
    return len(_chat_ids(tokenizer, [], cfg))


@functools.lru_cache(maxsize=2**17)  # a signal is in many prompts of its user, and a prompt in many steps
def _length(tokenizer: PreTrainedTokenizerBase, line: str) -> int:
    """Tokens of a line, its line break included."""
    return len(cast(list[int], tokenizer(line + "\n", add_special_tokens=False)["input_ids"]))


def _lines_within(tokenizer: PreTrainedTokenizerBase, lines: Sequence[str], budget: int) -> int:
    """How many of the first lines fit the budget; the last line has no line break."""
    totals = itertools.accumulate(_length(tokenizer, line) for line in lines)
    return sum(1 for _ in itertools.takewhile(lambda total: total <= budget + 1, totals))


@functools.lru_cache(maxsize=8)
def _special_names(names: tuple[str, ...]) -> re.Pattern[str]:
    """Matches the first character of every special token's name, overlapping names too."""
    alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if len(name) > 1)
    return re.compile(f"(?=(?:{alternatives}))(.)" if alternatives else r"(?!)(.)", re.DOTALL)
