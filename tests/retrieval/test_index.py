"""The index against brute force in NumPy, and on eight devices against one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnr.config import MeshConfig
from jaxnr.errors import InputError
from jaxnr.mesh import make_mesh
from jaxnr.retrieval.index import NEVER, ArticleIndex, top_k

EPOCH = 1_750_000_000
E = 4


def brute_force(embeddings_IE, published_I, expires_I, queries_NE, times_N, k, exclude_NX):
    """One query after the other, with a stable sort: equal scores keep the order of rows."""
    scores_NK = np.full((len(queries_NE), k), -np.inf, np.float32)
    rows_NK = np.full((len(queries_NE), k), -1, np.int32)
    for n, (query_E, time) in enumerate(zip(queries_NE, times_N, strict=True)):
        valid = [i for i in range(len(embeddings_IE)) if published_I[i] <= time < expires_I[i]]
        valid = np.array([i for i in valid if i not in exclude_NX[n]], int)
        scores = embeddings_IE[valid] @ query_E
        order = np.argsort(-scores, kind="stable")[:k]
        scores_NK[n, : len(order)], rows_NK[n, : len(order)] = scores[order], valid[order]
    return scores_NK, rows_NK


@functools.cache
def mesh8():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@st.composite
def searches(draw):
    """Small whole numbers: scores are exact and ties abound. Article 1100 and later lie in a third block."""
    articles = draw(st.sampled_from([1, 3, 40, 1100]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    queries, excluded = draw(st.integers(1, 8)), draw(st.sampled_from([0, 3]))
    published_I = EPOCH + rng.integers(0, 10, articles)
    expires_I = np.where(rng.random(articles) < 0.5, NEVER, published_I + rng.integers(0, 10, articles))
    return (
        rng.integers(-1, 2, (articles, E)).astype(np.float32),
        published_I,
        expires_I,
        rng.integers(-1, 2, (queries, E)).astype(np.float32),
        EPOCH + rng.integers(-2, 22, queries),
        draw(st.sampled_from([1, 7])),
        rng.integers(-1, articles, (queries, excluded)),
    )


@settings(max_examples=50, deadline=None)
@given(searches(), st.booleans())
def test_equals_brute_force_with_filters_exclusions_ties_and_short_catalogues(search, sharded):
    embeddings_IE, published_I, expires_I, queries_NE, times_N, k, exclude_NX = search
    index = ArticleIndex(embeddings_IE, published_I, expires_I, mesh8() if sharded else None)
    scores_NK, rows_NK = index.search(queries_NE, times_N, k, exclude_NX)
    expected_scores_NK, expected_rows_NK = brute_force(*search)
    assert (scores_NK.dtype, rows_NK.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(rows_NK, expected_rows_NK)
    np.testing.assert_array_equal(scores_NK, expected_scores_NK)


def real_valued(articles=2400, queries=150, size=96, seed=0):
    rng = np.random.default_rng(seed)
    embeddings_IE = rng.normal(size=(articles, size)).astype(np.float32)
    embeddings_IE /= np.linalg.norm(embeddings_IE, axis=1, keepdims=True)
    embeddings_IE[articles // 2 :] = embeddings_IE[
        : articles - articles // 2
    ]  # every article twice: ties across shards
    published_I = EPOCH + rng.integers(0, 100_000, articles)
    queries_NE = embeddings_IE[rng.integers(0, articles, queries)] + 0.1 * rng.normal(size=(queries, size))
    times_N = EPOCH + rng.integers(0, 100_000, queries)
    return embeddings_IE, published_I, queries_NE.astype(np.float32), times_N, rng.integers(-1, articles, (queries, 20))


@pytest.mark.parametrize(
    "axes",
    [
        MeshConfig(data=8, fsdp=1, tensor=1),
        MeshConfig(data=2, fsdp=2, tensor=2),
    ],
)
def test_eight_devices_equal_one_to_the_bit(axes):
    embeddings_IE, published_I, queries_NE, times_N, exclude_NX = real_valued()
    one = ArticleIndex(embeddings_IE, published_I).search(queries_NE, times_N, 10, exclude_NX)
    index = ArticleIndex(embeddings_IE, published_I, mesh=make_mesh(axes))
    assert len(index.shelf.embeddings_MIE.sharding.device_set) == 8
    assert not index.shelf.embeddings_MIE.sharding.is_fully_replicated
    eight = index.search(queries_NE, times_N, 10, exclude_NX)
    np.testing.assert_array_equal(eight[1], one[1])
    np.testing.assert_array_equal(eight[0], one[0])


def test_only_the_local_best_are_gathered():
    """No collective of the compiled program carries more than devices x k candidates a query."""
    N, k, size = 16, 5, 32
    index = ArticleIndex(np.ones((20_000, size), np.float32), np.full(20_000, EPOCH), mesh=mesh8())
    search = jax.jit(functools.partial(top_k, k=k, mesh=mesh8()))
    arguments = (jnp.zeros((N, size)), jnp.zeros(N, jnp.int32), jnp.zeros((N, 0), jnp.int32))
    program = search.lower(index.shelf, *arguments).compile().as_text()
    collective = r"= \(?(.*?)\)? (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\("
    carried = [shape for line in re.findall(collective, program) for shape in re.findall(r"\w+\[([\d,]*)\]", line)]
    assert carried, "the shards have to be merged by some collective"
    assert max(np.prod([int(d) for d in shape.split(",") if d]) for shape in carried) <= N * 8 * k


def test_pure_function_inside_another_jit_equals_search():
    embeddings_IE, published_I, queries_NE, times_N, exclude_NX = real_valued(articles=700, queries=16)
    for mesh in (None, mesh8()):
        index = ArticleIndex(embeddings_IE, published_I, mesh=mesh)

        @jax.jit
        def summed(shelf, queries_NE, times_N, exclude_NX, mesh=mesh):
            scores_NK, rows_NK = top_k(shelf, queries_NE, times_N, exclude_NX, k=4, mesh=mesh)
            return jnp.where(rows_NK >= 0, scores_NK, 0).sum(), rows_NK

        total, rows_NK = summed(index.shelf, queries_NE, index.relative(times_N), exclude_NX)
        scores_NK, expected_NK = index.search(queries_NE, times_N, 4, exclude_NX)
        np.testing.assert_array_equal(rows_NK, expected_NK)
        np.testing.assert_allclose(total, np.where(expected_NK >= 0, scores_NK, 0).sum(), rtol=1e-5)


def test_more_queries_than_one_program_takes():
    embeddings_IE, published_I, queries_NE, times_N, exclude_NX = real_valued(articles=60, queries=1030)
    index = ArticleIndex(embeddings_IE, published_I)
    _, rows_NK = index.search(queries_NE, times_N, 3, exclude_NX)
    _, last_NK = index.search(queries_NE[-6:], times_N[-6:], 3, exclude_NX[-6:])
    assert rows_NK.shape == (1030, 3)
    np.testing.assert_array_equal(rows_NK[-6:], last_NK)
    assert index.search(queries_NE[:0], times_N[:0], 3)[1].shape == (0, 3)


def test_every_article_where_k_is_more_than_a_block_and_than_the_catalogue():
    embeddings_IE, published_I, queries_NE, _, _ = real_valued(articles=1100, queries=2)
    time_N = np.full(2, published_I.max())
    _, rows_NK = ArticleIndex(embeddings_IE, published_I).search(queries_NE, time_N, 1110)
    np.testing.assert_array_equal(np.sort(rows_NK[:, :1100]), [np.arange(1100)] * 2)
    assert (rows_NK[:, 1100:] == -1).all()


def test_times_decades_away_keep_their_order():
    """int32 seconds on the device, int64 outside."""
    published_I = np.array([0, EPOCH, EPOCH + 1])
    index = ArticleIndex(np.eye(3, dtype=np.float32), published_I, np.array([NEVER, EPOCH + 10, 2**40]))
    ones = np.ones((4, 3), np.float32)
    _, rows_NK = index.search(ones, np.array([-(2**40), EPOCH, EPOCH + 10, 2**35]), 3)
    np.testing.assert_array_equal(rows_NK, [[-1, -1, -1], [0, 1, -1], [0, 2, -1], [0, 2, -1]])


@pytest.mark.parametrize(
    ("embeddings_IE", "published_I", "message"),
    [
        (np.array([[0.0], [np.nan]]), [EPOCH, EPOCH], "row 1 is not finite"),
        (np.zeros((2, 1)), [EPOCH], "2, 1"),
        (np.zeros((0, 1)), [], "at least one"),
        (np.zeros((2, 1)), [0, 2**32], "rows 0 and 1 are published 136 years apart"),
    ],
)
def test_what_cannot_be_indexed_is_an_input_error(embeddings_IE, published_I, message):
    with pytest.raises(InputError, match=message):
        ArticleIndex(embeddings_IE, np.array(published_I, np.int64))
