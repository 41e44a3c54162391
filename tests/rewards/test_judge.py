"""From a judge's answers to rewards, and the judges that a config opens."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from tiny import random_params, tiny_decoder

from jaxnr.config import JudgeConfig, MeshConfig, SecondJudgeConfig
from jaxnr.errors import InputError
from jaxnr.mesh import make_mesh
from jaxnr.models.huggingface import save
from jaxnr.prompting.output import ParsedList
from jaxnr.prompting.tokenizer import train_tokenizer
from jaxnr.rewards.criteria import SPECIFICITY, Criterion, TextRubric, subject_of, text_rubric
from jaxnr.rewards.judge import judge_of, judged_rewards, open_judge
from jaxnr.rewards.judge_http import HttpJudge
from jaxnr.rewards.judge_word_overlap import word_overlap

INVALID = ParsedList((), "not_json")
READER = text_rubric(("storm florida", "rowing cup"), (9.0, 1.0))
DRIVER = text_rubric(("electric car",), (4.0,))


def valid(*queries: str) -> ParsedList:
    return ParsedList(queries, None)


class Answers:
    """Answers by a function of queries and question; remembers what it was asked."""

    def __init__(self, yes):
        self.yes, self.asked = yes, []

    def __call__(self, lists, criteria):
        yes_NC = np.full((len(lists), max(map(len, criteria), default=0)), np.nan)
        for row, (queries, asked) in enumerate(zip(lists, criteria, strict=True)):
            self.asked += [(queries, criterion.question) for criterion in asked]
            yes_NC[row, : len(asked)] = [self.yes(queries, criterion.question) for criterion in asked]
        return yes_NC


def test_the_rubric_asks_for_each_facet_and_for_nothing_else():
    assert [(criterion.question, criterion.weight) for criterion in READER.coverage] == [
        ("Does the list contain a query about: storm florida?", 9.0),
        ("Does the list contain a query about: rowing cup?", 1.0),
        ("Is every query about one of these: storm florida; rowing cup?", 5.0),
    ]
    assert [criterion.question for criterion in READER.specificity] == list(SPECIFICITY)
    assert text_rubric((), ()).coverage == ()


def test_a_facet_is_named_by_the_words_that_most_signals_share_the_latest_first():
    assert (
        subject_of(["florida storm damage", "coast florida", "storm florida warning"]) == "florida storm warning coast"
    )
    assert subject_of(["one two three four five"]) == "one two three four"
    assert subject_of([""]) == ""


def test_rewards_are_the_weighted_means_of_the_answers():
    yes = {"about: storm": 0.5, "about: rowing": 1.0, "one of these": 0.2, "concrete": 0.9, "heap": 0.3}

    def answer(queries, question):
        return next((value for words, value in yes.items() if words in question), 0.0)

    judge = Answers(answer)
    lists = [[valid("a", "b"), INVALID, valid("a", "b")], [valid("a", "b"), valid("c"), INVALID]]
    rewards = judged_rewards(judge, [READER, DRIVER], lists)
    assert rewards.keys() == {"coverage", "specificity"}
    reader = (9 * 0.5 + 1 * 1.0 + 5 * 0.2) / 15
    driver = (4 * 0.0 + 2 * 0.2) / 6
    np.testing.assert_allclose(rewards["coverage"], [[reader, 0, reader], [driver, driver, 0]], rtol=1e-6)
    np.testing.assert_allclose(rewards["specificity"], [[0.4, 0, 0.4], [0.4, 0.4, 0]], rtol=1e-6)
    assert len(judge.asked) == 6 + 5 + 5  # the reader's two equal lists are one


def test_one_failed_answer_fails_that_reward_of_that_list_alone():
    def answer(queries, question):
        return np.nan if queries == ("a",) and "rowing cup?" in question and "contain" in question else 1.0

    rewards = judged_rewards(Answers(answer), [READER, READER], [[valid("a"), valid("b")], [valid("b"), INVALID]])
    np.testing.assert_array_equal(rewards["coverage"], [[np.nan, 1], [1, 0]])
    np.testing.assert_array_equal(rewards["specificity"], [[1, 1], [1, 0]])


def test_a_user_without_facets_cannot_be_judged_on_coverage():
    rewards = judged_rewards(Answers(lambda *_: 1.0), [text_rubric((), ()), READER], [[valid("a")], [valid("a")]])
    np.testing.assert_array_equal(rewards["coverage"], [[np.nan], [1]])
    np.testing.assert_array_equal(rewards["specificity"], [[1], [1]])


def test_invalid_lists_alone_ask_nothing():
    judge = Answers(lambda *_: 1.0)
    rewards = judged_rewards(judge, [READER], [[INVALID, INVALID]])
    assert {name: values.tolist() for name, values in rewards.items()} == {
        "coverage": [[0, 0]],
        "specificity": [[0, 0]],
    }
    assert judge.asked == []


def test_word_overlap_answers_by_shares_of_words_and_leaves_other_questions_open():
    criteria = (
        Criterion("about?", 1.0, ("storm florida coast",)),
        Criterion("every?", 1.0, ("storm florida coast", "rowing"), of_every_query=True),
        Criterion("concrete?", 1.0),
    )
    yes_NC = word_overlap([("Storm in Florida", "rowing"), ("cars", "rowing")], [criteria, criteria])
    np.testing.assert_allclose(yes_NC, [[2 / 3, (2 / 3 + 1) / 2, np.nan], [0, 1 / 2, np.nan]], rtol=1e-6)


def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_the_built_in_judge_is_none_that_reads_and_word_overlap_needs_nothing(tmp_path):
    assert judge_of(JudgeConfig(), tmp_path, mesh()) is None
    assert open_judge(SecondJudgeConfig(), tmp_path, mesh()) is word_overlap


def test_a_language_model_is_opened_from_its_checkpoint_once_and_when_it_is_asked(tmp_path):
    config = JudgeConfig(kind="language_model", model=str(tmp_path / "model"), lists_per_step=2)
    judge = judge_of(config, tmp_path, mesh())
    assert judge is not None
    tokenizer = train_tokenizer(["storm over florida", "yes or no"] * 3, 300, tmp_path / "tokens")
    model = tiny_decoder(vocab_size=320)
    save(tmp_path / "model", model, random_params(model), tokenizer)
    first = judged_rewards(judge, [READER], [[valid("a")]])
    assert 0 < first["coverage"] < 1
    shutil.rmtree(tmp_path / "model")
    again = judged_rewards(judge, [READER], [[valid("a")]])
    assert again["coverage"] == first["coverage"]


def test_the_token_comes_from_the_environment_and_is_not_written(tmp_path, monkeypatch):
    config = JudgeConfig(kind="http", url="http://localhost/v1", model="some", token_variable="MY_TOKEN")
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(InputError, match="MY_TOKEN"):
        open_judge(config, tmp_path, mesh())
    monkeypatch.setenv("MY_TOKEN", " secret\n")
    judge = open_judge(config, tmp_path, mesh())
    assert isinstance(judge, HttpJudge)
    assert judge._token == "secret"
    assert judge._cache == tmp_path / "judge.sqlite"
    assert open_judge(dataclasses.replace(config, cache=""), tmp_path, mesh())._cache is None  # pyright: ignore
    assert not list(tmp_path.iterdir())


def test_rubrics_hold_their_parts_in_the_order_of_the_rewards():
    assert TextRubric._fields == ("coverage", "specificity")
