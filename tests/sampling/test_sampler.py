"""The sampling loop: masks, log-probabilities, samples that depend on their name alone, filters, compile counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny import UNOPTIMISED, left_padded, quick, random_params, tiny_decoder

from jaxnr.config import MeshConfig
from jaxnr.mesh import batch_sharding, make_mesh, tree_shardings
from jaxnr.models.decoder import head_VD
from jaxnr.sampling.sampler import SamplingSettings, block_masses, choose, filtered, inverse_transform, make_sampler
from jaxnr.training.losses import token_logprobs

MODEL = tiny_decoder()
PARAMS = random_params(MODEL)
V, T, PAD = 61, 12, 0
STOPS = np.array([0, 7, 11, 23, 42], np.int32)  # the pad id is also a stop id, as in Qwen2.5
LENGTHS = (8, 3, 5, 1, 8, 2, 6, 4)
SAMPLER = make_sampler(MODEL, max_new_tokens=T, vocabulary_size=V, pad_id=PAD)
sample = quick(SAMPLER)


def draw(
    params=PARAMS,
    rows=range(8),
    samples=range(3),
    S=8,
    seed=0,
    step=0,
    stops=STOPS,
    place=None,
    sample=sample,
    **options,
):
    """Completions of the prompts ``rows``, each named by its row."""
    rows = np.array(rows)
    prompt_BS, mask_BS = left_padded(LENGTHS, S)
    arrays = (prompt_BS[rows], mask_BS[rows], rows.astype(np.int32))
    if place is not None:
        arrays = jax.device_put(arrays, place)
    names = (np.array(samples, np.int32), np.int32(seed), np.int32(step))
    return sample(params, *arrays, *names, SamplingSettings(**options), stops)


@pytest.fixture(scope="module")
def drawn():
    return jax.device_get(draw())


def rescored(tokens_BGT, temperature=1.0):
    prompt_BS, mask_BS = left_padded(LENGTHS, 8)

    @jax.jit
    def score(params, tokens_BGT, temperature):
        hidden = MODEL.apply({"params": params}, prompt_BS, mask_BS, tokens_BGT, method="shared")
        return token_logprobs(hidden, head_VD(params), tokens_BGT, vocabulary_size=V, temperature=temperature)

    return np.asarray(quick(score)(PARAMS, tokens_BGT, np.float32(temperature)))


def test_the_mask_ends_with_the_first_end_token_and_rows_without_one_are_cut(drawn):
    cut = 0
    for tokens, mask, logprobs, row_cut in zip(
        drawn.tokens_BGT.reshape(-1, T),
        drawn.mask_BGT.reshape(-1, T),
        drawn.logprobs_BGT.reshape(-1, T),
        drawn.cut_BG.reshape(-1),
        strict=True,
    ):
        ends = np.flatnonzero(np.isin(tokens, STOPS) & mask)
        length = ends[0] + 1 if ends.size else T
        np.testing.assert_array_equal(mask, np.arange(T) < length)
        assert row_cut == (ends.size == 0)
        assert (tokens[length:] == PAD).all()
        assert (logprobs[length:] == 0).all()
        assert (logprobs[:length] < 0).all()
        cut += row_cut
    assert 0 < cut < drawn.cut_BG.size  # both kinds of row were seen


def test_a_row_that_samples_the_pad_id_ends_there_and_counts_it():
    pad_first = draw(stops=np.arange(5, dtype=np.int32), samples=range(64))
    first, mask = np.asarray(pad_first.tokens_BGT[..., 0]), np.asarray(pad_first.mask_BGT)
    assert (first == PAD).any()
    np.testing.assert_array_equal(mask[first == PAD].sum(-1), 1)


def test_when_every_token_ends_each_completion_is_one_token():
    completions = draw(stops=np.arange(61, dtype=np.int32))
    assert np.asarray(completions.mask_BGT).sum(-1).tolist() == [[1] * 3] * 8
    assert not np.asarray(completions.cut_BG).any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_probabilities_are_those_of_rescoring(temperature):
    drawn = jax.device_get(draw(temperature=temperature))
    gap = np.abs(rescored(drawn.tokens_BGT, temperature) - drawn.logprobs_BGT)[drawn.mask_BGT]
    assert gap.max() < 1e-5


def assert_same(actual, expected, rows=slice(None), samples=slice(None)):
    actual = jax.device_get(actual)
    np.testing.assert_array_equal(actual.tokens_BGT, expected.tokens_BGT[rows][:, samples])
    np.testing.assert_array_equal(actual.mask_BGT, expected.mask_BGT[rows][:, samples])
    np.testing.assert_array_equal(actual.cut_BG, expected.cut_BG[rows][:, samples])
    np.testing.assert_allclose(actual.logprobs_BGT, expected.logprobs_BGT[rows][:, samples], atol=1e-5)


def test_the_order_of_the_batch_changes_no_sample(drawn):
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    assert_same(draw(rows=order), drawn, order)


def test_the_size_of_the_batch_the_group_and_the_padding_change_no_sample(drawn):
    assert_same(draw(rows=[4, 1]), drawn, [4, 1])
    assert_same(draw(samples=[2]), drawn, samples=[2])
    assert_same(draw(samples=[2, 1, 0]), drawn, samples=[2, 1, 0])
    assert_same(draw(S=13), drawn)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        pytest.param({"data": 1, "fsdp": 8}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 4}, marks=pytest.mark.slow),
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 1, "fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
        {"data": 1, "fsdp": 2, "tensor": 4},  # more devices than key heads
    ],
)
def test_the_mesh_changes_no_sample(drawn, sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    params = jax.device_put(PARAMS, tree_shardings(PARAMS, mesh))
    sampler = quick(make_sampler(MODEL, max_new_tokens=T, vocabulary_size=V, pad_id=PAD, mesh=mesh))
    completions = draw(params=params, place=batch_sharding(mesh), sample=sampler)
    assert_same(completions, drawn)
    for leaf in jax.tree.leaves(completions):
        assert leaf.sharding.is_equivalent_to(batch_sharding(mesh), leaf.ndim)


@pytest.mark.parametrize("name", [{"seed": 1}, {"step": 1}, {"samples": [3, 4, 5]}])
def test_another_name_is_another_sample(drawn, name):
    assert (np.asarray(draw(**name).tokens_BGT) != drawn.tokens_BGT).any(axis=-1).mean() > 0.9


def test_every_completion_of_every_prompt_is_drawn_apart_even_where_the_prompts_are_equal():
    prompt_BS, mask_BS = left_padded([8] * 8, 8)
    same = np.repeat(prompt_BS[:1], 8, axis=0)
    names = (np.arange(8, dtype=np.int32), np.arange(3, dtype=np.int32), np.int32(0), np.int32(0))
    completions = sample(PARAMS, same, mask_BS, *names, SamplingSettings(), np.full(5, -1, np.int32))
    assert len(np.unique(np.asarray(completions.tokens_BGT).reshape(-1, T), axis=0)) == 24


def test_temperature_zero_is_the_argmax_rollout_and_top_k_one_equals_it():
    no_stop = np.full(5, -1, np.int32)
    greedy = jax.device_get(draw(temperature=0.0, stops=no_stop))
    assert greedy.mask_BGT.all()
    assert greedy.cut_BG.all()
    prompt_BS, mask_BS = left_padded(LENGTHS, 8)
    sequence = np.concatenate([prompt_BS, np.zeros((8, T), np.int32)], axis=1)
    mask = np.concatenate([mask_BS, np.zeros((8, T), bool)], axis=1)

    @jax.jit
    def logits(params, tokens_BS, mask_BS):
        return MODEL.apply({"params": params}, tokens_BS, mask_BS) @ head_VD(params)[:V].T

    forward = quick(logits)
    for t in range(8, 8 + T):
        sequence[:, t] = np.argmax(forward(PARAMS, sequence, mask)[:, t - 1], axis=-1)
        mask[:, t] = True
    for sample_row in range(3):
        np.testing.assert_array_equal(greedy.tokens_BGT[:, sample_row], sequence[:, 8:])
    np.testing.assert_array_equal(draw(top_k=1, stops=no_stop).tokens_BGT, greedy.tokens_BGT)
    np.testing.assert_array_equal(draw(top_p=1e-6, stops=no_stop).tokens_BGT, greedy.tokens_BGT)
    gap = np.abs(rescored(greedy.tokens_BGT) - greedy.logprobs_BGT)
    assert gap.max() < 1e-5


def test_vocabulary_rows_past_the_real_vocabulary_are_never_sampled():
    """The padded rows are made the likeliest of all, so that without the mask they would be drawn."""
    model = tiny_decoder(tie_word_embeddings=False)
    params = random_params(model)
    params["lm_head"] = params["lm_head"].at[V:].multiply(100.0)
    arguments = (*left_padded(LENGTHS, 8), np.arange(8, dtype=np.int32), np.arange(3, dtype=np.int32))
    arguments = (*arguments, np.int32(0), np.int32(0), SamplingSettings(), np.full(5, -1, np.int32))
    for vocabulary_size, reaches_padding in ((V, False), (64, True)):
        sampler = make_sampler(model, max_new_tokens=T, vocabulary_size=vocabulary_size, pad_id=PAD)
        completions = quick(sampler)(params, *arguments)
        assert bool((np.asarray(completions.tokens_BGT) >= V).any()) == reaches_padding


def test_new_settings_and_stop_ids_compile_nothing():
    rows = (*left_padded([3], 4), np.arange(1, dtype=np.int32), np.arange(1, dtype=np.int32))
    for index, options in enumerate(
        [{}, {"temperature": 0.5}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 2, "top_p": 0.1}]
    ):
        stops = np.array([index, 60 - index], np.int32)
        SAMPLER(PARAMS, *rows, np.int32(index), np.int32(index), SamplingSettings(**options), stops)
        assert SAMPLER._cache_size() == 1


choose_rows = jax.jit(
    lambda logits_NV, uniforms_N, limits: choose(logits_NV.T, uniforms_N, limits), compiler_options=UNOPTIMISED
)
filter_rows = jax.jit(filtered, compiler_options=UNOPTIMISED)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_choose_draws_from_the_softmax(temperature):
    logits = np.array([2.0, -1.0, 0.0, 0.5, -3.0, 1.0, 1.0, -0.5], np.float32)
    N = 20_000
    uniforms = jax.random.uniform(jax.random.key(1), (N,))
    tokens, logprobs = choose_rows(np.tile(logits, (N, 1)), uniforms, SamplingSettings(temperature=temperature))
    expected = scipy.special.softmax(logits.astype(np.float64) / temperature)
    counts = np.bincount(np.asarray(tokens), minlength=8)
    assert scipy.stats.chisquare(counts, expected * N).pvalue > 1e-3
    np.testing.assert_allclose(logprobs, np.log(expected)[np.asarray(tokens)], atol=1e-5)


def nucleus(probabilities, top_k, top_p):
    """The kept tokens of one row, in float64 NumPy."""
    order = np.argsort(-probabilities, kind="stable")[: top_k or None]
    ranked = probabilities[order] / probabilities[order].sum()
    before = np.cumsum(ranked) - ranked
    return set(order[(before < top_p) | (np.arange(len(order)) == 0)].tolist())


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (3, 1.0), (0, 0.5), (0, 0.9), (5, 0.7), (100, 1.0), (0, 0.0)]
)
def test_top_k_and_top_p_restrict_the_support_to_the_nucleus(top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32) * 2
    limits = SamplingSettings(top_k=top_k, top_p=top_p)
    kept = np.isfinite(filter_rows(logits, limits))
    expected = [nucleus(row, top_k, top_p) for row in scipy.special.softmax(logits.astype(np.float64), axis=-1)]
    assert [set(np.flatnonzero(row).tolist()) for row in kept] == expected
    many = np.repeat(logits, 200, axis=0)
    tokens, _ = choose_rows(many, jax.random.uniform(jax.random.key(0), (len(many),)), limits)
    seen = [set(row) for row in np.asarray(tokens).reshape(50, 200).tolist()]
    assert all(row <= allowed for row, allowed in zip(seen, expected, strict=True))
    assert any(row == allowed for row, allowed in zip(seen, expected, strict=True))


def probability_of_choice(logits_NV, uniforms_N, limits):
    """The chosen token's probability after the filters, relative to the likeliest one's."""
    tokens, logprobs = choose_rows(logits_NV, uniforms_N, limits)
    assert np.isfinite(logprobs).all()
    scaled = logits_NV / (limits.temperature or 1.0)
    kept = filter_rows(scaled, limits) if limits.top_k or limits.top_p < 1 else scaled
    relative = np.exp(np.asarray(kept) - np.max(scaled, axis=-1, keepdims=True))
    return np.take_along_axis(relative, np.asarray(tokens)[:, None], axis=-1)


@settings(max_examples=60, deadline=None)
@given(
    logits=hnp.arrays(np.float32, (1, 16), elements=st.floats(-300, 300, width=32)),
    uniform=st.one_of(
        st.sampled_from([0.0, 2.0**-24, 2.0**-23, 0.5, 1 - 2.0**-23, 1 - 2.0**-24]),
        st.floats(0, 1, width=32, exclude_max=True),
    ),
    temperature=st.sampled_from([0.0, 0.1, 1.0, 3.0]),
    top_k=st.integers(0, 17),
    top_p=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
)
def test_choose_takes_a_token_of_positive_probability(logits, uniform, temperature, top_k, top_p):
    limits = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    assert (probability_of_choice(logits, np.array([uniform], np.float32), limits) > 0).all()


def test_choose_takes_a_token_of_positive_probability_at_every_boundary_of_a_long_vocabulary():
    """Rounding in a parallel prefix sum must not put a filtered token where two kept ones meet."""
    logits = np.random.default_rng(3).normal(size=1024).astype(np.float32) * 3
    limits = SamplingSettings(top_k=200)
    kept = scipy.special.softmax(np.asarray(filter_rows(logits[None], limits))[0])
    edges = (np.cumsum(kept) / np.sum(kept))[kept > 0].astype(np.float32)
    edges = np.concatenate([np.nextafter(edges, np.float32(0)), edges, np.nextafter(edges, np.float32(2))])
    uniforms = np.clip(edges, 0, np.float32(1 - 2.0**-24)).astype(np.float32)
    assert (probability_of_choice(jnp.tile(logits, (len(uniforms), 1)), uniforms, limits) > 0).all()


@pytest.mark.parametrize("size", [1, 2, 128, 129, 1000])  # one block, whole blocks, and a last one that is not full
def test_inverse_transform_is_the_search_in_the_running_sum(size):
    rng = np.random.default_rng(size)
    masses = 2.0 ** rng.integers(-4, 1, (200, size)) * rng.integers(0, 2, (200, size))  # sums are exact
    masses[:, rng.integers(size)] = 1  # of logit 0, the highest
    uniforms = rng.integers(0, 2**10, 200).astype(np.float32) / 2**10
    expected = [
        np.searchsorted(row.cumsum(), uniform * row.sum(), side="right")
        for row, uniform in zip(masses, uniforms, strict=True)
    ]
    with np.errstate(divide="ignore"):
        logits_VN, highest_N = np.log(masses.T).astype(np.float32), np.zeros(200, np.float32)
    drawn = inverse_transform(logits_VN, highest_N, block_masses(logits_VN, highest_N), uniforms)
    np.testing.assert_array_equal(drawn, expected)
