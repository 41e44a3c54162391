"""Judges and embedders that raise cost the lists that they raise for, and stop the run when they are down."""

import dataclasses
import json

import numpy as np
import pytest
from test_reward_model import ARTICLES, CONFIG, DRIVER, INVALID, LISTS, READER, model_of, valid

from jaxnr.errors import InputError
from jaxnr.retrieval.embedder import TfidfSvdEmbedder
from jaxnr.rewards.composite import summarise
from jaxnr.rewards.criteria import text_rubric
from jaxnr.rewards.failures import FIRST_ALONE, PatientEmbedder, PatientJudge

QUESTIONS = [("is it?", "and this?"), ("is it?",), ("is it?", "and this?")]


class Refuses:
    """Answers with the share of a list's queries that are short; raises for the lists that have a word."""

    def __init__(self, word, error=None):
        self.word, self.error, self.calls = word, error or RuntimeError("no"), []

    def __call__(self, lists, criteria):
        self.calls.append(len(lists))
        if any(self.word in query for queries in lists for query in queries):
            raise self.error
        yes_NC = np.full((len(lists), max(map(len, criteria))), np.nan)
        for row, (queries, asked) in enumerate(zip(lists, criteria, strict=True)):
            yes_NC[row, : len(asked)] = np.mean([len(query) < 4 for query in queries])
        return yes_NC


class RefusingEmbedder(TfidfSvdEmbedder):
    """Raises, or gives NaN, for texts with a word."""

    word, nan = "", False

    def embed_queries(self, texts):
        known_NE = self.embed_documents(texts)
        refused = np.array([bool(self.word) and self.word in text for text in texts])
        if self.nan:
            return np.where(refused[:, None], np.nan, known_NE)
        if refused.any():
            raise RuntimeError("no")
        return known_NE


@pytest.fixture
def embedder():
    return RefusingEmbedder.fit(ARTICLES, 6, seed=0)


def test_what_a_judge_raises_costs_the_lists_that_it_raises_for(caplog):
    judge = Refuses("bad")
    patient = PatientJudge(judge)
    found_NC = patient([["a"], ["bad"], ["abcd"]], QUESTIONS)
    np.testing.assert_array_equal(found_NC, [[1, 1], [np.nan, np.nan], [0, 0]])
    assert judge.calls == [3, 1, 1, 1]
    assert patient.last_error is judge.error
    assert "The judge failed on 1 of 3 lists" in caplog.text
    judge.calls.clear()
    np.testing.assert_array_equal(patient([["a"], ["b"], ["abcd"]], QUESTIONS), [[1, 1], [1, np.nan], [0, 0]])
    assert judge.calls == [3]


def test_a_judge_that_is_down_is_not_asked_about_every_list():
    judge = Refuses("")
    found_NC = PatientJudge(judge)([["a"]] * 50, [("is it?",)] * 50)
    assert np.isnan(found_NC).all()
    assert judge.calls == [50] + [1] * FIRST_ALONE


@pytest.mark.parametrize("answer", [np.inf, -np.inf, np.nan])
def test_answers_that_are_not_finite_are_none(answer):
    found_NC = PatientJudge(lambda lists, criteria: np.full((1, 1), answer))([["a"]], [("is it?",)])
    assert np.isnan(found_NC).all()


def test_answers_of_another_shape_are_a_failure():
    patient = PatientJudge(lambda lists, criteria: np.zeros(len(lists)))
    assert np.isnan(patient([["a"]], [("is it?",)])).all()
    assert "(1,)" in str(patient.last_error)


@pytest.mark.parametrize("error", [InputError("wrong"), KeyboardInterrupt()])
def test_mistakes_of_the_user_and_interrupts_are_not_swallowed(error):
    with pytest.raises(type(error)):
        PatientJudge(Refuses("a", error))([["a"]], [("is it?",)])


def test_only_the_lists_of_a_failing_judge_lose_their_total(embedder):
    plain = model_of(embedder, Refuses("nothing"))([READER, DRIVER], LISTS)
    scored = model_of(embedder, Refuses("factory"))([READER, DRIVER], LISTS)
    lost_BG = np.array([[False] * 3, [True, False, False]])
    np.testing.assert_array_equal(np.isnan(scored.total_BG), lost_BG)
    np.testing.assert_array_equal(scored.total_BG[~lost_BG], plain.total_BG[~lost_BG])
    assert summarise(scored.by_name)["reward/failed"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    "judge", [Refuses(""), lambda lists, criteria: np.full((len(lists), max(map(len, criteria))), np.nan)]
)
def test_a_judge_that_always_fails_stops_the_run(embedder, judge):
    model = model_of(embedder, judge)
    assert np.isnan(model([READER, DRIVER], LISTS).total_BG).sum() == 5  # too few to tell
    with pytest.raises(InputError, match=r"failed on 10 of the last 10 lists.*`reward\.max_failed_share`"):
        model([READER, DRIVER], LISTS)


