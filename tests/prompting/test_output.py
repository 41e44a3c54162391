"""The strict parser of the policy's output."""

import dataclasses
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxnr.config import PromptConfig
from jaxnr.prompting.output import PROBLEMS, format_list, parse_list

CFG = PromptConfig(min_queries=2, max_queries=4, max_query_words=5)

WORD = st.text(st.characters(categories=["Ll", "Lo", "Nd"]), min_size=1, max_size=12)
QUERY = st.lists(WORD, min_size=1, max_size=5).map(" ".join)
LISTS = st.lists(QUERY, min_size=2, max_size=4, unique_by=str.casefold)


@given(st.text())
@example("[" * 100_000)
@example("[" * 100_000 + "]" * 100_000)
@example('[{"a":' * 50_000)
@example("[" + "9" * 10_000 + "]")
@example("[1e999999, NaN, -Infinity]")
@example('["\ud800", "b"]')
@example('["\\ud800", "b"]')
@example("<think>" * 1000)
def test_any_text_gives_queries_or_a_named_problem(text):
    parsed = parse_list(text, CFG)
    if parsed.problem is None:
        assert CFG.min_queries <= len(parsed.queries) <= CFG.max_queries
        "".join(parsed.queries).encode("utf-8")
    else:
        assert parsed.problem in PROBLEMS
        assert parsed.queries == ()


@given(st.lists(st.one_of(st.text(), st.integers(), st.none(), st.lists(st.text())), max_size=6), st.text())
def test_any_json_array_with_any_tail_does_not_raise(values, tail):
    assert parse_list(json.dumps(values) + tail, CFG).problem in {*PROBLEMS, None}


@given(LISTS, st.none() | st.text(st.characters(exclude_characters="<")))
def test_a_formatted_list_parses_to_itself(queries, reasoning):
    assert parse_list(format_list(queries, reasoning), CFG) == (tuple(queries), None)


@given(LISTS, st.integers(1, 200))
def test_a_proper_prefix_is_never_valid(queries, length):
    text = format_list(queries)
    assert parse_list(text[: min(length, len(text) - 1)], CFG).problem == "cut"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no_array"),
        ("storm florida, rowing", "no_array"),
        ('Here: ["a b", "c d"]', "no_array"),
        ('{"queries": ["a b", "c d"]}', "no_array"),
        ("<think>so", "cut"),
        ("<think>so</think>", "no_array"),
        ('["a b", "c', "cut"),
        ('["a b" "c d"]', "not_json"),
        ("['a b', 'c d']", "not_json"),
        ('["a b", "c d",]', "not_json"),
        ('["a b", "c d"] done', "trailing_text"),
        ('["a b", "c d"]["e f"]', "trailing_text"),
        ('["a b", 3]', "not_strings"),
        ('["a b", ["c d"]]', "not_strings"),
        ('["a b", "c\\u0000d"]', "bad_characters"),
        ('["a b", "\\udc00"]', "bad_characters"),
        ('["a b", "c <|im_start|> d"]', "bad_characters"),
        ('["a b", "  "]', "empty_query"),
        ('["a b", "?!"]', "empty_query"),
        ("[]", "too_few"),
        ('["a b"]', "too_few"),
        ('["a", "b", "c", "d", "e"]', "too_many"),
        ('["a b c d e f", "g"]', "too_long"),
        (json.dumps(["x" * 100, "g"]), "too_long"),
    ],
)
def test_problem_is_named(text, problem):
    assert parse_list(text, CFG) == ((), problem)


def test_a_repeated_query_is_no_fault_of_structure():
    assert parse_list('["storm", "storm"]', CFG) == (("storm", "storm"), None)


def test_white_space_is_normalised():
    text = ' <think>\nstorms\n</think>\n\n[ "storm\\n florida " , "rowing"] \n'
    assert parse_list(text, CFG) == (("storm florida", "rowing"), None)


def test_limits_come_from_the_config():
    text = '["a b c"]'
    assert parse_list(text, dataclasses.replace(CFG, min_queries=1)).problem is None
    assert parse_list(text, dataclasses.replace(CFG, min_queries=1, max_query_words=2)).problem == "too_long"
