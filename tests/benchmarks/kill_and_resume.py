"""Kills a Dr.GRPO and a distillation run at random moments, resumes them, and compares with runs never killed.

    python tests/benchmarks/kill_and_resume.py --kills 20

A run is killed several times before it is let to its end: by SIGKILL at any moment, by SIGKILL while a checkpoint is
being written (a folder of Orbax's temporary name, or a checkpoint without its manifest, is there), and by SIGTERM. Then
every metric of every step, the last checkpoint's parameters, optimizer state and position in the data have to be those
of the run that was never killed, bit for bit, and no step may stand twice in metrics.jsonl. Exits with 1 where not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.table import Table
from tiny_run import CONFIG, tiny_surroundings

from jaxnr.config import save_config
from jaxnr.road import run_stages
from jaxnr.training.metrics import read_metrics

STEPS = 8
KILLED = dataclasses.replace(
    CONFIG,
    checkpoint_every=2,
    grpo=dataclasses.replace(CONFIG.grpo, steps=STEPS, uniform_steps=0, validate_every=4),
    supervised=dataclasses.replace(CONFIG.supervised, steps=4),
    distill=dataclasses.replace(CONFIG.distill, steps=STEPS),
)
"""The tiny run with more steps, and a checkpoint after every second one."""

TRAINING = {"grpo": ("grpo",), "distill": ("supervised", "distill")}
"""Stage of the road to its training stages."""

WAYS = ("SIGKILL at any moment", "SIGKILL inside a write", "SIGTERM")
SAVED = 143
EXIT_CODES = {WAYS[0]: (-9,), WAYS[1]: (-9,), WAYS[2]: (SAVED, -15)}
"""SIGTERM outside of the host loop ends a process at once."""

MOST_SECONDS = 300
KILLS_A_RUN = 5
WORKER = Path(__file__).parent / "workers" / "train_until_killed.py"


@dataclasses.dataclass(frozen=True)
class Kill:
    """How a process ended."""

    way: str
    exit_code: int
    half_written: str
    """Name of the checkpoint that it left half-written; empty for none."""


def prepare(base: Path) -> Path:
    """A run up to its warm start, and the compiled programs of all stages, under ``base``."""
    folder = base / "prepared"
    with tiny_surroundings(base):
        save_config(KILLED, folder / "config.toml")
        run_stages(KILLED, folder, ("data", "sft"))
    return folder


def start(folder: Path, stage: str) -> subprocess.Popen:
    """The stage's command, in a process of its own."""
    with open(folder / "output.txt", "ab") as output:
        return subprocess.Popen([sys.executable, str(WORKER), str(folder), stage], stdout=output, stderr=output)


def run_to_the_end(folder: Path, stage: str) -> None:
    """The stage, to its end. Raises RuntimeError with the process's output where it does not get there."""
    code = start(folder, stage).wait(MOST_SECONDS)
    if code:
        raise RuntimeError(f"`jaxnr {stage}` exited with {code}:\n{(folder / 'output.txt').read_text()[-3000:]}")


def half_written(folder: Path, stage: str) -> str:
    """The step folder of a checkpoint that is not finished, or empty."""
    for training in TRAINING[stage]:
        for path in (folder / "checkpoints" / training).glob("[0-9]*"):
            if "orbax-checkpoint-tmp" in path.name or not (path / "manifest.json").exists():
                return path.name
    return ""


def kill_once(folder: Path, stage: str, way: str, seconds: float, rng: random.Random) -> Kill | None:
    """Starts the stage and ends it within ``seconds`` of its first step; None where it came to its end before."""
    log = folder / "metrics.jsonl"
    before = log.stat().st_mtime_ns
    process = start(folder, stage)
    try:
        _wait(process, lambda: log.stat().st_mtime_ns != before)  # what the last kill left is gone by then
        if way == "SIGKILL inside a write":
            for _ in range(rng.randrange(3)):  # not always the first write of a process
                _wait(process, lambda: half_written(folder, stage))
                _wait(process, lambda: not half_written(folder, stage))
            if rng.random() < 0.5:
                _wait(process, lambda: half_written(folder, stage))
                time.sleep(rng.uniform(0.0, 0.05))
            else:  # after Orbax's rename, before the manifest
                _wait(process, lambda: half_written(folder, stage).isdigit())
        else:
            time.sleep(rng.uniform(0.0, seconds))
        if process.poll() is not None:
            return None
        process.send_signal(signal.SIGTERM if way == "SIGTERM" else signal.SIGKILL)
        return Kill(way, process.wait(MOST_SECONDS), half_written(folder, stage))
    finally:
        process.kill()


