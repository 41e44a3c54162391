"""Criteria of a query from term statistics."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxnr.errors import InputError
from jaxnr.rewards.specificity import TermStatistics, telling_words

TEXTS = [
    *["Markets rally as investors weigh inflation report"] * 20,
    *["Markets slip while investors wait"] * 20,
    "Hurricane nears Florida coast",
    "Florida rowing club wins regatta",
    "Electric car prices fall",
]
STATISTICS = TermStatistics.fit(TEXTS)


@given(
    st.text()
    | st.lists(st.sampled_from(["markets", "hurricane", "florida", "latest", "zxqv", "the"]), max_size=15).map(" ".join)
)
def test_criteria_are_in_0_1(query):
    assert all(0 <= criterion <= 1 for criterion in STATISTICS.criteria(query))


def mean(query: str) -> float:
    return sum(STATISTICS.criteria(query)) / 3


def test_rare_terms_are_rarer():
    assert 0 == STATISTICS.rarity("markets") < STATISTICS.rarity("inflation") < STATISTICS.rarity("hurricane") == 1
    assert STATISTICS.rarity("zxqv") == 0


@pytest.mark.parametrize(
    "query", ["latest news", "top stories today", "news", "the of and", "", "what is new this week"]
)
def test_generic_queries_score_low(query):
    content, rarity, _ = STATISTICS.criteria(query)
    assert content == rarity == 0
    assert mean(query) < 0.4 < mean("hurricane florida")


@pytest.mark.parametrize("query", ["hurricane florida", "hurricane", "electric car prices", "latest news"])
def test_invented_words_do_not_pay(query):
    for before, after in zip(STATISTICS.criteria(query), STATISTICS.criteria(f"{query} zxqv"), strict=True):
        assert after <= before
    assert STATISTICS.criteria("zxqv blorp") == (0, 0, 0)


def test_generic_words_do_not_raise_a_query():
    assert mean("latest hurricane florida news") <= mean("hurricane florida")


def test_heaps_and_repeats_are_out_of_focus():
    words = "hurricane nears florida coast rowing club wins regatta electric car prices fall".split()  # noqa: SIM905
    focus = [STATISTICS.criteria(" ".join(words[:count]))[2] for count in range(1, 13)]
    assert focus[0] == 0
    assert focus[1:7] == [1.0] * 6
    assert focus[7:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert STATISTICS.criteria("hurricane Hurricane florida")[2] == 0


def test_telling_words_are_the_rarest_and_none_of_the_template():
    template = [f"how to pick a {word} guide" for word in ("boat", "horse", "phone", "sofa", "tent", "lamp")]
    statistics = TermStatistics.fit([*template * 20, "regatta boat oars", "oars regatta"])
    assert telling_words("regatta guide: pick oars", statistics, 4) == "regatta oars"
    assert telling_words("regatta guide: pick oars", statistics, 1) in ("regatta", "oars")
    assert telling_words("how to pick a guide", statistics, 4) == "how to pick a guide"  # nothing rare: as it is
    assert telling_words("zxqv", statistics, 4) == "zxqv"


def test_saved_and_loaded(tmp_path):
    STATISTICS.save(tmp_path / "terms.json")
    loaded = TermStatistics.load(tmp_path / "terms.json")
    for query in ("hurricane florida coast", "markets rally", "zxqv"):
        assert loaded.criteria(query) == STATISTICS.criteria(query)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"texts": 3, "texts_with_term": {"a": "x"}}', '{"texts": 3'])
def test_not_statistics_is_an_input_error(tmp_path, content):
    path = tmp_path / "terms.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"terms\.json: not saved term statistics"):
        TermStatistics.load(path)


def test_statistics_without_content_terms_are_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no content terms"):
        TermStatistics.fit(["the news", "of today"])
    path = tmp_path / "terms.json"
    path.write_text(json.dumps({"texts": 3, "texts_with_term": {"the": 2}}))
    with pytest.raises(InputError, match="not saved term statistics"):
        TermStatistics.load(path)
