"""``jaxnr impressions``: a run's methods on MIND's impression task, over the impressions logged in its test window."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from jaxnr import __version__
from jaxnr.baselines.news_log import NewsLog
from jaxnr.baselines.ranking import encode_users
from jaxnr.baselines.run import BASELINES, make_learner, trained_params
from jaxnr.config import load_config
from jaxnr.data.clean_events import open_history_cleaner
from jaxnr.data.examples import histories, split_times
from jaxnr.errors import InputError
from jaxnr.evaluation.impressions import (
    IMPRESSION_METRICS,
    Impression,
    Ranker,
    by_popularity,
    by_publish_time,
    by_queries,
    by_vectors,
    impression_metrics,
    logged_impressions,
    prediction_lines,
)
from jaxnr.evaluation.merging import MERGES
from jaxnr.evaluation.recall_paths import Catalogue, embed_each, latest_texts, mean_signals
from jaxnr.evaluation.report import LABELS
from jaxnr.evaluation.run import MODELS
from jaxnr.evaluation.significance import grouped_mean_interval
from jaxnr.files import read_json, write_text
from jaxnr.hosts import own
from jaxnr.mesh import replicated
from jaxnr.progress import Bar, progress
from jaxnr.road import Road
from jaxnr.sampling.sampler import SamplingSettings
from jaxnr.training.rollout import all_lists, padded_chunks, roll_out

PLAIN = ("popularity", "recent", "signals", "content")
_MODELS_BY_DEFAULT = ("teacher", "student_on_policy")
_SPLIT_IN_ID = ("mind", "ebnerd")
"""Formats whose readers put the split's name before an impression's id."""
_AT_ONCE = 512
"""Impressions whose queries are embedded at once: bounds the memory of their vectors."""


def impressions(run_dir: Path, methods: Sequence[str], at_most: int, predictions: bool) -> dict:
    """Ranks the candidates of each impression logged in the test window; prints the table.

    Of no methods, those that learn nothing, teacher, on-policy student, and the baselines that are there. ``at_most``
    impressions are drawn by seed; 0 for all. Writes impressions/results.json under ``run_dir`` and returns what it
    holds; with ``predictions`` a submission for each method and split too, in which impressions that hide their clicks
    are ranked like the others. Raises InputError where there is none to score, and for a method that the run lacks.
    """
    config = load_config(run_dir / "config.toml")
    road = Road.open(config, run_dir)
    available = _available(road)
    if unknown := [method for method in methods if method not in available]:
        raise InputError(f"{run_dir} has no method {unknown[0]!r} to rank by; it has {', '.join(available)}.")
    if not methods:
        methods = [name for name in available if name not in MODELS or name in _MODELS_BY_DEFAULT]
    t2 = split_times(road.tables, config.data)[1]
    users, _ = histories(road.tables, open_history_cleaner(config, run_dir, road.mesh))
    logged = logged_impressions(
        road.tables, {user.user_id: user for user in users}, t2, config.data.max_signals, config.seed
    )
    asked = logged if predictions else [impression for impression in logged if impression.has_both]
    if not asked:
        raise InputError(
            f"{run_dir}: of {len(logged)} impressions logged in the test window none has candidates both clicked and "
            "not clicked; the task needs `requests` (docs/data.md)."
        )
    if 0 < at_most < len(asked):
        drawn = np.random.default_rng(config.seed).choice(len(asked), at_most, replace=False)
        asked = [asked[place] for place in np.sort(drawn)]

    scored_N = np.array([impression.has_both for impression in asked], bool)
    scored = [impression for impression in asked if impression.has_both]
    user_N = np.array([impression.example.user_id for impression in scored])
    values, seconds = {}, {}
    for name in methods:
        started = time.monotonic()
        with progress(name, len(asked)) as bar:
            rankings = _in_blocks(_ranker(road, name, asked), asked, bar)
        if scored:
            kept = [ranking for ranking, has_both in zip(rankings, scored_N, strict=True) if has_both]
            values[name] = impression_metrics(kept, scored)
        if predictions:
            _write_predictions(road, name, rankings, asked)
        seconds[name] = round(time.monotonic() - started, 3)
    resamples = config.evaluation.bootstrap_resamples
    results = {
        "seed": config.seed,
        "test_begins": datetime.fromtimestamp(t2, UTC).isoformat(),
        "impressions": _counts(logged, asked, scored),
        "merge": config.retrieval.merge,
        "methods": {
            name: {
                metric: grouped_mean_interval(values_N, user_N, resamples, config.seed)
                for metric, values_N in by_metric.items()
            }
            for name, by_metric in values.items()
        },
        "seconds": seconds,
        "environment": {
            "jaxnr": __version__,
            "jax": jax.__version__,
            "device_kind": jax.devices()[0].device_kind,
            "device_count": jax.device_count(),
        },
    }
    write_text(run_dir / "impressions" / "results.json", json.dumps(results, indent=1, allow_nan=False))
    _print(results)
    return results


def _available(road: Road) -> list[str]:
    """The methods that the run can rank by."""
    models = [name for name, (_, stage) in MODELS.items() if road.has_trained(stage)]
    trained = [name for name in BASELINES if (road.out / "baselines" / f"{name}.json").exists()]
    return [*PLAIN, *models, *trained]


def _ranker(road: Road, name: str, asked: Sequence[Impression]) -> Ranker:
    """How a method ranks; models have written the lists for all that is ``asked`` when this returns."""
    if name == "recent":
        return by_publish_time(Catalogue.of(road.tables.articles))
    if name == "popularity":
        return by_popularity(road.tables, Catalogue.of(road.tables.articles))
    if name == "content":
        return lambda some: by_vectors(
            mean_signals([impression.example for impression in some], road.rewards.embedder),
            road.rewards.articles_IE,
            some,
        )
    if name == "signals":
        count = road.config.prompt.max_queries
        return _query_ranker(road, lambda impression: latest_texts(impression.example, count))
    if name in MODELS:
        queries = _written_queries(road, name, asked)
        return _query_ranker(road, lambda impression: queries.get(impression.example.signals, ()))
    return _baseline_ranker(road, name)


def _query_ranker(road: Road, queries_of) -> Ranker:
    merge = MERGES[road.config.retrieval.merge]

    def rank(some: Sequence[Impression]) -> list[np.ndarray]:
        queries = embed_each([queries_of(impression) for impression in some], road.rewards.embedder)
        return by_queries(list(queries), road.rewards.articles_IE, merge, some)

    return rank


def _written_queries(road: Road, name: str, asked: Sequence[Impression]) -> dict[tuple, tuple[str, ...]]:
    """A model's list for each different history of signals, one sampled as ``jaxnr evaluate`` samples them.

    Who has no signal is not asked about; a malformed list has no queries.
    """
    shape, stage = MODELS[name]
    policy = road.policy(shape)
    params = road.trained_params(policy, stage)
    different = {impression.example.signals: impression.example for impression in asked if impression.example.signals}
    examples = [example._replace(example_id=number) for number, example in enumerate(different.values())]
    settings = SamplingSettings(temperature=road.config.evaluation.temperature)
    lists = []
    with progress(f"{name} writes", len(examples)) as bar:
        for chunk in padded_chunks(examples, road.config.evaluation.prompts_per_step):
            rollout = roll_out(
                policy,
                params,
                own(road.mesh, chunk.padded),
                samples=1,
                seed=road.config.seed,
                step=0,
                settings=settings,
            )
            lists += all_lists(policy, rollout)[: len(chunk.examples)]
            bar.advance(count=len(chunk.examples))
    return {example.signals: parsed.queries for example, (parsed,) in zip(examples, lists, strict=True)}


def _baseline_ranker(road: Road, name: str) -> Ranker:
    """The chosen trial of a baseline; who has no history is given the ranking of ``popularity``, as in its test."""
    path = road.out / "baselines" / f"{name}.json"
    expected = f"what `jaxnr baseline {name}` writes"
    chosen = read_json(path, expected).get("chosen")
    if not isinstance(chosen, int):
        raise InputError(f"{path}: expected {expected} (`chosen` is {chosen!r}).")
    log = NewsLog.open(road.config, road.out)
    learner = make_learner(name, log, road.config, chosen)
    params = trained_params(learner, road.out / "baselines" / name / f"trial-{chosen:02d}", road.mesh)
    constants = jax.device_put(learner.known_at(log.t2), replicated(road.mesh))
    items_IE = np.asarray(jax.jit(learner.item_vectors)(params, constants))
    popularity = by_popularity(log.tables, log.catalogue)

    def rank(some: Sequence[Impression]) -> list[np.ndarray]:
        rankings = popularity(some)
        places = [
            place
            for place, (_, example, *_) in enumerate(some)
            if example.user_id in log.users and learner.has_history(example)
        ]
        known = [some[place] for place in places]
        if known:
            # What the model cannot score is to it as if it were not in the catalogue.
            seen = [
                impression._replace(rows_C=np.where(learner.rankable_I[impression.rows_C], impression.rows_C, -1))
                for impression in known
            ]
            users_UE = encode_users(learner, params, constants, [each.example for each in known], road.mesh)
            for place, ranking in zip(places, by_vectors(users_UE, items_IE, seen), strict=True):
                rankings[place] = ranking
        return rankings

    return rank


def _in_blocks(rank: Ranker, asked: Sequence[Impression], bar: Bar) -> list[np.ndarray]:
    rankings = []
    for start in range(0, len(asked), _AT_ONCE):
        block = asked[start : start + _AT_ONCE]
        rankings += rank(block)
        bar.advance(count=len(block))
    return rankings


def _counts(logged: Sequence[Impression], asked: Sequence[Impression], scored: Sequence[Impression]) -> dict:
    return {
        "logged": len(logged),
        "without_click": sum(not impression.clicked_C.any() for impression in logged),
        "clicked_alone": sum(bool(impression.clicked_C.all()) for impression in logged),
        "ranked": len(asked),
        "scored": len(scored),
        "users": len({impression.example.user_id for impression in scored}),
        "without_signals": sum(not impression.example.signals for impression in scored),
        "candidates": sum(len(impression.rows_C) for impression in scored),
        "candidates_without_article": sum(int((impression.rows_C < 0).sum()) for impression in scored),
    }


def _write_predictions(road: Road, name: str, rankings: list[np.ndarray], asked: Sequence[Impression]) -> None:
    """impressions/METHOD-SPLIT.txt for each split, with the ids that the split has; METHOD.txt where there is none."""
    with_split = road.config.data.format in _SPLIT_IN_ID
    parts: dict[str, list[int]] = {}
    for place, impression in enumerate(asked):
        split = impression.request_id.rpartition("-")[0] if with_split else ""
        parts.setdefault(split, []).append(place)
    for split, places in parts.items():
        ids = [asked[place].request_id.removeprefix(f"{split}-" if split else "") for place in places]
        lines = prediction_lines([rankings[place] for place in places], [asked[place] for place in places], ids)
        stem = "-".join(filter(None, (name, split.replace("/", "-"))))
        write_text(road.out / "impressions" / f"{stem}.txt", lines)


def _print(results: dict) -> None:
    console = Console()
    counts = results["impressions"]
    if results["methods"]:
        labels = {"mrr": "MRR", "ndcg@5": "nDCG@5", "ndcg@10": "nDCG@10"}
        table = Table(
            "method", "AUC (95 %)", *(labels[metric] for metric in IMPRESSION_METRICS[1:]), box=box.SIMPLE_HEAD
        )
        for name, metrics in results["methods"].items():
            auc = "{mean:.3f} ({low:.3f}–{high:.3f})".format(**metrics["auc"])
            others = (f"{metrics[metric]['mean']:.3f}" for metric in IMPRESSION_METRICS[1:])
            table.add_row(LABELS.get(name, name), auc, *others)
        console.print(table)
    console.print(
        f"{counts['scored']:,} impressions of {counts['users']:,} users scored, of {counts['logged']:,} logged since "
        f"{results['test_begins']}; intervals over users",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
