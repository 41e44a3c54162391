"""The one host loop: batches in, steps, metrics, checkpoints; a killed run resumes to the same numbers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxnr.checkpoint import Checkpoints
from jaxnr.errors import InputError, Preempted
from jaxnr.progress import progress
from jaxnr.training.metrics import MetricsLog
from jaxnr.training.preemption import preemption_notice
from jaxnr.training.steps import TrainState

logger = logging.getLogger(__name__)


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
    max_skipped_steps: int = 0,
    keep_batch: Callable[[str, int, dict], Path] | None = None,
) -> TrainState:
    """Runs ``step(state, batch, index)`` until ``steps`` are done, from the newest whole checkpoint if there is any.

    ``validate(params)`` gives metrics that are logged before the first step, every ``validate_every`` steps and at the
    end, or with 0 not at all; they never change what is trained. A stage of no steps leaves a checkpoint of what it was
    given.

    A checkpoint holds the seconds that its steps took, over all processes; ``resumed`` is told those of the one that is
    gone on from. What a kill destroys, the steps since the last checkpoint, is lost from the count too.

    A step whose metric ``skipped`` is 1 has changed nothing, since its loss or gradient was not finite. They are
    counted over all processes; ``keep_batch(stage, step, metrics)`` writes what it trained on. Raises InputError,
    naming that file, after more than ``max_skipped_steps``, and Preempted after the step in which SIGTERM came, once
    it is saved.
    """
    started, earlier, skipped = time.monotonic(), 0.0, 0
    preempted = False
    with preemption_notice() as preemption_came, Checkpoints(folder) as checkpoints:
        saved = checkpoints.newest_whole()
        checkpoints.discard_after(-1 if saved is None else saved)
        if saved is None and not steps:
            checkpoints.save(0, state, batches.get_state())
        done = saved or 0
        if done:
            state, data_state = checkpoints.restore(state, done)
            earlier, skipped = data_state.pop("seconds", 0.0), data_state.pop("skipped", 0)
            batches.set_state(data_state)
            if resumed:
                resumed(earlier)
        log.truncate_after(stage, done if done else -1)
        if validate and validate_every and not done:
            log.write(stage, 0, validate(state.params))
        with progress(stage, steps, completed=done) as bar:
            for index in range(done, steps):
                state, metrics = step(state, next(batches), index)
                metrics = {name: np.asarray(value).item() for name, value in jax.device_get(metrics).items()}
                if "skipped" in metrics:
                    skipped += int(metrics["skipped"])
                    metrics["skipped_steps"] = skipped
                if validate and validate_every and ((index + 1) % validate_every == 0 or index + 1 == steps):
                    metrics |= validate(state.params)
                log.write(stage, index + 1, metrics)
                bar.advance(metrics)
                if metrics.get("skipped"):
                    kept = f"; its batch is in {keep_batch(stage, index + 1, metrics)}" if keep_batch else ""
                    problem = f"{stage}: the loss or the gradient of step {index + 1} is not finite{kept}"
                    if skipped > max_skipped_steps:
                        raise InputError(
                            f"{problem}. It is the {_th(skipped)} such step; `max_skipped_steps` allows "
                            f"{max_skipped_steps}."
                        )
                    logger.warning("%s. The step is skipped, the %s of this stage.", problem, _th(skipped))
                done, preempted = index + 1, preemption_came()
                if preempted or (index + 1) % checkpoint_every == 0 or index + 1 == steps:
                    seconds = round(earlier + time.monotonic() - started, 3)
                    data_state = batches.get_state() | {"seconds": seconds, "skipped": skipped}
                    checkpoints.save(index + 1, state, data_state)
                if preempted:
                    break
    # The checkpoint is on disk; the last takes its time, in which SIGTERM may come too.
    if preempted or preemption_came():
        raise Preempted(f"stopped by SIGTERM after step {done} of {steps} of {stage}, which is saved")
    return state


def _th(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
