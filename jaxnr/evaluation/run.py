"""The evaluation stage: every method on the test users, by the protocol of docs/evaluation.md."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from rich.console import Console

from jaxnr import __version__
from jaxnr.config import SecondJudgeConfig
from jaxnr.data.examples import Example
from jaxnr.data.prepare import read_report
from jaxnr.errors import InputError
from jaxnr.evaluation import recall_paths
from jaxnr.evaluation.best_of_n import best_of_n
from jaxnr.evaluation.beyond_accuracy import beyond_accuracy
from jaxnr.evaluation.merging import MERGES, to_item_ids
from jaxnr.evaluation.metrics import METRICS, evaluate_rankings, evaluate_samples
from jaxnr.evaluation.report import console_table, write_report
from jaxnr.evaluation.significance import compare, mean_interval
from jaxnr.files import without_nan, write_text
from jaxnr.hosts import gather_rows, is_first, own
from jaxnr.models.decoder import parameter_count
from jaxnr.progress import progress
from jaxnr.prompting.output import ParsedList
from jaxnr.rewards.composite import Retrieved
from jaxnr.rewards.criteria import TextRubric
from jaxnr.sampling.sampler import SamplingSettings
from jaxnr.training.metrics import read_metrics
from jaxnr.training.rollout import Policy, all_lists, padded_chunks, roll_out

if TYPE_CHECKING:
    from jaxnr.road import Road

TESTED_METRICS = ("recall@10", "ndcg@10")
"""The family of the paired tests; the other metrics have intervals."""

COLD_CLICKS = 5
"""Users who have clicked fewer articles than this before their request are the slice of cold users."""

DEPTH = 10
"""Articles of a ranking that count: the deepest metric's cut-off."""

MODELS = {
    "prompt_only": ("teacher", "warm_start_teacher"),
    "teacher": ("teacher", "grpo"),
    "teacher_uniform": ("teacher", "grpo_uniform"),
    "student_on_policy": ("student", "distill"),
    "student_supervised": ("student", "supervised"),
    "student_untrained": ("student", "warm_start_student"),
}
"""Each model of the results: which shape it has, and the training stage whose last checkpoint it is."""


@dataclasses.dataclass(frozen=True)
class Sampled:
    """S lists for each of U users, what the rewards say of them and what they retrieve."""

    lists_US: list[list[ParsedList]]
    rewards: dict[str, np.ndarray]
    """Each reward and ``total``, [U, S], and ``second/<name>`` for those that the second judge gives."""
    rankings_US: list[list[list[str]]]


def sample_lists(road: Road, policy: Policy, params: dict, examples: Sequence[Example], samples: int) -> Sampled:
    """Samples, scores and retrieves ``samples`` lists for every example; each process scores the lists of its own."""
    config = road.config
    settings = SamplingSettings(temperature=config.evaluation.temperature)
    lists_US, rankings_US, rewards = [], [], []
    for chunk in padded_chunks(examples, config.evaluation.prompts_per_step):
        examples_B = own(road.mesh, chunk.padded)
        rollout = roll_out(policy, params, examples_B, samples=samples, seed=config.seed, step=0, settings=settings)
        scored = road.rewards(examples_B, rollout.lists)
        users = len(chunk.examples)
        rankings_US += rank(road, scored.found, config.retrieval.merge)[:users]
        lists_US += all_lists(policy, rollout)[:users]
        second = road.rewards.judged_by(road.second_judge, examples_B, rollout.lists)
        values = {**scored.rewards, "total": scored.total_BG}
        values |= {f"second/{name}": second[name] for name in rewards_of(config.second_judge)}
        values = gather_rows(values, road.mesh)
        rewards.append({name: values_BG[:users] for name, values_BG in values.items()})
    stacked = {name: np.concatenate([part[name] for part in rewards]) for name in rewards[0]}
    return Sampled(lists_US, stacked, rankings_US)


def rewards_of(second: SecondJudgeConfig) -> tuple[str, ...]:
    """The rewards that the second judge gives: word overlap has no opinion on specificity."""
    return ("coverage",) if second.kind == "word_overlap" else TextRubric._fields


def rank(road: Road, found: Retrieved, merge: str) -> list[list[list[str]]]:
    """The merged ranking of each list: article ids, for each user and sample, of all processes' users.

    ``found`` is what this process's lists found.
    """
    merged_BGM = MERGES[merge](found.article_rows_BGQK, found.article_scores_BGQK, found.query_mask_BGQ)
    merged_BGM = gather_rows(merged_BGM[..., :DEPTH], road.mesh)
    return [to_item_ids(user_GM, road.rewards.item_ids_I) for user_GM in merged_BGM]


def recall_at_10(road: Road, policy: Policy, params: dict) -> dict[str, float]:
    """Mean Recall@10 and rewards, those by the second judge too, on the validation users, one list each."""
    examples = list(road.examples["valid"])
    sampled = sample_lists(road, policy, params, examples, samples=1)
    values = evaluate_samples(sampled.rankings_US, [example.relevant for example in examples])
    return {
        "valid/recall@10": float(values["recall@10"].mean()),
        **{f"valid/reward/{name}": float(np.nanmean(values)) for name, values in sampled.rewards.items()},
    }


