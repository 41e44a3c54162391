"""PinSage: graph convolutions over articles, whose neighbours are what random walks visit (arXiv 1806.01973).

An article's vector comes from its text and its neighbourhood in the graph of users and articles, so one that is clicked
after training has one too: nothing is trained by id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnr.baselines.items import unit
from jaxnr.baselines.news_log import NewsLog
from jaxnr.baselines.sequences import Clicks, news_clicks, pad
from jaxnr.baselines.training import Learner
from jaxnr.config import PinsageConfig
from jaxnr.data.examples import Example

SPACE = {
    "learning_rate": (3e-4, 1e-3, 3e-3),
    "size": (128, 256),
    "neighbours": (5, 10, 20),
    "margin": (0.1, 0.3, 1.0),
    "clicks": (5, 10, 30),
    "epochs": (5, 10),
}
"""What trials after the first draw from."""

_ARTICLES_AT_ONCE = 65_536
"""Articles that random walks start from at once: bounds the memory of their visits."""


@flax.struct.dataclass
class Graph:
    """The K articles that walks from each article visit most, and the share of visits of each; weight 0 for none."""

    neighbour_IK: Any
    weight_IK: Any


@flax.struct.dataclass
class PairBatch:
    """Articles that one user clicked one after the other."""

    query_B: Any
    clicked_B: Any


@flax.struct.dataclass
class LatestClicks:
    """A user's latest clicks [U, K]."""

    rows_UK: Any
    mask_UK: Any


