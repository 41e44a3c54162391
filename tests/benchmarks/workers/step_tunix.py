"""Whole steps of google-tunix: its DrGRPOLearner on one device, with its own ("vanilla") rollout.

The learner asks its data for the next prompts when a step has ended, so the data waits for requests.
"""

import importlib.metadata
import json
from collections.abc import Iterator

import jax
import numpy as np
import optax
from flax import nnx
from serve import Requests, reward, step_arguments
from tunix.rl.grpo.drgrpo_learner import DrGRPOConfig, DrGRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix_qwen2 import Numbers, load

options = step_arguments()
assert options.what == "grpo", "google-tunix has no on-policy distillation"
prompts = json.loads(options.prompts.read_text())
model, mesh = load(options.checkpoint)
requests: Requests
tokens = 0
RECORDED = "recorded_gradient_norm"


def even_tokens(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    global tokens
    rows = [Numbers().encode(text) for text in completions]
    tokens = sum(map(len, rows))
    rewards = [reward(row) for row in rows]
    requests.sampled()
    return rewards


def record_norm() -> optax.GradientTransformation:
    """Leaves the gradient alone; its state is the gradient's norm."""
    return optax.GradientTransformation(
        lambda params: {RECORDED: jax.numpy.zeros(())},
        lambda gradient, state, params=None: (gradient, {RECORDED: optax.global_norm(gradient)}),
    )


cluster = RLCluster(
    actor=model,
    tokenizer=Numbers(),
    cluster_config=ClusterConfig(
        role_to_mesh=dict.fromkeys((Role.ACTOR, Role.ROLLOUT), mesh),
        training_config=RLTrainingConfig(
            actor_optimizer=optax.chain(
                record_norm(), optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0)
            ),
            eval_every_n_steps=10**9,
            max_steps=10**9,
            mini_batch_size=len(prompts),
            train_micro_batch_size=len(prompts),
        ),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=options.new_tokens,
            max_prompt_length=len(prompts[0]),
            kv_cache_size=len(prompts[0]) + options.new_tokens,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=[-1],
        ),
    ),
)
learner = DrGRPOLearner(
    rl_cluster=cluster,
    reward_fns=even_tokens,
    algo_config=DrGRPOConfig(num_generations=options.group, num_iterations=1, beta=0.0),
)
requests = Requests(
    {
        "google-tunix": importlib.metadata.version("google-tunix"),
        "jax": jax.__version__,
        "flax": importlib.metadata.version("flax"),
    }
)


def gradient_norm() -> float:
    found = jax.tree_util.tree_leaves_with_path(nnx.state(cluster.actor_trainer.optimizer))
    return next(float(leaf) for path, leaf in found if RECORDED in jax.tree_util.keystr(path))


def data() -> Iterator[dict]:
    while requests.begin() is not None:
        yield {"prompts": np.array([" ".join(map(str, prompt)) for prompt in prompts])}
        jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
        requests.stop()
        requests.answer(requests.measured | {"tokens": tokens, "grad_norm": gradient_norm()})


learner.train(data())
