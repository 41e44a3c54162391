"""The lexicon: complete, and worded differently in each stream."""

from itertools import pairwise

from jaxnr.data.synthetic.lexicon import load_lexicon

LEXICON = load_lexicon()


def words(terms):
    return set(" ".join(terms).split())


def test_every_subject_has_words_for_every_stream():
    assert len(LEXICON.topics) == 24
    assert len(LEXICON.subjects) == 192
    assert len({subject.name for subject in LEXICON.subjects}) == 192
    for subject in LEXICON.subjects:
        assert subject.anchor
        assert (len(subject.search), len(subject.page), len(subject.news)) == (3, 2, 3)
        assert all(term == term.strip() != "" for term in (*subject.search, *subject.page, *subject.news))


def test_topic_of_subject_points_at_its_topic():
    topics = [LEXICON.topics[index] for index in LEXICON.topic_of_subject]
    assert topics == [subject.topic for subject in LEXICON.subjects]


def test_streams_name_a_subject_with_different_words():
    shared = [len(words(s.search) & words(s.news)) / len(words(s.search) | words(s.news)) for s in LEXICON.subjects]
    assert sum(shared) / len(shared) < 0.05


def test_subjects_are_told_apart_by_their_news_words():
    for first, second in pairwise(LEXICON.subjects):
        assert not set(first.news) & set(second.news)
