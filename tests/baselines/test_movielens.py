"""MovieLens-1M: the format, leave-one-out with ratings of one second, and the command on a small file of the format."""

import dataclasses
import json

import numpy as np
import pytest

from jaxnr.baselines import movielens
from jaxnr.baselines.movielens import leave_one_out, read_movielens, run_movielens
from jaxnr.config import BaselinesConfig, Config, ItemsConfig, SasrecConfig, flatten, save_config
from jaxnr.errors import InputError
from jaxnr.evaluation.metrics import evaluate_rankings

MOVIES = "1::Toy Story (1995)::Children's|Comedy\n2::Mis\xe9rables, Les (1995)::Drama\n9::City: Lost (1995)::Drama\n"
RATINGS = "1::9::5::978300760\n1::2::3::978300760\n2::1::4::978298413\n1::1::3::978300719\n2::9::4::978298412\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "movies.dat").write_bytes(MOVIES.encode("latin-1"))
    (tmp_path / "ratings.dat").write_text(RATINGS)
    return tmp_path


def test_files_are_read_in_their_format(folder):
    ratings = read_movielens(folder)
    assert ratings.movie_ids == ["1", "2", "9"]
    assert ratings.users.tolist() == [1, 1, 2, 1, 2]
    assert ratings.movie_rows.tolist() == [2, 1, 0, 0, 2]
    assert ratings.times[0] == 978300760


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "ratings.dat",
            "1::9::5::978300760\n1::9::5\n",
            r"ratings\.dat:2: '1::9::5'; expected the form UserID::MovieID",
        ),
        ("ratings.dat", "1::9::x::978300760\n", r"ratings\.dat:1: .* expected four whole numbers"),
        ("ratings.dat", "1::7::5::978300760\n", r"ratings\.dat:1: movie 7 is not in movies\.dat"),
        ("ratings.dat", "", r"ratings\.dat: is empty"),
        ("movies.dat", "1::Toy Story\n", r"movies\.dat:1: .* expected the form MovieID::Title::Genres"),
        ("movies.dat", "x::Toy Story::Comedy\n", r"movies\.dat:1: the movie id is 'x'"),
        ("movies.dat", "1::A::B\n1::A::B\n", r"movies\.dat: a movie id stands there twice"),
    ],
)
def test_what_is_not_in_the_format_is_named_with_its_line(folder, name, content, says):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=says):
        read_movielens(folder)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"movies\.dat: cannot read"):
        read_movielens(tmp_path)


def test_the_last_rating_is_asked_for_and_those_of_one_second_keep_their_order(folder):
    clicks, examples, catalogue = leave_one_out(read_movielens(folder), "stable")
    (example,) = examples  # user 2 has two ratings
    assert (example.user_id, example.seen, example.relevant) == ("1", ("1", "9"), ("2",))
    assert [history.rows.tolist() for history in clicks.train] == [[0, 2]]
    assert clicks.asked(example).rows.tolist() == [0, 2]
    assert catalogue.is_candidate_I(example).tolist() == [False, True, False]
    assert clicks.features.known_I.tolist() == [True, False, True]


def write_chains(folder, users=64, movies=12):
    """Everyone goes through the movies in one order, from another one on."""
    rng = np.random.default_rng(0)
    (folder / "movies.dat").write_text("".join(f"{movie}::M{movie}::Drama\n" for movie in range(1, movies + 1)))
    lines = []
    for user in range(1, users + 1):
        start = rng.integers(movies)
        lines += [f"{user}::{(start + i) % movies + 1}::4::{978300000 + 60 * i}\n" for i in range(7)]
    (folder / "ratings.dat").write_text("".join(rng.permutation(lines)))


def test_the_command_trains_and_ranks_all_movies(tmp_path):
    write_chains(tmp_path)
    sasrec = SasrecConfig(size=16, blocks=1, dropout=0.0, negatives=8, batch=64, epochs=60, learning_rate=1e-2)
    config = dataclasses.replace(Config(), baselines=BaselinesConfig(sasrec=sasrec))
    save_config(config, tmp_path / "out" / "config.toml")
    results = run_movielens("sasrec", tmp_path, tmp_path / "out", "stable")
    assert results["ndcg@10"] > 0.95  # by chance .4: one in six
    assert results["hr@10"] == 1.0
    assert results["published"] is None
    written = json.loads((tmp_path / "out" / "baselines" / "sasrec-movielens-stable.json").read_text())
    assert written == results
    assert written["users"] == 64
    assert written["settings"]["items.kind"] == "id"


def test_without_a_config_its_own_settings_count(tmp_path, monkeypatch):
    write_chains(tmp_path, users=16)
    assert movielens.SETTINGS.gru != Config().baselines.gru
    few = dataclasses.replace(movielens.SETTINGS.gru, size=8, epochs=1)
    monkeypatch.setattr(movielens, "SETTINGS", dataclasses.replace(movielens.SETTINGS, gru=few))
    settings = run_movielens("gru", tmp_path, tmp_path / "out", "stable")["settings"]
    assert settings == flatten(dataclasses.replace(few, items=ItemsConfig(kind="id")))


def test_baselines_that_read_texts_are_refused(tmp_path):
    with pytest.raises(InputError, match="nrhub reads texts"):
        run_movielens("nrhub", tmp_path, tmp_path, "stable")


def test_its_settings_are_those_of_the_published_figures():
    """The reference: d 50, 2 blocks, 1 head, length 200, dropout .2, 1e-3, 128 negatives, τ .05."""
    config = movielens.SETTINGS
    for settings in (config.sasrec, config.hstu):
        assert (settings.size, settings.blocks, settings.heads, settings.length) == (50, 2, 1, 200)
        assert (settings.dropout, settings.learning_rate) == (0.2, 1e-3)
        assert (settings.negatives, settings.temperature) == (128, 0.05)
    assert config.hstu.time_bias == "target"
    assert movielens.PUBLISHED["hstu", "stable"] == (0.3227, 0.1879)


def test_hit_rate_and_ndcg_of_one_relevant_movie():
    values = evaluate_rankings([["a", "b"], ["c"], []], [("b",), ("x",), ("y",)])
    assert values["recall@10"].tolist() == [1.0, 0.0, 0.0]
    np.testing.assert_allclose(values["ndcg@10"], [1 / np.log2(3), 0.0, 0.0])
