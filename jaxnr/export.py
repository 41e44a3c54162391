"""A trained model of a run as a checkpoint that transformers, and what is built on it, loads."""

from __future__ import annotations

from pathlib import Path

from jaxnr.config import load_config
from jaxnr.evaluation.run import MODELS
from jaxnr.models.huggingface import save
from jaxnr.road import Road


def export(run_dir: Path, name: str, out: Path) -> None:
    """Writes the model ``name`` of the results table to the new folder ``out``, adapters merged."""
    road = Road.open(load_config(run_dir / "config.toml"), run_dir)
    shape, stage = MODELS[name]
    policy = road.policy(shape)
    save(out, policy.model, road.trained_params(policy, stage), road.tokenizer)
