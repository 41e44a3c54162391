"""From examples to sampled lists: encode the prompts, sample G completions each, decode and parse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jaxnr.config import PromptConfig
from jaxnr.data.examples import Example
from jaxnr.mesh import batch_sharding
from jaxnr.models.decoder import Decoder
from jaxnr.prompting.output import ParsedList, parse_list
from jaxnr.prompting.prompt import as_shown, encode_prompt, pad_prompts
from jaxnr.rewards.specificity import TermStatistics
from jaxnr.sampling.sampler import Completions, SamplingSettings, make_sampler
from jaxnr.training.steps import Batch


@dataclasses.dataclass(frozen=True)
class Policy:
    """A decoder with what it takes to write lists: tokenizer, prompt settings and the compiled sampler."""

    model: Decoder
    tokenizer: PreTrainedTokenizerBase
    prompt: PromptConfig
    mesh: Mesh
    sampler: Callable
    signal_terms: TermStatistics
    """Of signals and articles: which words of a signal are rare, where a prompt shows only these."""

    @property
    def pad_id(self) -> int:
        """Fills prompts on the left and completions on the right."""
        return cast(int, self.tokenizer.pad_token_id)

    @property
    def vocabulary_size(self) -> int:
        """Number of real tokens; embedding rows past it are padding."""
        return len(self.tokenizer)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Sampled lists of B prompts: the arrays that a step trains on, and what was read from them."""

    batch: Batch
    completions: Completions
    lists: list[list[ParsedList]]


def make_policy(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    mesh: Mesh,
    signal_terms: TermStatistics,
) -> Policy:
    """Bundles a model with its tokenizer and its jitted sampler."""
    sampler = make_sampler(
        model,  # pyright: ignore[reportArgumentType]  # flax modules are hashable by their fields
        max_new_tokens=prompt.max_new_tokens,
        vocabulary_size=len(tokenizer),
        pad_id=cast(int, tokenizer.pad_token_id),
    )
    return Policy(model, tokenizer, prompt, mesh, sampler, signal_terms)


def place_prompts(policy: Policy, examples: Sequence[Example]) -> tuple[jax.Array, jax.Array]:
    """The examples' prompts, left-padded to a bucket and spread over the mesh: tokens and mask [B, S]."""
    count, terms = policy.prompt.signal_words, policy.signal_terms
    ids = [encode_prompt(policy.tokenizer, as_shown(example, terms, count), policy.prompt).ids for example in examples]
    prompt_BS, mask_BS = pad_prompts(ids, policy.prompt.prompt_buckets, policy.pad_id)
    return jax.device_put((prompt_BS, mask_BS), batch_sharding(policy.mesh))


def roll_out(
    policy: Policy,
    params: dict,
    examples: Sequence[Example],
    *,
    samples: int,
    seed: int,
    step: int,
    settings: SamplingSettings,
) -> Rollout:
    """Samples ``samples`` lists for each example; (seed, step, example id, sample index) names each of them."""
    prompt_BS, mask_BS = place_prompts(policy, examples)
    prompt_ids_B = jax.device_put(
        np.array([example.example_id for example in examples], np.int32), batch_sharding(policy.mesh)
    )
    completions = policy.sampler(
        params,
        prompt_BS,
        mask_BS,
        prompt_ids_B,
        np.arange(samples, dtype=np.int32),
        np.int32(seed),
        np.int32(step),
        settings,
        np.array([policy.tokenizer.eos_token_id, policy.pad_id], np.int32),
    )
    batch = Batch(prompt_BS, mask_BS, completions.tokens_BGT, completions.mask_BGT)
    return Rollout(batch, completions, read_lists(policy, completions))


class Chunk(NamedTuple):
    """Examples, and the same filled up to the chunk size with copies of the last, so that every chunk has one shape."""

    examples: list[Example]
    padded: list[Example]


def padded_chunks(examples: Sequence[Example], size: int) -> Iterator[Chunk]:
    """The examples in chunks of ``size``. A copy draws the samples of its original; callers leave copies out."""
    for start in range(0, len(examples), size):
        chunk = list(examples[start : start + size])
        yield Chunk(chunk, chunk + [chunk[-1]] * (size - len(chunk)))


def read_lists(policy: Policy, completions: Completions) -> list[list[ParsedList]]:
    """Decodes and parses every completion; one that was cut at the budget has the problem "cut"."""
    tokens_BGT, mask_BGT, cut_BG = jax.device_get((completions.tokens_BGT, completions.mask_BGT, completions.cut_BG))
    B, G, T = tokens_BGT.shape
    lengths = mask_BGT.sum(-1).reshape(-1) - ~cut_BG.reshape(-1)  # without the end token, which is no text
    rows = [row[:length] for row, length in zip(tokens_BGT.reshape(-1, T), lengths, strict=True)]
    # Special tokens stay in the text: a list with one inside is malformed and has to be seen as such.
    texts = policy.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    parsed = [
        ParsedList((), "cut") if cut else parse_list(text, policy.prompt)
        for text, cut in zip(texts, cut_BG.reshape(-1), strict=True)
    ]
    return [parsed[row * G : (row + 1) * G] for row in range(B)]
