"""What supervised steps imitate: for the warm start, the users' own signals; for distillation, the teacher's lists.

A model that begins from nothing stands where a pretrained, prompted language model would: it knows the format and which
texts go together, and nothing of the rewards. It learns that from the training split alone, without labels: a list is
made of random signals of the user, some still shown in the prompt (copying) and some hidden from it (association), each
said as a search query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from jaxnr.config import PromptConfig
from jaxnr.data.examples import Example
from jaxnr.mesh import batch_sharding
from jaxnr.prompting.output import format_list
from jaxnr.prompting.prompt import encode_completion
from jaxnr.retrieval.embedder import analyze
from jaxnr.training.rollout import Policy, place_prompts
from jaxnr.training.steps import Batch

HIDING_PROMPTS = 0.25
"""Share of the prompts whose lists are made of signals that the prompt hides."""

HIDDEN_SHARE = 0.3
"""Of the signals of such a prompt, on average."""


SHORT_TEXT_WORDS = 4
"""Texts of up to so many words, such as searches, are queries already."""


class Target(NamedTuple):
    """A prompt and G lists to imitate; they share the prompt, as completions do."""

    example: Example
    lists: tuple[tuple[str, ...], ...]


def warm_start_target(example: Example, config: PromptConfig, group_size: int, rng: np.random.Generator) -> Target:
    """Lists of random signals of the user; for some of the prompts, of signals that the prompt then does not show."""
    signals = example.signals
    hidden = rng.random(len(signals)) < HIDDEN_SHARE
    if rng.random() < HIDING_PROMPTS and hidden.sum() >= config.min_queries and (~hidden).any():
        shown = tuple(signal for signal, hide in zip(signals, hidden, strict=True) if not hide)
        pool = [signal.text for signal, hide in zip(signals, hidden, strict=True) if hide]
    else:
        shown, pool = signals, [signal.text for signal in signals]
    return Target(
        example._replace(signals=shown), tuple(_random_list(pool, config, rng) for _ in range(group_size))
    )


def _random_list(pool: Sequence[str], config: PromptConfig, rng: np.random.Generator) -> tuple[str, ...]:
    wanted = int(rng.integers(config.min_queries, config.max_queries + 1))
    texts = (pool[row] for row in rng.permutation(len(pool)))
    return queries_from([as_query(text, rng) for text in texts], config, wanted)


def as_query(text: str, rng: np.random.Generator) -> str:
    """A short text as it is; of a longer one, such as a headline, two to four of its content words in their order."""
    if len(text.split()) <= SHORT_TEXT_WORDS:
        return text
    terms = [term for term in dict.fromkeys(analyze(text)) if term not in ENGLISH_STOP_WORDS]
    if len(terms) < 2:
        return text
    kept = np.sort(rng.permutation(len(terms))[: int(rng.integers(2, 5))])
    return " ".join(terms[row] for row in kept)


def queries_from(texts: Sequence[str], config: PromptConfig, wanted: int) -> tuple[str, ...]:
    """The first ``wanted`` distinct texts, each cut to the words a query may have."""
    queries: dict[str, str] = {}
    for text in texts:
        query = " ".join(text.split()[: config.max_query_words])
        if len(queries) < wanted:
            queries.setdefault(query.casefold(), query)
    return tuple(queries.values())


def place_targets(policy: Policy, targets: Sequence[Target]) -> Batch:
    """Prompts and their lists as one batch; a list over the generation budget loses its last queries."""
    T = policy.prompt.max_new_tokens
    shape_BGT = (len(targets), len(targets[0].lists), T)
    tokens_BGT = np.full(shape_BGT, policy.tokenizer.pad_token_id, np.int32)
    mask_BGT = np.zeros(shape_BGT, bool)
    for row, target in enumerate(targets):
        for column, queries in enumerate(target.lists):
            ids = _fitting_ids(policy, queries, T)
            tokens_BGT[row, column, : len(ids)] = ids
            mask_BGT[row, column, : len(ids)] = True
    prompt_BS, prompt_mask_BS = place_prompts(policy, [target.example for target in targets])
    return Batch(prompt_BS, prompt_mask_BS, *jax.device_put((tokens_BGT, mask_BGT), batch_sharding(policy.mesh)))


def _fitting_ids(policy: Policy, queries: tuple[str, ...], budget: int) -> list[int]:
    for count in range(len(queries), 0, -1):
        ids = encode_completion(policy.tokenizer, format_list(queries[:count]))
        if len(ids) <= budget:
            return ids
    return ids[:budget]


def warm_start_batches(
    policy: Policy, group_size: int, seed: int
) -> Callable[[Sequence[Example], int], Batch]:
    """``(examples, step) -> batch`` of warm-start targets, drawn by (seed, step, example id) alone."""

    def batch(examples: Sequence[Example], step: int) -> Batch:
        draws = (np.random.default_rng([seed, step, example.example_id]) for example in examples)
        return place_targets(
            policy,
            [
                warm_start_target(example, policy.prompt, group_size, rng)
                for example, rng in zip(examples, draws, strict=True)
            ],
        )

    return batch
