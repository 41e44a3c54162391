"""Trains in FOLDER, a small tmpfs, until it is full; makes room there and goes on. Prints what happened as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxnr.checkpoint import Checkpoints
from jaxnr.data.pipeline import training_batches
from jaxnr.errors import InputError
from jaxnr.training.loop import train
from jaxnr.training.metrics import MetricsLog, read_metrics
from jaxnr.training.steps import TrainState

STEPS = 8


def start() -> TrainState:
    return TrainState(jnp.int32(0), {"weights": jnp.zeros(60_000)}, ())


@jax.jit
def advance(state: TrainState, numbers: jax.Array) -> tuple[TrainState, dict]:
    noise = jax.random.normal(jax.random.key(numbers.sum()), (60_000,))  # which no file format makes smaller
    weights = noise + state.params["weights"]
    return TrainState(state.step + 1, {"weights": weights}, ()), {"loss": weights.sum()}


def run(folder: Path) -> TrainState:
    return train(
        stage="full",
        state=start(),
        batches=training_batches(range(9), batch_size=2, seed=5),
        step=lambda state, examples, index: advance(state, np.array(examples)),
        steps=STEPS,
        folder=folder / "checkpoints",
        checkpoint_every=2,
        log=MetricsLog(folder / "metrics.jsonl"),
    )


def main(folder: Path, elsewhere: Path) -> None:
    expected = run(elsewhere)
    message = ""
    try:
        run(folder)
    except InputError as error:
        message = str(error)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        whole = checkpoints.newest_whole()
    rows = [row["step"] for row in read_metrics(folder / "metrics.jsonl")]
    subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    state = run(folder)
    print(
        json.dumps(
            {
                "message": message,
                "whole": whole,
                "rows": rows,
                "rows_after": [row["step"] for row in read_metrics(folder / "metrics.jsonl")],
                "equal": all(map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(expected))),
                "left": sorted(path.name for path in (folder / "checkpoints").iterdir()),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
