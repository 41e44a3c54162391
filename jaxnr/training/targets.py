"""What supervised steps imitate: for the warm start, the users' own signals; for distillation, the teacher's lists.

A model that begins from nothing stands where a pretrained, prompted language model would: it knows the format and which
texts go together, and nothing of the rewards. It learns that from the training split alone, without labels: a list is
made of random signals of the user, some still shown in the prompt (copying) and some hidden from it (association).
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
from jaxnr.training.rollout import Policy, place_prompts
from jaxnr.training.steps import Batch

HIDDEN_SHARE = 0.3
"""Of the signals, on average, in the half of the lists that are made of hidden ones."""


class Target(NamedTuple):
    """A prompt and the list to imitate."""

    example: Example
    queries: tuple[str, ...]


def warm_start_target(example: Example, config: PromptConfig, rng: np.random.Generator) -> Target:
    """A list of random signals of the user; in half the cases of signals that the prompt then does not show."""
    signals = example.signals
    hidden = rng.random(len(signals)) < HIDDEN_SHARE
    if rng.random() < 0.5 and hidden.sum() >= config.min_queries and (~hidden).any():
        shown = tuple(signal for signal, hide in zip(signals, hidden, strict=True) if not hide)
        pool = [signal.text for signal, hide in zip(signals, hidden, strict=True) if hide]
    else:
        shown, pool = signals, [signal.text for signal in signals]
    wanted = int(rng.integers(config.min_queries, config.max_queries + 1))
    texts = [pool[row] for row in rng.permutation(len(pool))]
    return Target(example._replace(signals=shown), queries_from(texts, config, wanted))


def queries_from(texts: Sequence[str], config: PromptConfig, wanted: int) -> tuple[str, ...]:
    """The first ``wanted`` distinct texts, each cut to the words a query may have."""
    queries: dict[str, str] = {}
    for text in texts:
        query = " ".join(text.split()[: config.max_query_words])
        if len(queries) < wanted:
            queries.setdefault(query.casefold(), query)
    return tuple(queries.values())


def place_targets(policy: Policy, targets: Sequence[Target]) -> Batch:
    """Prompts and their lists as one batch with G = 1; a list over the budget loses its last queries."""
    T = policy.prompt.max_new_tokens
    tokens_BGT = np.full((len(targets), 1, T), policy.tokenizer.pad_token_id, np.int32)
    mask_BGT = np.zeros((len(targets), 1, T), bool)
    for row, target in enumerate(targets):
        ids = _fitting_ids(policy, target.queries, T)
        tokens_BGT[row, 0, : len(ids)] = ids
        mask_BGT[row, 0, : len(ids)] = True
    prompt_BS, prompt_mask_BS = place_prompts(policy, [target.example for target in targets])
    return Batch(prompt_BS, prompt_mask_BS, *jax.device_put((tokens_BGT, mask_BGT), batch_sharding(policy.mesh)))


def _fitting_ids(policy: Policy, queries: tuple[str, ...], budget: int) -> list[int]:
    for count in range(len(queries), 0, -1):
        ids = encode_completion(policy.tokenizer, format_list(queries[:count]))
        if len(ids) <= budget:
            return ids
    return ids[:budget]


def warm_start_batches(policy: Policy, seed: int) -> Callable[[Sequence[Example], int], Batch]:
    """``(examples, step) -> batch`` of warm-start targets, drawn by (seed, step, example id) alone."""

    def batch(examples: Sequence[Example], step: int) -> Batch:
        return place_targets(
            policy,
            [
                warm_start_target(example, policy.prompt, np.random.default_rng([seed, step, example.example_id]))
                for example in examples
            ],
        )

    return batch