def _wait(process: subprocess.Popen, happens: Callable[[], object]) -> None:
    """Until it happens or the process has ended."""
    while process.poll() is None and not happens():
        time.sleep(0.0005)


def outcome(folder: Path, stage: str) -> dict:
    """All that has to be equal: each training stage's rows, and the arrays and the place in the data of its last save.

    Raises AssertionError where a step stands twice in the log.
    """
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [(row["stage"], row["step"]) for row in rows]
    assert len(steps) == len(set(steps)), f"{folder}: a step stands twice in metrics.jsonl"
    found = {}
    for training in TRAINING[stage]:
        kept = folder / "checkpoints" / training
        last = kept / str(max(int(path.name) for path in kept.iterdir() if path.name.isdigit()))
        data = json.loads((last / "data" / "metadata").read_text())
        restored = {item: ocp.PyTreeCheckpointer().restore(last / item) for item in ("params", "optimizer")}
        leaves, _ = jax.tree.flatten_with_path(restored)
        found[training] = {
            "rows": [{name: value for name, value in row.items() if name != "time"} for row in rows],
            "arrays": {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves},
            "data": {name: value for name, value in data.items() if name != "seconds"},
            "step": last.name,
        }
        found[training]["rows"] = [row for row in found[training]["rows"] if row["stage"] == training]
    return found


def differences(found: dict, expected: dict) -> list[str]:
    """What is not bit-equal, by name."""
    differing = []
    for training, wanted in expected.items():
        have = found[training]
        differing += [f"{training}: {name}" for name in ("rows", "data", "step") if have[name] != wanted[name]]
        if have["arrays"].keys() != wanted["arrays"].keys():
            differing.append(f"{training}: names of arrays")
            continue
        for name, array in wanted["arrays"].items():
            if array.tobytes() != have["arrays"][name].tobytes():
                differing.append(f"{training}: {name}")
    return differing


def kill_and_resume(before: Path, whole: Path, stage: str, kills: int, seed: int) -> tuple[list[Kill], int, list[str]]:
    """Makes so many kills, up to ``KILLS_A_RUN`` a run: the kills, how many runs, and what was not equal after them.

    Each run is a copy of ``before``; ``whole`` becomes the one that is not killed.
    """
    rng = random.Random(f"{stage} {seed}")
    shutil.copytree(before, whole)
    run_to_the_end(whole, stage)  # compiles, too
    expected = outcome(whole, stage)
    times = [row["time"] for row in read_metrics(whole / "metrics.jsonl") if row["stage"] in expected]
    seconds = 1.2 * len(times) * float(np.median(np.diff(times)))  # without compiling
    made, runs, wrong = [], 0, []
    while len(made) < kills:
        folder = shutil.copytree(before, whole.with_name(f"{stage}-{runs}"))
        for _ in range(min(KILLS_A_RUN, kills - len(made))):
            way = WAYS[len(made) % len(WAYS)]
            kill = kill_once(folder, stage, way, seconds, rng)
            if kill is None:
                break
            made.append(kill)
            print(f"{stage}, run {runs}: {kill}", flush=True)
            if kill.exit_code not in EXIT_CODES[way]:
                wrong.append(f"run {runs}: {way} ended with exit code {kill.exit_code}")
                break
        run_to_the_end(folder, stage)
        wrong += [f"run {runs}: {difference}" for difference in differences(outcome(folder, stage), expected)]
        runs += 1
    return made, runs, wrong


def main() -> None:
    """Prints one row for each stage and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each of the two runs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    columns = (
        "stage",
        "signal",
        "kills",
        "left a half-written checkpoint",
        "saved before its end",
        "runs",
        "equal",
    )
    table, failed = Table(*columns), False
    with tempfile.TemporaryDirectory() as temporary:
        folder = prepare(Path(temporary))
        for stage in TRAINING:
            before, folder = folder, Path(temporary) / f"{stage}-whole"
            made, runs, wrong = kill_and_resume(before, folder, stage, arguments.kills, arguments.seed)
            for way in WAYS:
                kills = [kill for kill in made if kill.way == way]
                half = sum(bool(kill.half_written) for kill in kills)
                saved = sum(kill.exit_code == SAVED for kill in kills)
                table.add_row(stage, way, *map(str, (len(kills), half, saved, runs)), "NO" if wrong else "yes")
            failed |= bool(wrong)
            print("\n".join(wrong))
    Console(width=140).print(table)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
