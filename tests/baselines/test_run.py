"""``jaxnr baseline`` on a small generated world: no leakage, the protocol's candidates, resuming, what is written."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pyarrow.compute as pc
import pytest
import tiny_run
from planted import fitted

from jaxnr.baselines import run as baseline_run
from jaxnr.baselines.news_log import NewsLog
from jaxnr.baselines.run import BASELINES, Trial, make_learner, run_baseline
from jaxnr.baselines.training import fit
from jaxnr.config import (
    BaselinesConfig,
    GruConfig,
    HstuConfig,
    ItemsConfig,
    MeshConfig,
    NrhubConfig,
    PinsageConfig,
    SasrecConfig,
    flatten,
    save_config,
)
from jaxnr.data.examples import histories
from jaxnr.data.prepare import prepare_data
from jaxnr.errors import InputError
from jaxnr.evaluation.metrics import evaluate_rankings
from jaxnr.files import write_text
from jaxnr.mesh import make_mesh

CONFIG = dataclasses.replace(
    tiny_run.CONFIG,
    baselines=BaselinesConfig(
        trials=2,
        checkpoint_every=3,
        gru=GruConfig(size=8, batch=16, negatives=16, epochs=2, length=10),
        sasrec=SasrecConfig(size=8, batch=16, negatives=8, epochs=2, length=10),
        hstu=HstuConfig(size=8, batch=16, negatives=8, epochs=2, length=10),
        nrhub=NrhubConfig(records=4, record_words=5, word_size=8, filters=8, attention_size=8, batch=16, epochs=1),
        pinsage=PinsageConfig(size=8, neighbours=3, walks=20, batch=64, negatives=8, epochs=1),
    ),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run whose data stage is done."""
    out = tmp_path_factory.mktemp("baseline")
    with tiny_run.tiny_surroundings(out / "surroundings"):
        save_config(CONFIG, out / "run" / "config.toml")
        prepare_data(CONFIG, out / "run")
        write_text(out / "run" / "done" / "data.json", json.dumps({"seconds": 1.0}))
        yield out / "run"


@pytest.fixture(scope="module")
def log(world):
    return NewsLog.open(CONFIG, world)


def before(log, time):
    """The log as it was at a time: nothing that happened from then on is in it."""
    events = log.tables.events.filter(pc.field("timestamp").cast("int64") < time)
    users, _ = histories(dataclasses.replace(log.tables, events=events))
    known = {user.user_id: user for user in users}
    nobody = {user_id: user._replace(**_nothing(user)) for user_id, user in log.users.items()}
    return dataclasses.replace(log, users={user_id: known.get(user_id, nobody[user_id]) for user_id in log.users})


def _nothing(user):
    return {name: value[:0] for name, value in user._asdict().items() if name != "user_id"}


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_after_the_training_window_trains(log, name):
    whole, cut = (make_learner(name, some, CONFIG, 0) for some in (log, before(log, log.t1)))
    assert whole.rows == cut.rows
    places = list(range(0, whole.rows, 3))
    same = jax.tree.map(np.array_equal, whole.make_batch(places), cut.make_batch(places))
    assert jax.tree.all(same)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.constants, cut.constants))


@pytest.mark.parametrize("name", BASELINES)
def test_a_request_is_answered_from_what_was_before_it(log, name):
    for example in log.examples["test"][:3]:
        whole, cut = (make_learner(name, some, CONFIG, 0) for some in (log, before(log, example.timestamp)))
        same = jax.tree.map(np.array_equal, whole.make_users([example]), cut.make_users([example]))
        assert jax.tree.all(same)
        if name == "pinsage":
            graphs = [learner.known_at(log.t2)["graph"].weight_IK for learner in (whole, cut)]
            np.testing.assert_array_equal(*graphs)


