"""What supervised steps imitate: for the warm start, the users' own signals; for distillation, the teacher's lists.

A model that begins from nothing is to stand where a pretrained, prompted language model would: it knows the format and
can read its prompt, and nothing of the rewards. It learns that from the training split alone, without labels. A list is
the first few lines of the prompt, the user's latest signals, noise and all, each said as a search query in its own
telling words. Signals in random order would teach the same format, but after each query all of them would be equally
likely to be next, and a small model's first words are then mostly words of nobody's.

At first every list goes on to the last line, which teaches reading; then most lists are short. How many queries pay is
not known before there are rewards, and a few whole lists stay for RL to find out. Half of the prompts are of random
words: a training split has few words and users, and a model would learn them by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxnr.config import PromptConfig
from jaxnr.data.examples import Example, Signal
from jaxnr.hosts import place_rows
from jaxnr.prompting.output import format_list
from jaxnr.prompting.prompt import as_shown, encode_completion
from jaxnr.rewards.specificity import TermStatistics
from jaxnr.training.rollout import Policy, place_prompts
from jaxnr.training.steps import Batch

STOP = 0.7
"""Chance that a list ends after a query, from the shortest allowed list on."""

WHOLE = 0.04
"""Share of the lists that end only where the prompt does, so that its end is known as one."""

RANDOM, DIFFERENT_WORDS = 0.5, 25
"""Share of the prompts that are of random words, and how many different ones each has at most. So few stand in several
lines each, and only what is before a word tells which line it is read from."""


class Target(NamedTuple):
    """A prompt and G lists to imitate; they share the prompt, as completions do."""

    example: Example
    lists: tuple[tuple[str, ...], ...]


def warm_start_target(
    example: Example,
    config: PromptConfig,
    group_size: int,
    terms: TermStatistics,
    rng: np.random.Generator,
    whole_share: float = WHOLE,
) -> Target:
    """Lists of the user's latest signals: ``whole_share`` of them of all, the others of a random length."""
    shown = as_shown(example, terms, config.signal_words or config.max_query_words).signals
    texts = queries_from([signal.text for signal in shown], config, config.max_queries)
    whole = rng.random(group_size) < whole_share
    lengths = np.where(whole, config.max_queries, config.min_queries - 1 + rng.geometric(STOP, group_size))
    return Target(example, tuple(texts[:length] for length in lengths))


def queries_from(texts: Sequence[str], config: PromptConfig, wanted: int) -> tuple[str, ...]:
    """The first ``wanted`` distinct texts, each cut to the words a query may have."""
    queries: dict[str, str] = {}
    for text in texts:
        query = " ".join(text.split()[: config.max_query_words])
        if len(queries) < wanted:
            queries.setdefault(query.casefold(), query)
    return tuple(queries.values())


def place_targets(policy: Policy, targets: Sequence[Target]) -> Batch:
    """Prompts and their lists as one batch; a list over the generation budget loses its last queries.

    ``targets`` are this process's rows of the batch.
    """
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
    return Batch(prompt_BS, prompt_mask_BS, *place_rows((tokens_BGT, mask_BGT), policy.mesh))


def _fitting_ids(policy: Policy, queries: tuple[str, ...], budget: int) -> list[int]:
    while len(ids := encode_completion(policy.tokenizer, format_list(queries))) > budget and len(queries) > 1:
        queries = queries[:-1]
    return ids[:budget]


def warm_start_batches(
    policy: Policy, group_size: int, seed: int, words: Sequence[str], reading_steps: int, random_reading_steps: int
) -> Callable[[Sequence[Example], int], Batch]:
    """``(examples, step) -> batch`` of warm-start targets, drawn by (seed, step, example id) alone.

    ``RANDOM`` of the prompts are of random ``words``. Lists are whole in the first ``reading_steps``, and those of
    random words in the first ``random_reading_steps``.
    """

    known = np.asarray(words)

    def target(example: Example, step: int) -> Target:
        rng = np.random.default_rng([seed, step, example.example_id])
        scrambled = rng.random() < RANDOM
        if scrambled:
            example = in_random_words(example, rng.choice(known, DIFFERENT_WORDS).tolist(), rng)
        whole_share = 1.0 if step < (random_reading_steps if scrambled else reading_steps) else WHOLE
        return warm_start_target(example, policy.prompt, group_size, policy.signal_terms, rng, whole_share)

    return lambda examples, step: place_targets(policy, [target(example, step) for example in examples])


def in_random_words(example: Example, words: Sequence[str], rng: np.random.Generator) -> Example:
    """The example with each word of its signals replaced by a random one of ``words``."""

    def text_like(signal: Signal) -> str:
        return " ".join(rng.choice(words, len(signal.text.split())))

    return example._replace(signals=tuple(signal._replace(text=text_like(signal)) for signal in example.signals))
