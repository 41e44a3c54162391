"""How many users a second a run's teacher and student serve, on the machine at hand."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxnr.config import load_config
from jaxnr.data.examples import Example
from jaxnr.evaluation.run import MODELS, rank
from jaxnr.models.decoder import parameter_count
from jaxnr.progress import progress
from jaxnr.road import Road
from jaxnr.training.rollout import Policy, padded_chunks

SERVED = ("teacher", "student_on_policy")


def benchmark_serving(run_dir: Path, users: int, best_of: int, repeats: int) -> dict[str, dict[str, float]]:
    """Prints and returns, for each model, users a second from prompt to merged ranking: medians of ``repeats``.

    ``one list``: one list a user. ``best of N``: N lists of one prefill, all retrieved for, the best by reward kept.
    ``N calls``: as many lists, each by a call with its own prefill. The first ``users`` test users are served, in
    batches of ``evaluation.prompts_per_step``, after a pass to compile.
    """
    road = Road.open(load_config(run_dir / "config.toml"), run_dir)
    examples = list(road.examples["test"])[:users]
    ways = {"one list": [1], f"best of {best_of}": [best_of], f"{best_of} calls": [1] * best_of}
    speeds: dict[str, dict[str, float]] = {}
    with progress("benchmark", len(ways) * len(SERVED)) as bar:
        for name in SERVED:
            shape, stage = MODELS[name]
            policy = road.policy(shape)
            params = road.trained_params(policy, stage)
            speeds[name] = {"parameters": parameter_count(params)}
            for way, samples_a_call in ways.items():
                speed = _users_per_second(road, policy, params, examples, samples_a_call, repeats)
                speeds[name][way] = speed
                bar.advance({"users/s": speed})
    _print(speeds, len(examples))
    return speeds


def _serve(
    road: Road, policy: Policy, params: dict, chunk: list[Example], samples_a_call: Sequence[int]
) -> list[list[str]]:
    """The ranking of each user: lists by calls of so many samples each, the best of them by reward retrieved for."""
    temperature = road.config.evaluation.temperature
    calls = [
        road.roll_out(policy, params, chunk, samples, temperature, step=call)
        for call, samples in enumerate(samples_a_call)
    ]
    lists = [list(itertools.chain(*groups)) for groups in zip(*(call.lists for call in calls), strict=True)]
    if len(lists[0]) == 1:
        best_B = np.zeros(len(chunk), int)
        found = road.rewards.retrieve(chunk, lists)
    else:
        scored = road.rewards(chunk, lists)
        best_B, found = np.argmax(scored.total_BG, axis=1), scored.found
    rankings = rank(road, found, road.config.retrieval.merge)
    return [ranked[best] for ranked, best in zip(rankings, best_B, strict=True)]


def _users_per_second(
    road: Road, policy: Policy, params: dict, examples: list[Example], samples_a_call: Sequence[int], repeats: int
) -> float:
    chunks = [chunk.padded for chunk in padded_chunks(examples, road.config.evaluation.prompts_per_step)]
    _serve(road, policy, params, chunks[0], samples_a_call)
    speeds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for chunk in chunks:
            _serve(road, policy, params, chunk, samples_a_call)
        speeds.append(len(examples) / (time.perf_counter() - started))
    return statistics.median(speeds)


def _print(speeds: dict[str, dict[str, float]], users: int) -> None:
    ways = list(next(iter(speeds.values())))
    table = Table("model", *ways, title=f"Users a second, {users} users")
    for name, values in speeds.items():
        table.add_row(name, *(f"{values[way]:,.0f}" if way == "parameters" else f"{values[way]:.2f}" for way in ways))
    Console().print(table)
