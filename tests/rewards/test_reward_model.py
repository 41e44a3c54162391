"""From parsed lists to rewards, over a small catalogue with the default embedder."""

import dataclasses

import numpy as np
import pytest

from jaxnr.config import Config, PromptConfig, RetrievalConfig
from jaxnr.data.examples import Example, Signal
from jaxnr.prompting.output import ParsedList
from jaxnr.retrieval.embedder import TfidfSvdEmbedder
from jaxnr.retrieval.index import ArticleIndex
from jaxnr.rewards.composite import REWARDS, RewardModel, Scored, summarise
from jaxnr.rewards.rubric import Calibration
from jaxnr.rewards.specificity import TermStatistics

ARTICLES = [
    "hurricane florida coast warning", "florida storm damage hurricane", "hurricane season forecast storm",
    "rowing regatta results cambridge", "rowing cup final cambridge crew", "crew wins rowing regatta",
    "electric car prices battery", "battery plant electric car factory", "car factory prices fall",
]  # fmt: skip
CONFIG = Config(prompt=PromptConfig(max_queries=4), retrieval=RetrievalConfig(articles_per_query=3))


def example_of(example_id: int, *texts: str, seen=(), timestamp: int = 100) -> Example:
    signals = tuple(Signal(t, "search", text, None) for t, text in enumerate(texts))
    return Example(example_id, f"u{example_id}", timestamp, signals, (), tuple(seen))


def valid(*queries: str) -> ParsedList:
    return ParsedList(queries, None)


READER = example_of(0, "hurricane florida", "florida hurricane storm", "rowing regatta", "rowing crew cambridge")
DRIVER = example_of(1, "electric car", "car battery prices", "battery factory", seen=["a6", "gone"])
INVALID = ParsedList((), "not_json")


class CountingEmbedder(TfidfSvdEmbedder):
    """Remembers what it was asked to embed."""

    def embed_queries(self, texts):
        self.asked = [*getattr(self, "asked", []), list(texts)]
        return self.embed_documents(texts)


@pytest.fixture
def model():
    embedder = CountingEmbedder.fit(ARTICLES, 6, seed=0)
    return model_of(embedder)


def model_of(embedder, judge=None):
    return RewardModel(
        embedder=embedder,
        index=ArticleIndex(embedder.embed_documents(ARTICLES), np.arange(9)),
        item_ids_I=[f"a{row}" for row in range(9)],
        articles_IE=embedder.embed_documents(ARTICLES),
        statistics=TermStatistics.fit(ARTICLES),
        signal_terms=TermStatistics.fit(ARTICLES),
        calibration=Calibration(0.2),
        config=CONFIG,
        judge=judge,
    )


LISTS = [
    [valid("hurricane florida storm", "rowing regatta crew"), valid("hurricane florida", "electric car"), INVALID],
    [
        valid("electric car", "battery factory"),
        valid("electric car", "electric car prices"),
        valid("zxqv a", "blorp b"),
    ],
]


def test_shapes_and_bounds(model):
    scored = model([READER, DRIVER], LISTS)
    assert set(scored.rewards) == set(REWARDS)
    for name, reward_BG in scored.rewards.items():
        assert reward_BG.shape == (2, 3)
        assert np.all((reward_BG >= 0) & (reward_BG <= 1)), name
        assert reward_BG[0, 2] == 0
    assert scored.rewards["structure"].tolist() == [[1, 1, 0], [1, 1, 1]]
    weighted = sum(getattr(CONFIG.reward, name) * reward_BG for name, reward_BG in scored.rewards.items())
    np.testing.assert_allclose(scored.total_BG, weighted, atol=1e-6)
    assert scored.found.query_mask_BGQ.sum(-1).tolist() == [[2, 2, 0], [2, 2, 2]]
    assert scored.found.article_rows_BGQK.shape == scored.found.article_scores_BGQK.shape == (2, 3, 4, 3)
    assert np.all(scored.found.article_rows_BGQK[~scored.found.query_mask_BGQ] == -1)


def test_covering_both_interests_is_worth_more_than_one_and_a_stranger(model):
    coverage_BG = model([READER, DRIVER], LISTS).rewards["coverage"]
    assert coverage_BG[0, 0] > 0.9
    assert coverage_BG[0, 0] > coverage_BG[0, 1] + 0.2


def test_unknown_words_earn_structure_only(model):
    rewards = model([READER, DRIVER], LISTS).rewards
    assert {name: float(rewards[name][1, 2]) for name in REWARDS} == {
        "align": 0.0, "coverage": 0.0, "specificity": 0.0, "diversity": 0.0, "structure": 1.0,
    }  # fmt: skip


def test_articles_seen_or_not_yet_published_are_not_retrieved(model):
    rows = model([DRIVER], [[valid("electric car", "battery factory")]]).found.article_rows_BGQK
    assert 6 not in rows
    assert {7, 8} <= set(rows.ravel().tolist())
    early = example_of(2, "electric car", timestamp=7)
    assert set(model([early], [[valid("electric car", "battery factory")]]).found.article_rows_BGQK.ravel()) <= {
        *range(8),
        -1,
    }


