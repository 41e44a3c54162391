"""``jaxnr reproduce``: does the runs that a table needs, for every seed, and writes the table."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from rich.console import Console

from jaxnr import __version__
from jaxnr.baselines.run import run_baseline
from jaxnr.config import Config
from jaxnr.errors import InputError
from jaxnr.files import read_json, write_text
from jaxnr.reproduce.conditions import (
    BASE,
    Condition,
    base,
    best_of_many,
    capacities,
    carry_out,
    cleanings,
    reward_ablations,
)
from jaxnr.reproduce.output import as_markdown, write_table
from jaxnr.reproduce.tables import BASELINES, TABLES, Runs
from jaxnr.road import read_seconds


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
        "jaxnr": __version__,
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    pages = []
    with programs_kept():
        for name in names:
            for seed in seeds:
                _do_runs(name, dataclasses.replace(config, seed=seed), sizes, out / f"seed{seed}", console)
            table = TABLES[name](runs)
            about = facts | ({"settings tried for each baseline": _tried(runs)} if name == "offline" else {})
            write_table(table, about, out / "tables")
            pages.append(as_markdown(table, about))
            console.print(pages[-1], markup=False, highlight=False, soft_wrap=True)
    if len(names) > 1:
        write_text(out / "tables.md", "\n".join(pages))
    took = sum(seconds(out / f"seed{seed}") for seed in seeds) / 3600
    console.print(
        f"{', '.join(names)}: written to {out / 'tables'}; all runs in {out} took {took:.2f} hours",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


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


@contextlib.contextmanager
def programs_kept() -> Iterator[None]:
    """Compiled programs are kept on disk meanwhile: most runs differ in a weight or a seed alone, not in a shape.

    Where ``JAX_COMPILATION_CACHE_DIR`` names a folder they are kept there, beyond the end.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="jaxnr-programs-") as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        reset_cache()  # jax decides once whether it has a cache
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            reset_cache()


def seconds(seed_dir: Path) -> float:
    """What all runs and baselines of a seed took, over all processes; what runs share counts once."""
    marks = [path for path in seed_dir.glob("*/done/*.json") if not path.is_symlink()]
    run = seed_dir / BASE
    baselines = [_report(run, path.stem)["seconds"] for path in (run / "baselines").glob("*.json")]
    return sum(read_seconds(path, path.stem) for path in marks) + sum(
        each["all_trials"] + each["evaluation"] for each in baselines
    )


def _do_runs(table: str, config: Config, sizes: Sequence[str], seed_dir: Path, console: Console) -> None:
    for condition in needed(table, config, sizes):
        console.rule(f"{table}: seed {config.seed}, {condition.name}", align="left", style="dim")
        carry_out(condition, seed_dir)
    if table == "offline":
        run = seed_dir / BASE
        for name in BASELINES:
            if not (run / "baselines" / f"{name}.json").exists():
                console.rule(f"offline: {name} on {run}", align="left", style="dim")
                run_baseline(name, run, None)
                jax.clear_caches()


def _tried(runs: Runs) -> str:
    """How many trials the baselines had: `jaxnr baseline NAME RUN --trials N` may have given one of them more."""
    reports = [_report(runs.run(seed), name) for seed in runs.seeds for name in BASELINES]
    return ", ".join(map(str, sorted({len(report["trials"]) for report in reports})))


def _report(run: Path, baseline: str) -> dict:
    return read_json(run / "baselines" / f"{baseline}.json", "what `jaxnr baseline` writes")


def _check(seeds: Sequence[int], sizes: Sequence[str]) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"--seeds is {' '.join(map(str, seeds))}; expected different numbers from 0 on.")
    if len(sizes) < 2 or len(set(sizes)) < len(sizes):
        raise InputError(f"--sizes is {' '.join(sizes)}; expected two different sizes at least, smallest first.")
