import numpy as np
import pytest

from jaxnr.data.examples import DAY, Example, Signal
from jaxnr.data.schema import ARTICLES, EVENTS, Article, Event, to_table
from jaxnr.evaluation import recall_paths
from jaxnr.evaluation.merging import reciprocal_rank, round_robin
from jaxnr.evaluation.recall_paths import content, popularity, recent, signals

NOW = 100 * DAY
WORDS = ("bridge", "snow", "tax", "whale")
ARTICLE_LIST = [
    Article("bridge1", NOW - 5 * DAY, "bridge"),
    Article("snow1", NOW - 4 * DAY, "snow"),
    Article("tax1", NOW - 3 * DAY, "tax"),
    Article("mixed", NOW - 3 * DAY, "bridge snow"),
    Article("expired", NOW - 9 * DAY, "bridge", expires_at=NOW),
    Article("last_second", NOW - 8 * DAY, "tax bridge snow", expires_at=NOW + 1),
    Article("now", NOW, "snow snow tax"),
    Article("future", NOW + 1, "bridge"),
]
TABLE = to_table(ARTICLE_LIST, ARTICLES)
LIVE = {"bridge1", "snow1", "tax1", "mixed", "last_second", "now"}


class WordEmbedder:
    """Counts of four words, as unit vectors."""

    size = len(WORDS)

    def embed_queries(self, texts):
        vectors = np.array([[text.split().count(word) for word in WORDS] for text in texts], np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)

    embed_documents = embed_queries


class PlainIndex:
    """The contract of ArticleIndex.search, one query at a time; remembers the shapes it was asked for."""

    def __init__(self):
        self.vectors = WordEmbedder().embed_documents([article.title for article in ARTICLE_LIST])
        self.shapes = set()

    def search(self, queries_NE, times_N, k, exclude_NX=None):
        self.shapes.add(queries_NE.shape)
        scores_NK, rows_NK = (
            np.full((len(queries_NE), k), -np.inf, np.float32),
            np.full((len(queries_NE), k), -1, np.int32),
        )
        for n, query in enumerate(queries_NE):
            scores = self.vectors @ query
            live = [
                row
                for row, article in enumerate(ARTICLE_LIST)
                if article.published_at <= times_N[n] < (article.expires_at or np.inf) and row not in exclude_NX[n]
            ]
            best = sorted(live, key=lambda row: (-scores[row], row))[:k]
            rows_NK[n, : len(best)], scores_NK[n, : len(best)] = best, scores[best]
        return scores_NK, rows_NK


def example(*texts, seen=(), timestamp=NOW):
    """Signals oldest first."""
    past = tuple(Signal(timestamp - 60 * (len(texts) - i), "search", text, None) for i, text in enumerate(texts))
    return Example(0, "U", timestamp, past, ("tax1",), tuple(seen))


def click(item_id, timestamp, domain="news"):
    return Event("V", timestamp, domain, "click", "", item_id)


def test_recent_is_by_publish_time_over_the_candidates():
    first, second, third = recent(
        [example(), example(seen=["now", "gone"]), example(timestamp=NOW + 1)], TABLE, depth=6
    )
    assert first == ["now", "tax1", "mixed", "snow1", "bridge1", "last_second"]
    assert second == ["tax1", "mixed", "snow1", "bridge1", "last_second"]
    assert third == ["future", "now", "tax1", "mixed", "snow1", "bridge1"]


def test_popularity_counts_clicks_in_the_window_before_the_request_only():
    events = to_table(
        [
            click("snow1", NOW - 1),
            click("snow1", NOW - 2 * DAY),
            click("bridge1", NOW - 1),
            *[click("tax1", NOW + i) for i in range(5)],  # at and after the request: the future
            *[click("mixed", NOW - 2 * DAY - 1) for _ in range(5)],  # before the window
            *[click("expired", NOW - 5) for _ in range(5)],
            *[click("elsewhere", NOW - 5) for _ in range(5)],
            *[click("mixed", NOW - 5, "web") for _ in range(5)],
        ],
        EVENTS,
    )
    plain, seen, later = popularity(
        [example(), example(seen=["snow1"]), example(timestamp=NOW + 3)], TABLE, events, depth=4, window_days=2
    )
    assert plain == ["snow1", "bridge1", "now", "tax1"]
    assert seen == ["bridge1", "now", "tax1", "mixed"]
    assert later[0] == "tax1"


def test_popularity_without_any_click_is_recent():
    users = [example(), example(seen=["now"])]
    no_events = to_table([], EVENTS)
    assert popularity(users, TABLE, no_events, depth=5) == recent(users, TABLE, depth=5)


def ask_signals(examples, index, **changes):
    settings = {"max_queries": 2, "articles_per_query": 2, "merge": round_robin, "depth": 10} | changes
    return signals(examples, TABLE, WordEmbedder(), index, **settings)


def test_signals_are_the_latest_different_texts_as_queries():
    user = example("tax", "bridge", "snow", "bridge")  # latest first: bridge, snow; tax is one too many
    assert ask_signals([user], PlainIndex()) == [["bridge1", "snow1", "mixed", "now"]]
    assert ask_signals([user], PlainIndex(), merge=reciprocal_rank, depth=2) == [["bridge1", "snow1"]]


def test_signals_without_a_known_word_retrieve_nothing():
    unknown, half = example("zebra", "yak"), example("snow", "zebra")
    assert ask_signals([unknown, half, example()], PlainIndex()) == [[], ["snow1", "now"], []]


def test_content_is_nearest_to_the_mean_of_the_signals():
    users = [example("bridge", "snow"), example("bridge", "snow", seen=["mixed"]), example("zebra"), example()]
    mixed, without, unknown, nothing = content(users, TABLE, WordEmbedder(), PlainIndex(), depth=3)
    assert mixed == ["mixed", "last_second", "bridge1"]
    assert without == ["last_second", "bridge1", "snow1"]
    assert (unknown, nothing) == ([], [])


@pytest.mark.parametrize(
    "path",
    [
        lambda users: recent(users, TABLE, depth=99),
        lambda users: popularity(users, TABLE, to_table([click("expired", NOW - 1)], EVENTS), depth=99),
        lambda users: ask_signals(users, PlainIndex(), articles_per_query=8, depth=99),
        lambda users: content(users, TABLE, WordEmbedder(), PlainIndex(), depth=99),
    ],
)
def test_every_path_ranks_the_candidates_of_the_protocol(path):
    first, second = path([example("bridge", "tax"), example("bridge", "tax", seen=["tax1", "now"])])
    assert set(first) == LIVE
    assert set(second) == LIVE - {"tax1", "now"}
    assert path([]) == []


def test_blocks_of_users_change_nothing_and_have_one_shape(monkeypatch):
    users = [example(*texts, seen=seen) for texts in (["bridge"], ["snow", "tax"], ["tax"]) for seen in ([], ["now"])]
    whole, index = ask_signals(users, PlainIndex()), PlainIndex()
    monkeypatch.setattr(recall_paths, "_USERS_AT_ONCE", 4)
    assert ask_signals(users, index) == whole
    assert index.shapes == {(8, 4)}
