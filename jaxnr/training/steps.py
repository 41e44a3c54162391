"""The jitted steps: ``step(state, batch) -> (state, metrics)``, the state donated, sharded by ``mesh.py``'s table."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxnr.config import GrpoConfig, OptimizerConfig
from jaxnr.mesh import batch_sharding, replicated, tree_shardings
from jaxnr.models.decoder import Decoder, head_VD
from jaxnr.models.lora import trainable, with_trainable
from jaxnr.training.losses import dr_grpo_advantages, dr_grpo_loss, masked_mean, reverse_kl, sft_loss, token_logprobs


@flax.struct.dataclass
class TrainState:
    """Everything a step changes. Of parameters with adapters only these have optimizer state, and change."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


@flax.struct.dataclass
class Batch:
    """Left-padded prompts with G completions each; ``mask_BGT`` includes the end token."""

    prompt_BS: jax.Array
    prompt_mask_BS: jax.Array
    completion_BGT: jax.Array
    mask_BGT: jax.Array


@flax.struct.dataclass
class ScoredBatch(Batch):
    """Sampled completions with their log-probabilities at sampling and their composite rewards."""

    old_logprobs_BGT: jax.Array
    reward_BG: jax.Array


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; linear warm-up, then cosine decay to a tenth."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup_steps, max(steps - 1, 0)),
        decay_steps=max(steps, 1),
        end_value=config.learning_rate / 10,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay),
    )


def create_state(params: dict, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, placed on the mesh. Copies ``params``, since steps donate their state."""

    def build(params: dict) -> TrainState:
        return TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(trainable(params)))

    shardings = tree_shardings(jax.eval_shape(build, params), mesh)
    return jax.jit(build, out_shardings=shardings)(params)


def _jit_step(step: Callable, state: TrainState, mesh: Mesh, constants: int = 0) -> Callable:
    """Compiles ``step(state, *constants, batch)``; constants (a teacher's parameters) keep the sharding they have."""
    shardings = tree_shardings(state, mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, *(None,) * constants, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def _step_down(
    loss_fn: Callable[[dict], tuple[jax.Array, dict]], state: TrainState, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict]:
    """One update of what is trainable, by the gradient of ``loss_fn(params) -> (loss, metrics)``."""
    changing = trainable(state.params)
    (loss, metrics), gradients = jax.value_and_grad(
        lambda changing: loss_fn(with_trainable(state.params, changing)), has_aux=True
    )(changing)
    updates, opt_state = optimizer.update(gradients, state.opt_state, changing)
    params = with_trainable(state.params, cast(dict, optax.apply_updates(changing, updates)))
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients), **metrics}
    return TrainState(state.step + 1, params, opt_state), metrics


def _hidden_states(model: Decoder, params: dict, batch: Batch) -> jax.Array:
    """Hidden states [B, G, T, D] that predict each completion token; the prompt runs once for its completions."""
    hidden = model.apply(
        {"params": params}, batch.prompt_BS, batch.prompt_mask_BS, batch.completion_BGT, method="shared"
    )
    return cast(jax.Array, hidden)


def make_sft_step(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    vocabulary_size: int,
) -> Callable:
    """Supervised fine-tuning: warm start, and supervised distillation."""

    def loss_fn(params: dict, batch: Batch) -> tuple[jax.Array, dict]:
        hidden = _hidden_states(model, params, batch)
        logprobs = token_logprobs(hidden, head_VD(params), batch.completion_BGT, vocabulary_size=vocabulary_size)
        return sft_loss(logprobs, batch.mask_BGT), {}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        return _step_down(lambda params: loss_fn(params, batch), state, optimizer)

    return _jit_step(step, state, mesh)


def make_grpo_step(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    vocabulary_size: int,
    config: GrpoConfig,
) -> Callable:
    """Dr.GRPO on one sampled batch. ``logprob_gap`` is max |old − new| before the update: 0 but for rounding."""

    def loss_fn(params: dict, batch: ScoredBatch) -> tuple[jax.Array, dict]:
        hidden = _hidden_states(model, params, batch)
        logprobs = token_logprobs(
            hidden,
            head_VD(params),
            batch.completion_BGT,
            vocabulary_size=vocabulary_size,
            temperature=config.temperature,
        )
        advantages_BG = dr_grpo_advantages(batch.reward_BG)
        loss = dr_grpo_loss(
            logprobs,
            batch.old_logprobs_BGT,
            advantages_BG,
            batch.mask_BGT,
            budget=batch.completion_BGT.shape[-1],
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        gap = jnp.max(jnp.where(batch.mask_BGT, jnp.abs(logprobs - batch.old_logprobs_BGT), 0.0))
        metrics = {
            "logprob_gap": gap,
            "surprisal": -masked_mean(logprobs, batch.mask_BGT),
            "completion_tokens": jnp.mean(jnp.sum(batch.mask_BGT, axis=-1)),
            "zero_advantage_groups": jnp.mean(jnp.all(advantages_BG == 0, axis=-1)),
        }
        return loss, metrics

    def step(state: TrainState, batch: ScoredBatch) -> tuple[TrainState, dict]:
        return _step_down(lambda params: loss_fn(params, batch), state, optimizer)

    return _jit_step(step, state, mesh)


def make_distill_step(
    student: Decoder,
    teacher: Decoder,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    vocabulary_size: int,
    temperature: float,
) -> Callable:
    """``step(state, teacher_params, batch)``: exact reverse KL on the student's samples, no gradient through them."""

    def loss_fn(params: dict, teacher_params: dict, batch: Batch) -> tuple[jax.Array, dict]:
        kl_BGT = reverse_kl(
            _hidden_states(student, params, batch),
            head_VD(params),
            jax.lax.stop_gradient(_hidden_states(teacher, teacher_params, batch)),
            head_VD(teacher_params),
            vocabulary_size=vocabulary_size,
            temperature=temperature,
        )
        loss = masked_mean(kl_BGT, batch.mask_BGT)
        return loss, {"reverse_kl": loss, "completion_tokens": jnp.mean(jnp.sum(batch.mask_BGT, axis=-1))}

    def step(state: TrainState, teacher_params: dict, batch: Batch) -> tuple[TrainState, dict]:
        return _step_down(lambda params: loss_fn(params, teacher_params, batch), state, optimizer)

    return _jit_step(step, state, mesh, constants=1)
