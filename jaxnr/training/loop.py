"""The one host loop: batches in, steps, metrics, checkpoints; a killed run resumes to the same numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxnr.checkpoint import Checkpoints
from jaxnr.progress import progress
from jaxnr.training.metrics import MetricsLog
from jaxnr.training.steps import TrainState


class Batches(Protocol):
    """An endless iterator whose place can be saved and restored (Grain's DatasetIterator)."""

    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def train(
    *,
    stage: str,
    state: TrainState,
    batches: Batches,
    step: Callable[[TrainState, Any, int], tuple[TrainState, dict]],
    steps: int,
    folder: Path,
    checkpoint_every: int,
    log: MetricsLog,
    validate: Callable[[dict], dict] | None = None,
    validate_every: int = 0,
    resumed: Callable[[float], None] | None = None,
) -> TrainState:
    """Runs ``step(state, batch, index)`` until ``steps`` are done, from the newest checkpoint in ``folder`` if any.

    ``validate(params)`` gives metrics that are logged before the first step, every ``validate_every`` steps and at the
    end; they never change what is trained. A stage of no steps leaves a checkpoint of what it was given.

    A checkpoint holds the seconds that its steps took, over all processes; ``resumed`` is told those of the one that is
    gone on from. What a kill destroys, the steps since the last checkpoint, is lost from the count too.
    """
    started, earlier = time.monotonic(), 0.0
    with Checkpoints(folder) as checkpoints:
        saved = checkpoints.latest_step()
        if saved is None and not steps:
            checkpoints.save(0, state, batches.get_state())
        done = saved or 0
        if done:
            state, data_state = checkpoints.restore(state)
            earlier = data_state.pop("seconds", 0.0)
            batches.set_state(data_state)
            if resumed:
                resumed(earlier)
        log.truncate_after(stage, done if done else -1)
        if validate and not done:
            log.write(stage, 0, validate(state.params))
        with progress(stage, steps, completed=done) as bar:
            for index in range(done, steps):
                state, metrics = step(state, next(batches), index)
                metrics = {name: np.asarray(value).item() for name, value in jax.device_get(metrics).items()}
                if validate and validate_every and ((index + 1) % validate_every == 0 or index + 1 == steps):
                    metrics |= validate(state.params)
                log.write(stage, index + 1, metrics)
                bar.advance(metrics)
                if (index + 1) % checkpoint_every == 0 or index + 1 == steps:
                    seconds = round(earlier + time.monotonic() - started, 3)
                    checkpoints.save(index + 1, state, batches.get_state() | {"seconds": seconds})
    return state
