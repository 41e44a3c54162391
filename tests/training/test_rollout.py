"""Rollouts: completions as parsed lists, and chunks of one shape."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_decoder

from jaxnr.config import MeshConfig, PromptConfig
from jaxnr.data.examples import Example, Signal
from jaxnr.mesh import make_mesh
from jaxnr.prompting.output import ParsedList, format_list
from jaxnr.prompting.prompt import as_shown, encode_completion, encode_prompt
from jaxnr.prompting.tokenizer import train_tokenizer
from jaxnr.rewards.specificity import TermStatistics
from jaxnr.sampling.sampler import Completions
from jaxnr.training.rollout import make_policy, padded_chunks, place_prompts, read_lists

CFG = PromptConfig(
    signal_words=0, max_prompt_tokens=80, prompt_buckets=(60, 80), max_new_tokens=24, min_queries=1, max_queries=4
)
TEXTS = ["storm florida", "rowing cup final", "electric car prices"]
T = CFG.max_new_tokens


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    tokenizer = train_tokenizer([*TEXTS, CFG.instructions] * 2, 500, tmp_path_factory.mktemp("tokenizer"))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    statistics = TermStatistics.fit(TEXTS)
    return make_policy(tiny_decoder(vocab_size=len(tokenizer)), tokenizer, CFG, mesh, statistics)


def completions_of(policy, rows) -> Completions:
    """Completions [B, G, T] of (ids, cut) rows, as the sampler returns them."""
    B, G = len(rows), len(rows[0])
    tokens = np.full((B, G, T), policy.tokenizer.pad_token_id, np.int32)
    mask, cut = np.zeros((B, G, T), bool), np.zeros((B, G), bool)
    for b, group in enumerate(rows):
        for g, (ids, is_cut) in enumerate(group):
            tokens[b, g, : len(ids)], mask[b, g, : len(ids)], cut[b, g] = ids, True, is_cut
    return Completions(tokens, np.zeros((B, G, T), np.float32), mask, cut)  # pyright: ignore[reportArgumentType]


def test_lists_are_read_without_their_end_token(policy):
    whole = encode_completion(policy.tokenizer, format_list(TEXTS[:2]))
    single = encode_completion(policy.tokenizer, format_list(TEXTS[2:]))
    broken = encode_completion(policy.tokenizer, "no list")
    read = read_lists(policy, completions_of(policy, [[(whole, False), (broken, False)], [(single, False)] * 2]))
    assert read == [
        [ParsedList(tuple(TEXTS[:2]), None), ParsedList((), "no_array")],
        [ParsedList(tuple(TEXTS[2:]), None)] * 2,
    ]


def test_a_completion_cut_at_the_budget_is_no_list_whatever_it_says(policy):
    whole = encode_completion(policy.tokenizer, format_list(TEXTS[:2]))[:-1]
    ((cut,), (ended,)) = read_lists(policy, completions_of(policy, [[(whole, True)], [([*whole, 2], False)]]))
    assert cut == ParsedList((), "cut")
    assert ended.problem is None


def test_either_stop_token_ends_a_list_and_one_inside_spoils_it(policy):
    tokenizer = policy.tokenizer
    ids = encode_completion(tokenizer, format_list(TEXTS[:2]))[:-1]
    (row,) = read_lists(
        policy,
        completions_of(policy, [[
            ([*ids, tokenizer.eos_token_id], False),
            ([*ids, tokenizer.pad_token_id], False),
            ([*ids[:3], tokenizer.convert_tokens_to_ids("<|im_start|>"), *ids[3:], tokenizer.eos_token_id], False),
        ]]),
    )  # fmt: skip
    assert row[0] == row[1] == ParsedList(tuple(TEXTS[:2]), None)
    assert row[2].problem is not None


def example_of(example_id, texts) -> Example:
    return Example(example_id, "u", 9, tuple(Signal(t, "search", text, None) for t, text in enumerate(texts)), (), ())


def test_prompts_are_left_padded_to_the_smallest_bucket(policy):
    examples = [example_of(0, TEXTS[:1]), example_of(1, TEXTS)]
    shown = [as_shown(example, policy.signal_terms, CFG.signal_words) for example in examples]
    ids = [encode_prompt(policy.tokenizer, example, CFG).ids for example in shown]
    tokens_BS, mask_BS = map(np.asarray, place_prompts(policy, examples))
    assert tokens_BS.shape[1] == next(bucket for bucket in CFG.prompt_buckets if bucket >= max(map(len, ids)))
    for row, mask, wanted in zip(tokens_BS, mask_BS, ids, strict=True):
        assert row[mask].tolist() == wanted
        assert mask[-len(wanted) :].all()


@given(st.lists(st.integers(0, 99), max_size=20), st.integers(1, 8))
def test_chunks_hold_every_example_once_and_have_one_shape(numbers, size):
    examples = [example_of(number, ()) for number in numbers]
    chunks = list(padded_chunks(examples, size))
    assert [example for chunk in chunks for example in chunk.examples] == examples
    for chunk in chunks:
        assert len(chunk.padded) == size
        assert chunk.padded[: len(chunk.examples)] == chunk.examples
        assert set(chunk.padded[len(chunk.examples) :]) <= {chunk.examples[-1]}
