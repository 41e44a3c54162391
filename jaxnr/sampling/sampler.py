"""The jitted sampling loop: one prefill a prompt, G completions that share it, one ``while_loop``.

The random number of a token depends on (seed, step, prompt id, sample id, position) alone, so neither the order nor the
size of the batch nor the mesh changes a sample. Temperature, top-p, top-k and the stop ids are traced: changing them
compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxnr.mesh import LOGITS, WHOLE_LOGITS, batch_sharding, constrain, spread, traced_on
from jaxnr.models.decoder import Cache, Decoder, head_VD


@flax.struct.dataclass
class SamplingSettings:
    """Traced settings. ``top_k`` 0 and ``top_p`` 1 switch the filters off. Train with both off and the temperature that
    the loss scores with: a filtered distribution is not the scored one. ``temperature`` 0 takes the likeliest token."""

    temperature: jax.Array | float = 1.0
    top_p: jax.Array | float = 1.0
    top_k: jax.Array | int = 0


@flax.struct.dataclass
class Completions:
    """What was sampled. ``mask`` includes the end token; ``cut`` marks rows that reached the budget without one.

    ``logprobs`` are those of the temperature-scaled distribution before top-p and top-k (at temperature 0: of the
    unscaled one), 0 outside the mask.
    """

    tokens_BGT: jax.Array
    logprobs_BGT: jax.Array
    mask_BGT: jax.Array
    cut_BG: jax.Array


@flax.struct.dataclass
class _State:
    t: jax.Array
    """Tokens chosen so far."""
    token_BG: jax.Array
    """The last of them."""
    own_key_LBKGHT: jax.Array
    own_value_LBKGTH: jax.Array
    done_BG: jax.Array
    tokens_BGT: jax.Array
    logprobs_BGT: jax.Array
    mask_BGT: jax.Array


@functools.lru_cache(maxsize=8)  # the stages and models of a run share what has been compiled
def make_sampler(
    model: Decoder, *, max_new_tokens: int, vocabulary_size: int, pad_id: int, mesh: Mesh | None = None
) -> Callable:
    """The jitted sampler of a model; with a ``mesh``, completions are spread over it by prompts.

    ``sample(params, prompt_BS, prompt_mask_BS, prompt_ids_B, sample_ids_G, seed, step, settings, stop_ids)``.
    Prompts are left-padded. ``stop_ids`` is an int array; its length, B, G and S are the only things that compile anew.
    """

    def sample(
        params: dict,
        prompt_BS: jax.Array,
        prompt_mask_BS: jax.Array,
        prompt_ids_B: jax.Array,
        sample_ids_G: jax.Array,
        seed: jax.Array,
        step: jax.Array,
        settings: SamplingSettings,
        stop_ids: jax.Array,
    ) -> Completions:
        variables = {"params": params}
        head = head_VD(params)
        keys_BG = completion_keys(seed, step, prompt_ids_B, sample_ids_G)
        B, G = keys_BG.shape
        prefilled = model.apply(variables, prompt_BS, prompt_mask_BS, method="prefill")
        hidden_BD, prompt_key, prompt_value = cast(Any, prefilled)
        L, _, K, H, _ = prompt_key.shape

        def extend(state: _State, hidden_BGD: jax.Array) -> _State:
            """The state after choosing the t-th token of every completion that has not ended."""
            logits = constrain(next_logits(hidden_BGD.reshape(B * G, -1), head, vocabulary_size), LOGITS)
            logits = constrain(logits, WHOLE_LOGITS)  # whole columns to draw from, each on one device
            uniforms = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, state.t)))(keys_BG.reshape(-1))
            token, logprob = (spread(x.reshape(B, G)) for x in choose(logits, uniforms, settings))
            live = ~state.done_BG
            token = jnp.where(live, token, pad_id)
            logprob = jnp.where(live, logprob, 0.0)
            return dataclasses.replace(
                state,
                t=state.t + 1,
                token_BG=token,
                done_BG=state.done_BG | (live & jnp.isin(token, stop_ids)),
                tokens_BGT=state.tokens_BGT.at[:, :, state.t].set(token),
                logprobs_BGT=state.logprobs_BGT.at[:, :, state.t].set(logprob),
                mask_BGT=state.mask_BGT.at[:, :, state.t].set(live),
            )

        def body(state: _State) -> _State:
            place = state.t - 1  # of the token that is decoded
            cache = Cache(prompt_key, prompt_value, state.own_key_LBKGHT, state.own_value_LBKGTH)
            decoded = model.apply(variables, state.token_BG, place, cache, prompt_mask_BS, method="decode")
            hidden_BGD, key, value = cast(Any, decoded)
            state = dataclasses.replace(
                state,
                own_key_LBKGHT=jax.lax.dynamic_update_slice_in_dim(state.own_key_LBKGHT, key, place, axis=5),
                own_value_LBKGTH=jax.lax.dynamic_update_slice_in_dim(state.own_value_LBKGTH, value, place, axis=4),
            )
            return extend(state, hidden_BGD)

        empty = _State(
            t=jnp.int32(0),
            token_BG=jnp.full((B, G), pad_id, jnp.int32),
            own_key_LBKGHT=jnp.zeros((L, B, K, G, H, max_new_tokens), prompt_key.dtype),
            own_value_LBKGTH=jnp.zeros((L, B, K, G, max_new_tokens, H), prompt_value.dtype),
            done_BG=jnp.zeros((B, G), bool),
            tokens_BGT=jnp.full((B, G, max_new_tokens), pad_id, jnp.int32),
            logprobs_BGT=jnp.zeros((B, G, max_new_tokens), jnp.float32),
            mask_BGT=jnp.zeros((B, G, max_new_tokens), bool),
        )
        first = extend(empty, jnp.broadcast_to(hidden_BD[:, None], (B, G, hidden_BD.shape[-1])))
        state = jax.lax.while_loop(lambda state: (state.t < max_new_tokens) & ~jnp.all(state.done_BG), body, first)
        return Completions(state.tokens_BGT, state.logprobs_BGT, state.mask_BGT, ~state.done_BG)

    if mesh is None:
        return jax.jit(sample)
    return jax.jit(traced_on(mesh, sample), out_shardings=batch_sharding(mesh))


def completion_keys(seed: jax.Array, step: jax.Array, prompt_ids_B: jax.Array, sample_ids_G: jax.Array) -> jax.Array:
    """One random key [B, G] a completion, from nothing but its names."""
    base = jax.random.fold_in(jax.random.key(seed), step)
    keys_B = jax.vmap(lambda prompt_id: jax.random.fold_in(base, prompt_id))(prompt_ids_B)
    return jax.vmap(lambda key: jax.vmap(lambda sample_id: jax.random.fold_in(key, sample_id))(sample_ids_G))(keys_B)


def next_logits(hidden_ND: jax.Array, head_VD: jax.Array, vocabulary_size: int) -> jax.Array:
    """Float32 logits [V, N] over all rows of the head; −∞ for those that belong to no token.

    The vocabulary comes first, and what is no token is masked, not cut off: so ``choose`` can divide the vocabulary,
    which checkpoints pad to a round number, into blocks where it lies. On a TPU anything else copies the logits.
    """
    logits_VN = jnp.einsum("vd,nd->vn", head_VD.astype(hidden_ND.dtype), hidden_ND, preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(len(head_VD))[:, None] < vocabulary_size, logits_VN, -jnp.inf)


def choose(logits_VN: jax.Array, uniforms_N: jax.Array, settings: SamplingSettings) -> tuple[jax.Array, jax.Array]:
    """A token a column by inverse transform of one uniform number, and its log-probability before the filters.

    The logits of many completions over a large vocabulary are as much to read as the model's weights. Without filters
    they are read for their maximum and for the sums of their exponentials, and no other array of their size is made.
    """
    greedy = settings.temperature <= 0
    filtering = (settings.top_k > 0) | (settings.top_p < 1)
    logits_VN = logits_VN / jnp.where(greedy, 1.0, settings.temperature)
    highest_N = jnp.max(logits_VN, axis=0)
    # Kept as they are: the compiler would take the sum of these sums for one over all of V, and read the logits again.
    masses_MN = jax.lax.optimization_barrier(block_masses(logits_VN, highest_N))
    token_N = jax.lax.switch(
        jnp.where(greedy, 0, jnp.where(filtering, 2, 1)),
        (
            lambda: jnp.argmax(logits_VN, axis=0).astype(jnp.int32),
            lambda: inverse_transform(logits_VN, highest_N, masses_MN, uniforms_N),
            lambda: _choose_filtered(logits_VN, highest_N, uniforms_N, settings),
        ),
    )
    chosen_N = jnp.take_along_axis(logits_VN, token_N[None], axis=0)[0]
    return token_N, chosen_N - highest_N - jnp.log(jnp.sum(masses_MN, axis=0))


def _choose_filtered(
    logits_VN: jax.Array, highest_N: jax.Array, uniforms_N: jax.Array, settings: SamplingSettings
) -> jax.Array:
    logits_VN = filtered(logits_VN.T, settings).T
    return inverse_transform(logits_VN, highest_N, block_masses(logits_VN, highest_N), uniforms_N)


BLOCK = 128
"""Tokens of a block: about the root of small vocabularies, and a divisor of what large ones are padded to."""


def block_masses(logits_VN: jax.Array, highest_N: jax.Array) -> jax.Array:
    """Σ exp(logit − highest) of each block of ``BLOCK`` tokens [M, N]; the last may be short of some."""
    V, N = logits_VN.shape
    if V % BLOCK:
        logits_VN = jnp.pad(logits_VN, ((0, -V % BLOCK), (0, 0)), constant_values=-jnp.inf)
    return jnp.sum(jnp.exp(logits_VN.reshape(-1, BLOCK, N) - highest_N), axis=1)


def inverse_transform(
    logits_VN: jax.Array, highest_N: jax.Array, masses_MN: jax.Array, uniforms_N: jax.Array
) -> jax.Array:
    """Of each column the token at which the running sum of exp(logit − highest) passes ``uniform`` times their total.

    First the block, by ``block_masses``, then the token in it: two short running sums instead of one over all of V,
    which takes longer than the rest of a decoding step of a small model.
    """
    masses_NM = masses_MN.T
    target_N = uniforms_N * masses_NM.sum(axis=-1)
    block_N = _first_past(masses_NM, target_N)
    before_N = jnp.where(jnp.arange(masses_NM.shape[1]) < block_N[:, None], masses_NM, 0.0).sum(axis=-1)
    token_NW = block_N[:, None] * BLOCK + jnp.arange(BLOCK)
    logits_WN = jnp.take_along_axis(logits_VN, token_NW.T, axis=0, mode="fill", fill_value=-jnp.inf)
    return block_N * BLOCK + _first_past(jnp.exp(logits_WN - highest_N).T, target_N - before_N)


def _first_past(masses_NK: jax.Array, target_N: jax.Array) -> jax.Array:
    """The first entry that has mass and at which the running sum passes the target, or else the last that has mass:
    sums are rounded, so one over a row may stay at or below a target that is below the true total."""
    has_mass = masses_NK > 0
    passes = has_mass & (jnp.cumsum(masses_NK, axis=-1) > target_N[:, None])
    last = masses_NK.shape[-1] - 1 - jnp.argmax(has_mass[:, ::-1], axis=-1)
    return jnp.where(passes.any(axis=-1), jnp.argmax(passes, axis=-1), last)


def filtered(logits_NV: jax.Array, settings: SamplingSettings) -> jax.Array:
    """The logits, −∞ outside the top-k and then outside the top-p nucleus."""
    order = jnp.argsort(-logits_NV, axis=-1, stable=True)
    ranked = jax.nn.softmax(jnp.take_along_axis(logits_NV, order, axis=-1))
    rank = jnp.arange(ranked.shape[-1])
    kept = jnp.where(settings.top_k > 0, rank < settings.top_k, True)
    ranked = jnp.where(kept, ranked, 0.0)
    ranked = ranked / jnp.sum(ranked, axis=-1, keepdims=True)
    before = jnp.cumsum(ranked, axis=-1) - ranked  # the likeliest token always stays
    kept = kept & ((before < settings.top_p) | (rank == 0))
    # Row by row, so that rows on different devices stay there.
    kept = jax.vmap(lambda kept_V, order_V: jnp.zeros_like(kept_V).at[order_V].set(kept_V))(kept, order)
    return jnp.where(kept, logits_NV, -jnp.inf)
