"""A whole run of the road in seconds, which the tests of the road and of its commands share."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import jaxnr.data.prepare
import jaxnr.road
from jaxnr.config import (
    Config,
    DataConfig,
    DistillConfig,
    EvaluationConfig,
    GrpoConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    RetrievalConfig,
    SftConfig,
    save_config,
)
from jaxnr.data.synthetic.world import WorldParameters, generate_world
from jaxnr.mesh import make_mesh
from jaxnr.road import STAGES, run_stages

WORLD = WorldParameters(n_users=40, n_articles=500, days=12)

_MODEL = ModelConfig(hidden_size=32, num_layers=1, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=16)
_FAST = OptimizerConfig(learning_rate=2e-2, warmup_steps=1)

CONFIG = Config(
    checkpoint_every=2,
    data=DataConfig(train_prompts_per_user=1, max_signals=5, max_test_users=10),
    prompt=PromptConfig(
        max_prompt_tokens=64,
        prompt_buckets=(64,),
        max_new_tokens=24,
        min_queries=1,
        max_queries=3,
        vocabulary_size=1200,
    ),
    retrieval=RetrievalConfig(embedding_size=32),
    teacher=_MODEL,
    student=dataclasses.replace(_MODEL, hidden_size=16, intermediate_size=16, head_dim=8),
    warm_start=SftConfig(steps=30, prompts_per_step=4, group_size=2, optimizer=_FAST),
    grpo=GrpoConfig(steps=4, prompts_per_step=8, group_size=2, validate_every=2, uniform_steps=1, temperature=0.4),
    teacher_lists=2,
    supervised=SftConfig(steps=2, prompts_per_step=2, group_size=2),
    distill=DistillConfig(steps=2, prompts_per_step=8, group_size=2),
    evaluation=EvaluationConfig(
        samples=2, temperature=0.4, best_of_n=(1, 2), prompts_per_step=8, bootstrap_resamples=50, showcase_users=2
    ),
)


@contextlib.contextmanager
def tiny_surroundings(base: Path):
    """A small world, one device, and programs compiled once, without the costly optimisations, and kept in ``base``."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(base / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxnr.data.prepare, "generate_world", lambda seed: generate_world(seed, WORLD))
        patch.setattr(jaxnr.road, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        for name, value in settings.items():
            jax.config.update(name, value)
        reset_cache()  # jax decides once whether it has a cache
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            reset_cache()


@functools.cache
def finished_run(base: Path) -> Path:
    """The folder in ``base`` of one whole tiny run, walked once a process. Tests copy it before they change it."""
    out = base / "tiny_run"
    with tiny_surroundings(base):
        save_config(CONFIG, out / "config.toml")
        run_stages(CONFIG, out, STAGES)
    return out
