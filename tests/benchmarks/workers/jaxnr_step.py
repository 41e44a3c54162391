"""jaxnr's steps as it takes them, and their flattened twins, in which each prompt runs once for each completion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import without_torch  # noqa: F401
from serve import reward

from jaxnr.config import DistillConfig, GrpoConfig, MeshConfig, OptimizerConfig
from jaxnr.mesh import batch_sharding, make_mesh
from jaxnr.models.decoder import Decoder, DecoderConfig
from jaxnr.models.huggingface import load_decoder_params
from jaxnr.sampling.sampler import Completions, SamplingSettings, make_sampler
from jaxnr.training.steps import (
    Batch,
    ScoredBatch,
    TrainState,
    create_state,
    make_distill_step,
    make_grpo_step,
    make_optimizer,
)

OPTIMIZER = OptimizerConfig(
    learning_rate=1e-6, warmup_steps=0, schedule="constant", beta2=0.999, weight_decay=0.0, max_grad_norm=1.0
)
MESH = make_mesh(MeshConfig())


class Flattened(Decoder):
    """A decoder that runs each prompt again for each of its completions; the same parameters, the same values."""

    def shared(self, prompt_BS: jax.Array, mask_BS: jax.Array, completion_BGT: jax.Array) -> jax.Array:
        B, G, T = completion_BGT.shape
        prompt, mask = (jnp.repeat(x, G, axis=0) for x in (prompt_BS, mask_BS))
        hidden = super().shared(prompt, mask, completion_BGT.reshape(B * G, 1, T))
        return hidden.reshape(B, G, T, -1)


def load(checkpoint: Path, flattened: bool) -> tuple[Decoder, dict]:
    """The model without rematerialisation, and its parameters."""
    kind = Flattened if flattened else Decoder
    model = kind(DecoderConfig.read(checkpoint / "config.json"), remat="none")
    return model, load_decoder_params(checkpoint, model, MESH)


def make_sample(model: Decoder, prompt_BS: np.ndarray, group: int, new_tokens: int) -> Callable[[dict, int], tuple]:
    """``sample(params, step)``: the prompts on the mesh, and completions of which none ends early.

    The flattened twin gives the sampler B·G prompts of one completion each.
    """
    B, G = len(prompt_BS), group
    sampler = make_sampler(model, max_new_tokens=new_tokens, vocabulary_size=model.config.vocab_size, pad_id=0)
    no_stop = np.array([-1], np.int32)

    def sample(params: dict, step: int) -> tuple[jax.Array, jax.Array, Completions]:
        prompts = jax.device_put((prompt_BS, np.ones_like(prompt_BS, bool)), batch_sharding(MESH))
        seed_and_step = (np.int32(0), np.int32(step))
        if isinstance(model, Flattened):
            repeated = jax.device_put([np.repeat(x, G, axis=0) for x in prompts], batch_sharding(MESH))
            names = (np.arange(B * G, dtype=np.int32), np.zeros(1, np.int32))
            flat = sampler(params, *repeated, *names, *seed_and_step, SamplingSettings(), no_stop)
            return *prompts, jax.tree.map(lambda x: x.reshape(B, G, *x.shape[2:]), flat)
        names = (np.arange(B, dtype=np.int32), np.arange(G, dtype=np.int32))
        return *prompts, sampler(params, *prompts, *names, *seed_and_step, SamplingSettings(), no_stop)

    return sample


def rewards(completions: Completions) -> np.ndarray:
    """The trivial reward of every completion [B, G]; waits for the sampler."""
    return np.array([[reward(row) for row in group] for group in completions.tokens_BGT.tolist()], np.float32)


def scored(prompt_BS: jax.Array, mask_BS: jax.Array, completions: Completions, reward_BG: np.ndarray) -> ScoredBatch:
    """What a Dr.GRPO step learns from."""
    return ScoredBatch(
        prompt_BS,
        mask_BS,
        completions.tokens_BGT,
        completions.mask_BGT,
        old_logprobs_BGT=completions.logprobs_BGT,
        reward_BG=jax.device_put(reward_BG, batch_sharding(MESH)),
    )


def unscored(prompt_BS: jax.Array, mask_BS: jax.Array, completions: Completions) -> Batch:
    """What a distillation step learns from."""
    return Batch(prompt_BS, mask_BS, completions.tokens_BGT, completions.mask_BGT)


def make_update(
    what: str, model: Decoder, params: dict, teacher: Path, optimizer: optax.GradientTransformation | None = None
) -> tuple[TrainState, Callable]:
    """The state before the first step, and ``update(state, batch)``; ``teacher`` is read for ``what`` = distill."""
    optimizer = make_optimizer(OPTIMIZER, steps=1) if optimizer is None else optimizer
    state = create_state(params, optimizer, MESH)
    vocabulary_size = model.config.vocab_size
    if what == "grpo":
        return state, make_grpo_step(model, optimizer, state, MESH, vocabulary_size, GrpoConfig(optimizer=OPTIMIZER))
    teacher_model, teacher_params = load(teacher, isinstance(model, Flattened))
    config = DistillConfig(optimizer=OPTIMIZER)
    step = make_distill_step(model, teacher_model, optimizer, state, MESH, vocabulary_size, config)
    return state, lambda state, batch: step(state, teacher_params, batch)
