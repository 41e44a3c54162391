"""``jaxnr baseline``: trains a baseline on a run's data, chooses its settings, and ranks for the run's test users.

Split, candidates, users and metrics are those of ``jaxnr evaluate``; its functions compute them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from jaxnr import __version__
from jaxnr.baselines import gru, hstu, nrhub, pinsage, sasrec
from jaxnr.baselines.news_log import NewsLog
from jaxnr.baselines.ranking import rank
from jaxnr.baselines.sequences import news_clicks
from jaxnr.baselines.training import Learner, fit
from jaxnr.baselines.tuning import draw
from jaxnr.checkpoint import Checkpoints
from jaxnr.config import Config, flatten, load_config
from jaxnr.config_rules import validate
from jaxnr.errors import InputError
from jaxnr.evaluation.metrics import METRICS, evaluate_rankings
from jaxnr.evaluation.recall_paths import popularity
from jaxnr.evaluation.report import console_table
from jaxnr.evaluation.run import DEPTH
from jaxnr.evaluation.significance import mean_interval
from jaxnr.files import read_json, write_text
from jaxnr.mesh import abstract_on, make_mesh


class Baseline(NamedTuple):
    """How a model is made from a run's data, and the settings that its trials draw from."""

    learner: Callable[[NewsLog, Any, int], Learner]
    """(log, settings, seed) -> learner."""
    space: Mapping[str, tuple]


BASELINES = {
    "gru": Baseline(lambda log, settings, seed: gru.learner(news_clicks(log), settings), gru.SPACE),
    "sasrec": Baseline(lambda log, settings, seed: sasrec.learner(news_clicks(log), settings), sasrec.SPACE),
    "hstu": Baseline(lambda log, settings, seed: hstu.learner(news_clicks(log), settings), hstu.SPACE),
    "nrhub": Baseline(lambda log, settings, seed: nrhub.news_learner(log, settings), nrhub.SPACE),
    "pinsage": Baseline(pinsage.news_learner, pinsage.SPACE),
}
"""By the name of the command, of the section of the config and of the results."""


class Trial(NamedTuple):
    """One choice of settings and what came of it."""

    settings: dict[str, Any]
    valid: dict[str, float]
    """Means over the validation users."""
    steps: int
    training_seconds: float
    validation_seconds: float


