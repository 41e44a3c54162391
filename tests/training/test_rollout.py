"""Rollouts: completions as parsed lists, and chunks of one shape."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_params, tiny_decoder

from jaxnr.config import MeshConfig, PromptConfig
from jaxnr.data.examples import Example, Signal
from jaxnr.errors import InputError
from jaxnr.mesh import make_mesh
from jaxnr.prompting.output import ParsedList, format_list
from jaxnr.prompting.prompt import as_shown, encode_completion, encode_prompt
from jaxnr.prompting.tokenizer import train_tokenizer
from jaxnr.rewards.specificity import TermStatistics
from jaxnr.sampling.sampler import Completions, SamplingSettings
from jaxnr.training.rollout import make_policy, padded_chunks, place_prompts, read_lists, roll_out, roll_out_and_score

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


DRAW = {"samples": 2, "seed": 0, "step": 3, "settings": SamplingSettings()}


def readers(count: int) -> list[Example]:
    """Examples with prompts of different lengths."""
    return [
        Example(
            number, f"u{number}", 10, tuple(Signal(5, "search", TEXTS[n % 3], None) for n in range(1 + number)), (), ()
        )
        for number in range(count)
    ]


def length_of(examples, lists) -> dict[str, np.ndarray]:
    """A score that tells of which example and which sample it is."""
    counts = [[len(parsed.queries) for parsed in group] for group in lists]
    return {"total": np.array([example.example_id for example in examples])[:, None] + 0.1 * np.array(counts)}


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_microbatches_sample_and_score_what_one_batch_does(policy, microbatches):
    params, examples = random_params(policy.model), readers(4)
    whole = roll_out(policy, params, examples, **DRAW)
    rollout, scores = roll_out_and_score(policy, params, examples, length_of, microbatches, **DRAW)
    np.testing.assert_array_equal(rollout.batch.completion_BGT, whole.batch.completion_BGT)
    np.testing.assert_array_equal(rollout.batch.mask_BGT, whole.batch.mask_BGT)
    np.testing.assert_allclose(rollout.completions.logprobs_BGT, whole.completions.logprobs_BGT, atol=1e-5)
    assert rollout.lists == whole.lists
    np.testing.assert_array_equal(scores["total"], length_of(examples, whole.lists)["total"])


def test_the_next_microbatch_is_sampled_while_one_is_scored(policy):
    """The first score waits for the third microbatch, which is asked for once the second's lists are read."""
    calls, third = [], threading.Event()

    def sampler(*arguments):
        calls.append(policy.sampler(*arguments))
        if len(calls) == 3:
            third.set()
        return calls[-1]

    def score(examples, lists):
        assert third.wait(timeout=60)
        return length_of(examples, lists)

    watched = dataclasses.replace(policy, sampler=sampler)
    roll_out_and_score(watched, random_params(policy.model), readers(4), score, 4, **DRAW)
    assert len(calls) == 4


def test_of_several_processes_each_scores_before_it_asks_for_later_samples(policy, monkeypatch):
    """So that what is scored by programs of all processes comes in one order in each of them."""
    order = []

    def sampler(*arguments):
        order.append("sample")
        return policy.sampler(*arguments)

    def score(examples, lists):
        time.sleep(0.05)
        order.append("score")
        return length_of(examples, lists)

    params = random_params(policy.model)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jaxnr.training.rollout.largest", lambda number: number)
    roll_out_and_score(dataclasses.replace(policy, sampler=sampler), params, readers(4), score, 4, **DRAW)
    assert order == ["sample", *["sample", "score"] * 3, "score"]


def test_what_a_score_raises_is_raised(policy):
    def score(examples, lists):
        raise InputError("no judge")

    with pytest.raises(InputError, match="no judge"):
        roll_out_and_score(policy, random_params(policy.model), readers(2), score, 2, **DRAW)