def test_scores_are_cosines_of_the_articles_found(model):
    scored = model([READER], [[valid("rowing regatta", "florida storm")]])
    query_QE = model.embedder.embed_documents(["rowing regatta", "florida storm"])
    articles_IE = model.embedder.embed_documents(ARTICLES)
    for place in range(2):
        expected = articles_IE[scored.found.article_rows_BGQK[0, 0, place]] @ query_QE[place]
        np.testing.assert_allclose(scored.found.article_scores_BGQK[0, 0, place], expected, atol=1e-6)


def test_each_text_is_embedded_once(model):
    model.precompute([READER, DRIVER])
    model([READER, DRIVER], LISTS)
    model([READER, DRIVER], LISTS)
    signals, first, second = model.embedder.asked
    assert len(signals) == len(set(signals)) == 7
    assert len(first) == len(set(first)) == len({query for row in LISTS for parsed in row for query in parsed.queries})
    assert first == second


def test_permuted_completions_and_users_give_permuted_rewards(model):
    before = model([READER, DRIVER], LISTS)
    after = model([DRIVER, READER], [LISTS[1][::-1], LISTS[0][::-1]])
    np.testing.assert_allclose(after.total_BG, before.total_BG[::-1, ::-1], atol=1e-6)


def test_only_invalid_lists(model):
    scored = model([READER], [[INVALID, INVALID]])
    assert scored.total_BG.tolist() == [[0, 0]]
    assert not scored.found.query_mask_BGQ.any()


def test_a_user_without_usable_signals_is_a_judge_failure(model):
    scored = model([example_of(3, "zxqv", "blorp")], [[valid("electric car", "rowing crew"), INVALID]])
    assert np.isnan(scored.rewards["coverage"][0, 0])
    assert np.isnan(scored.total_BG[0, 0])
    assert scored.total_BG[0, 1] == 0
    assert scored.rewards["align"][0, 0] > 0


def test_summary_leaves_judge_failures_out(model):
    scored = Scored(
        {"coverage": np.array([[0.2, 0.4, np.nan], [0.5, 0.5, 0.5], [np.nan] * 3], np.float32)},
        np.full((3, 3), np.nan, np.float32),
        found=None,
    )
    summary = summarise(scored.by_name)
    assert summary["reward/coverage/mean"] == pytest.approx(0.42)
    assert summary["reward/coverage/spread"] == pytest.approx(0.05)
    assert summary["reward/coverage/constant"] == pytest.approx(0.5)
    assert np.isnan(summary["reward/total/mean"])


def test_weights_come_from_the_config(model):
    weights = dataclasses.replace(CONFIG.reward, coverage=3.0, diversity=0.0)
    model.config = dataclasses.replace(CONFIG, reward=weights)
    scored = model([READER, DRIVER], LISTS)
    expected = sum(getattr(weights, name) * reward_BG for name, reward_BG in scored.rewards.items())
    np.testing.assert_allclose(scored.total_BG, expected, atol=1e-5)


def test_a_judge_stands_in_for_similarity_and_term_statistics(model):
    asked = []

    def judge(lists, criteria):
        asked.extend(criterion.question for criterion in criteria[0])
        yes_NC = np.full((len(lists), max(map(len, criteria))), 0.25)
        yes_NC[[queries == ("hurricane florida", "electric car") for queries in lists], 0] = np.nan
        return yes_NC

    plain, judged = (scorer([READER, DRIVER], LISTS) for scorer in (model, model_of(model.embedder, judge)))
    assert sorted(asked[:2]) == [
        "Does the list contain a query about: crew cambridge regatta?",
        "Does the list contain a query about: florida storm?",
    ]
    np.testing.assert_array_equal(judged.rewards["coverage"], np.float32([[0.25, np.nan, 0], [0.25] * 3]))
    np.testing.assert_array_equal(judged.rewards["specificity"], np.float32([[0.25, 0.25, 0], [0.25] * 3]))
    for name in ("align", "diversity", "structure"):
        np.testing.assert_array_equal(judged.rewards[name], plain.rewards[name])
    np.testing.assert_array_equal(np.isnan(judged.total_BG), [[False, True, False], [False] * 3])
    weighted = sum(getattr(CONFIG.reward, name) * reward_BG for name, reward_BG in judged.rewards.items())
    np.testing.assert_allclose(judged.total_BG, weighted, atol=1e-6)
    assert summarise(judged.by_name)["reward/failed"] == pytest.approx(1 / 6)
    assert not np.isnan(summarise(judged.by_name)["reward/coverage/mean"])


def test_the_questions_of_a_user_are_made_once_and_follow_the_rubric(model):
    rubric, questions = model.rubric(READER), model.text_rubric(READER)
    assert questions is model.text_rubric(READER)
    assert [set(members) for members in rubric.members] == [{2, 3}, {0, 1}]
    assert [criterion.weight for criterion in questions.coverage] == [4.0, 4.0, 0.5 * 8.0]
    texts = [signal.text for signal in READER.signals]
    assert [criterion.signals for criterion in questions.coverage] == [tuple(texts[2:]), tuple(texts[:2]), ()]
    assert model.text_rubric(example_of(7, "zxqv", "blorp")).coverage == ()
