"""The compiled steps, forward and backward: none of them holds the logits of all tokens."""

import math
import re

import jax
import optax
import pytest
from tiny import left_padded, random_params, tiny_decoder

from jaxnr.config import DistillConfig, GrpoConfig, MeshConfig
from jaxnr.mesh import make_mesh
from jaxnr.training import losses
from jaxnr.training.steps import (
    Batch,
    ScoredBatch,
    create_state,
    make_distill_step,
    make_grpo_step,
    make_sft_step,
)

V, B, G, T = 1009, 4, 2, 16  # the vocabulary is far larger than every other axis
TOKENS, CHUNK = B * G * T, 16
MODEL = tiny_decoder(num_hidden_layers=1, vocab_size=1024)
TEACHER = tiny_decoder(num_hidden_layers=1, vocab_size=1030, hidden_size=16, tie_word_embeddings=False)
DIVERGENCES = ("reverse_kl", "jsd", "sampled_token", "sampled_token_control_variate")


def compiled(kind: str) -> str:
    """The optimised program of a step on one device, as text."""
    mesh, optimizer = make_mesh(MeshConfig(data=1), jax.devices()[:1]), optax.sgd(1.0)
    state = create_state(random_params(MODEL), optimizer, mesh)
    of_tokens = [jax.ShapeDtypeStruct((B, G, T), dtype) for dtype in ("int32", "bool", "float32")]
    batch = Batch(*left_padded([6] * B, 6), *of_tokens[:2])
    if kind == "sft":
        step, arguments = make_sft_step(MODEL, optimizer, state, mesh, V), (batch,)
    elif kind == "grpo":
        step = make_grpo_step(MODEL, optimizer, state, mesh, V, GrpoConfig())
        rewards = jax.ShapeDtypeStruct((B, G), "float32")
        arguments = (ScoredBatch(batch.prompt_BS, batch.prompt_mask_BS, *of_tokens, rewards),)
    else:
        step = make_distill_step(MODEL, TEACHER, optimizer, state, mesh, V, DistillConfig(divergence=kind))
        arguments = (random_params(TEACHER), batch)
    return step.lower(state, *arguments).compile().as_text()


def largest_buffer(program: str) -> int:
    """Elements of the largest array, of any type, that a program's text names."""
    return max(math.prod(map(int, sizes.split(","))) for sizes in re.findall(r"\b\w+\[(\d+(?:,\d+)*)\]", program))


@pytest.mark.parametrize("kind", ["sft", "grpo", *DIVERGENCES])
def test_no_step_holds_tokens_times_vocabulary(monkeypatch, kind):
    monkeypatch.setattr(losses.map_chunks, "__defaults__", (CHUNK,))
    largest = largest_buffer(compiled(kind))
    assert largest >= 1024 * MODEL.config.hidden_size >= CHUNK * V  # it sees the table, and a chunk's logits
    assert largest < TOKENS * V / 2


@pytest.mark.parametrize("kind", ["sft", "jsd"])
def test_a_step_whose_chunk_is_the_whole_batch_is_found_out(monkeypatch, kind):
    monkeypatch.setattr(losses.map_chunks, "__defaults__", (TOKENS,))
    assert largest_buffer(compiled(kind)) >= TOKENS * V