@pytest.mark.parametrize("name", BASELINES)
def test_results_are_those_of_the_evaluator_over_the_candidates(world, log, name, monkeypatch):
    ranked = {}

    def remembered(learner, params, log, split, mesh):
        ranked[split] = rankings_of(learner, params, log, split, mesh)
        return ranked[split]

    rankings_of = baseline_run.rankings_of
    monkeypatch.setattr(baseline_run, "rankings_of", remembered)
    results = run_baseline(name, world, trials=1)
    examples = log.examples["test"]
    for example, ranking in zip(examples, ranked["test"], strict=True):
        assert len(ranking) == len(set(ranking)) == 10
        candidate_I = log.catalogue.is_candidate_I(example)
        assert all(candidate_I[log.catalogue.row_of[item]] for item in ranking)
    values = evaluate_rankings(ranked["test"], [example.relevant for example in examples])
    written = json.loads((world / "baselines" / f"{name}.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert written["per_user"]["user_id"] == [example.user_id for example in examples]
    assert written["per_user"]["recall@10"] == values["recall@10"].tolist()
    assert written["metrics"]["ndcg@10"]["mean"] == pytest.approx(values["ndcg@10"].mean())
    assert written["settings"] == flatten(getattr(CONFIG.baselines, name))
    assert set(written["seconds"]) == {"training", "evaluation", "all_trials"}


def test_trials_choose_on_validation_and_are_not_trained_again(world, monkeypatch):
    space = {"learning_rate": (0.02, 0.1), "dropout": (0.0, 0.1, 0.3)}
    monkeypatch.setitem(BASELINES, "gru", BASELINES["gru"]._replace(space=space))
    results = run_baseline("gru", world, trials=3)
    recalls = [trial["valid"]["recall@10"] for trial in results["trials"]]
    assert results["chosen"] == int(np.argmax(recalls))
    assert results["settings"] == results["trials"][results["chosen"]]["settings"]
    assert len({json.dumps(trial["settings"]) for trial in results["trials"]}) == 3

    def trained_again(*args, **kwargs):
        raise AssertionError("a finished trial was trained again")

    monkeypatch.setattr(baseline_run, "fit", trained_again)
    assert run_baseline("gru", world, trials=3)["metrics"] == results["metrics"]


def test_a_killed_trial_ends_with_the_same_parameters(log, tmp_path):
    learner = make_learner("sasrec", log, CONFIG, 0)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    settings = {"stage": "sasrec", "mesh": mesh, "seed": 0, "checkpoint_every": 2}
    learner = dataclasses.replace(learner, epochs=4)
    whole = fit(learner, folder=tmp_path / "whole", **settings)
    assert whole.steps == 4
    calls = iter(range(100))

    def make_batch(rows):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return learner.make_batch(rows)

    with pytest.raises(KeyboardInterrupt):
        fit(dataclasses.replace(learner, make_batch=make_batch), folder=tmp_path / "killed", **settings)
    resumed = fit(learner, folder=tmp_path / "killed", **settings)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)


MESHES = {1: MeshConfig(data=1), 8: MeshConfig(data=4, fsdp=2)}


@pytest.mark.parametrize("name", BASELINES)
def test_a_step_on_eight_devices_is_that_on_one(log, name):
    """By plain gradient descent: Adam would turn a rounding error of a zero gradient into a whole step."""
    learner = dataclasses.replace(make_learner(name, log, CONFIG, 0), optimizer=optax.sgd(1.0))
    start, *after = (
        fitted(learner, steps, mesh=make_mesh(MESHES[count], jax.devices()[:count]))
        for steps, count in ((0, 1), (1, 1), (1, 8))
    )
    gradients = [jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), start, params) for params in after]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *gradients)


def test_eight_devices_rank_as_one_does(log):
    learner = make_learner("sasrec", log, CONFIG, 0)
    params = jax.tree.map(np.asarray, fitted(learner, 1))
    rankings = [
        baseline_run.rankings_of(learner, params, log, "test", make_mesh(MESHES[count], jax.devices()[:count]))
        for count in MESHES
    ]
    assert rankings[0] == rankings[1]


def test_by_ids_alone_only_what_training_clicked_is_ranked(log):
    settings = dataclasses.replace(CONFIG.baselines.sasrec, items=ItemsConfig(kind="id"))
    learner = BASELINES["sasrec"].learner(log, settings, 0)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    params = fitted(learner, 1)
    known_I = learner.rankable_I
    assert 0 < known_I.sum() < len(known_I)
    for ranking, example in zip(
        baseline_run.rankings_of(learner, params, log, "test", mesh), log.examples["test"], strict=True
    ):
        if learner.has_history(example):
            assert all(known_I[log.catalogue.row_of[item]] for item in ranking)


def test_a_run_without_data_says_which_command_begins_it(tmp_path):
    save_config(CONFIG, tmp_path / "config.toml")
    with pytest.raises(InputError, match="jaxnr data CONFIG --out"):
        run_baseline("gru", tmp_path, trials=1)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"steps": 3}, "expected a finished trial"),
        (Trial({"size": 3}, {"recall@10": 0.5}, 3, 1.0, 1.0)._asdict(), "of other settings"),
    ],
)
def test_a_trial_that_is_damaged_or_of_another_config_is_named(world, content, says):
    path = world / "baselines" / "hstu" / "trial-00" / "trial.json"
    write_text(path, json.dumps(content))
    try:
        with pytest.raises(InputError, match=rf"trial\.json: {says}"):
            run_baseline("hstu", world, trials=1)
    finally:
        path.unlink()
