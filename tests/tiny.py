"""Tiny decoders and padded prompts that the tests share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxnr.models.decoder import Decoder, DecoderConfig, init_params

TINY = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def tiny_decoder(**changes) -> Decoder:
    """Width 32, 2 layers, grouped heads, tied head; ``changes`` are DecoderConfig fields."""
    return Decoder(dataclasses.replace(TINY, **changes))


def random_params(model: Decoder, seed: int = 0, scale: float = 0.15) -> dict:
    """Parameters with noise on every leaf, so that biases and norms, which start at 0 and 1, are tested too."""
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def leaf(path, x) -> jax.Array:
        base = 1.0 if jax.tree_util.keystr(path).endswith("['weight']") else 0.0
        return jnp.asarray(base + scale * rng.normal(size=x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, params)


def left_padded(lengths, S: int, seed: int = 0, vocab: int = 61) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts of the given lengths as tokens [B, S] and mask [B, S]; padding holds random tokens too."""
    rng = np.random.default_rng(seed)
    tokens_BS = rng.integers(0, vocab, (len(lengths), S)).astype(np.int32)
    mask_BS = np.arange(S)[None] >= S - np.asarray(lengths)[:, None]
    for row, length in enumerate(lengths):  # drawn by row, so that another S pads the same prompts
        own = np.random.default_rng([seed, row]).integers(0, vocab, length)
        tokens_BS[row, S - length :] = own
    return tokens_BS, mask_BS


def relative_gap(actual, expected) -> float:
    """The largest over the leaves of ‖actual − expected‖ / ‖expected‖."""

    def gap(a, b) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    return max(jax.tree.leaves(jax.tree.map(gap, actual, expected)))


UNOPTIMISED = {"xla_backend_optimization_level": 0}
"""Compiler options that halve compile time and leave the XLA program, its sharding and donation alone."""


def quick(jitted):
    """Calls a ``jax.jit`` function compiled with ``UNOPTIMISED``, once for each set of shapes and shardings."""
    programs = {}

    def call(*arguments):
        leaves, structure = jax.tree.flatten(arguments)
        key = (structure, *((np.shape(leaf), str(getattr(leaf, "sharding", None))) for leaf in leaves))
        if key not in programs:
            programs[key] = jitted.lower(*arguments).compile(UNOPTIMISED)
        return programs[key](*arguments)

    return call
