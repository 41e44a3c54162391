"""GRU, SASRec and HSTU: planted patterns, blocks against float64, causality, padding, and the losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted import IDS, clicks_of, fitted, known_clicks, obeyed

from jaxnr.baselines import gru, hstu, sasrec
from jaxnr.baselines.items import ItemFeatures, Items
from jaxnr.baselines.sequences import History, SequenceBatch, last_place, request_batch, sampled_softmax, training_batch
from jaxnr.config import GruConfig, HstuConfig, ItemsConfig, SasrecConfig

TOPICS, LENGTH = 8, 5
GRU = GruConfig(items=IDS, size=24, batch=64, negatives=32, learning_rate=0.1)
SASREC = SasrecConfig(items=IDS, size=24, dropout=0.0, batch=64, negatives=16, learning_rate=1e-2)
HSTU = HstuConfig(items=IDS, size=24, dropout=0.0, batch=64, negatives=16, learning_rate=1e-2)
MODELS = {"gru": (gru.learner, GRU), "sasrec": (sasrec.learner, SASREC), "hstu": (hstu.learner, HSTU)}


def follow_ups(count, seed, shuffled=False):
    """Different topics in any order; the last click is the follow-up (TOPICS + topic) of the last topic before it."""
    rng = np.random.default_rng(seed)
    histories = []
    for _ in range(count):
        topics = rng.permutation(TOPICS)[:LENGTH]
        shown = rng.permutation(topics) if shuffled else topics
        times = np.arange(LENGTH + 1) * 60
        histories.append(History(np.append(shown, TOPICS + topics[-1]).astype(np.int32), times))
    return histories


@pytest.mark.parametrize(("name", "steps"), [("gru", 200), ("sasrec", 120)])
def test_order_is_learned_and_without_it_nothing_is(name, steps):
    make, config = MODELS[name]

    def share(shuffled):
        learner = make(clicks_of(follow_ups(512, 0, shuffled), 2 * TOPICS), config)
        test = follow_ups(200, 1, shuffled)
        expected = np.array([history.rows[-1] for history in test])
        return obeyed(learner, fitted(learner, steps), known_clicks(test, LENGTH), expected, range(TOPICS, 2 * TOPICS))

    assert share(shuffled=False) > 0.95
    assert share(shuffled=True) < 0.4  # one in five topics


def gaps(count, seed):
    """After a minute the reader follows up the last topic; after days, the first."""
    rng = np.random.default_rng(seed)
    histories = []
    for _ in range(count):
        topics = rng.permutation(TOPICS)[:LENGTH]
        soon = rng.random() < 0.5
        times = np.cumsum(rng.integers(20_000, 40_000, LENGTH))
        next_time = times[-1] + (rng.integers(30, 90) if soon else rng.integers(400_000, 600_000))
        follow_up = TOPICS + (topics[-1] if soon else topics[0])
        histories.append(History(np.append(topics, follow_up).astype(np.int32), np.append(times, next_time)))
    return histories


@pytest.mark.parametrize(("told", "low", "high"), [("target", 0.9, 1.0), ("last", 0.0, 0.65), ("none", 0.0, 0.65)])
def test_hstu_learns_what_time_gaps_say_when_it_is_told_of_them(told, low, high):
    learner = hstu.learner(clicks_of(gaps(1024, 0), 2 * TOPICS), dataclasses.replace(HSTU, time_bias=told))
    test = gaps(300, 1)
    expected = np.array([history.rows[-1] for history in test])
    share = obeyed(learner, fitted(learner, 250), known_clicks(test, LENGTH), expected, range(TOPICS, 2 * TOPICS))
    assert low <= share <= high


def random_batch(seed=0, B=3, T=6, items=10):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.integers(1, 100_000, (B, T + 1)), axis=1).astype(np.int32)
    rows = rng.integers(0, items, (B, T + 1)).astype(np.int32)
    return SequenceBatch(rows[:, :-1], np.ones((B, T), bool), times[:, :-1], rows[:, 1:], times[:, 1:])


def model_of(name, length):
    if name == "gru":
        return gru.Gru(GRU)
    return sasrec.Sasrec(SASREC, length) if name == "sasrec" else hstu.Hstu(HSTU, length)


def noisy(params, seed=0):
    """Noise on every parameter: zeros and ones hide mistakes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), params)


def hidden(model, params, batch, items=10):
    features = ItemFeatures(np.ones(items, bool), np.zeros((items, 0), np.float32))
    return np.asarray(model.apply({"params": params}, batch, features, False)[0])


def initial(model, batch, items=10):
    features = ItemFeatures(np.ones(items, bool), np.zeros((items, 0), np.float32))
    return noisy(model.init(jax.random.key(0), batch, features, False)["params"])


