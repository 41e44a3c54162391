"""The pure losses against float64 NumPy, and what they hold in memory and spread over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import relative_gap

from jaxnr.config import MeshConfig
from jaxnr.mesh import BATCH, make_mesh
from jaxnr.training import losses
from jaxnr.training.distillation_losses import reverse_kl, token_losses
from jaxnr.training.losses import (
    map_chunks,
    masked_mean,
    token_logprobs,
)

V = 61  # real tokens; the table below has 64 rows
RNG = np.random.default_rng(0)
STUDENT_HIDDEN = RNG.normal(size=(3, 4, 8)).astype(np.float32)
STUDENT_HEAD = RNG.normal(size=(64, 8)).astype(np.float32)
TOKENS = RNG.integers(0, V, (3, 4)).astype(np.int32)
MASK = RNG.random((3, 4)) < 0.7


def log_softmax64(hidden, head, temperature=1.0):
    """Over the real vocabulary, in float64."""
    logits = hidden.astype(np.float64) @ head[:V].T.astype(np.float64) / temperature
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("chunk", [1, 5, 12, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_are_the_log_softmax_whatever_the_chunk(monkeypatch, chunk, temperature):
    monkeypatch.setattr(losses.map_chunks, "__defaults__", (chunk,))
    actual = token_logprobs(STUDENT_HIDDEN, STUDENT_HEAD, TOKENS, vocabulary_size=V, temperature=temperature)
    expected = np.take_along_axis(log_softmax64(STUDENT_HIDDEN, STUDENT_HEAD, temperature), TOKENS[..., None], -1)
    np.testing.assert_allclose(actual, expected[..., 0], rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 9), chunk=st.integers(1, 11))
def test_chunks_keep_the_order_of_the_rows(count, chunk):
    rows, scale = np.arange(count * 2.0).reshape(count, 2), np.arange(1.0, count + 1)
    mapped = map_chunks(lambda row_N2, scale_N: row_N2 * scale_N[:, None], (rows, scale), chunk)
    np.testing.assert_array_equal(mapped, rows * scale[:, None])


def test_chunking_changes_no_gradient(monkeypatch):
    def gradients():
        def loss(hidden, head):
            return jnp.sum(MASK * token_logprobs(hidden, head, TOKENS, vocabulary_size=V))

        return jax.grad(loss, argnums=(0, 1))(STUDENT_HIDDEN, STUDENT_HEAD)

    whole = gradients()
    monkeypatch.setattr(losses.map_chunks, "__defaults__", (5,))
    assert relative_gap(gradients(), whole) < 1e-6


def test_masked_mean_is_the_mean_over_the_mask_and_zero_for_an_empty_one():
    values = RNG.random((2, 3)).astype(np.float32)
    mask = np.array([[1, 1, 0], [0, 0, 1]], bool)
    assert masked_mean(values, mask) == pytest.approx(values[mask].mean(), rel=1e-6)
    assert masked_mean(values, np.zeros_like(mask)) == 0


def test_rows_past_the_vocabulary_change_nothing():
    head = STUDENT_HEAD.copy()
    head[V:] = 1e3
    np.testing.assert_array_equal(
        token_logprobs(STUDENT_HIDDEN, STUDENT_HEAD, TOKENS, vocabulary_size=V),
        token_logprobs(STUDENT_HIDDEN, head, TOKENS, vocabulary_size=V),
    )


TOKEN_COUNT, BIG_V, WIDTH = 16_384, 8_192, 8


def big_gradient(loss: str):
    def total(hidden, head, tokens):
        if loss == "token_logprobs":
            return token_logprobs(hidden, head, tokens, vocabulary_size=BIG_V).sum()
        losses, _ = token_losses(
            lambda log_p, log_q, _: reverse_kl(log_p, log_q),
            hidden,
            head,
            hidden * 2,
            head,
            tokens,
            vocabulary_size=BIG_V,
        )
        return losses.sum()

    return jax.jit(jax.grad(total, argnums=(0, 1)))


@pytest.mark.parametrize("loss", ["token_logprobs", "reverse_kl"])
def test_the_working_memory_is_that_of_a_few_chunks(loss):
    shapes = [(TOKEN_COUNT, WIDTH), (BIG_V, WIDTH)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = big_gradient(loss).lower(*arrays, jax.ShapeDtypeStruct((TOKEN_COUNT,), jnp.int32)).compile()
    one_chunk = 4 * losses.CHUNK_TOKENS * BIG_V  # bytes
    assert program.memory_analysis().temp_size_in_bytes < 8 * one_chunk < 4 * TOKEN_COUNT * BIG_V


@pytest.mark.parametrize("loss", ["token_logprobs", "reverse_kl"])
def test_eight_devices_share_the_work_of_the_head(loss):
    """Each device computes the logits of its own tokens, an eighth of every chunk."""

    def flops(mesh_config: MeshConfig, devices: list) -> float:
        mesh = make_mesh(mesh_config, devices)
        specs = [((TOKEN_COUNT, WIDTH), jnp.float32, BATCH), ((BIG_V, WIDTH), jnp.float32, P())]
        specs.append(((TOKEN_COUNT,), jnp.int32, BATCH))
        arrays = [jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, p)) for s, dtype, p in specs]
        return big_gradient(loss).lower(*arrays).compile().cost_analysis()["flops"]

    one = flops(MeshConfig(data=1), jax.devices()[:1])
    assert flops(MeshConfig(data=4, fsdp=2), jax.devices()) < one / 7