class Edges(NamedTuple):
    """For each source a slice of ``targets``, from ``starts[source]`` to ``starts[source + 1]``."""

    starts: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, sources: np.ndarray, targets: np.ndarray, count: int) -> Edges:
        order = np.argsort(sources, kind="stable")
        return cls(np.searchsorted(sources[order], np.arange(count + 1)), targets[order])

    def step(self, sources: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One target of each source at random; every source has one."""
        degree = self.starts[sources + 1] - self.starts[sources]
        return self.targets[self.starts[sources] + (rng.random(len(sources)) * degree).astype(np.int64)]


def walk_graph(users: np.ndarray, articles: np.ndarray, count: int, config: PinsageConfig, seed: int) -> Graph:
    """The neighbourhoods of ``count`` articles by random walks with restart over clicks (user, article).

    A walk goes from an article to a user that clicked it and on to an article that the user clicked, and begins again
    with probability ``restart``. Articles without clicks have no neighbours.
    """
    by_article = Edges.of(articles, users, count)
    by_user = Edges.of(users, articles, int(users.max(initial=-1)) + 1)
    rng = np.random.default_rng(seed)
    K = config.neighbours
    neighbour_IK, weight_IK = np.zeros((count, K), np.int32), np.zeros((count, K), np.float32)
    clicked = np.unique(articles)
    for first in range(0, len(clicked), _ARTICLES_AT_ONCE):
        start_N = clicked[first : first + _ARTICLES_AT_ONCE]
        visits_NV = np.empty((len(start_N), config.walks), np.int64)
        at_N = start_N
        for visit in range(config.walks):
            at_N = by_user.step(by_article.step(at_N, rng), rng)
            visits_NV[:, visit] = at_N
            at_N = np.where(rng.random(len(start_N)) < config.restart, start_N, at_N)
        for start, visits_V in zip(start_N, visits_NV, strict=True):
            visited, times = np.unique(visits_V[visits_V != start], return_counts=True)
            most = np.argsort(-times, kind="stable")[:K]
            neighbour_IK[start, : len(most)] = visited[most]
            weight_IK[start, : len(most)] = times[most] / max(times[most].sum(), 1)
    return Graph(neighbour_IK, weight_IK)


class Convolution(nn.Module):
    """n = Σ w·ReLU(Q h) / Σ w over the neighbours; z = norm(ReLU(W [n; h]))."""

    size: int

    def setup(self) -> None:
        self.passed = nn.Dense(self.size, name="q")
        self.combined = nn.Dense(self.size, name="w")

    def pass_on(self, h_XE: jax.Array) -> jax.Array:
        """ReLU(Q h) of articles: what they pass on to those they are neighbours of."""
        return nn.relu(self.passed(h_XE))

    def combine(self, h_XE: jax.Array, passed_XKD: jax.Array, weight_XK: jax.Array) -> jax.Array:
        """z [X, D] of articles, from what they are and what their neighbours pass on."""
        total_X1 = jnp.sum(weight_XK, axis=-1, keepdims=True)
        n_XD = jnp.einsum("...k,...kd->...d", weight_XK, passed_XKD) / jnp.where(total_X1 > 0, total_X1, 1)
        return unit(nn.relu(self.combined(jnp.concatenate([n_XD, h_XE], axis=-1))))

    def __call__(self, h_XE: jax.Array, neighbour_h_XKE: jax.Array, weight_XK: jax.Array) -> jax.Array:
        return self.combine(h_XE, self.pass_on(neighbour_h_XKE), weight_XK)


class Pinsage(nn.Module):
    """Two convolutions over text vectors."""

    size: int

    def setup(self) -> None:
        self.first, self.second = Convolution(self.size), Convolution(self.size)

    def pass_on(self, texts_IE: jax.Array) -> jax.Array:
        """What all articles pass on in the first convolution, [I, D]."""
        return self.first.pass_on(texts_IE)

    def vectors(self, rows_X: jax.Array, passed_ID: jax.Array, texts_IE: jax.Array, graph: Graph) -> jax.Array:
        """z [X, D] of some articles."""
        near_XK = graph.neighbour_IK[rows_X]
        these_XC = jnp.concatenate([rows_X[:, None], near_XK], axis=1)  # C: the article and its K neighbours
        around_XCKD = passed_ID[graph.neighbour_IK[these_XC]]
        z_XCD = self.first.combine(texts_IE[these_XC], around_XCKD, graph.weight_IK[these_XC])
        return self.second(z_XCD[:, 0], z_XCD[:, 1:], graph.weight_IK[rows_X])

    def __call__(self, rows_X: jax.Array, texts_IE: jax.Array, graph: Graph) -> jax.Array:
        return self.vectors(rows_X, self.pass_on(texts_IE), texts_IE, graph)


def hinge_loss(
    query_BD: jax.Array, clicked_BD: jax.Array, negative_ND: jax.Array, apart_BN: jax.Array, margin: float
) -> jax.Array:
    """Mean of max(0, z_q·z_n − z_q·z_i + margin) over pairs and the negatives that are neither of the two."""
    excess_BN = query_BD @ negative_ND.T - jnp.sum(query_BD * clicked_BD, axis=-1, keepdims=True) + margin
    return jnp.sum(jnp.where(apart_BN, nn.relu(excess_BN), 0)) / jnp.maximum(jnp.sum(apart_BN), 1)


def news_learner(log: NewsLog, config: PinsageConfig, seed: int) -> Learner:
    """PinSage on a news log. Trained on the graph of clicks before t1; asked later, it reads those before that too."""
    click_user = np.concatenate([np.full(len(user.click_rows), i) for i, user in enumerate(log.users.values())])
    click_rows = np.concatenate([user.click_rows for user in log.users.values()])
    click_times = np.concatenate([user.click_times for user in log.users.values()])

    def graph_at(time: int) -> Graph:
        known = click_times < time
        return walk_graph(click_user[known], click_rows[known], len(log.texts_IE), config, seed)

    return learner(news_clicks(log), graph_at(log.t1), graph_at, config)


def learner(clicks: Clicks, graph: Graph, graph_at: Any, config: PinsageConfig) -> Learner:
    """PinSage on these clicks; ``graph_at(time)`` is the graph of the clicks before a time."""
    model: Any = Pinsage(config.size)
    query_P = np.concatenate([history.rows[:-1] for history in clicks.train]).astype(np.int32)
    clicked_P = np.concatenate([history.rows[1:] for history in clicks.train]).astype(np.int32)
    constants = {"texts_IE": clicks.features.text_IE, "pool_P": clicks.pool_P, "graph": graph}

    def vectors(params: dict, rows_X: jax.Array, constants: dict) -> jax.Array:
        return model.apply({"params": params}, rows_X, constants["texts_IE"], constants["graph"])

    def loss(params: dict, constants: dict, batch: PairBatch, key: jax.Array) -> jax.Array:
        negative_N = jax.random.choice(key, constants["pool_P"], (config.negatives,))
        rows_X = jnp.concatenate([batch.query_B, batch.clicked_B, negative_N])
        B = len(batch.query_B)
        query_BD, clicked_BD, negative_ND = jnp.split(vectors(params, rows_X, constants), [B, 2 * B])
        apart_BN = (negative_N != batch.query_B[:, None]) & (negative_N != batch.clicked_B[:, None])
        return hinge_loss(query_BD, clicked_BD, negative_ND, apart_BN, config.margin)

    def item_vectors(params: dict, constants: dict) -> jax.Array:
        texts_IE, graph = constants["texts_IE"], constants["graph"]
        passed_ID = model.apply({"params": params}, texts_IE, method="pass_on")

        def vector(row: jax.Array) -> jax.Array:
            return model.apply({"params": params}, row[None], passed_ID, texts_IE, graph, method="vectors")[0]

        return jax.lax.map(vector, jnp.arange(len(texts_IE)), batch_size=512)

    def user_vectors(params: dict, constants: dict, latest: LatestClicks) -> jax.Array:
        z_UKD = vectors(params, latest.rows_UK.reshape(-1), constants).reshape(*latest.rows_UK.shape, -1)
        count_U1 = jnp.maximum(jnp.sum(latest.mask_UK, axis=1, keepdims=True), 1)
        return jnp.sum(jnp.where(latest.mask_UK[..., None], z_UKD, 0), axis=1) / count_U1

    def make_users(examples: Sequence[Example]) -> LatestClicks:
        rows_UK, _, mask_UK = pad([clicks.asked(example) for example in examples], config.clicks, start=0)
        return LatestClicks(rows_UK, mask_UK)

    return Learner(
        optimizer=optax.adam(config.learning_rate),
        rows=len(query_P),
        batch_size=config.batch,
        epochs=config.epochs,
        constants=constants,
        known_at=lambda time: constants | {"graph": graph_at(time)},
        init=lambda key, constants: model.init(key, jnp.zeros(1, jnp.int32), constants["texts_IE"], constants["graph"])[
            "params"
        ],
        make_batch=lambda places: PairBatch(query_P[np.asarray(places)], clicked_P[np.asarray(places)]),
        loss=loss,
        item_vectors=item_vectors,
        make_users=make_users,
        user_vectors=user_vectors,
        has_history=lambda example: len(clicks.asked(example).rows) > 0,
        rankable_I=np.ones(len(clicks.features.known_I), bool),
    )
