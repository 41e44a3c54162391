"""Operations counted from the jaxpr: loops by their trips, rematerialisation twice, and conditionals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, tiny_decoder

from jaxnr.models.decoder import init_params
from jaxnr.planning.arithmetic import count_flops

B, D, L = 6, 8, 5
X, WEIGHTS = jax.ShapeDtypeStruct((B, D), jnp.float32), jax.ShapeDtypeStruct((L, D, D), jnp.float32)


def scanned(x, weights):
    return jax.lax.scan(lambda x, weight: (x @ weight, None), x, weights)[0]


def unrolled(x, weights):
    for layer in range(L):
        x = x @ weights[layer]
    return x


def compilers(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_scanned_layers_count_as_often_as_they_run():
    counted = count_flops(jax.jit(scanned).trace(X, WEIGHTS), 1)
    assert counted == 2 * B * D * D * L == count_flops(jax.jit(unrolled).trace(X, WEIGHTS), 1)
    # The compiler agrees on the unrolled program, and counts one layer of the scanned one.
    assert counted == pytest.approx(compilers(unrolled, X, WEIGHTS), rel=0.02)
    assert compilers(scanned, X, WEIGHTS) < counted / 2


def test_rematerialised_gradients_count_forward_twice_and_backward_twice_as_much():
    def loss(weights, x):
        block = jax.checkpoint(lambda x, weight: (jnp.sin(x @ weight), None))
        return jax.lax.scan(block, x, weights)[0].sum()

    plain = 2 * B * D * D * L
    # Forward, forward again, and the products for the input's and the weight's gradients.
    assert count_flops(jax.jit(jax.grad(loss)).trace(WEIGHTS, X), 1) == 4 * plain


def test_loops_that_data_ends_run_as_often_as_they_are_said_to_and_conditionals_take_the_dearest_branch():
    def loop(x, weights):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ weights[0], x)

    def either(x, weights):
        return jax.lax.cond(x.sum() > 0, lambda: x @ weights[0] @ weights[1], lambda: x @ weights[0])

    assert count_flops(jax.jit(loop).trace(X, WEIGHTS), 7) == 7 * 2 * B * D * D
    assert count_flops(jax.jit(either).trace(X, WEIGHTS), 1) == 2 * 2 * B * D * D


def test_a_decoder_takes_two_operations_a_weight_and_token_and_those_of_attention():
    model, S = tiny_decoder(), 16
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    tokens, mask = jax.ShapeDtypeStruct((B, S), jnp.int32), jax.ShapeDtypeStruct((B, S), bool)
    forward = jax.jit(lambda params, *text: model.apply({"params": params}, *text))
    kernels = sum(
        np.prod(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "kernel" in str(path[-1])
    )
    heads = TINY.num_attention_heads * TINY.head_dim
    attention = 2 * 2 * B * S * S * heads * TINY.num_hidden_layers
    assert count_flops(forward.trace(params, tokens, mask), 1) == 2 * B * S * kernels + attention
