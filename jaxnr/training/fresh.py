"""Parameters of models that begin from nothing.

A pretrained model knows which words go together, and attention that looks for what resembles the present word and
brings it along. Both take a small model thousands of steps to find. Here the first is read off the training texts and
the second is where attention starts, so that a warm start of minutes gets as far as a list on the user's topics.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer
from transformers import PreTrainedTokenizerBase

from jaxnr.models.decoder import Decoder, DecoderConfig, init_params

EMBEDDING_NORM = 0.7
"""Length of every embedding row: with a tied head and normalised hidden states of width 128, logits of up to 8."""

LOOK_BACK_STRENGTH = 6.0
LOOK_BACK_LEAST_FREQUENCY = 0.1
"""With heads of 32, the token before gets about nine tenths of the attention."""

VALUE_SCALE = 0.7
"""Values and outputs together start as half the identity on the part of the stream that a head sees."""


def fresh_params(model: Decoder, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], seed: int) -> dict:
    """Parameters to begin the warm start from, with token vectors learned from ``texts``."""
    random, attention = jax.random.split(jax.random.key(seed))
    params = copying_attention(init_params(model, random), model.config, attention)
    vectors_VD = jnp.asarray(token_vectors(tokenizer, texts, model.config.hidden_size, seed))
    return {**params, "embed_tokens": {"embedding": vectors_VD}}


def token_vectors(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], size: int, seed: int) -> np.ndarray:
    """Vectors [V, size] of equal length, near where tokens occur in the same texts (latent semantic analysis).

    Tokens that the texts lack get random ones.
    """
    rng = np.random.default_rng(seed)
    ids = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    rows = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    columns = np.concatenate([np.asarray(row, np.int64) for row in ids])
    counts = csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(ids), len(tokenizer)))
    rank = min(size, len(tokenizer) - 1, len(ids) - 1)
    svd = TruncatedSVD(rank, random_state=seed).fit(TfidfTransformer(sublinear_tf=True).fit_transform(counts))
    vectors_VD = rng.normal(0, 1e-3, (len(tokenizer), size))  # tells apart the tokens that always occur together
    # Damped by the square root, so that the few strongest directions do not drown the rest.
    vectors_VD[:, :rank] += np.asarray(svd.components_).T * np.sqrt(svd.singular_values_)
    unseen = np.asarray(counts.sum(axis=0)).reshape(-1) == 0
    vectors_VD[unseen] = rng.normal(size=(int(unseen.sum()), size))
    # Rotated at random: no head is to get all of the strongest directions, and another none.
    rotation, _ = np.linalg.qr(rng.normal(size=(size, size)))
    vectors_VD = vectors_VD @ rotation
    return (EMBEDDING_NORM * vectors_VD / np.linalg.norm(vectors_VD, axis=1, keepdims=True)).astype(np.float32)


def copying_attention(params: dict, config: DecoderConfig, key: jax.Array) -> dict:
    """The parameters with attention that begins as copying: find what resembles the present token, bring what follows.

    Every head's output undoes its values, so that what is attended to is added to the stream, on H random orthogonal
    directions a key head (mimetic initialisation, Trockman and Kolter 2023, arXiv 2305.09828). The first query head of
    each key head looks for tokens like its own. In the first layer the last key head instead looks one token back,
    whatever is there, which makes the layers after it find the token that came next (induction heads, Olsson et al.
    2022, arXiv 2209.11895). Needs D >= K * H.
    """
    L, D = config.num_hidden_layers, config.hidden_size
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    layers = params["layers"]
    first = slice(None, None, N // K)  # of each group of query heads
    gaussian_LDD = jax.random.normal(key, (L, D, D))
    basis_LDKH = jnp.linalg.qr(gaussian_LDD)[0][..., : K * H].reshape(L, D, K, H)
    query_LDNH = layers["q_proj"]["kernel"].reshape(L, D, N, H).at[:, :, first].set(basis_LDKH)
    out_LNHD = layers["o_proj"]["kernel"].reshape(L, N, H, D)
    out_LNHD = out_LNHD.at[:, first].set(VALUE_SCALE * basis_LDKH.transpose(0, 2, 3, 1))
    look_back = N - N // K  # the first query head of the last key head
    query_LDNH = query_LDNH.at[0, :, look_back].set(0.0)
    key_LDKH = basis_LDKH.at[0, :, -1].set(0.0)
    query_bias_LNH = jnp.zeros((L, N, H)).at[0, look_back].set(_one_back(config))
    key_bias_LKH = jnp.zeros((L, K, H)).at[0, -1].set(_one_back(config, steps=0))
    changed = {
        "q_proj": {"kernel": query_LDNH.reshape(L, D, N * H), "bias": query_bias_LNH.reshape(L, N * H)},
        "k_proj": {"kernel": key_LDKH.reshape(L, D, K * H), "bias": key_bias_LKH.reshape(L, K * H)},
        "v_proj": {**layers["v_proj"], "kernel": VALUE_SCALE * basis_LDKH.reshape(L, D, K * H)},
        "o_proj": {"kernel": out_LNHD.reshape(L, N * H, D)},
    }
    return {**params, "layers": {**layers, **changed}}


def _one_back(config: DecoderConfig, steps: int = 1) -> jax.Array:
    """A query bias [H] whose product with the key bias (``steps`` 0) peaks, after rotation, at the token before."""
    frequency = config.rope_theta ** (-jnp.arange(config.head_dim // 2) / (config.head_dim // 2))
    # Only the fast rotations tell one position from the next.
    strength = jnp.where(frequency > LOOK_BACK_LEAST_FREQUENCY, LOOK_BACK_STRENGTH, 0.0)
    return jnp.concatenate([strength * jnp.cos(steps * frequency), -strength * jnp.sin(steps * frequency)])