def run_baseline(name: str, run_dir: Path, trials: int | None) -> dict:
    """Trains ``trials`` settings (None: as configured) and ranks by the best on validation; prints the table.

    Writes baselines/NAME.json under ``run_dir`` and returns what it holds. A trial that has ended is not trained again,
    and one that was killed goes on from its last checkpoint. Raises InputError where the run has no data yet.
    """
    config = load_config(run_dir / "config.toml")
    validate(config)
    log = NewsLog.open(config, run_dir)
    mesh = make_mesh(config.mesh)
    folder = run_dir / "baselines" / name
    count = config.baselines.trials if trials is None else trials
    done = [run_trial(name, log, config, mesh, folder / f"trial-{trial:02d}", trial) for trial in range(count)]
    best = max(range(count), key=lambda trial: (done[trial].valid["recall@10"], -trial))

    learner = make_learner(name, log, config, best)
    params = trained_params(learner, folder / f"trial-{best:02d}", mesh)
    started = time.monotonic()
    rankings = rankings_of(learner, params, log, "test", mesh)
    examples = log.examples["test"]
    per_user = evaluate_rankings(rankings, [example.relevant for example in examples])
    seconds = time.monotonic() - started
    resamples = config.evaluation.bootstrap_resamples
    results = {
        "baseline": name,
        "seed": config.seed,
        "users": {
            "test": len(examples),
            "without_history": sum(not learner.has_history(example) for example in examples),
        },
        "metrics": {metric: mean_interval(per_user[metric], resamples, config.seed) for metric in METRICS},
        "relevant_scorable_share": scorable_share(learner, log),
        "chosen": best,
        "settings": done[best].settings,
        "trials": [trial._asdict() for trial in done],
        "seconds": {
            "training": round(done[best].training_seconds, 3),
            "evaluation": round(seconds, 3),
            "all_trials": round(sum(trial.training_seconds + trial.validation_seconds for trial in done), 3),
        },
        "environment": {
            "jaxnr": __version__,
            "jax": jax.__version__,
            "device_kind": jax.devices()[0].device_kind,
            "device_count": jax.device_count(),
        },
        "per_user": {
            "user_id": [example.user_id for example in examples],
            **{metric: per_user[metric].tolist() for metric in METRICS},
        },
    }
    write_text(run_dir / "baselines" / f"{name}.json", json.dumps(results, indent=1, allow_nan=False))
    console = Console()
    console.print(console_table({"offline": {name: results["metrics"]}}))
    console.print(
        f"{name}: trial {best} of {count} by validation ({done[best].valid['recall@10']:.3f} Recall@10), "
        f"{results['seconds']['training']:.1f} s of training, {seconds:.1f} s of evaluation; "
        f"{results['relevant_scorable_share']:.0%} of what test users clicked can be scored",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return results


def make_learner(name: str, log: NewsLog, config: Config, trial: int) -> Learner:
    """The model under the settings of a trial."""
    settings = draw(getattr(config.baselines, name), BASELINES[name].space, trial, config.seed)
    return BASELINES[name].learner(log, settings, config.seed)


def run_trial(name: str, log: NewsLog, config: Config, mesh: Mesh, folder: Path, number: int) -> Trial:
    """Trains and validates the settings of one trial, or reads what an earlier process wrote of it."""
    settings = flatten(draw(getattr(config.baselines, name), BASELINES[name].space, number, config.seed))
    path = folder / "trial.json"
    if path.exists():
        expected = f"a finished trial; delete {folder}, and the command trains it again"
        content = read_json(path, expected)
        if content.keys() != set(Trial._fields):
            raise InputError(f"{path}: expected {expected}.")
        if content["settings"] != json.loads(json.dumps(settings)):
            raise InputError(f"{path}: of other settings than the run's config has now; expected {expected}.")
        return Trial(**content)
    learner = make_learner(name, log, config, number)
    trained = fit(
        learner,
        stage=f"{name} trial {number}",
        folder=folder,
        mesh=mesh,
        seed=config.seed,
        checkpoint_every=config.baselines.checkpoint_every,
    )
    started = time.monotonic()
    rankings = rankings_of(learner, trained.params, log, "valid", mesh)
    values = evaluate_rankings(rankings, [example.relevant for example in log.examples["valid"]])
    trial = Trial(
        settings=settings,
        valid={metric: float(values[metric].mean()) for metric in METRICS},
        steps=trained.steps,
        training_seconds=round(trained.seconds, 3),
        validation_seconds=round(time.monotonic() - started, 3),
    )
    write_text(path, json.dumps(trial._asdict(), indent=1))
    return trial


def trained_params(learner: Learner, folder: Path, mesh: Mesh) -> dict:
    """The parameters of a finished trial."""
    params = jax.eval_shape(learner.init, jax.random.key(0), jax.tree.map(jnp.asarray, learner.constants))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.restore_params(abstract_on(params, mesh))


def rankings_of(learner: Learner, params: dict, log: NewsLog, split: str, mesh: Mesh) -> list[list[str]]:
    """Rankings for the users of a split; those the model knows nothing of are given what is popular."""
    examples = log.examples[split]
    popular = popularity(examples, log.tables.articles, log.tables.events, depth=DEPTH)
    since = {"valid": log.t1, "test": log.t2}[split]
    return rank(learner, params, examples, log.catalogue, mesh, since=since, depth=DEPTH, otherwise=popular)


def scorable_share(learner: Learner, log: NewsLog) -> float:
    """Share of the test users' relevant articles that the model can score at all."""
    rows = [log.catalogue.row_of[item] for example in log.examples["test"] for item in example.relevant]
    return float(learner.rankable_I[rows].mean())
