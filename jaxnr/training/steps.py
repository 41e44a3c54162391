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
from jaxnr.mesh import batch_sharding, replicated, traced_on, tree_shardings
from jaxnr.models.decoder import Decoder, head_VD
from jaxnr.models.lora import trainable, with_trainable
from jaxnr.training import distillation_losses
from jaxnr.training.distillation_losses import TokenLoss, token_losses
from jaxnr.training.losses import masked_mean, token_logprobs
from jaxnr.training.policy_losses import (
    CLIP,
    cispo_loss,
    clipped,
    dapo_loss,
    dr_grpo_advantages,
    dr_grpo_loss,
    gdpo_advantages,
    grpo_advantages,
    grpo_loss,
    gspo_loss,
    kl_k1,
    kl_k2,
    kl_k3,
    sequence_ratio,
    token_ratio,
    truncated_importance_weights,
    without_constant_groups,
)


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
    """Sampled completions with their log-probabilities at sampling and their rewards, NaN where a judge failed.

    ``reference_logprobs_BGT`` are those of the policy that a KL term holds on to; None without one.
    """

    old_logprobs_BGT: jax.Array
    reward_BG: jax.Array
    reference_logprobs_BGT: jax.Array | None = None


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


def make_logprobs(model: Decoder, mesh: Mesh, vocabulary_size: int, config: GrpoConfig) -> Callable:
    """``logprobs(params, batch)`` [B, G, T] of a batch's completions, one microbatch after the other; 0 outside the
    mask. Scores what the policy has sampled by its reference."""

    def logprobs(params: dict, batch: Batch) -> jax.Array:
        parts = split_batch(batch, config.microbatches)
        return merge_batch(
            jax.lax.map(lambda part: _logprobs(model, params, part, vocabulary_size, config.temperature), parts)
        )

    sharding = batch_sharding(mesh)
    return jax.jit(traced_on(mesh, logprobs), in_shardings=(None, sharding), out_shardings=sharding)


def _logprobs(model: Decoder, params: dict, batch: Batch, vocabulary_size: int, temperature: float) -> jax.Array:
    """Log-probability of each completion token [B, G, T]; 0 outside the mask, where it may be anything: a ratio of two
    of them overflows there."""
    logprobs_BGT = token_logprobs(
        _hidden_states(model, params, batch),
        head_VD(params),
        batch.completion_BGT,
        vocabulary_size=vocabulary_size,
        temperature=temperature,
    )
    return jnp.where(batch.mask_BGT, logprobs_BGT, 0.0)


def make_grpo_step(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    vocabulary_size: int,
    config: GrpoConfig,
) -> Callable:
    """Policy optimisation on one sampled batch, by the loss, advantages and KL of the config.

    ``logprob_gap`` is max |old − new| before the update: 0 but for rounding. One update is made on a batch, so with
    importance weights the trainer's log-probabilities at its start, from which ρ is then measured, are the current
    ones: ρ is 1, and nothing is clipped.
    """

    def loss_fn(
        params: dict, part: tuple[ScoredBatch, jax.Array, jax.Array], totals: Totals
    ) -> tuple[jax.Array, jax.Array]:
        batch, advantages_BG, mask_BGT = part
        logprobs_BGT = _logprobs(model, params, batch, vocabulary_size, config.temperature)
        old_BGT, weight_BGT = batch.old_logprobs_BGT, 1.0
        if config.importance_cap:
            weight_BGT = truncated_importance_weights(logprobs_BGT, old_BGT, config.importance_cap)
            old_BGT = jax.lax.stop_gradient(logprobs_BGT)
        penalty_BGT = 0.0
        if batch.reference_logprobs_BGT is not None:
            estimate = {"k2": kl_k2, "k3": kl_k3}[config.kl]
            penalty_BGT = config.kl_weight * estimate(logprobs_BGT, batch.reference_logprobs_BGT)
        loss = _policy_loss(config, logprobs_BGT, old_BGT, advantages_BG, mask_BGT, totals, weight_BGT, penalty_BGT)
        return loss, logprobs_BGT

    def step(state: TrainState, batch: ScoredBatch) -> tuple[TrainState, dict]:
        advantages_BG = _advantages(config, batch.reward_BG)  # of whole groups, whichever microbatch they are in
        mask_BGT = batch.mask_BGT
        if config.loss == "dapo":
            mask_BGT = without_constant_groups(mask_BGT, advantages_BG)
        state, metrics, logprobs_BGT = _step_down(
            loss_fn, state, optimizer, (batch, advantages_BG, mask_BGT), mask_BGT, mesh, config.microbatches
        )
        return state, metrics | _policy_metrics(config, batch, advantages_BG, logprobs_BGT)

    return _jit_step(step, state, mesh)


