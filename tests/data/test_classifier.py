"""What classifiers of events read, that nothing leaks, how they are calibrated and measured; and TF-IDF."""

import numpy as np
import pytest

from jaxnr.data.classifier import Calibration, Labelled, Shown, TfidfCleaner, measure, shown_histories, split_by_user
from jaxnr.errors import InputError


def labelled(events=400, users=60):
    """Spam is told by its words alone; news is never noise."""
    rng = np.random.default_rng(0)
    noise = rng.random(events) < 0.3
    domains = np.where(noise | (rng.random(events) < 0.6), "search", "news")
    good, bad = ("oil price", "chess final", "opera season"), ("win free prize", "cheap pills now")
    texts = [str(rng.choice(bad if drop else good)) for drop in noise]
    shown = [Shown(str(domain), text, ("oil price",)) for domain, text in zip(domains, texts, strict=True)]
    owners = [f"u{number}" for number in rng.integers(0, users, events)]
    return Labelled(owners, np.arange(events), shown, noise)


def test_an_event_is_shown_with_the_users_earlier_texts_and_nothing_later():
    users, domains = ["a", "a", "b", "a", "a"], ["search", "web", "news", "search", "news"]
    texts = ["one", None, "other", "two", "three"]
    shown = shown_histories(users, domains, texts, {}, 2)
    assert [None if event is None else event.before for event in shown] == [(), None, (), ("one",), ("two", "one")]
    recent = {}
    parts = [shown_histories(users[i : i + 1], domains[i : i + 1], texts[i : i + 1], recent, 2)[0] for i in range(5)]
    assert parts == shown


def test_labels_are_split_by_user_and_only_test_users_show_later_ones():
    data = labelled()
    parts = split_by_user(data, seed=0, before=200)
    users = {name: set(part.users) for name, part in parts.items()}
    assert not (users["train"] & users["valid"] | users["train"] & users["test"] | users["valid"] & users["test"])
    assert max(parts["train"].times.max(), parts["valid"].times.max()) < 200 <= parts["test"].times.max()
    with pytest.raises(InputError, match=r"of the .* labelled events of train users 0 are to be dropped"):
        split_by_user(data._replace(noise=np.zeros(len(data.noise), bool)), 0, np.inf)


def test_platt_scaling_recovers_the_probabilities_and_the_threshold_has_the_largest_f1():
    rng = np.random.default_rng(0)
    true = rng.uniform(0.02, 0.98, 20_000)
    noise = rng.random(len(true)) < true
    logits = 3 * np.log(true / (1 - true)) - 2  # overconfident and shifted
    fitted = Calibration.fit(logits, noise)
    np.testing.assert_allclose(fitted.probabilities(logits), true, atol=0.03)

    def f1(threshold):
        dropped = fitted.probabilities(logits) >= threshold
        return 2 * (dropped & noise).sum() / (dropped.sum() + noise.sum())

    assert f1(fitted.threshold) >= max(f1(threshold) for threshold in np.linspace(0.05, 0.95, 91)) - 1e-12


def test_tfidf_learns_what_words_tell():
    parts = split_by_user(labelled(), 0, np.inf)
    figures = measure(TfidfCleaner(parts["train"], parts["valid"]), parts["test"])
    assert figures["all"]["auc"] > 0.99
    assert figures["all"]["f1"] > 0.95
    assert figures["news"]["auc"] is None
    assert figures["news"]["noise"] == 0
    assert figures["all"]["events"] == figures["news"]["events"] + figures["search"]["events"]
    assert figures["all"]["events"] == len(parts["test"].noise)
