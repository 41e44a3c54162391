"""Parameters that begin from nothing: vectors by co-occurrence, and attention that begins as reading."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, quick, random_params, tiny_decoder

from jaxnr.models.decoder import Decoder, head_VD, init_params, rotate
from jaxnr.prompting.tokenizer import train_tokenizer
from jaxnr.training.fresh import EMBEDDING_NORM, Parts, fresh_params, reading_layers, stream_parts, token_vectors

SMALL = dataclasses.replace(TINY, vocab_size=300, hidden_size=128, head_dim=32, rope_theta=1e6)
SUBJECTS = ("hurricane storm florida coast", "rowing regatta crew river", "battery car factory prices")


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.permutation(subject.split())[:3]) for subject in SUBJECTS for _ in range(30)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts):
    return train_tokenizer(texts, 500, tmp_path_factory.mktemp("tokenizer"))


PARTS = Parts(np.arange(0, 10), np.arange(10, 16), np.arange(16, 20), np.arange(20, 24))


def test_all_vectors_have_one_length_and_leave_room_for_other_tokens(tokenizer, texts):
    vectors_VD = token_vectors(tokenizer, texts, PARTS, seed=1)
    assert vectors_VD.shape == (len(tokenizer), 24)
    assert vectors_VD.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors_VD, axis=1), EMBEDDING_NORM, rtol=1e-5)
    assert not vectors_VD[:, np.concatenate([PARTS.before, PARTS.line_end])].any()


def test_words_of_the_same_texts_mean_more_alike_than_others(tokenizer, texts):
    parts = Parts(
        np.arange(4), np.arange(4, 6), np.arange(6, 8), np.arange(8, 10)
    )  # fewer directions than words: they are shared
    vectors_VD = token_vectors(tokenizer, texts, parts, seed=1)
    rows = [[tokenizer(f" {word}")["input_ids"][-1] for word in subject.split()[:3]] for subject in SUBJECTS]
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for subject in SUBJECTS for word in subject.split()[:3])
    vectors = vectors_VD[np.array(rows)][..., parts.meaning]
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)  # [subject, word, D]
    cosines = np.einsum("iad,jbd->ijab", vectors, vectors)
    other_words = ~np.eye(3, dtype=bool)
    same = np.array([cosines[i, i][other_words].min() for i in range(3)])
    different = np.array([cosines[i, j].max() for i in range(3) for j in range(3) if i != j])
    assert same.min() > different.max() + 0.2


def test_no_direction_of_the_stream_holds_most_of_the_vectors(tokenizer, texts):
    vectors_VD = token_vectors(tokenizer, texts, PARTS, seed=1)
    seen = np.unique(np.concatenate(tokenizer(texts)["input_ids"]))
    energy_D = np.square(vectors_VD[seen]).sum(axis=0)
    assert energy_D.max() < 0.5 * energy_D.sum()


@pytest.mark.parametrize(("D", "H"), [(128, 32), (48, 32), (32, 8)])
def test_the_parts_are_all_of_the_stream_and_a_sketch_fits_where_the_token_before_is_kept(D, H):
    parts = stream_parts(dataclasses.replace(SMALL, hidden_size=D, head_dim=H))
    assert np.concatenate(parts).tolist() == list(range(D))
    assert all(len(part) for part in parts)
    assert len(parts.sketch) == len(parts.before) == len(parts.line_end)
    assert not set(parts.sketch.tolist()) & {*parts.before.tolist(), *parts.line_end.tolist()}


@pytest.mark.parametrize(("num_kv_heads", "share"), [(1, 0.4), (2, 0.6), (4, 0.7)])  # one head copies 32 of 128 parts
def test_a_fresh_model_goes_on_as_the_prompt_went_on_after_the_same_token(tokenizer, texts, num_kv_heads, share):
    config = dataclasses.replace(SMALL, vocab_size=len(tokenizer), num_key_value_heads=num_kv_heads)
    model = Decoder(config)
    params = fresh_params(model, tokenizer, texts, seed=0)
    rng = np.random.default_rng(0)
    prompts_BS = np.stack([rng.permutation(np.arange(5, len(tokenizer)))[:60] for _ in range(20)])  # every token once
    places_B = rng.integers(5, 50, 20)
    rows = np.arange(20)
    tokens_BS = np.concatenate([prompts_BS, prompts_BS[rows, places_B][:, None]], axis=1)
    hidden_BSD = model.apply({"params": params}, tokens_BS, np.ones_like(tokens_BS, bool))
    guesses_B = jnp.argmax(hidden_BSD[:, -1] @ head_VD(params).T, axis=-1)
    assert np.mean(guesses_B == prompts_BS[rows, places_B + 1]) > share  # by chance: one in hundreds


def test_an_untied_head_begins_as_the_token_vectors(tokenizer, texts):
    config = dataclasses.replace(SMALL, vocab_size=len(tokenizer), tie_word_embeddings=False)
    params = fresh_params(Decoder(config), tokenizer, texts, seed=0)
    np.testing.assert_array_equal(params["lm_head"], params["embed_tokens"]["embedding"])


@pytest.mark.parametrize(("head", "steps"), [(2, 1), (3, 4), (0, 2), (1, 5)])  # last of two groups, then the first
def test_heads_of_the_first_layer_look_back_whatever_is_there(head, steps):
    config = SMALL
    parts = stream_parts(config)
    params = init_params(Decoder(config), jax.random.key(0))
    layers = reading_layers(params["layers"], config, parts, np.zeros(config.hidden_size), 4, seed=0)
    H = config.head_dim
    assert not layers["q_proj"]["kernel"].reshape(2, -1, 4, H)[0, :, head].any()
    assert not layers["k_proj"]["kernel"].reshape(2, -1, 2, H)[0, :, head // 2].any()
    query, key = layers["q_proj"]["bias"][0].reshape(4, H)[head], layers["k_proj"]["bias"][0].reshape(2, H)[head // 2]
    position = jnp.arange(12)
    query, key = (
        rotate(jnp.broadcast_to(bias, (12, 1, H)), position, config.rope_theta)[:, 0] for bias in (query, key)
    )
    scores = np.asarray(query @ key.T)
    for now in range(steps, 12):
        assert scores[now, : now + 1].argmax() == now - steps


def words_of(tokenizer):
    return [tokenizer(f" {word}")["input_ids"][0] for subject in SUBJECTS for word in subject.split()]


@pytest.fixture(scope="module")
def next_logits(tokenizer, texts):
    """Logits [V] of a fresh model of three layers after a prompt, a query, the separator and what is begun."""
    config = dataclasses.replace(SMALL, vocab_size=len(tokenizer), num_hidden_layers=3)
    model, params = Decoder(config), fresh_params(Decoder(config), tokenizer, texts, seed=0)
    label, end = tokenizer("\nsearch:")["input_ids"], tokenizer('","')["input_ids"][-1]

    @quick
    @jax.jit
    def last_logits(tokens_BS):
        hidden_BSD = model.apply({"params": params}, tokens_BS, jnp.ones_like(tokens_BS, bool))
        return hidden_BSD[0, -1] @ head_VD(params).T

    def logits_after(lines, query, begun=()) -> np.ndarray:
        prompt = np.concatenate([np.concatenate([label, line]) for line in lines])
        return np.asarray(last_logits(np.concatenate([prompt, query, [end], begun]).astype(np.int32)[None]))

    return logits_after


def random_lines(tokenizer, count):
    """Prompts of four lines of three words, all different: [count, 4, 3]."""
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(words_of(tokenizer))[:12].reshape(4, 3) for _ in range(count)])


def test_a_fresh_model_finds_the_line_after_the_one_it_has_read(tokenizer, next_logits):
    found = []
    for lines in random_lines(tokenizer, 20):
        for line in (0, 2):
            logits_V = next_logits(lines, lines[line])
            found.append(lines[:, 0][logits_V[lines[:, 0]].argmax()] == lines[line + 1, 0])
    assert np.mean(found) > 0.45  # of four first words


def test_lines_that_end_alike_are_told_apart_by_the_word_before(tokenizer, next_logits):
    gain = []
    for lines in random_lines(tokenizer, 20):
        lines[2, 2] = lines[0, 2]
        after_0, after_2 = (next_logits(lines, lines[line]) for line in (0, 2))
        # What the end of line 0 says for the line after it, against what the end of line 2 says for that.
        gain.append((after_0 - after_2)[lines[1, 0]] + (after_2 - after_0)[lines[3, 0]])
    assert np.mean(np.array(gain) > 0) > 0.8


@pytest.mark.parametrize("shared", [0, 1])
def test_a_word_of_two_lines_goes_on_as_in_the_one_that_is_read(tokenizer, next_logits, shared):
    """Lines 1 and 3 share their first or their second word: what was before it tells which line goes on."""
    gain = []
    for lines in random_lines(tokenizer, 20):
        lines[3, shared] = lines[1, shared]
        in_1, in_3 = (next_logits(lines, lines[line - 1], begun=lines[line, : shared + 1]) for line in (1, 3))
        gain.append((in_1 - in_3)[lines[1, shared + 1]] + (in_3 - in_1)[lines[3, shared + 1]])
    assert np.mean(np.array(gain) > 0) > 0.8


def test_what_would_cover_the_reading_with_noise_starts_at_zero():
    config = dataclasses.replace(SMALL, num_hidden_layers=3)
    params = init_params(Decoder(config), jax.random.key(0))
    layers = reading_layers(params["layers"], config, stream_parts(config), np.zeros(config.hidden_size), 4, seed=0)
    assert not layers["down_proj"]["kernel"].any()
    out_LNHD = layers["o_proj"]["kernel"].reshape(3, 4, config.head_dim, -1)
    assert not out_LNHD[2, 1].any()  # the second head of the first group of the third layer has no task
    assert jax.tree.map(jnp.shape, layers) == jax.tree.map(jnp.shape, params["layers"])
    for name in ("gate_proj", "up_proj", "input_layernorm", "post_attention_layernorm"):
        jax.tree.map(np.testing.assert_array_equal, layers[name], params["layers"][name])


def test_fresh_parameters_depend_on_the_seed_alone(tokenizer, texts):
    model = tiny_decoder(vocab_size=len(tokenizer))
    params, again, other = (fresh_params(model, tokenizer, texts, seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert (params["embed_tokens"]["embedding"] != other["embed_tokens"]["embedding"]).any()
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, random_params(model))
