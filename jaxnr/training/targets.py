"""What supervised steps imitate: for the warm start, the users' own signals; for distillation, the teacher's lists.

A model that begins from nothing is to stand where a pretrained, prompted language model would: it knows the format,
which texts go together and what the news calls things, and nothing of the rewards. It learns that from the training
split alone, without labels. A list is made of random signals of the user, noise and all, each said as a search query
either in its own words or in those of an article like it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxnr.config import PromptConfig
from jaxnr.data.examples import Example
from jaxnr.mesh import batch_sharding
from jaxnr.prompting.output import format_list
from jaxnr.prompting.prompt import encode_completion
from jaxnr.retrieval.embedder import Embedder
from jaxnr.rewards.rubric import FACET_WORDS
from jaxnr.rewards.specificity import TermStatistics, telling_words
from jaxnr.training.rollout import Policy, place_prompts
from jaxnr.training.steps import Batch

PARAPHRASED = 0.5
"""Share of the queries that are made of an article's words."""

LIKE_ARTICLES = 3
"""Articles that may stand for a signal: about as many as there are on one subject at a time."""


class Target(NamedTuple):
    """A prompt and G lists to imitate; they share the prompt, as completions do."""

    example: Example
    lists: tuple[tuple[str, ...], ...]


class Paraphrases(NamedTuple):
    """What it takes to say a signal as a search query."""

    titles: dict[str, tuple[str, ...]]
    """Signal text to the titles of the articles most like it."""
    statistics: TermStatistics


def paraphrases(
    texts: list[str], titles: list[str], articles_IE: np.ndarray, embedder: Embedder, statistics: TermStatistics
) -> Paraphrases:
    """The articles nearest to each text, among ``titles`` with vectors ``articles_IE``."""
    texts = list(dict.fromkeys(texts))
    nearest: dict[str, tuple[str, ...]] = {}
    for start in range(0, len(texts), 1024):  # scores of 1024 texts at a time
        chunk = texts[start : start + 1024]
        about = [telling_words(text, statistics, FACET_WORDS) for text in chunk]
        rows_NK = np.argsort(-(embedder.embed_queries(about) @ articles_IE.T), axis=1, kind="stable")[:, :LIKE_ARTICLES]
        for text, rows_K in zip(chunk, rows_NK, strict=True):
            nearest[text] = tuple(titles[row] for row in rows_K)
    return Paraphrases(nearest, statistics)


def warm_start_target(
    example: Example, config: PromptConfig, group_size: int, known: Paraphrases, rng: np.random.Generator
) -> Target:
    """Lists of random signals of the user."""
    pool = [signal.text for signal in example.signals]
    return Target(example, tuple(_random_list(pool, config, known, rng) for _ in range(group_size)))


def _random_list(
    pool: list[str], config: PromptConfig, known: Paraphrases, rng: np.random.Generator
) -> tuple[str, ...]:
    wanted = int(rng.integers(config.min_queries, config.max_queries + 1))
    texts = (pool[row] for row in rng.permutation(len(pool))[: 2 * wanted])  # some to spare for repeated queries
    said = [
        str(rng.choice(known.titles[text])) if rng.random() < PARAPHRASED and text in known.titles else text
        for text in texts
    ]
    words = config.signal_words or config.max_query_words
    return queries_from([telling_words(text, known.statistics, words) for text in said], config, wanted)


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
    tokens_BGT = np.full(shape_BGT, policy.pad_id, np.int32)
    mask_BGT = np.zeros(shape_BGT, bool)
    for row, target in enumerate(targets):
        for column, queries in enumerate(target.lists):
            ids = _fitting_ids(policy, queries, T)
            tokens_BGT[row, column, : len(ids)] = ids
            mask_BGT[row, column, : len(ids)] = True
    prompt_BS, prompt_mask_BS = place_prompts(policy, [target.example for target in targets])
    return Batch(prompt_BS, prompt_mask_BS, *jax.device_put((tokens_BGT, mask_BGT), batch_sharding(policy.mesh)))


def _fitting_ids(policy: Policy, queries: tuple[str, ...], budget: int) -> list[int]:
    while len(ids := encode_completion(policy.tokenizer, format_list(queries))) > budget and len(queries) > 1:
        queries = queries[:-1]
    return ids[:budget]


def warm_start_batches(
    policy: Policy, group_size: int, known: Paraphrases, seed: int
) -> Callable[[Sequence[Example], int], Batch]:
    """``(examples, step) -> batch`` of warm-start targets, drawn by (seed, step, example id) alone."""

    def batch(examples: Sequence[Example], step: int) -> Batch:
        draws = (np.random.default_rng([seed, step, example.example_id]) for example in examples)
        return place_targets(
            policy,
            [
                warm_start_target(example, policy.prompt, group_size, known, rng)
                for example, rng in zip(examples, draws, strict=True)
            ],
        )

    return batch
