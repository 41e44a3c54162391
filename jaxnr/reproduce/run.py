"""``jaxnr reproduce``: does the runs that a table needs, for every seed, and writes the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from rich.console import Console

from jaxnr import __version__
from jaxnr.baselines.run import run_baseline
from jaxnr.config import Config
from jaxnr.errors import InputError
from jaxnr.files import write_text
from jaxnr.reproduce.conditions import Condition, base, best_of_many, capacities, carry_out, cleanings, reward_ablations
from jaxnr.reproduce.output import as_markdown, write_table
from jaxnr.reproduce.tables import BASELINES, TABLES, Runs


def reproduce(names: Sequence[str], config: Config, seeds: Sequence[int], sizes: Sequence[str], out: Path) -> None:
    """Writes each named table under ``out``/tables as soon as its runs have ended, and all of them as tables.md.

    A run that has ended is not done again, and one that was killed goes on from its last checkpoint. Raises InputError
    where a setting makes no sense or ``out`` holds runs of another config.
    """
    _check(seeds, sizes)
    list(capacities(config, sizes))  # says what is wrong with a size before hours of runs
    console = Console()
    runs = Runs(out, config, seeds, sizes)
    facts = {
        "seeds": ", ".join(map(str, seeds)),
        "settings tried for each baseline": config.baselines.trials,
        "jaxnr": __version__,
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    pages = []
    for name in names:
        for seed in seeds:
            seeded = dataclasses.replace(config, seed=seed)
            for condition in needed(name, seeded, sizes):
                console.rule(f"{name}: seed {seed}, {condition.name}", align="left", style="dim")
                carry_out(condition, out / f"seed{seed}")
            if name == "offline":
                _train_baselines(runs.run(seed), console)
        table = TABLES[name](runs)
        write_table(table, facts, out / "tables")
        pages.append(as_markdown(table, facts))
        console.print(pages[-1], markup=False, highlight=False, soft_wrap=True)
    if len(names) > 1:
        write_text(out / "tables.md", "\n".join(pages))
    console.print(f"{', '.join(names)}: written to {out / 'tables'}", markup=False, highlight=False, soft_wrap=True)


def needed(table: str, config: Config, sizes: Sequence[str]) -> Iterator[Condition]:
    """The runs of one seed that a table is made of, the base run first."""
    yield base(config)
    if table == "rewards":
        yield from reward_ablations(config)
    elif table == "sampling":
        yield best_of_many(config)
    elif table in ("capacity", "efficiency"):
        yield from capacities(config, sizes)
    elif table == "cleaning":
        yield from cleanings(config)


def _train_baselines(run: Path, console: Console) -> None:
    for name in BASELINES:
        if not (run / "baselines" / f"{name}.json").exists():
            console.rule(f"offline: {name} on {run}", align="left", style="dim")
            run_baseline(name, run, None)
            jax.clear_caches()


def _check(seeds: Sequence[int], sizes: Sequence[str]) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"--seeds is {' '.join(map(str, seeds))}; expected different numbers from 0 on.")
    if len(sizes) < 2 or len(set(sizes)) < len(sizes):
        raise InputError(f"--sizes is {' '.join(sizes)}; expected two different sizes at least, smallest first.")