def _advantages(config: GrpoConfig, reward_BG: jax.Array) -> jax.Array:
    advantages = {"dr_grpo": dr_grpo_advantages, "grpo": grpo_advantages, "gdpo": gdpo_advantages}
    return advantages[config.advantages](reward_BG)


def clip_range(config: GrpoConfig) -> tuple[float, float]:
    """ε_low and ε_high: the configured ones, and for a 0 the one of the loss's paper."""
    low, high = CLIP[config.loss]
    return config.clip_low or low, config.clip_high or high


def _policy_loss(
    config: GrpoConfig,
    logprobs_BGT: jax.Array,
    old_logprobs_BGT: jax.Array,
    advantages_BG: jax.Array,
    mask_BGT: jax.Array,
    totals: Totals,
    weight_BGT: jax.Array | float,
    penalty_BGT: jax.Array | float,
) -> jax.Array:
    arrays = (logprobs_BGT, old_logprobs_BGT, advantages_BG, mask_BGT)
    low, high = clip_range(config)
    settings: Any = {"clip_low": low, "clip_high": high, "weight_BGT": weight_BGT, "penalty_BGT": penalty_BGT}
    match config.loss:
        case "dr_grpo":
            return dr_grpo_loss(*arrays, rows=totals.rows, budget=mask_BGT.shape[-1], **settings)
        case "grpo":
            return grpo_loss(*arrays, rows=totals.rows, **settings)
        case "dapo":
            return dapo_loss(*arrays, tokens=totals.tokens, **settings)
        case "gspo":
            return gspo_loss(*arrays, rows=totals.rows, **settings)
        case "cispo":
            return cispo_loss(*arrays, tokens=totals.tokens, **settings)


def _policy_metrics(
    config: GrpoConfig, batch: ScoredBatch, advantages_BG: jax.Array, logprobs_BGT: jax.Array
) -> dict[str, jax.Array]:
    """What a step logs of the policy before its update, from the values of the whole batch."""
    mask_BGT, old_BGT = batch.mask_BGT, batch.old_logprobs_BGT
    weight_BGT = truncated_importance_weights(logprobs_BGT, old_BGT, config.importance_cap or jnp.inf)
    if config.importance_cap:
        old_BGT = logprobs_BGT
    if config.loss == "gspo":
        ratio_BGT = sequence_ratio(logprobs_BGT, old_BGT, mask_BGT)
    else:
        ratio_BGT = token_ratio(logprobs_BGT, old_BGT)
    metrics = {
        "logprob_gap": jnp.max(jnp.where(mask_BGT, jnp.abs(logprobs_BGT - batch.old_logprobs_BGT), 0.0)),
        "surprisal": -masked_mean(logprobs_BGT, mask_BGT),
        "completion_tokens": jnp.mean(jnp.sum(mask_BGT, axis=-1)),
        "zero_advantage_groups": jnp.mean(jnp.all(advantages_BG == 0, axis=-1)),
        "clip_fraction": masked_mean(clipped(ratio_BGT, advantages_BG, *clip_range(config)), mask_BGT),
        "importance_weight": masked_mean(weight_BGT, mask_BGT),
    }
    if batch.reference_logprobs_BGT is not None:
        metrics["kl_k1"] = masked_mean(kl_k1(logprobs_BGT, batch.reference_logprobs_BGT), mask_BGT)
        metrics["kl_k3"] = masked_mean(kl_k3(logprobs_BGT, batch.reference_logprobs_BGT), mask_BGT)
    return metrics


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
