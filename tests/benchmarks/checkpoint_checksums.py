"""What the checksums of a checkpoint cost: seconds to write it, to seal it afterwards, and to check it before reading.

    python tests/benchmarks/checkpoint_checksums.py --mebibytes 512

Sealing happens in the background, beside training; checking once, when a run goes on. Medians count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rollouts import machine

from jaxnr import manifest
from jaxnr.checkpoint import Checkpoints
from jaxnr.training.steps import TrainState


def seconds(call: Callable[[], object]) -> float:
    """What one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=512, help="of parameters")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(16, arguments.mebibytes * 2**14)).astype(np.float32)
    state = TrainState(jnp.int32(0), {str(row): jnp.asarray(column) for row, column in enumerate(weights)}, ())
    written, sealed, checked = [], [], []
    with tempfile.TemporaryDirectory() as temporary:

        def save(step: int) -> None:
            with Checkpoints(Path(temporary)) as checkpoints:
                checkpoints.save(step, state, {})

        for step in range(arguments.repeats):
            both = seconds(lambda step=step: save(step))
            folder = Path(temporary) / str(step)
            sealed.append(seconds(lambda folder=folder: manifest.seal(folder)))
            checked.append(seconds(lambda folder=folder: manifest.damage(folder)))
            written.append(both - sealed[-1])
    medians = {"write_s": written, "seal_s": sealed, "check_s": checked}
    figures = {name: round(statistics.median(values), 2) for name, values in medians.items()}
    print(json.dumps({"mebibytes": arguments.mebibytes, **figures, "machine": machine()}))


if __name__ == "__main__":
    main()