def evaluate(road: Road) -> None:
    """Measures every method on the test users; writes results.json, report.html and what they are made from
    (per_user.json, showcase.json), and prints the table.

    Models that have not been trained yet are left out. Raises InputError where none has been.
    """
    started = time.monotonic()
    config = road.config.evaluation
    report, seconds = read_report(road.out), road.seconds()
    models = {name: model for name, model in MODELS.items() if road.has_trained(model[1])}
    if not models:
        raise InputError(
            f"{road.out}: there is no model to evaluate yet; the warm start, `jaxnr sft CONFIG --out {road.out}`, has "
            "to run first."
        )
    examples = list(road.examples["test"])
    relevant = [example.relevant for example in examples]
    plain = plain_rankings(road, examples)
    per_user = {name: evaluate_rankings(rankings, relevant) for name, rankings in plain.items()}
    sampled, throughput, parameters, best, merges = {}, {}, {}, {}, {}
    with progress("evaluate", len(models)) as bar:
        for name, (shape, stage) in models.items():
            policy = road.policy(shape)
            params = road.trained_params(policy, stage)
            parameters[shape] = parameter_count(params)
            samples = max(config.best_of_n) if name == "teacher" else config.samples
            sampled[name] = sample_lists(road, policy, params, examples, samples)
            values_US = evaluate_samples(sampled[name].rankings_US, relevant)
            per_user[name] = {metric: values.mean(axis=1) for metric, values in values_US.items()}
            if name == "teacher":
                total_US = sampled[name].rewards["total"]
                best = {
                    n: {metric: best_of_n(total_US, values, n) for metric, values in values_US.items()}
                    for n in config.best_of_n
                }
                merges = validation_recall_of_merges(road, policy, params)
            if name in ("teacher", "student_on_policy"):
                throughput[f"{shape}_users_per_s"] = users_per_second(road, policy, params, examples)
            bar.advance({"recall@10": per_user[name]["recall@10"].mean()})
    results = assemble(road, report, per_user, best, sampled, throughput)
    rankings = {name: [[ranking] for ranking in rankings_U] for name, rankings_U in plain.items()}
    rankings |= {name: sample.rankings_US for name, sample in sampled.items()}
    results["beyond_accuracy"] = {
        name: beyond_accuracy(
            rankings_US, [example.timestamp for example in examples], road.tables.articles, road.rewards.articles_IE
        )
        for name, rankings_US in rankings.items()
    }
    results["slices"] = {"cold": cold_users(road, examples, per_user)}
    results["parameters"] = parameters
    results["merging"] = {"used": road.config.retrieval.merge, "valid/recall@10": merges}
    results["seconds"] = {**seconds, "evaluate": round(time.monotonic() - started, 3)}
    results["seconds"]["total"] = round(sum(results["seconds"].values()), 3)
    if not is_first():
        return
    results = without_nan(results)
    by_user = {
        "user_id": [example.user_id for example in examples],
        "methods": {name: as_lists(values) for name, values in per_user.items()},
        "best_of_n": {str(n): as_lists(values) for n, values in best.items()},
    }
    write_text(road.out / "per_user.json", json.dumps(by_user, allow_nan=False))
    showcase = show(road, examples, sampled)
    write_text(road.out / "showcase.json", json.dumps(showcase, ensure_ascii=False))
    write_text(road.out / "results.json", json.dumps(results, indent=2, allow_nan=False))
    write_report(road.out / "report.html", results, read_metrics(road.out / "metrics.jsonl"), showcase)
    Console().print(console_table(results))


def as_lists(values: dict[str, np.ndarray]) -> dict[str, list[float]]:
    return {metric: values[metric].tolist() for metric in METRICS}


def validation_recall_of_merges(road: Road, policy: Policy, params: dict) -> dict[str, float]:
    """Recall@10 on the validation users under each way of merging, the basis of ``retrieval.merge``."""
    config = road.config
    examples = list(road.examples["valid"])
    settings = SamplingSettings(temperature=config.evaluation.temperature)
    rankings_US: dict[str, list] = {merge: [] for merge in MERGES}
    for chunk in padded_chunks(examples, config.evaluation.prompts_per_step):
        examples_B = own(road.mesh, chunk.padded)
        rollout = roll_out(policy, params, examples_B, samples=1, seed=config.seed, step=0, settings=settings)
        found = road.rewards.retrieve(examples_B, rollout.lists)
        for merge, ranked in rankings_US.items():
            ranked += rank(road, found, merge)[: len(chunk.examples)]
    relevant = [example.relevant for example in examples]
    return {
        merge: float(evaluate_samples(ranked, relevant)["recall@10"].mean()) for merge, ranked in rankings_US.items()
    }


