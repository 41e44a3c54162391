"""Parameters of models that begin from nothing.

A pretrained model knows which words go together, and has attention that finds where the present word stood before and
brings along what followed it (an induction head, Olsson et al. 2022, arXiv 2209.11895). Both take a small model
thousands of steps to find. Here the first is read off the training texts and the second is where attention starts, so
that a model reads its prompt from the first step on and a warm start of a minute gets as far as a list on the user's
topics.

A list is more than one signal: after a query the model has to find the next signal. For that a token also knows, by
its distance, the last two words of the line before its own, so that the last two words of a query point to the first
word of the line after the one that was read. Two, because a word may stand in several lines. Which of them is read is
told by the word before it, and after the first word of a line by the end of the line before.

Four parts of the residual stream make room for that: what a token means, which token it is, which two are before it,
and which two ended the line before. Everything that would cover them with noise, the feed-forward and the other heads,
starts with outputs of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer
from transformers import PreTrainedTokenizerBase

from jaxnr.models.decoder import Decoder, DecoderConfig, init_params
from jaxnr.prompting.prompt import LABELS

EMBEDDING_NORM = 2.8
"""Length of every embedding row. Adam moves each weight by about the learning rate: rows are not to be much smaller
than the other weights, or they are the first to be lost."""

FINAL_SCALE = 0.625
"""Of the final norm: with a tied head and a width of 128, a token that is copied gets a logit of about 15."""

MEANING_SHARE = 0.6
"""Of the directions for a token itself, those for its meaning; the others tell it from all other tokens."""

LOOK_BACK_STRENGTH = 6.0
LOOK_BACK_LEAST_FREQUENCY = 0.1
"""With heads of 32, the token before gets about eight tenths of the attention."""

MATCH_STRENGTH = 2.0
"""Of queries and keys that look for equal tokens: with heads of 32, an equal one gets most of the attention."""

CONTEXT_STRENGTH, LINE_SHIFT = 0.3, 13
"""Of what tells one of several equal tokens from the others, and how far that is rolled on in a head when it is about
the line before."""

POINT_STRENGTH = 2.0
"""Of queries and keys that look for the line after the present query's."""

MARK_STRENGTH = 6.0
"""Of the bias that looks for what follows a mark."""

BEFORE_GAIN, COPY_GAIN, ALIKE_GAIN = 0.52, 1.36, 0.4
"""What heads add to the stream: the token before, about as much as the token itself; a copied token, more than that;
and tokens alike, a little."""

FURTHER_SHARE, FURTHER_SHIFT = 0.8, 7
"""The token two before is added with this share of the gain, its directions rolled on by so many: the same token in
both places is not to look the same."""

FAR = 150
"""Tokens: as far apart as equal tokens of one prompt may be."""


class Parts(NamedTuple):
    """Which directions of the residual stream stand for what: indices, together all D.

    ``before``: of the two tokens before. ``line_end``: of the two tokens that end the line before, as seen from the
    first word of a line.
    """

    meaning: np.ndarray
    identity: np.ndarray
    before: np.ndarray
    line_end: np.ndarray

    @property
    def token(self) -> np.ndarray:
        """Directions of the token itself."""
        return np.concatenate([self.meaning, self.identity])

    @property
    def sketch(self) -> np.ndarray:
        """Directions of a token that are kept of the token before: as many as there is room for."""
        return np.concatenate([self.identity, self.meaning])[: len(self.before)]


def fresh_params(
    model: Decoder, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], seed: int, mark: str = ":"
) -> dict:
    """Parameters to begin the warm start from, with token vectors learned from ``texts``.

    ``mark`` is what stands before each signal's first word in a prompt.
    """
    config = model.config
    parts = stream_parts(config)
    vectors_VD = token_vectors(tokenizer, texts, parts, seed)
    # From the last word of a line over the line break and the next line's label to its first word.
    line_step = 1 + len(_ids(tokenizer, f"\n{LABELS['search']}{mark}"))
    mark_D = vectors_VD[_ids(tokenizer, mark)[0]] / EMBEDDING_NORM
    params = init_params(model, jax.random.key(seed))
    fresh = {
        **params,
        "embed_tokens": {"embedding": jnp.asarray(vectors_VD)},
        "layers": reading_layers(params["layers"], config, parts, mark_D, line_step, seed),
        "norm": jax.tree.map(lambda weight: FINAL_SCALE * weight, params["norm"]),
    }
    return fresh | ({} if config.tie_word_embeddings else {"lm_head": jnp.asarray(vectors_VD)})


