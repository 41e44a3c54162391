"""PinSage: neighbourhoods that only the graph tells of, its equations in float64, walks, and padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from planted import clicks_of, fitted

from jaxnr.baselines import pinsage
from jaxnr.baselines.items import ItemFeatures
from jaxnr.baselines.pinsage import Convolution, Graph, LatestClicks, Pinsage, hinge_loss, walk_graph
from jaxnr.baselines.sequences import History
from jaxnr.config import PinsageConfig

CIRCLES, SIZE, TRAINED = 40, 8, 28
CONFIG = PinsageConfig(
    size=32, neighbours=7, walks=100, batch=64, negatives=64, learning_rate=3e-3, margin=0.3, clicks=4
)


def circles():
    """Circles of articles that the same readers click, whose texts say nothing: (texts, users, articles)."""
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(CIRCLES * SIZE, 16)).astype(np.float32)
    users = np.repeat(np.arange(3 * CIRCLES), SIZE)
    articles = np.concatenate([rng.permutation(SIZE) + SIZE * (user % CIRCLES) for user in range(3 * CIRCLES)])
    return texts, users, articles


def test_neighbourhoods_of_articles_that_training_never_saw_are_used():
    """Trained on pairs of some circles, asked about the others: half of a circle is known, which is the other half?"""
    texts, users, articles = circles()
    histories = [
        History(articles[users == user].astype(np.int32), np.arange(SIZE))
        for user in range(3 * CIRCLES)
        if user % CIRCLES < TRAINED
    ]
    features = ItemFeatures(np.ones(len(texts), bool), texts)
    clicks = dataclasses.replace(clicks_of(histories, len(texts), features), pool_P=np.arange(TRAINED * SIZE))
    graph = walk_graph(users, articles, len(texts), CONFIG, seed=0)

    def share(graph):
        learner = pinsage.learner(clicks, graph, lambda time: graph, CONFIG)
        params = fitted(learner, 250)
        asked = np.array([[circle * SIZE + i for i in range(4)] for circle in range(TRAINED, CIRCLES)])
        constants = jax.tree.map(jnp.asarray, learner.constants)
        known = LatestClicks(asked, np.ones_like(asked, bool))
        users_UE = jax.jit(learner.user_vectors)(params, constants, known)
        scores = np.array(users_UE @ jax.jit(learner.item_vectors)(params, constants).T)[:, TRAINED * SIZE :]
        scores[:, np.arange(scores.shape[1]) % SIZE < 4] = -np.inf  # clicked, by one of those who are asked
        best_circle = scores.argmax(axis=1) // SIZE + TRAINED
        return float((best_circle == np.arange(TRAINED, CIRCLES)).mean())

    assert share(graph) > 0.8
    assert share(Graph(graph.neighbour_IK, np.zeros_like(graph.weight_IK))) < 0.4  # one in twelve


def test_convolution_is_its_equations_in_float64():
    rng = np.random.default_rng(0)
    h, near, weight = rng.normal(size=(3, 6)), rng.normal(size=(3, 4, 6)), rng.random((3, 4))
    weight[2] = 0  # without neighbours
    layer = Convolution(5)
    arguments = [jnp.asarray(x, jnp.float32) for x in (h, near, weight)]
    params = layer.init(jax.random.key(0), *arguments)["params"]
    params = jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), params)
    found = layer.apply({"params": params}, *arguments)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for i in range(3):
        passed = np.maximum(near[i] @ p["q"]["kernel"] + p["q"]["bias"], 0)
        n = weight[i] @ passed / weight[i].sum() if weight[i].any() else np.zeros(5)
        z = np.maximum(np.concatenate([n, h[i]]) @ p["w"]["kernel"] + p["w"]["bias"], 0)
        np.testing.assert_allclose(found[i], z / np.linalg.norm(z), rtol=1e-4, atol=1e-6)


def test_two_layers_reach_neighbours_of_neighbours_and_no_further():
    """On a chain 0 - 1 - 2 - 3, each with the next as its neighbour."""
    graph = Graph(np.array([[1], [2], [3], [3]]), np.array([[1.0], [1.0], [1.0], [0.0]], np.float32))
    texts = np.random.default_rng(0).random((4, 5)).astype(np.float32)
    model = Pinsage(16)
    params = model.init(jax.random.key(0), jnp.array([0]), texts, graph)

    def moved(row):
        changed = texts.copy()
        changed[row] += 1
        z = [model.apply(params, jnp.array([0]), some, graph) for some in (texts, changed)]
        return float(jnp.abs(z[0] - z[1]).max())

    assert moved(1) > 1e-4
    assert moved(2) > 1e-4
    assert moved(3) == 0


def test_hinge_loss_in_float64():
    rng = np.random.default_rng(0)
    q, i, n = (rng.normal(size=shape) for shape in ((3, 4), (3, 4), (2, 4)))
    apart = np.array([[True, True], [True, False], [True, True]])
    terms = [max(0.0, q[b] @ n[k] - q[b] @ i[b] + 0.5) for b in range(3) for k in range(2) if apart[b, k]]
    found = hinge_loss(*(jnp.asarray(x, jnp.float32) for x in (q, i, n)), apart, 0.5)
    np.testing.assert_allclose(found, np.mean(terms), rtol=1e-5)


def test_walks_stay_among_connected_articles_and_weigh_by_visits():
    # Article 0 and 1 share three readers, 0 and 2 one; 3 and 4 are apart; 5 has no reader.
    clicks = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 2), (4, 3), (4, 4)]
    users, articles = np.array(clicks).T
    config = dataclasses.replace(CONFIG, neighbours=3, walks=2000)
    graph = walk_graph(users, articles, 6, config, seed=0)
    assert graph.neighbour_IK[0, :2].tolist() == [1, 2]
    assert 0.65 < graph.weight_IK[0, 0] < 0.9
    np.testing.assert_allclose(graph.weight_IK.sum(axis=1), [1, 1, 1, 1, 1, 0], rtol=1e-6)
    assert graph.neighbour_IK[3, 0] == 4
    again = walk_graph(users, articles, 6, config, seed=0)
    np.testing.assert_array_equal(graph.weight_IK, again.weight_IK)


def test_padded_clicks_do_not_count_for_a_user():
    texts = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    graph = walk_graph(np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 3, 4]), 6, CONFIG, seed=0)
    clicks = clicks_of([History(np.array([0, 1]), np.arange(2))], 6, ItemFeatures(np.ones(6, bool), texts))
    learner = pinsage.learner(clicks, graph, lambda time: graph, CONFIG)
    constants = jax.tree.map(jnp.asarray, learner.constants)
    params = learner.init(jax.random.key(0), constants)
    items = learner.item_vectors(params, constants)
    known = LatestClicks(np.array([[3, 1, 5, 5]]), np.array([[True, True, False, False]]))
    found = jax.jit(learner.user_vectors)(params, constants, known)
    np.testing.assert_allclose(found[0], (items[3] + items[1]) / 2, rtol=1e-5, atol=1e-6)