def test_the_limit_is_a_share_of_the_lists_that_could_have_a_total(embedder):
    lists = [valid("electric car", f"battery {word}") for word in ("prices", "plant", "factory")]
    model = model_of(embedder, Refuses("p"))  # fails on two of the three
    with pytest.raises(InputError, match="failed on 12 of the last 18 lists"):
        model([DRIVER], [lists * 6 + [INVALID] * 9])
    model.config = dataclasses.replace(CONFIG, reward=dataclasses.replace(CONFIG.reward, max_failed_share=0.7))
    assert np.isnan(model([DRIVER], [lists * 6 + [INVALID] * 9]).total_BG).sum() == 12


@pytest.mark.parametrize("nan", [False, True])
def test_a_query_that_the_embedder_fails_on_costs_its_lists(embedder, nan):
    plain = model_of(embedder)([READER, DRIVER], LISTS)
    model = model_of(embedder)
    model.precompute([READER, DRIVER])
    embedder.word, embedder.nan = "factory", nan
    scored = model([READER, DRIVER], LISTS)
    lost_BG = np.array([[False] * 3, [True, False, False]])
    for name in ("align", "coverage", "diversity"):
        np.testing.assert_array_equal(np.isnan(scored.rewards[name]), lost_BG)
    np.testing.assert_array_equal(np.isnan(scored.total_BG), lost_BG)
    np.testing.assert_allclose(scored.total_BG[~lost_BG], plain.total_BG[~lost_BG], rtol=1e-6)
    assert (scored.found.article_rows_BGQK[1, 0, 1] == -1).all()  # what is not embedded finds nothing
    assert (scored.found.article_rows_BGQK[1, 0, 0] >= 0).any()


def test_a_user_whose_signals_cannot_be_embedded_is_tried_again_next_time(embedder):
    model = model_of(embedder)
    embedder.word = "regatta"
    lists = [[valid("electric car")] * 2] * 2
    np.testing.assert_array_equal(np.isnan(model([READER, DRIVER], lists).total_BG), [[True] * 2, [False] * 2])
    embedder.word = ""
    assert not np.isnan(model([READER, DRIVER], lists).total_BG).any()


def test_an_embedder_that_is_down_stops_the_run(embedder):
    model = model_of(embedder)
    model.precompute([READER, DRIVER])
    embedder.embed_queries = None
    model([READER, DRIVER], LISTS)
    with pytest.raises(InputError, match=r"failed on 10 of the last 10 lists.*'NoneType' object is not callable"):
        model([READER, DRIVER], LISTS)


@pytest.fixture
def beside(monkeypatch):
    """A second process, which asks what is in the list that this gives, before this one's."""
    texts = []
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jaxnr.rewards.failures.union", lambda own: list(dict.fromkeys([*texts, *own])))
    return texts


def test_processes_that_hold_a_judge_together_ask_all_their_lists_and_each_takes_its_own(beside):
    (about, *rest), (concrete, *_) = text_rubric(("storm florida",), (4.0,), [("a storm", "florida")])
    judge = Refuses("bad")
    asked = []

    def note(lists, criteria):
        asked.append((lists, criteria))
        return judge(lists, criteria)

    beside += [json.dumps([["bad"], [about, *rest, concrete]]), json.dumps([["a"], [about]])]
    found_NC = PatientJudge(note, shared=True)([("abcd", "a"), ("a",)], [(about, concrete), (about,)])
    np.testing.assert_array_equal(found_NC, [[0.5, 0.5], [1, np.nan]])
    assert [len(lists) for lists, _ in asked] == [3, 1, 1, 1]  # the equal lists of both are asked about once
    assert asked[0][1][2] == [about, concrete]
    assert PatientJudge(note, shared=True)([], []).shape == (0, 0)
    assert len(asked) == 4 + 3  # one that has no lists asks those of the other
    alone_NC = PatientJudge(note)([("a",)], [(about,)])
    np.testing.assert_array_equal(alone_NC, [[1]])
    assert asked[-1][0] == [("a",)]


def test_processes_that_hold_an_embedder_together_embed_all_their_texts_and_each_takes_its_own(beside, embedder):
    calls = []

    def note(texts, embed=embedder.embed_queries):
        calls.append(list(texts))
        return embed(texts)

    expected_NE = embedder.embed_documents(["storm florida", "electric car"])
    embedder.embed_queries, embedder.word = note, "factory"
    beside += ["battery factory", "electric car"]
    patient = PatientEmbedder(embedder, shared=True)
    vectors_NE, failed_N = patient(["storm florida", "electric car"])
    assert calls == [[*beside, "storm florida"], ["battery factory"], ["electric car"], ["storm florida"]]
    np.testing.assert_allclose(vectors_NE, expected_NE, atol=1e-6)
    assert not failed_N.any()
    vectors_NE, failed_N = patient(["battery factory"])
    assert not vectors_NE.any()
    assert failed_N.all()
    calls.clear()
    vectors_NE, failed_N = patient([])
    assert (vectors_NE.shape, failed_N.shape) == ((0, embedder.size), (0,))
    assert calls[0] == beside