@pytest.mark.parametrize("name", MODELS)
def test_what_comes_later_changes_nothing_before(name):
    batch = random_batch()
    model = model_of(name, 6)
    params = initial(model, batch)
    later = batch.replace(
        rows_BT=batch.rows_BT.copy(), times_BT=batch.times_BT.copy(), next_times_BT=batch.next_times_BT.copy()
    )
    later.rows_BT[:, 4:] = (later.rows_BT[:, 4:] + 3) % 10
    later.times_BT[:, 4:] += 99_999
    later.next_times_BT[:, 4:] += 99_999
    before, after = hidden(model, params, batch), hidden(model, params, later)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max(axis=-1).min() > 0


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name):
    batch = random_batch()
    model = model_of(name, 6)
    params = initial(model, batch)
    mask = batch.mask_BT.copy()
    mask[:, 4:] = False
    junk = batch.replace(mask_BT=mask)
    clean = jax.tree.map(lambda x: np.where(mask, x, 0), junk)
    at_last = [np.asarray(last_place(hidden(model, params, some), mask)) for some in (junk, clean)]
    np.testing.assert_array_equal(*at_last)
    np.testing.assert_allclose(at_last[0], hidden(model, params, batch)[:, 3], rtol=2e-5, atol=1e-6)


def norm(x, scale=1.0, bias=0.0):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def float64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def test_sasrec_block_is_its_equations_in_float64():
    B, T, D, N = 2, 5, 8, 2
    x = np.random.default_rng(0).normal(size=(B, T, D))
    block = sasrec.Block(D, N, 0.0)
    mask = np.tril(np.ones((B, T, T), bool))
    params = noisy(block.init(jax.random.key(0), jnp.asarray(x, jnp.float32), mask, False)["params"])
    found = block.apply({"params": params}, jnp.asarray(x, jnp.float32), mask, False)
    p = float64(params)
    query = norm(x, **p["attention_norm"])
    q = np.einsum("btd,dnh->bnth", query, p["attention"]["query"]["kernel"]) + p["attention"]["query"]["bias"][:, None]
    k = np.einsum("btd,dnh->bnth", x, p["attention"]["key"]["kernel"]) + p["attention"]["key"]["bias"][:, None]
    v = np.einsum("btd,dnh->bnth", x, p["attention"]["value"]["kernel"]) + p["attention"]["value"]["bias"][:, None]
    weights = softmax(np.where(mask[:, None], q @ k.swapaxes(-1, -2) / np.sqrt(D / N), -np.inf))
    attended = np.einsum("bnth,nhd->btd", weights @ v, p["attention"]["out"]["kernel"]) + p["attention"]["out"]["bias"]
    y = norm(query + attended, **p["feed_forward_norm"])
    inner = np.maximum(y @ p["inner"]["kernel"] + p["inner"]["bias"], 0)
    np.testing.assert_allclose(found, y + inner @ p["outer"]["kernel"] + p["outer"]["bias"], rtol=1e-4, atol=1e-5)


