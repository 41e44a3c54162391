"""Parameters that begin from nothing: vectors by co-occurrence, and one head a group that copies what is like it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, random_params, tiny_decoder

from jaxnr.models.decoder import rotate
from jaxnr.prompting.tokenizer import train_tokenizer
from jaxnr.training.fresh import EMBEDDING_NORM, VALUE_SCALE, copying_attention, fresh_params, token_vectors

KEY = jax.random.key(1)
SUBJECTS = ("hurricane storm florida coast", "rowing regatta crew river", "battery car factory prices")


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.permutation(subject.split())[:3]) for subject in SUBJECTS for _ in range(30)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts):
    return train_tokenizer(texts, 500, tmp_path_factory.mktemp("tokenizer"))


def test_all_vectors_have_one_length(tokenizer, texts):
    vectors_VD = token_vectors(tokenizer, texts, 24, seed=1)
    assert vectors_VD.shape == (len(tokenizer), 24)
    assert vectors_VD.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors_VD, axis=1), EMBEDDING_NORM, rtol=1e-5)


def test_words_of_the_same_texts_are_nearer_than_others(tokenizer, texts):
    vectors_VD = token_vectors(tokenizer, texts, 4, seed=1)  # fewer directions than words: they have to be shared
    rows = [[tokenizer(f" {word}")["input_ids"][-1] for word in subject.split()[:3]] for subject in SUBJECTS]
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for subject in SUBJECTS for word in subject.split()[:3])
    vectors = vectors_VD[np.array(rows)] / EMBEDDING_NORM  # [subject, word, D]
    cosines = np.einsum("iad,jbd->ijab", vectors, vectors)
    other_words = ~np.eye(3, dtype=bool)
    same = np.array([cosines[i, i][other_words].min() for i in range(3)])
    different = np.array([cosines[i, j].max() for i in range(3) for j in range(3) if i != j])
    assert same.min() > different.max() + 0.2


def test_no_direction_of_the_stream_holds_most_of_the_vectors(tokenizer, texts):
    vectors_VD = token_vectors(tokenizer, texts, 24, seed=1)
    seen = np.unique(np.concatenate(tokenizer(texts)["input_ids"]))
    energy_D = np.square(vectors_VD[seen]).sum(axis=0)
    assert energy_D.max() < 0.5 * energy_D.sum()


def heads(params, config):
    """q, k, v [L, D, heads, H] and o [L, heads, H, D] of the attention."""
    L, D, H = config.num_hidden_layers, config.hidden_size, config.head_dim
    layers = params["layers"]
    query, key, value = (np.asarray(layers[f"{name}_proj"]["kernel"]).reshape(L, D, -1, H) for name in "qkv")
    return query, key, value, np.asarray(layers["o_proj"]["kernel"]).reshape(L, -1, H, D)


@pytest.mark.parametrize(("N", "K", "D"), [(4, 2, 32), (3, 3, 40)])
def test_the_first_head_of_each_group_looks_for_its_like_and_brings_it_along(N, K, D):
    sizes = {"num_attention_heads": N, "num_key_value_heads": K, "hidden_size": D}
    config = dataclasses.replace(TINY, **sizes)
    query, key, value, out = heads(copying_attention(random_params(tiny_decoder(**sizes)), config, KEY), config)
    first = np.arange(0, N, N // K)
    for layer, kinds in ((0, K - 1), (1, K)):  # the last of the first layer looks back instead
        np.testing.assert_array_equal(query[layer][:, first[:kinds]], key[layer][:, :kinds])
        np.testing.assert_allclose(VALUE_SCALE * key[layer][:, :kinds], value[layer][:, :kinds], rtol=1e-6)
    moved = np.einsum("ldkh,lkhe->lkde", value, out[:, first])  # what a head adds for a token it looks at
    projections = moved / VALUE_SCALE**2
    np.testing.assert_allclose(projections, projections.swapaxes(-1, -2), atol=1e-5)
    np.testing.assert_allclose(projections @ projections, projections, atol=1e-5)
    np.testing.assert_allclose(np.trace(projections, axis1=-2, axis2=-1), config.head_dim, rtol=1e-4)
    together = projections.sum(axis=1)  # the heads of a layer share no direction
    np.testing.assert_allclose(together @ together, together, atol=1e-5)


@pytest.mark.parametrize("head_dim", [8, 32])
def test_one_head_of_the_first_layer_looks_one_token_back_whatever_is_there(head_dim):
    config = dataclasses.replace(TINY, hidden_size=64, head_dim=head_dim)
    model = tiny_decoder(hidden_size=64, head_dim=head_dim)
    params = copying_attention(random_params(model), config, KEY)
    query, key, _, _ = heads(params, config)
    assert not query[0, :, 2].any()  # the first query head of the last of two key heads
    assert not key[0, :, 1].any()
    biases = {name: params["layers"][f"{name}_proj"]["bias"][0].reshape(-1, head_dim) for name in "qk"}
    position = jnp.arange(12)
    rotated = {
        name: rotate(jnp.broadcast_to(bias, (12, *bias.shape)), position, config.rope_theta)
        for name, bias in biases.items()
    }
    scores = np.asarray(jnp.einsum("th,uh->tu", rotated["q"][:, 2], rotated["k"][:, 1]))
    for now in range(1, 12):
        assert scores[now, : now + 1].argmax() == now - 1


def test_other_heads_and_other_parameters_are_untouched():
    before = random_params(tiny_decoder())
    after = copying_attention(before, TINY, KEY)
    for index, axis in ((0, 2), (3, 1)):  # queries and outputs; keys and values belong to whole groups
        old, new = (np.take(heads(params, TINY)[index], [1, 3], axis) for params in (before, after))
        np.testing.assert_array_equal(new, old)
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert before["layers"].keys() == after["layers"].keys()
    for name, value in before["layers"].items():
        if name not in attention:
            jax.tree.map(np.testing.assert_array_equal, after["layers"][name], value)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    np.testing.assert_array_equal(after["embed_tokens"]["embedding"], before["embed_tokens"]["embedding"])


def test_fresh_parameters_depend_on_the_seed_alone(tokenizer, texts):
    model = tiny_decoder(vocab_size=len(tokenizer))
    params, again, other = (fresh_params(model, tokenizer, texts, seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert (params["embed_tokens"]["embedding"] != other["embed_tokens"]["embedding"]).any()
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, random_params(model))
