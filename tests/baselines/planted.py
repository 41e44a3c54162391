"""Planted patterns: histories whose next click follows a rule, a quick fit, and how often the rule is then obeyed."""

import jax
import numpy as np

from jaxnr.baselines.items import ItemFeatures
from jaxnr.baselines.sequences import Clicks, History, request_batch
from jaxnr.baselines.training import make_step
from jaxnr.config import ItemsConfig, MeshConfig
from jaxnr.data.examples import Example
from jaxnr.mesh import make_mesh
from jaxnr.training.steps import create_state

IDS = ItemsConfig(kind="id")


def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def clicks_of(histories, items, features=None) -> Clicks:
    """Histories to train on, over ``items`` articles that are all known; asked, a user has none."""
    return Clicks(
        train=histories,
        asked=lambda example: History(np.zeros(0, np.int32), np.zeros(0, np.int64)),
        features=features or ItemFeatures(np.ones(items, bool), np.zeros((items, 0), np.float32)),
        pool_P=np.arange(items, dtype=np.int32),
    )


def fitted(learner, steps, seed=0, mesh=None):
    """Parameters after some steps on batches drawn at random."""
    mesh = mesh or one_device()
    constants = jax.tree.map(jax.numpy.asarray, learner.constants)
    state = create_state(jax.jit(learner.init)(jax.random.key(seed), constants), learner.optimizer, mesh)
    step = make_step(learner, state, mesh, seed)
    rng = np.random.default_rng(seed)
    size = min(learner.batch_size, learner.rows) // 8 * 8  # a multiple of the devices of any test
    for _ in range(steps):
        rows = rng.choice(learner.rows, size, replace=False)
        state, _ = step(state, constants, learner.make_batch(rows.tolist()))
    return state.params


def obeyed(learner, params, known, expected, among) -> float:
    """Share of users whose best article of those ``among`` is the expected one."""
    constants = jax.tree.map(jax.numpy.asarray, learner.constants)
    users_UE = jax.jit(learner.user_vectors)(params, constants, known)
    items_IE = jax.jit(learner.item_vectors)(params, constants)
    scores = np.asarray(users_UE) @ np.asarray(items_IE)[among].T
    return float((np.asarray(among)[scores.argmax(axis=1)] == expected).mean())


def known_clicks(histories, length):
    """What a sequence model is shown of histories whose last click it is to predict."""
    cut = [History(history.rows[:-1], history.times[:-1]) for history in histories]
    return request_batch(cut, [int(history.times[-1]) for history in histories], length, 0)


def example(user_id="u", timestamp=0) -> Example:
    return Example(0, user_id, timestamp, (), (), ())
