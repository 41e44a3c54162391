"""The cleaning rules: what they keep in any language, what they drop and why, and that they never look ahead."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnr.data.cleaning import MAX_CHARACTERS, MAX_WORDS, clean_histories, clean_text, refusal_reason

SHARED = Path(os.environ.get("JAXNR_SHARED_DATA", "../shared/data"))


@pytest.mark.parametrize(
    "text",
    [
        "oil price forecast",
        "eleições municipais em São Paulo",
        "AMANHÃ CHUVA",
        "ESPAÑA: más años",
        "новости экономики",
        "क्षेत्रीय समाचार",
        "ข่าวเศรษฐกิจไทย",
        "日本の経済",
        "أخبار اليوم",
        "node.js tutorial",
        "vue.js",
        "C++ vs C#",
        "R&D spending",
        "50%de desconto",
        "U.S. economy",
        "facebook earnings",
        "youtube bans ads",
        "covid-19",
        "G7",
    ],
)
def test_topics_pass_unchanged(text):
    assert clean_text(text) == text
    assert refusal_reason(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \t\n\u00a0\ufeff", "empty"),
        ("www.x.com", "navigation"),
        ("https://www.example.org/a?b=c", "navigation"),
        ("globo.com", "navigation"),
        ("bbc.co.uk/news", "navigation"),
        ("apple.com login", "navigation"),
        ("facebook login", "navigation"),
        ("Facebook", "navigation"),
        ("YouTube", "navigation"),
        ("gmail sign in", "navigation"),
        ("Sign in", "navigation"),
        ("New Tab", "navigation"),
        ("notÃ­cias de SÃ£o Paulo", "non_text"),
        ("the bankâ€™s plan", "non_text"),
        ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "non_text"),
        ("m\ufffdsica", "non_text"),
        ("news\x00\x07", "non_text"),
        ("2024 11 05", "non_text"),
        ("!!! ??? $ a", "non_text"),
        ("aaaaaaa", "non_text"),
        ("a a a a", "non_text"),
        ("q%3Dnews%20today", "non_text"),
        ("htt://exam ple", "non_text"),
        ("//www.foodtv.com/recipes.htm recipe", "non_text"),
        ("index.php?id=3", "non_text"),
        ("?where=here&what=", "non_text"),
    ],
)
def test_what_says_nothing_is_refused_with_its_reason(text, reason):
    assert clean_text(text) is None
    assert refusal_reason(text) == reason


def test_white_space_is_normalised():
    assert clean_text("  oil\u00a0 price\n\tfore\u200bcast ") == "oil price forecast"


def test_overlong_texts_are_cut_between_words():
    words = [f"word{i}" for i in range(30)]
    assert clean_text(" ".join(words)) == " ".join(words[:MAX_WORDS])
    long_words = [f"w{i}" + "o" * 20 for i in range(12)]
    cut = clean_text(" ".join(long_words))
    assert cut is not None
    assert len(cut) <= MAX_CHARACTERS
    assert cut.split() == long_words[: len(cut.split())]
    assert len(clean_text("日本の経済" * 100) or "") == MAX_CHARACTERS


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_a_clean_text_stays_as_it_is_or_goes(text):
    clean = clean_text(text)
    assert (clean is None) == (refusal_reason(text) is not None)
    if clean is not None:
        assert 0 < len(clean) <= MAX_CHARACTERS
        assert len(clean.split()) <= MAX_WORDS
        assert clean == " ".join(clean.split())


def test_repeats_go_within_a_user_and_domain_only():
    rows = [
        ("a", "search", "oil price", True),
        ("a", "search", "oil prices", False),
        ("a", "news", "Oil price", True),
        ("a", "search", "election poll", True),
        ("a", "search", "OIL PRICE", False),
        ("b", "search", "oil price", True),
        ("b", "search", "2023 election", True),
        ("b", "search", "2024 election", True),
    ]
    texts, report = clean_histories(*([row[i] for row in rows] for i in range(3)))
    assert [text is not None for text in texts] == [row[3] for row in rows]
    assert report.dropped == {"duplicate": 2}


def test_an_interest_that_comes_back_later_is_kept():
    texts = [
        "oil price",
        *(f"{topic} news" for topic in ("football", "chess", "weather", "tax law", "opera")),
        "oil price",
    ]
    kept, _ = clean_histories(["a"] * len(texts), ["search"] * len(texts), texts)
    assert kept == texts


HISTORY = st.lists(
    st.tuples(
        st.sampled_from(["search", "web"]),
        st.sampled_from(["oil price", "oil prices", "", "gmail", "chess", "x" * 3, "opera " * 20, "www.a.com"]),
    ),
    max_size=12,
)


@given(HISTORY, HISTORY)
def test_counts_add_up_and_nothing_depends_on_what_comes_later_or_on_other_users(first, second):
    rows = [("a", *row) for row in first] + [("b", *row) for row in second]
    kept, report = clean_histories(*([row[i] for row in rows] for i in range(3)))
    assert report.total == len(rows) == len(kept)
    assert report.kept == sum(text is not None for text in kept) == report.total - sum(report.dropped.values())
    assert report.cut == sum(text is not None and text.startswith("opera") for text in kept)
    for history, whole in ((first, kept[: len(first)]), (second, kept[len(first) :])):
        for cut in range(len(history) + 1):
            part, _ = clean_histories(
                ["c"] * cut, [domain for domain, _ in history[:cut]], [text for _, text in history[:cut]]
            )
            assert part == whole[:cut]


def test_real_queries_of_1997():
    path = SHARED / "excite_small" / "excite-small.log"
    if not path.exists():
        pytest.skip(f"needs the Excite queries at {path}")
    with path.open(encoding="utf-8", errors="replace") as lines:
        rows = sorted(tuple(line.rstrip("\n").split("\t")) for line in lines)
    users, _, queries = zip(*rows, strict=True)
    _, report = clean_histories(users, ["search"] * len(users), queries)
    assert report.total == 4501
    assert report.dropped["empty"] == 533
    assert 50 < report.dropped["navigation"] < 200
    assert report.dropped["non_text"] < 100
    assert report.kept > 1500
