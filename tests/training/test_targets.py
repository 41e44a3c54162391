"""What the warm start imitates: lists of the user's own signals, in a fixed format and budget, drawn by seed."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_decoder

from jaxnr.config import MeshConfig, PromptConfig
from jaxnr.data.examples import Example, Signal
from jaxnr.mesh import make_mesh
from jaxnr.prompting.output import parse_list
from jaxnr.prompting.tokenizer import train_tokenizer
from jaxnr.rewards.specificity import TermStatistics
from jaxnr.training.rollout import make_policy
from jaxnr.training.targets import (
    STOP,
    WHOLE,
    Target,
    in_random_words,
    place_targets,
    queries_from,
    warm_start_batches,
    warm_start_target,
)

TEXTS = [
    "hurricane florida coast", "rowing cup final", "electric car prices", "opera season opening",
    "chess world championship", "mortgage interest rates", "volcano island eruption", "wheat harvest drought",
]  # fmt: skip
TITLES = ["storm damages coastal towns", "crews race on the river", "battery makers cut costs"]
CFG = PromptConfig(
    signal_words=0, max_prompt_tokens=160, prompt_buckets=(160,), max_new_tokens=48, min_queries=2, max_queries=4
)
STATISTICS = TermStatistics.fit(TEXTS + TITLES)


def example_of(example_id=0, texts=TEXTS) -> Example:
    signals = tuple(Signal(time, "search", text, None) for time, text in enumerate(texts))
    return Example(example_id, f"u{example_id}", 100, signals, (), ())


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    tokenizer = train_tokenizer([*TEXTS, *TITLES, CFG.instructions], 600, tmp_path_factory.mktemp("tokenizer"))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return make_policy(tiny_decoder(vocab_size=len(tokenizer)), tokenizer, CFG, mesh, STATISTICS)


@given(
    st.lists(st.text("ab C", min_size=1).filter(str.strip), max_size=8),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_queries_are_distinct_short_and_as_many_as_wanted(texts, wanted, words):
    queries = queries_from(texts, dataclasses.replace(CFG, max_query_words=words), wanted)
    different = {" ".join(text.split()[:words]).casefold() for text in texts}
    assert len(queries) == len({query.casefold() for query in queries}) == min(wanted, len(different))
    assert all(1 <= len(query.split(" ")) <= words for query in queries)
    assert list(queries) == [q for q in dict.fromkeys(" ".join(t.split()[:words]) for t in texts) if q in queries]


LATEST_FIRST = TEXTS[::-1]


@settings(max_examples=30)
@given(st.integers(0, 2**31 - 1))
def test_lists_are_the_users_latest_signals(seed):
    target = warm_start_target(example_of(), CFG, 3, STATISTICS, np.random.default_rng(seed))
    assert len(target.lists) == 3
    for queries in target.lists:
        assert CFG.min_queries <= len(queries) <= CFG.max_queries
        assert list(queries) == LATEST_FIRST[: len(queries)]


def test_most_lists_are_short_and_some_go_on_to_the_end_of_the_prompt():
    roomy = dataclasses.replace(CFG, max_queries=len(TEXTS))
    lists = warm_start_target(example_of(), roomy, 2000, STATISTICS, np.random.default_rng(0)).lists
    share = np.bincount([len(queries) for queries in lists], minlength=len(TEXTS) + 1) / len(lists)
    assert (share[: CFG.min_queries] == 0).all()
    assert share[CFG.min_queries] == pytest.approx((1 - WHOLE) * STOP, abs=0.04)
    assert share[len(TEXTS)] == pytest.approx(WHOLE + (1 - WHOLE) * (1 - STOP) ** 6, abs=0.03)


def test_a_user_with_few_signals_gets_them_all():
    target = warm_start_target(example_of(texts=TEXTS[:2]), CFG, 4, STATISTICS, np.random.default_rng(0))
    assert set(target.lists) == {(TEXTS[1], TEXTS[0])}


def read_back(policy, batch):
    tokens_BGT, mask_BGT = jax.device_get((batch.completion_BGT, batch.mask_BGT))
    return [
        [policy.tokenizer.decode(row[mask][:-1]) for row, mask in zip(rows, masks, strict=True)]
        for rows, masks in zip(tokens_BGT, mask_BGT, strict=True)
    ]


def test_placed_lists_read_back_and_end_with_the_end_token(policy):
    lists = (("rowing cup final", "volcano island eruption"), ("electric car prices", "wheat harvest drought"))
    batch = place_targets(policy, [Target(example_of(0), lists), Target(example_of(1), lists[::-1])])
    assert batch.completion_BGT.shape == batch.mask_BGT.shape == (2, 2, CFG.max_new_tokens)
    assert batch.prompt_BS.shape == (2, 160)
    for texts, wanted in zip(read_back(policy, batch), (lists, lists[::-1]), strict=True):
        assert tuple(parse_list(text, CFG).queries for text in texts) == wanted
    tokens, mask = np.asarray(batch.completion_BGT), np.asarray(batch.mask_BGT)
    last = np.take_along_axis(tokens, mask.sum(-1)[..., None] - 1, axis=-1)
    assert (last == policy.tokenizer.eos_token_id).all()
    assert (tokens[~mask] == policy.tokenizer.pad_token_id).all()


def test_a_list_over_the_budget_loses_its_last_queries_and_still_ends(policy):
    batch = place_targets(policy, [Target(example_of(), (tuple(TEXTS),))])
    ((text,),) = read_back(policy, batch)
    fitting = parse_list(text, dataclasses.replace(CFG, max_queries=99)).queries
    assert 2 <= len(fitting) < len(TEXTS)
    assert fitting == tuple(TEXTS[: len(fitting)])
    ids = np.asarray(batch.completion_BGT)[np.asarray(batch.mask_BGT)]
    assert ids[-1] == policy.tokenizer.eos_token_id


@pytest.mark.parametrize("reading_steps", [0, 10])
def test_targets_depend_on_seed_step_and_example_alone(policy, reading_steps):
    examples = [example_of(0), example_of(1), example_of(2)]
    batch = warm_start_batches(policy, 4, 5, TEXTS, reading_steps, reading_steps)(examples, 7)
    turned = warm_start_batches(policy, 4, 5, TEXTS, reading_steps, reading_steps)(examples[::-1], 7)
    for name in ("prompt_BS", "prompt_mask_BS", "completion_BGT", "mask_BGT"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(turned, name)[::-1])


def test_another_seed_step_example_or_place_in_the_group_is_another_draw(policy):
    examples = [example_of(number) for number in range(12)]
    batch = warm_start_batches(policy, 4, 5, TEXTS, reading_steps=0, random_reading_steps=0)(examples, 7)
    others = [
        warm_start_batches(policy, 4, 5, TEXTS, reading_steps=0, random_reading_steps=0)(examples, 8),
        warm_start_batches(policy, 4, 6, TEXTS, reading_steps=0, random_reading_steps=0)(examples, 7),
    ]
    assert all((other.completion_BGT != batch.completion_BGT).any() for other in others)
    rows = np.asarray(batch.completion_BGT)
    assert (rows[0] != rows[1]).any()
    assert (rows[:, 0] != rows[:, 1]).any()


def test_half_of_the_prompts_are_of_random_words_and_at_first_all_lists_are_whole(policy):
    words = [f"{sound}{ending}" for sound in ("ba", "do", "fi", "lu") for ending in "kmnprst"]
    # The tokenizer spells these words out, so whole lists of them take more tokens.
    policy = dataclasses.replace(policy, prompt=dataclasses.replace(CFG, max_new_tokens=150))
    make_batch = warm_start_batches(policy, 1, seed=0, words=words, reading_steps=3, random_reading_steps=4)
    examples = [example_of(number, TEXTS[:4]) for number in range(40)]
    whole = tuple(TEXTS[3::-1])

    def lists(step: int) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        queries = [parse_list(text, CFG).queries for (text,) in read_back(policy, make_batch(examples, step))]
        assert all(queries)
        own = [row[: CFG.min_queries] == whole[: CFG.min_queries] for row in queries]
        return list(itertools.compress(queries, own)), list(itertools.compress(queries, np.logical_not(own)))

    first, between, later = lists(2), lists(3), lists(4)
    for own, scrambled in (first, between, later):
        assert 10 < len(own) < 30
        assert {word for queries in scrambled for query in queries for word in query.split()} <= set(words)
    assert set(first[0]) == {whole}
    assert all(queries == whole[: len(queries)] for queries in later[0])

    def short(rows: list[tuple[str, ...]]) -> float:
        return float(np.mean([len(queries) == CFG.min_queries for queries in rows]))

    # Of random lines that begin or end alike only one is shown, which shortens few whole lists to the least.
    for rows in (first[1], between[1]):
        assert short(rows) < 0.2
    for rows in (between[0], *later):
        assert 0.5 < short(rows) < 1


@given(st.integers(0, 2**31 - 1))
def test_random_words_keep_number_and_length_of_the_signals(seed):
    example = example_of()
    other = in_random_words(example, ["ocean", "glacier", "rain"], np.random.default_rng(seed))
    assert [len(signal.text.split()) for signal in other.signals] == [len(text.split()) for text in TEXTS]
    assert other._replace(signals=()) == example._replace(signals=())
    assert [signal._replace(text="") for signal in other.signals] == [s._replace(text="") for s in example.signals]
    assert {word for signal in other.signals for word in signal.text.split()} <= {"ocean", "glacier", "rain"}