def stream_parts(config: DecoderConfig) -> Parts:
    """``before`` and ``line_end`` get as many directions as a head can compare far apart, a fifth each at most."""
    D = config.hidden_size
    room = min(len(_slow(config)), D // 5)
    meaning = int(MEANING_SHARE * (D - 2 * room))
    return Parts(*np.split(np.arange(D), [meaning, D - 2 * room, D - room]))


def token_vectors(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], parts: Parts, seed: int) -> np.ndarray:
    """Vectors [V, D] of equal length: half of it near where tokens occur in the same texts (latent semantic analysis),
    half at random, so that no two tokens are alike. The directions for other tokens stay empty.

    Tokens that the texts lack get a random meaning.
    """
    rng = np.random.default_rng(seed)
    ids = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    rows = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    columns = np.concatenate([np.asarray(row, np.int64) for row in ids])
    counts = csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(ids), len(tokenizer)))
    size = len(parts.meaning)
    rank = min(size, len(tokenizer) - 1, len(ids) - 1)
    svd = TruncatedSVD(rank, random_state=seed).fit(TfidfTransformer(sublinear_tf=True).fit_transform(counts))
    meaning_VM = rng.normal(0, 1e-3, (len(tokenizer), size))  # no row is to be zero
    # Damped by the square root, so that the few strongest directions do not drown the rest.
    meaning_VM[:, :rank] += np.asarray(svd.components_).T * np.sqrt(svd.singular_values_)
    unseen = np.asarray(counts.sum(axis=0)).reshape(-1) == 0
    meaning_VM[unseen] = rng.normal(size=(int(unseen.sum()), size))
    # Rotated at random: no head is to get all of the strongest directions, and another none.
    rotation, _ = np.linalg.qr(rng.normal(size=(size, size)))
    vectors_VD = np.zeros((len(tokenizer), sum(map(len, parts))), np.float32)
    vectors_VD[:, parts.meaning] = _unit(meaning_VM @ rotation)
    vectors_VD[:, parts.identity] = _unit(rng.normal(size=(len(tokenizer), len(parts.identity))))
    return EMBEDDING_NORM * _unit(vectors_VD)


