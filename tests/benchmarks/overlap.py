"""How much a slow judge adds to a Dr.GRPO step, with and without microbatches to hide it behind.

    python tests/benchmarks/overlap.py RUN_DIR [--sleep 0.2] [--steps 7]

RUN_DIR is a run whose `sft` stage has ended. Each step samples, scores and updates as `jaxnr grpo` does, from the same
parameters; the judge sleeps once a call. Prints medians, and ratios within the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import jax

from jaxnr.config import load_config
from jaxnr.road import Road, reinforcement
from jaxnr.training.steps import create_state, make_grpo_step, make_optimizer


def seconds_a_step(road: Road, microbatches: int, sleep: float, steps: int) -> float:
    """Median over ``steps`` steps, after one that compiles."""
    config = dataclasses.replace(road.config.grpo, microbatches=microbatches)
    road = dataclasses.replace(road, config=dataclasses.replace(road.config, grpo=config))
    policy = road.policy("teacher")
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = create_state(road.trained_params(policy, "warm_start_teacher"), optimizer, road.mesh)
    update = make_grpo_step(policy.model, optimizer, state, road.mesh, policy.vocabulary_size, config)

    def rewards(examples, lists):
        time.sleep(sleep)
        return road.rewards(examples, lists)

    step = reinforcement(road, policy, update, rewards, road.config.reward)
    examples = list(road.examples["train"])
    seconds = []
    for index in range(steps + 1):
        batch = examples[index * config.prompts_per_step : (index + 1) * config.prompts_per_step]
        started = time.perf_counter()
        state, metrics = step(state, batch, index)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--sleep", type=float, default=0.2, help="seconds that the judge sleeps a call")
    parser.add_argument("--steps", type=int, default=7)
    arguments = parser.parse_args()
    road = Road.open(load_config(arguments.run_dir / "config.toml"), arguments.run_dir)
    print("microbatches  seconds a step  with a sleep  ratio")
    for microbatches in (1, 2, 4):
        plain, slept = (seconds_a_step(road, microbatches, sleep, arguments.steps) for sleep in (0.0, arguments.sleep))
        print(f"{microbatches:12}  {plain:14.2f}  {slept:12.2f}  {slept / plain:5.2f}", flush=True)


if __name__ == "__main__":
    main()