def plain_rankings(road: Road, examples: list[Example]) -> dict[str, list[list[str]]]:
    """The rankings of the methods that learn nothing."""
    config, tables, rewards = road.config, road.tables, road.rewards
    return {
        "popularity": recall_paths.popularity(examples, tables.articles, tables.events, depth=DEPTH),
        "recent": recall_paths.recent(examples, tables.articles, depth=DEPTH),
        "signals": recall_paths.signals(
            examples,
            tables.articles,
            rewards.embedder,
            rewards.index,
            max_queries=config.prompt.max_queries,
            articles_per_query=config.retrieval.articles_per_query,
            merge=MERGES[config.retrieval.merge],
            depth=DEPTH,
        ),
        "content": recall_paths.content(examples, tables.articles, rewards.embedder, rewards.index, depth=DEPTH),
    }


def users_per_second(road: Road, policy: Policy, params: dict, examples: list[Example]) -> float:
    """Users a second from prompt to merged ranking, one list each, rewards left out; after a batch to warm up."""
    config = road.config
    timed = examples[: 8 * config.evaluation.prompts_per_step]
    settings = SamplingSettings(temperature=config.evaluation.temperature)

    def serve(examples_B: Sequence[Example]) -> None:
        rollout = roll_out(policy, params, examples_B, samples=1, seed=config.seed, step=0, settings=settings)
        rank(road, road.rewards.retrieve(examples_B, rollout.lists), config.retrieval.merge)

    chunks = [own(road.mesh, chunk.padded) for chunk in padded_chunks(timed, config.evaluation.prompts_per_step)]
    serve(chunks[0])
    started = time.perf_counter()
    for chunk in chunks:
        serve(chunk)
    return len(timed) / (time.perf_counter() - started)


def assemble(
    road: Road,
    report: dict,
    per_user: dict[str, dict[str, np.ndarray]],
    best: dict[int, dict[str, np.ndarray]],
    sampled: dict[str, Sampled],
    throughput: dict[str, float],
) -> dict:
    """The content of ``results.json``; ``report`` is that of the data stage."""
    config = road.config.evaluation

    def intervals(values: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        return {
            metric: mean_interval(values[metric], config.bootstrap_resamples, road.config.seed) for metric in METRICS
        }

    others = [name for name in per_user if name != "teacher"]
    students = ("student_on_policy", "student_supervised", "student_untrained")
    pairs = [("teacher", other) for other in others] + list(itertools.pairwise(students))
    pairs = [pair for pair in pairs if per_user.keys() >= set(pair)]
    return {
        "seed": road.config.seed,
        "users": report["users"],
        "offline": {name: intervals(values) for name, values in per_user.items()},
        "comparisons": compare(per_user, pairs, TESTED_METRICS),
        "best_of_n": {str(n): intervals(values) for n, values in best.items()},
        "rewards": {
            name: {reward: float(np.nanmean(values)) for reward, values in sample.rewards.items()}
            for name, sample in sampled.items()
        },
        "judges": {"training": road.config.judge.kind, "second": road.config.second_judge.kind},
        "throughput": throughput,
        "environment": {
            "jaxnr": __version__,
            "jax": jax.__version__,
            "device_kind": jax.devices()[0].device_kind,
            "device_count": jax.device_count(),
        },
        "data": report,
    }


def cold_users(road: Road, examples: list[Example], per_user: dict[str, dict[str, np.ndarray]]) -> dict:
    """The tested metrics of every method on the users with fewer than ``COLD_CLICKS`` clicks, and how many they are."""
    cold_U = np.array([len(example.seen) < COLD_CLICKS for example in examples], bool)
    resamples, seed = road.config.evaluation.bootstrap_resamples, road.config.seed
    offline = {
        name: {metric: mean_interval(values[metric][cold_U], resamples, seed) for metric in TESTED_METRICS}
        for name, values in per_user.items()
        if cold_U.any()
    }
    return {"users": int(cold_U.sum()), "fewer_clicks_than": COLD_CLICKS, "offline": offline}


def show(road: Road, examples: list[Example], sampled: dict[str, Sampled]) -> list[dict]:
    """Some users with their signals, the lists of three models side by side, and the articles retrieved."""
    shown = [name for name in ("prompt_only", "teacher", "student_on_policy") if name in sampled]
    titles = dict(
        zip(road.tables.articles["item_id"].to_pylist(), road.tables.articles["title"].to_pylist(), strict=True)
    )
    chosen = np.random.default_rng(road.config.seed).permutation(len(examples))[: road.config.evaluation.showcase_users]
    return [
        {
            "user_id": examples[user].user_id,
            "signals": [{"domain": signal.domain, "text": signal.text} for signal in examples[user].signals],
            "lists": {name: list(sampled[name].lists_US[user][0].queries) for name in shown},
            "articles": {
                name: [
                    {"title": titles[item], "relevant": item in examples[user].relevant}
                    for item in sampled[name].rankings_US[user][0]
                ]
                for name in shown
            },
        }
        for user in chosen.tolist()
    ]