def test_hstu_layer_is_its_equations_in_float64():
    B, T, D, N, length = 2, 5, 8, 2, 7
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D))
    times = np.cumsum(rng.integers(0, 10_000, (B, T + 1)), axis=1)
    layer = hstu.Layer(D, N, 0.0, length)
    mask = np.tril(np.ones((B, T, T), bool))
    batch = SequenceBatch(None, None, times[:, :-1], None, times[:, 1:])
    buckets = hstu.time_buckets(batch, "target")
    params = noisy(layer.init(jax.random.key(0), jnp.asarray(x, jnp.float32), mask, buckets, False)["params"])
    found = layer.apply({"params": params}, jnp.asarray(x, jnp.float32), mask, buckets, False)
    p = float64(params)
    u, v, q, k = np.split(silu(norm(x) @ p["uvqk"]["kernel"]), 4, axis=-1)
    pooled = np.zeros((B, T, D))
    H = D // N
    for b in range(B):
        for head in range(N):
            part = slice(head * H, (head + 1) * H)
            for t in range(T):
                for s in range(t + 1):
                    apart = max(1, abs(int(times[b, t + 1] - times[b, s])))
                    bias = p["position_bias"][s - t + length - 1] + p["time_bias"][min(int(np.log(apart) / 0.301), 128)]
                    pooled[b, t, part] += silu(q[b, t, part] @ k[b, s, part] + bias) / length * v[b, s, part]
    expected = x + (u * norm(pooled)) @ p["output"]["kernel"] + p["output"]["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_gru_is_its_equations_in_float64():
    batch = random_batch()
    model = gru.Gru(GRU)
    params = initial(model, batch)
    p = float64(params)
    cell = p["GRUCell_0"]
    table = p["Items_0"]["item_embedding"]
    h = np.zeros((3, GRU.size))
    for t in range(6):
        x = table[batch.rows_BT[:, t]]
        r = sigmoid(x @ cell["ir"]["kernel"] + cell["ir"]["bias"] + h @ cell["hr"]["kernel"])
        z = sigmoid(x @ cell["iz"]["kernel"] + cell["iz"]["bias"] + h @ cell["hz"]["kernel"])
        inner = h @ cell["hn"]["kernel"] + cell["hn"]["bias"]
        n = np.tanh(x @ cell["in"]["kernel"] + cell["in"]["bias"] + r * inner)
        h = (1 - z) * n + z * h
    features = ItemFeatures(np.ones(10, bool), np.zeros((10, 0), np.float32))
    states, items = model.apply({"params": params}, batch, features, False)
    np.testing.assert_allclose(states[:, -1] @ items.T, h @ table.T + p["bias"], rtol=1e-4, atol=1e-4)


def test_gru_loss_is_the_softmax_over_target_batch_and_negatives():
    rng = np.random.default_rng(0)
    B, T, E, I = 3, 2, 4, 9
    states, items = rng.normal(size=(B, T, E)), rng.normal(size=(I, E))
    target = np.array([[1, 2], [1, 3], [4, 5]])
    mask = np.array([[True, True], [True, False], [True, True]])
    negatives = np.array([6, 2, 6])
    batch = SequenceBatch(None, mask, None, target, None)
    losses = []
    for b, t in zip(*np.nonzero(mask), strict=True):
        others = [target[c, t] for c in range(B) if mask[c, t] and target[c, t] != target[b, t]]
        others += [n for n in negatives if n != target[b, t]]
        logits = items[[target[b, t], *others]] @ states[b, t]
        losses.append(np.log(np.exp(logits - logits[0]).sum()))
    found = gru.batch_softmax(*(jnp.asarray(x, jnp.float32) for x in (states, items)), batch, negatives)
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize(("items", "width"), [(5, 4), (40, 2)], ids=["all scores", "the negatives' vectors"])
def test_sampled_softmax_leaves_the_target_out_of_its_negatives(items, width):
    """With one article in the pool, the loss is log(1 + exp of the difference), or 0 where that is the target."""
    rng = np.random.default_rng(0)
    states, vectors = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 3, width), (items, width)))
    batch = SequenceBatch(None, np.array([[True, True, False]]), None, np.array([[1, 2, 3]]), None)
    found = sampled_softmax(states, vectors, batch, jnp.array([2]), jax.random.key(0), negatives=2, temperature=0.5)
    apart = float(states[0, 0] @ (vectors[2] - vectors[1])) / 0.5
    np.testing.assert_allclose(found, np.log1p(2 * np.exp(apart)) / 2, rtol=1e-5)


def test_batches_hold_the_latest_clicks_and_what_follows():
    history = History(np.array([5, 6, 7, 8]), np.array([100, 110, 130, 160]))
    batch = training_batch([history], 2, start=100)
    assert batch.rows_BT.tolist() == [[6, 7]]
    assert batch.next_rows_BT.tolist() == [[7, 8]]
    assert batch.next_times_BT.tolist() == [[30, 60]]
    none = History(np.zeros(0, np.int64), np.zeros(0, np.int64))
    asked = request_batch([history, none], [200, 300], 6, start=100)
    assert asked.rows_BT.tolist() == [[5, 6, 7, 8, 0, 0], [0] * 6]
    assert asked.next_rows_BT.tolist() == [[6, 7, 8, -1, 0, 0], [0] * 6]
    assert asked.next_times_BT[0].tolist() == [10, 30, 60, 100, 0, 0]
    assert asked.mask_BT.sum(axis=1).tolist() == [4, 0]


def test_an_article_that_training_never_clicked_is_known_by_its_text_alone():
    features = ItemFeatures(np.array([True, False]), np.eye(2, 3, dtype=np.float32))
    vectors = {}
    for kind in ("id", "text", "id_and_text"):
        items = Items(ItemsConfig(kind=kind), 4)
        params = noisy(items.init(jax.random.key(0), features, False)["params"])
        vectors[kind] = items.apply({"params": params}, features, False), params
    found, params = vectors["id_and_text"]
    np.testing.assert_allclose(found[1], params["text"]["kernel"][1], rtol=1e-6)
    np.testing.assert_allclose(found[0], params["text"]["kernel"][0] + params["item_embedding"][0], rtol=1e-6)
    assert not np.asarray(vectors["id"][0][1]).any()
    assert np.asarray(vectors["text"][0]).all()


def test_id_dropout_leaves_ids_out_in_training_alone():
    items = Items(ItemsConfig(kind="id", id_dropout=0.5), 3)
    features = ItemFeatures(np.ones(200, bool), np.zeros((200, 0), np.float32))
    params = items.init(jax.random.key(0), features, False)
    left = items.apply(params, features, True, rngs={"dropout": jax.random.key(1)})
    kept = np.asarray(left).any(axis=1).mean()
    assert 0.35 < kept < 0.65
    assert np.asarray(items.apply(params, features, False)).any(axis=1).all()
