"""NRHUB: interests that only searches and pages tell of, its equations in float64, masks of time and padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted import fitted

from jaxnr.baselines import nrhub
from jaxnr.baselines.nrhub import Attention, Nrhub, Records, Stream, TrainingRow, Vocabulary, latest
from jaxnr.config import NrhubConfig

TOPICS, WORDS = 6, 4
CONFIG = NrhubConfig(
    records=4,
    record_words=WORDS,
    word_size=16,
    filters=24,
    attention_size=16,
    dropout=0.0,
    batch=32,
    learning_rate=2e-2,
)
# Rows of the vocabulary: what is searched for a topic, what its titles say, words that mean nothing.
SEARCHED, TITLED, NOISE = 1, 1 + TOPICS, 1 + 2 * TOPICS
VOCABULARY = NOISE + 8
TITLES = np.stack([[TITLED + i % TOPICS, NOISE + i % 8, 0, 0] for i in range(24)]).astype(np.int32)


def readers(count, seed, news_only=False):
    """Readers of one topic each, of which half have searched, half have seen a page; what they read tells nothing."""
    rng = np.random.default_rng(seed)
    streams, rows, topics = {}, [], rng.integers(0, TOPICS, count)
    nothing = Stream(np.zeros((0, WORDS), np.int32), np.zeros(0, np.int64))
    for user, topic in enumerate(topics):
        telling = np.array([[SEARCHED + topic, NOISE + rng.integers(8), 0, 0]], np.int32)
        view = Stream(telling, np.array([5]))
        read = Stream(TITLES[rng.integers(0, 24, 3)], np.arange(3) + 1)
        other = [view, nothing] if rng.random() < 0.5 else [nothing, view]
        streams[str(user)] = [*([nothing, nothing] if news_only else other), read]
        rows.append(TrainingRow(str(user), np.array([topic + TOPICS * rng.integers(4)]), np.array([10])))
    return streams, rows, topics


@pytest.mark.slow
def test_interests_that_only_searches_and_pages_tell_are_learned():
    def share(news_only):
        streams, rows, _ = readers(256, 0, news_only)
        learner = nrhub.learner(streams, rows, TITLES, np.arange(24, dtype=np.int32), VOCABULARY, CONFIG)
        asked, _, topics = readers(200, 1, news_only)
        known = latest(list(asked.values()), [10] * 200, CONFIG, start=10)
        best_topic = np.arange(24) % TOPICS  # the topic of the best article is what counts
        params = fitted(learner, 120)
        scores = (
            np.asarray(learner.user_vectors(params, {}, known))
            @ np.asarray(learner.item_vectors(params, {"titles_IW": jnp.asarray(TITLES)})).T
        )
        return float((best_topic[scores.argmax(axis=1)] == topics).mean())

    assert share(news_only=False) > 0.95
    assert share(news_only=True) < 0.35  # one in six topics


def random_records(seed=0, B=2, R=4, C=3):
    rng = np.random.default_rng(seed)
    words = rng.integers(1, VOCABULARY, (B, 3, R, WORDS)).astype(np.int32)
    words[:, :, :, 3] = 0
    words[:, :, 3] = 0
    return Records(words, rng.integers(0, 50, (B, 3, R)).astype(np.int32), np.array([[5, 30, 60]] * B, np.int32))


def random_params(seed=0):
    model = Nrhub(CONFIG, VOCABULARY)
    params = model.init(jax.random.key(0), random_records(), TITLES[:2], False)["params"]
    rng = np.random.default_rng(seed)
    return model, jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), params)


def attention64(params, vectors, mask):
    if not mask.any():
        return np.zeros(vectors.shape[-1])
    kept = vectors[mask]
    score = (np.tanh(kept @ params["hidden"]["kernel"] + params["hidden"]["bias"]) @ params["query"]["kernel"])[:, 0]
    weight = np.exp(score - score.max())
    return weight / weight.sum() @ kept


def record64(params, table, words):
    mask = words > 0
    read = np.where(mask[:, None], table[words], 0)
    padded = np.pad(read, ((1, 1), (0, 0)))
    kernel = params["filters"]["kernel"]
    filtered = [sum(padded[w + j] @ kernel[j] for j in range(3)) + params["filters"]["bias"] for w in range(len(words))]
    return attention64(params["words"], np.maximum(np.array(filtered), 0), mask)


def test_users_and_titles_are_the_equations_in_float64():
    model, params = random_params()
    records = random_records()
    users, titles = model.apply({"params": params}, records, TITLES[:2], False)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    table = p["word_embeddings"]["embedding"]
    np.testing.assert_allclose(titles[0], record64(p["encoder_news"], table, TITLES[0]), rtol=1e-4, atol=1e-5)
    for b in range(2):
        for c in range(3):
            views, seen = [], []
            for view, domain in enumerate(("search", "web", "news")):
                vectors = np.array([record64(p[f"encoder_{domain}"], table, w) for w in records.words_BVRW[b, view]])
                mask = (records.times_BVR[b, view] < records.request_times_BC[b, c]) & (np.arange(4) < 3)
                views.append(attention64(p[f"records_{domain}"], vectors, mask))
                seen.append(mask.any())
            expected = attention64(p["views"], np.array(views), np.array(seen))
            np.testing.assert_allclose(users[b, c], expected, rtol=1e-4, atol=1e-5)


def test_records_at_or_after_a_request_change_nothing():
    model, params = random_params()
    records = random_records()
    changed = records.words_BVRW.copy()
    late = records.times_BVR >= 30
    changed[late] = (changed[late] + 1) % VOCABULARY
    before = model.apply({"params": params}, records, False, method="users")
    after = model.apply({"params": params}, records.replace(words_BVRW=changed), False, method="users")
    np.testing.assert_array_equal(before[:, :2], after[:, :2])  # requests at 5 and 30
    assert np.abs(before[:, 2] - after[:, 2]).max() > 0


def test_padding_changes_nothing():
    """More places for records, and more for words, give the same user."""
    model, params = random_params()
    records = random_records()
    more = Records(
        np.pad(records.words_BVRW, ((0, 0), (0, 0), (0, 3), (0, 2))),
        np.pad(records.times_BVR, ((0, 0), (0, 0), (0, 3))),
        records.request_times_BC,
    )
    users = [model.apply({"params": params}, some, False, method="users") for some in (records, more)]
    np.testing.assert_allclose(*users, rtol=1e-5, atol=1e-6)


def test_attention_over_nothing_is_zero():
    attention = Attention(4)
    vectors, mask = jnp.ones((1, 2, 3)), np.zeros((1, 2), bool)
    params = attention.init(jax.random.key(0), vectors, mask)
    assert not np.asarray(attention.apply(params, vectors, mask)).any()


def test_latest_records_are_those_before_the_time():
    stream = Stream(np.arange(1, 7)[:, None].repeat(WORDS, 1).astype(np.int32), np.array([1, 2, 3, 4, 5, 6]))
    nothing = Stream(np.zeros((0, WORDS), np.int32), np.zeros(0, np.int64))
    config = dataclasses.replace(CONFIG, records=2)
    records = latest([[stream, nothing, nothing]], [5], config, start=1)
    assert records.words_BVRW[0, 0, :, 0].tolist() == [3, 4]
    assert records.times_BVR[0, 0].tolist() == [2, 3]
    assert not records.words_BVRW[0, 1:].any()
    assert records.request_times_BC.tolist() == [[4]]


def test_words_that_the_training_texts_do_not_have_are_unknown():
    vocabulary = Vocabulary(["Storm at sea", "storm damage"], words=2)
    assert len(vocabulary) == 5  # at, damage, sea, storm
    assert vocabulary.encode(["tax storm sea damage", "tax"]).tolist() == [[4, 3], [0, 0]]
