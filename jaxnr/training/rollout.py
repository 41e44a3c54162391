"""From examples to sampled lists: encode the prompts, sample G completions each, decode and parse."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jaxnr.config import PromptConfig
from jaxnr.data.examples import Example
from jaxnr.hosts import gather_rows, largest, place_rows, read_rows
from jaxnr.mesh import batch_sharding
from jaxnr.models.decoder import Decoder
from jaxnr.prompting.output import ParsedList, parse_list
from jaxnr.prompting.prompt import as_shown, encode_prompt, pad_prompts
from jaxnr.rewards.specificity import TermStatistics
from jaxnr.sampling.sampler import Completions, SamplingSettings, make_sampler
from jaxnr.training.steps import Batch, merge_batch, split_batch


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
    """Those of this process's prompts."""


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
        mesh=mesh,
    )
    return Policy(model, tokenizer, prompt, mesh, sampler, signal_terms)


def place_prompts(policy: Policy, examples: Sequence[Example]) -> tuple[jax.Array, jax.Array]:
    """Prompts, left-padded to a bucket and spread over the mesh: tokens and mask [B, S].

    ``examples`` are this process's rows of the batch.
    """
    count, terms = policy.prompt.signal_words, policy.signal_terms
    ids = [encode_prompt(policy.tokenizer, as_shown(example, terms, count), policy.prompt).ids for example in examples]
    buckets = policy.prompt.prompt_buckets
    if len(buckets) > 1:  # the same in all processes
        longest = largest(max(map(len, ids)))
        buckets = [length for length in buckets if length >= longest] or buckets
    return place_rows(pad_prompts(ids, buckets, policy.pad_id), policy.mesh)


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
    """Samples ``samples`` lists for each example; (seed, step, example id, sample index) names each of them.

    ``examples`` are this process's rows of the batch.
    """
    prompts = place_prompts(policy, examples)
    completions = _sample(policy, params, examples, prompts, samples, seed, step, settings)
    batch = Batch(*prompts, completions.tokens_BGT, completions.mask_BGT)
    return Rollout(batch, completions, read_lists(policy, completions))


def roll_out_and_score(
    policy: Policy,
    params: dict,
    examples: Sequence[Example],
    score: Callable[[Sequence[Example], list[list[ParsedList]]], Mapping[str, np.ndarray]],
    microbatches: int,
    *,
    samples: int,
    seed: int,
    step: int,
    settings: SamplingSettings,
) -> tuple[Rollout, dict[str, np.ndarray]]:
    """``roll_out``, with the arrays [B, G] that ``score(examples, lists)`` gives for this process's rows of it.

    Goes a microbatch at a time (see ``split_batch``): while the lists of one are read and scored, in a thread of its
    own, the device samples the next. Of several processes each waits for the scores before it asks for the samples
    after those: programs of all processes have to come in the same order in each.
    """
    prompts = place_prompts(policy, examples)
    parts = split_batch(prompts, microbatches)
    examples_of = [examples[number::microbatches] for number in range(microbatches)]

    def sample(number: int) -> Completions:  # returns at once: the device goes on by itself
        prompt_BS, mask_BS = jax.tree.map(lambda x: jax.device_put(x[number], batch_sharding(policy.mesh)), parts)
        return _sample(policy, params, examples_of[number], (prompt_BS, mask_BS), samples, seed, step, settings)

    sampled, lists, scoring = [sample(0)], [], []
    with ThreadPoolExecutor(max_workers=1) as scorer:
        for number in range(microbatches):
            if number + 1 < microbatches:
                sampled.append(sample(number + 1))
            lists.append(read_lists(policy, sampled[number]))
            scoring.append(scorer.submit(score, examples_of[number], lists[number]))
            if jax.process_count() > 1:
                scoring[-1].result()
    scores = [dict(future.result()) for future in scoring]
    completions = _merger(policy.mesh)(sampled)
    batch = Batch(*prompts, completions.tokens_BGT, completions.mask_BGT)
    merged_lists = [lists[place % microbatches][place // microbatches] for place in range(len(examples))]
    merged_scores = {name: merge_batch(np.stack([part[name] for part in scores])) for name in scores[0]}
    return Rollout(batch, completions, merged_lists), merged_scores


@functools.cache
def _merger(mesh: Mesh) -> Callable:
    """Compiled: the completions of a whole batch from those of its microbatches."""

    def merge(parts: list[Completions]) -> Completions:
        return merge_batch(jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts))

    return jax.jit(merge, out_shardings=batch_sharding(mesh))


def _sample(
    policy: Policy,
    params: dict,
    examples: Sequence[Example],
    prompts: tuple[jax.Array, jax.Array],
    samples: int,
    seed: int,
    step: int,
    settings: SamplingSettings,
) -> Completions:
    """Completions of the examples' placed prompts."""
    prompt_ids_B = place_rows(np.array([example.example_id for example in examples], np.int32), policy.mesh)
    return policy.sampler(
        params,
        *prompts,
        prompt_ids_B,
        np.arange(samples, dtype=np.int32),
        np.int32(seed),
        np.int32(step),
        settings,
        np.array([policy.tokenizer.eos_token_id, policy.pad_id], np.int32),
    )


def all_lists(policy: Policy, rollout: Rollout) -> list[list[ParsedList]]:
    """The lists of all processes' prompts, in every process."""
    if jax.process_count() == 1:
        return rollout.lists
    return read_lists(policy, gather_rows(rollout.completions, policy.mesh))


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
    """Decodes and parses this process's completions; one that was cut at the budget has the problem "cut"."""
    tokens_BGT, mask_BGT, cut_BG = read_rows((completions.tokens_BGT, completions.mask_BGT, completions.cut_BG))
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
