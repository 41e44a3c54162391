"""The RoBERTa that cleans: what it learns from words and from the texts before, and that it comes back from disk."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxnr.config import CleaningConfig, MeshConfig
from jaxnr.data.classifier import Labelled, Shown, TfidfCleaner, measure, split_by_user
from jaxnr.data.roberta_cleaner import load_cleaner, train_roberta, training_order
from jaxnr.errors import InputError
from jaxnr.mesh import make_mesh
from jaxnr.models.huggingface import save

pytestmark = pytest.mark.xdist_group("roberta_cleaner")  # trained once

CONFIG = CleaningConfig(
    vocabulary_size=400, hidden_size=16, layers=1, heads=2, epochs=12, batch=32, max_tokens=20, context_texts=2
)
SUBJECTS = (
    ("oil price", "crude barrel", "opec output"),
    ("chess final", "grandmaster draw", "opening gambit"),
    ("opera season", "tenor recital", "aria evening"),
    ("rowing cup", "regatta crew", "oar blades"),
)


def labelled(users=60, events=16):
    """Users search for one subject each. Noise is spam, told by its words, or a subject of others, told by the texts
    before alone: every subject is as often noise as any other."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(users):
        own, before = user % len(SUBJECTS), ()
        for time in range(events):
            kind = rng.choice(["own", "spam", "errand"], p=[0.6, 0.2, 0.2]) if time > 1 else "own"
            subject = (own + rng.integers(1, len(SUBJECTS))) % len(SUBJECTS) if kind == "errand" else own
            text = "win free prize" if kind == "spam" else str(rng.choice(SUBJECTS[subject]))
            rows.append((f"u{user}", time, Shown("search", text, before), kind != "own"))
            before = (str(rng.choice(SUBJECTS[own])), *before)[:2]
    owners, times, shown, noise = zip(*rows, strict=True)
    return Labelled(list(owners), np.array(times), list(shown), np.array(noise))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    parts = split_by_user(labelled(), 0, np.inf)
    folder = tmp_path_factory.mktemp("classifier")
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=1), jax.devices()[:2])
    return train_roberta(parts["train"], parts["valid"], CONFIG, folder / "tokenizer", mesh, 0), parts, folder


def test_it_learns_what_words_tell_and_what_only_the_texts_before_do(trained):
    roberta, parts, _ = trained
    assert measure(roberta, parts["test"])["all"]["auc"] > 0.97
    assert measure(TfidfCleaner(parts["train"], parts["valid"]), parts["test"])["all"]["auc"] < 0.85
    subject, others = SUBJECTS[0], SUBJECTS[1]
    own, errand, spam, first = roberta.probabilities(
        [
            Shown("search", subject[0], subject[1:]),
            Shown("search", subject[0], others[1:]),
            Shown("search", "win free prize", subject[1:]),
            Shown("search", subject[0], ()),
        ]
    )
    assert own < 0.2
    assert min(errand, spam) > 0.8
    assert own <= first < errand


def test_other_events_beside_one_and_texts_beyond_the_context_change_nothing(trained):
    roberta, parts, _ = trained
    shown = parts["test"].shown
    together = roberta.logits(shown)
    np.testing.assert_allclose([roberta.logits([event])[0] for event in shown[:5]], together[:5], atol=1e-5)
    roberta._readings = {}  # nothing read before
    longer = [event._replace(before=(*event.before, "win free prize")) for event in shown if len(event.before) == 2]
    expected = [logit for event, logit in zip(shown, together, strict=True) if len(event.before) == 2]
    np.testing.assert_allclose(roberta.logits(longer), expected, atol=1e-5)
    assert roberta.logits([]).shape == (0,)


def test_training_sees_every_event_once_and_neighbours_of_a_user_together():
    users = [f"u{user}" for user in range(5) for _ in range(40)]
    first, second = (training_order(users, np.random.default_rng(seed)) for seed in (0, 1))
    assert sorted(first) == sorted(second) == list(range(200))
    assert first.tolist() != second.tolist()
    assert np.mean(np.diff(first) == 1) > 0.85


def test_a_saved_cleaner_says_the_same_on_another_mesh(trained):
    roberta, parts, folder = trained
    shown = parts["test"].shown
    roberta.save(folder / "saved")
    again = load_cleaner(str(folder / "saved"), CONFIG, make_mesh(MeshConfig(), jax.devices()[:1]))
    np.testing.assert_allclose(again.probabilities(shown), roberta.probabilities(shown), atol=1e-5)
    assert again.calibration == roberta.calibration
    with pytest.raises(InputError, match=r"its labels are keep, drop; expected some, not all"):
        load_cleaner(str(folder / "saved"), dataclasses.replace(CONFIG, keep_labels=("yes",)), make_mesh(MeshConfig()))
    (folder / "saved" / "comparison.safetensors").write_bytes(b"not one")
    with pytest.raises(InputError, match=r"comparison\.safetensors: not the comparison"):
        load_cleaner(str(folder / "saved"), CONFIG, make_mesh(MeshConfig()))
    (folder / "saved" / "cleaner.json").write_text('{"calibration": {}}')
    with pytest.raises(InputError, match=r"cleaner\.json: expected the calibration"):
        load_cleaner(str(folder / "saved"), CONFIG, make_mesh(MeshConfig()))


def test_a_classifier_from_elsewhere_judges_the_text_alone(trained):
    roberta, _, folder = trained
    save(folder / "elsewhere", *roberta.loaded)
    plain = load_cleaner(str(folder / "elsewhere"), CONFIG, make_mesh(MeshConfig(), jax.devices()[:1]))
    event = Shown("search", "oil price", ("win free prize",))
    assert plain.logits([event])[0] == plain.logits([event._replace(before=(), domain="web")])[0]
    assert plain.context == 0