def reading_layers(
    layers: dict, config: DecoderConfig, parts: Parts, mark_D: np.ndarray, line_step: int, seed: int
) -> dict:
    """The layers with attention that begins as reading. The first query head of each key head gets a task:

    - first layer, last key head: looks one token back, whatever is there, and writes down which token that is. Its
      second query head, where there is one, does so ``line_step`` tokens back. The key head before it, where there is
      one, looks one token further back than both;
    - second layer: looks for a token after one equal to the present token, and copies it; among several, for one after
      the same two tokens, or in the line after one that ends as the last query did. The second query head of each key
      head, where there is one, copies what comes after ``mark_D``: the first words of signals;
    - third layer: looks for the first word of the line after the one that ends with the tokens before, and copies it;
    - elsewhere: looks for tokens like the present one and adds a little of them.

    Queries and keys meet in the slowly rotating directions of a head alone: in the others, what two tokens have in
    common is lost with their distance.
    """
    rng = np.random.default_rng(seed)
    L, D = config.num_hidden_layers, config.hidden_size
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shapes = {"q_proj": (L, D, N, H), "k_proj": (L, D, K, H), "v_proj": (L, D, K, H), "o_proj": (L, N, H, D)}
    kernel = {name: np.array(layers[name]["kernel"], np.float32).reshape(shape) for name, shape in shapes.items()}
    query_LDNH, key_LDKH, value_LDKH, out_LNHD = kernel.values()
    out_LNHD[:] = 0
    query_bias_LNH, key_bias_LKH = np.zeros((L, N, H), np.float32), np.zeros((L, K, H), np.float32)
    slow = _slow(config)[: len(parts.before)]
    sketch = parts.sketch

    def match(layer: int, k: int, of_query: np.ndarray, of_key: np.ndarray, strength: float) -> None:
        n = k * (N // K)
        query_LDNH[layer, :, n], key_LDKH[layer, :, k] = 0, 0
        query_LDNH[layer, of_query, n, slow], key_LDKH[layer, of_key, k, slow] = strength, strength

    def bring(layer: int, k: int, source: np.ndarray, target: np.ndarray, gain: float, heads: int = 1) -> None:
        value_LDKH[layer, :, k] = 0
        value_LDKH[layer, source, k, np.arange(len(source))] = 1
        for n in range(k * (N // K), k * (N // K) + heads):
            out_LNHD[layer, n, np.arange(len(source)), target] = gain

    for layer in range(L):
        shuffled = rng.permutation(parts.token)
        for k in range(K):
            # Each key head brings other directions, as far as there are others.
            brought = shuffled[(k * H + np.arange(min(H, len(shuffled)))) % len(shuffled)]
            if layer == 0 and k >= K - 2:
                further = K - 1 - k
                shift, gain = FURTHER_SHIFT * further, BEFORE_GAIN * FURTHER_SHARE**further
                query_LDNH[0, :, k * (N // K)], key_LDKH[0, :, k] = 0, 0
                query_bias_LNH[0, k * (N // K)] = _steps_back(config, 1 + further)
                key_bias_LKH[0, k] = _steps_back(config, 0)
                bring(0, k, sketch, np.roll(parts.before, shift), gain)
                if N // K > 1:
                    n = k * (N // K) + 1
                    query_LDNH[0, :, n], query_bias_LNH[0, n] = 0, _steps_back(config, line_step + further)
                    out_LNHD[0, n, np.arange(len(sketch)), np.roll(parts.line_end, shift)] = gain
            elif layer == 1:
                match(1, k, sketch, parts.before, MATCH_STRENGTH)
                # A word may stand in several lines. It may have another word before it in each; and for the first
                # words of lines, the last word of the line before differs. At the first word of a query that is the
                # token two before, at the second word of a line it is known as the end of the line before.
                if K > 1:  # two words of context are known
                    query_LDNH[1, parts.before, k * (N // K), np.roll(slow, FURTHER_SHIFT)] += CONTEXT_STRENGTH
                    query_LDNH[1, parts.before, k * (N // K), np.roll(slow, LINE_SHIFT)] += CONTEXT_STRENGTH
                    key_LDKH[1, parts.line_end, k, np.roll(slow, LINE_SHIFT)] += CONTEXT_STRENGTH
                heads = min(N // K, 2)
                bring(1, k, brought, brought, COPY_GAIN, heads)
                if heads == 2:
                    query_LDNH[1, :, k * (N // K) + 1] = 0
                    query_bias_LNH[1, k * (N // K) + 1, slow] = MARK_STRENGTH * mark_D[sketch]
            elif layer == 2:
                match(2, k, parts.before, parts.line_end, POINT_STRENGTH)
                bring(2, k, brought, brought, COPY_GAIN)
            else:
                alike = sketch if layer and k == 0 else parts.meaning[: len(slow)]
                match(layer, k, alike, alike, 1.0)
                bring(layer, k, brought, brought, ALIKE_GAIN)
    changed = {
        name: {**layers[name], "kernel": jnp.asarray(array.reshape(layers[name]["kernel"].shape))}
        for name, array in kernel.items()
    }
    changed["q_proj"]["bias"] = jnp.asarray(query_bias_LNH.reshape(L, N * H))
    changed["k_proj"]["bias"] = jnp.asarray(key_bias_LKH.reshape(L, K * H))
    changed["down_proj"] = jax.tree.map(jnp.zeros_like, layers["down_proj"])
    return {**layers, **changed}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _frequency(config: DecoderConfig) -> np.ndarray:
    """Radians a token, of each of the H/2 pairs of a head's directions."""
    half = config.head_dim // 2
    return config.rope_theta ** (-np.arange(half) / half)


def _slow(config: DecoderConfig) -> np.ndarray:
    """Directions of a head that rotate by less than a radian over ``FAR`` tokens."""
    slow = np.flatnonzero(_frequency(config) * FAR < 1)
    return np.concatenate([slow, slow + config.head_dim // 2])


def _steps_back(config: DecoderConfig, steps: int) -> np.ndarray:
    """A query bias [H] whose product with the key bias (``steps`` 0) peaks, after rotation, ``steps`` tokens before."""
    frequency = _frequency(config)
    # Only the fast rotations tell one position from the next.
    strength = np.where(frequency > LOOK_BACK_LEAST_FREQUENCY, LOOK_BACK_STRENGTH, 0.0)
    return np.concatenate([strength * np.cos(steps * frequency), -strength * np.sin(steps * frequency)])
