"""The jitted steps: ``step(state, batch) -> (state, metrics)``, the state donated, sharded by ``mesh.py``'s table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxnr.config import DistillConfig, GrpoConfig, OptimizerConfig
from jaxnr.mesh import batch_sharding, traced_on, replicated, tree_shardings
from jaxnr.models.decoder import Decoder, head_VD
from jaxnr.models.lora import trainable, with_trainable
from jaxnr.training import distillation_losses
from jaxnr.training.distillation_losses import TokenLoss, token_losses
from jaxnr.training.losses import dr_grpo_advantages, dr_grpo_loss, masked_mean, token_logprobs


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
    """AdamW after clipping by the global norm, under ``learning_rate``."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(learning_rate(config, steps), config.beta1, config.beta2, weight_decay=config.weight_decay),
    )


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """A linear warm-up from 0, and from there to ``steps`` as ``config.schedule`` says."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, max(steps - 1, 0))
    after = {
        "cosine": optax.cosine_decay_schedule(peak, max(steps - warmup, 1), config.final_share),
        "linear": optax.linear_schedule(peak, config.final_share * peak, max(steps - warmup, 1)),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


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
        traced_on(mesh, step),
        in_shardings=(shardings, *(None,) * constants, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


class Totals(NamedTuple):
    """Of a whole batch: what losses divide by, so that the gradients of its microbatches add up to its own."""

    rows: int
    """Completions."""
    tokens: jax.Array
    """Tokens under the mask."""


def _step_down(
    loss_fn: Callable[[dict, Any, Totals], tuple[jax.Array, Any]],
    state: TrainState,
    optimizer: optax.GradientTransformation,
    batch: Any,
    mask_BGT: jax.Array,
    mesh: Mesh,
    microbatches: int,
) -> tuple[TrainState, dict, Any]:
    """One update of what is trainable, by the gradient of ``loss_fn(params, microbatch, totals) -> (loss, values)``.

    Returns the state, the metrics that every step has, and the values: arrays with a leading axis of prompts, those of
    all microbatches. Where the loss or its gradient is not finite the parameters and the optimizer state stay as they
    are, and the metric ``skipped`` is 1.
    """
    changing = trainable(state.params)
    totals = Totals(mask_BGT[..., 0].size, jnp.sum(mask_BGT))
    shardings = tree_shardings(changing, mesh)

    def gradient(part: Any) -> tuple[dict, tuple[jax.Array, Any]]:
        (loss, values), gradients = jax.value_and_grad(
            lambda changing: loss_fn(with_trainable(state.params, changing), part, totals), has_aux=True
        )(changing)
        # Summed over the devices, each keeps the part that it updates.
        return jax.lax.with_sharding_constraint(gradients, shardings), (loss, values)

    if microbatches == 1:
        gradients, (loss, values) = gradient(batch)
    else:

        def add(total: dict, part: Any) -> tuple[dict, tuple[jax.Array, Any]]:
            gradients, found = gradient(part)
            return jax.tree.map(jnp.add, total, gradients), found

        zeros = jax.tree.map(jnp.zeros_like, changing)
        gradients, (losses, values) = jax.lax.scan(add, zeros, split_batch(batch, microbatches))
        loss, values = jnp.sum(losses), merge_batch(values)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, changing)
    updated = (cast(dict, optax.apply_updates(changing, updates)), opt_state)
    changed, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), updated, (changing, state.opt_state)
    )
    state = TrainState(state.step + 1, with_trainable(state.params, changed), opt_state)
    return state, {"loss": loss, "grad_norm": norm, "skipped": 1.0 - finite}, values


def split_batch(batch, microbatches: int):
    """Every array [B, ...] of a tree as [microbatches, B / microbatches, ...].

    A microbatch takes every ``microbatches``-th prompt, so that each device, which holds consecutive ones, has its
    share of every microbatch.
    """
    return jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)


def merge_batch(parts):
    """The inverse of ``split_batch``."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


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
    microbatches: int = 1,
) -> Callable:
    """Supervised fine-tuning: warm start, and supervised distillation."""

    def loss_fn(params: dict, batch: Batch, totals: Totals) -> tuple[jax.Array, tuple]:
        hidden = _hidden_states(model, params, batch)
        logprobs = token_logprobs(hidden, head_VD(params), batch.completion_BGT, vocabulary_size=vocabulary_size)
        return -jnp.sum(batch.mask_BGT * logprobs) / jnp.maximum(totals.tokens, 1), ()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        state, metrics, _ = _step_down(loss_fn, state, optimizer, batch, batch.mask_BGT, mesh, microbatches)
        return state, metrics

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

    def loss_fn(params: dict, advantaged: tuple[ScoredBatch, jax.Array], totals: Totals) -> tuple[jax.Array, jax.Array]:
        batch, advantages_BG = advantaged
        hidden = _hidden_states(model, params, batch)
        logprobs = token_logprobs(
            hidden,
            head_VD(params),
            batch.completion_BGT,
            vocabulary_size=vocabulary_size,
            temperature=config.temperature,
        )
        loss = dr_grpo_loss(
            logprobs,
            batch.old_logprobs_BGT,
            advantages_BG,
            batch.mask_BGT,
            rows=totals.rows,
            budget=batch.completion_BGT.shape[-1],
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        return loss, logprobs

    def step(state: TrainState, batch: ScoredBatch) -> tuple[TrainState, dict]:
        advantages_BG = dr_grpo_advantages(batch.reward_BG)  # of whole groups, whichever microbatch they are in
        state, metrics, logprobs_BGT = _step_down(
            loss_fn, state, optimizer, (batch, advantages_BG), batch.mask_BGT, mesh, config.microbatches
        )
        gap = jnp.max(jnp.where(batch.mask_BGT, jnp.abs(logprobs_BGT - batch.old_logprobs_BGT), 0.0))
        return state, metrics | {
            "logprob_gap": gap,
            "surprisal": -masked_mean(logprobs_BGT, batch.mask_BGT),
            "completion_tokens": jnp.mean(jnp.sum(batch.mask_BGT, axis=-1)),
            "zero_advantage_groups": jnp.mean(jnp.all(advantages_BG == 0, axis=-1)),
        }

    return _jit_step(step, state, mesh)


def make_distill_step(
    student: Decoder,
    teacher: Decoder,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    vocabulary_size: int,
    config: DistillConfig,
) -> Callable:
    """``step(state, teacher_params, batch)``: the chosen divergence on the student's samples, no gradient through them.

    ``reverse_kl`` of the metrics is exact whatever the divergence.
    """
    token_loss = _token_loss(config)

    def step(state: TrainState, teacher_params: dict, batch: Batch) -> tuple[TrainState, dict]:
        def loss_fn(params: dict, batch: Batch, totals: Totals) -> tuple[jax.Array, jax.Array]:
            losses_BGT, kl_BGT = token_losses(
                token_loss,
                _hidden_states(student, params, batch),
                head_VD(params),
                _hidden_states(teacher, teacher_params, batch),
                head_VD(teacher_params),
                batch.completion_BGT,
                vocabulary_size=vocabulary_size,
                temperature=config.temperature,
            )
            return jnp.sum(batch.mask_BGT * losses_BGT) / jnp.maximum(totals.tokens, 1), kl_BGT

        counted = _prefix(batch, config.prefix_tokens)
        state, metrics, kl_BGT = _step_down(
            loss_fn, state, optimizer, counted, counted.mask_BGT, mesh, config.microbatches
        )
        tokens = jnp.mean(jnp.sum(batch.mask_BGT, axis=-1))
        return state, metrics | {"reverse_kl": masked_mean(kl_BGT, counted.mask_BGT), "completion_tokens": tokens}

    return _jit_step(step, state, mesh, constants=1)


def _token_loss(config: DistillConfig) -> TokenLoss:
    match config.divergence:
        case "reverse_kl":
            return lambda log_p_NV, log_q_NV, _: distillation_losses.reverse_kl(log_p_NV, log_q_NV)
        case "jsd":
            return lambda log_p_NV, log_q_NV, _: distillation_losses.generalized_jsd(
                log_p_NV, log_q_NV, config.jsd_beta
            )
        case "sampled_token":
            return distillation_losses.sampled_token
        case "sampled_token_control_variate":
            return distillation_losses.sampled_token_control_variate


def _prefix(batch: Batch, tokens: int) -> Batch:
    """The batch with the first ``tokens`` of each completion, 0 for all. No earlier token sees what is cut off."""
    if tokens == 0:
        return batch
    completion_BGT, mask_BGT = batch.completion_BGT[..., :tokens], batch.mask_BGT[..., :tokens]
    return dataclasses.replace(batch, completion_BGT=completion_BGT, mask_BGT=mask_BGT)
