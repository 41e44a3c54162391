"""A RoBERTa that keeps or drops events (the paper's first stage), and TF-IDF with logistic regression beside it.

Both read the same: an event's text under the name of its stream, and the user's texts before it, the latest first.
Nothing later, so cleaning a log and then cutting it at a time gives what cutting first gives.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, precision_recall_curve, precision_recall_fscore_support, roc_auc_score
from transformers import PreTrainedTokenizerBase

from jaxnr.config import CleaningConfig, OptimizerConfig
from jaxnr.errors import InputError
from jaxnr.files import read_json, write_text
from jaxnr.mesh import batch_sharding, batch_ways, replicated, traced_on, tree_shardings
from jaxnr.models.encoder import Classifier, EncoderConfig, init_params
from jaxnr.models.huggingface import load, save
from jaxnr.prompting.tokenizer import train_pair_tokenizer
from jaxnr.retrieval.sentence_encoder import length_batches
from jaxnr.training.fresh import Parts, token_vectors
from jaxnr.training.steps import TrainState, create_state, make_optimizer

VALID_SHARE = TEST_SHARE = 0.15
"""Of the users, by a hash of their ids."""
SETTINGS_FILE = "cleaner.json"
Array = np.ndarray | jax.Array


class Shown(NamedTuple):
    """What a classifier reads of one event."""

    domain: str
    text: str
    before: tuple[str, ...]
    """The user's texts before it, the latest first."""

    @property
    def pair(self) -> tuple[str, str]:
        """The two texts of a RoBERTa pair."""
        return f"{self.domain}: {self.text}", "; ".join(self.before)


def shown_histories(
    users: Sequence, domains: Sequence[str], texts: Sequence[str | None], recent: dict, context: int
) -> list[Shown | None]:
    """What is read of each event that the rules left; None for the others. Users' events are given oldest first.

    ``recent`` holds each user's last ``context`` texts and is brought up to date.
    """
    shown: list[Shown | None] = []
    for user, domain, text in zip(users, domains, texts, strict=True):
        if text is None:
            shown.append(None)
            continue
        before = recent.setdefault(user, deque(maxlen=context))
        shown.append(Shown(domain, text, tuple(before)))
        before.appendleft(text)
    return shown


class Labelled(NamedTuple):
    """Labelled events; ``noise`` is true where one is to be dropped."""

    users: list[str]
    times: np.ndarray
    shown: list[Shown]
    noise: np.ndarray

    def where(self, mask: np.ndarray) -> Labelled:
        rows = np.flatnonzero(mask)
        users = [self.users[row] for row in rows]
        return Labelled(users, self.times[rows], [self.shown[row] for row in rows], self.noise[rows])


def part_of_user(user: str, seed: int) -> str:
    """train, valid or test: a user's labels are all in one of them, since the user's texts are read together."""
    place = int.from_bytes(hashlib.sha256(f"{seed}/{user}".encode()).digest()[:8]) / 2**64
    return "test" if place < TEST_SHARE else "valid" if place < TEST_SHARE + VALID_SHARE else "train"


def split_by_user(labelled: Labelled, seed: int, before: float) -> dict[str, Labelled]:
    """Labels of training and validation users up to ``before`` (UTC seconds), and all labels of test users.

    Raises InputError where one of them lacks a class.
    """
    parts = np.array([part_of_user(user, seed) for user in labelled.users], dtype=object)
    splits = {
        name: labelled.where((parts == name) & ((name == "test") | (labelled.times < before)))
        for name in ("train", "valid", "test")
    }
    for name, split in splits.items():
        dropped = int(split.noise.sum())
        if not 0 < dropped < len(split.noise):
            raise InputError(
                f"cleaning.labels: of the {len(split.noise)} labelled events of {name} users {dropped} are to be "
                "dropped; expected some to keep and some to drop (70, 15 and 15 % of the users are for train, valid "
                "and test)."
            )
    return splits


class Calibration(NamedTuple):
    """Platt scaling, P(noise) = sigmoid(slope · logit + intercept), and from which probability on events go."""

    slope: float = 1.0
    intercept: float = 0.0
    threshold: float = 0.5

    @classmethod
    def fit(cls, logits: np.ndarray, noise: np.ndarray) -> Calibration:
        """On validation events; the threshold has the largest F1 of noise."""
        platt = LogisticRegression(C=1e6).fit(logits[:, None], noise)
        fitted = cls(float(platt.coef_[0, 0]), float(platt.intercept_[0]))
        precision, recall, thresholds = precision_recall_curve(noise, fitted.probabilities(logits))
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
        return fitted._replace(threshold=float(thresholds[np.argmax(f1[:-1])]))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-np.clip(self.slope * np.asarray(logits, np.float64) + self.intercept, -60, 60)))


class RobertaCleaner:
    """P(noise) of events by a RoBERTa classifier: padded to few lengths, spread over the mesh, one program a length."""

    def __init__(
        self,
        model: Classifier,
        params: dict,
        tokenizer: PreTrainedTokenizerBase,
        mesh: Mesh,
        keep: Sequence[bool],
        context: int,
        max_tokens: int,
        calibration: Calibration | None = None,
        plain: bool = False,
    ):
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.context = context
        self.calibration = calibration or Calibration()
        self._plain = plain
        self._keep = np.array(keep)
        self._ways = batch_ways(mesh)
        self._max_tokens = min(max_tokens, model.config.max_tokens)
        self._score = make_scorer(model, params, self._keep, mesh)

    def logits(self, shown: Sequence[Shown]) -> np.ndarray:
        """Log-odds of noise [N], before calibration."""
        token_ids = encode(self.tokenizer, shown, self._max_tokens, self._plain)
        logits_N = np.zeros(len(shown))
        pending = []
        for length, rows in length_batches({row: len(ids) for row, ids in enumerate(token_ids)}, self._max_tokens):
            size = len(rows) + -len(rows) % max(self._ways, 8)
            batch = padded([token_ids[row] for row in rows], size, length, self.model.config.pad_token_id)
            pending.append((rows, self._score(self.params, *batch)))
        for rows, logits_B in pending:  # read back only now, so that the device is never waited for in between
            logits_N[rows] = np.asarray(logits_B)[: len(rows)]
        return logits_N

    def probabilities(self, shown: Sequence[Shown]) -> np.ndarray:
        """P(noise) [N]."""
        return self.calibration.probabilities(self.logits(shown))

    def save(self, folder: Path) -> None:
        """A Hugging Face checkpoint with the calibration beside it; what was there before is replaced."""
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, self.model, self.params, self.tokenizer)
        content = {
            "context_texts": self.context,
            "max_tokens": self._max_tokens,
            "calibration": self.calibration._asdict(),
        }
        write_text(folder / SETTINGS_FILE, json.dumps(content, indent=2))


def load_cleaner(name: str, config: CleaningConfig, mesh: Mesh) -> RobertaCleaner:
    """A RoBERTa classifier from a folder or the hub; one that was not trained here reads texts alone.

    Raises InputError where it is no classifier, or all of its labels mean to keep, or to drop.
    """
    loaded = load(name, mesh=mesh)
    if not isinstance(loaded.model, Classifier):
        raise InputError(f"{name}: expected a RobertaForSequenceClassification in cleaning.classifier.")
    keep = [label.lower() in config.keep_labels for label in loaded.model.labels]
    if all(keep) or not any(keep):
        raise InputError(
            f"{name}: its labels are {', '.join(loaded.model.labels)}; expected some, not all, in "
            f"cleaning.keep_labels ({', '.join(config.keep_labels)})."
        )
    path = Path(name) / SETTINGS_FILE
    if not path.is_file():
        return RobertaCleaner(
            loaded.model, loaded.params, loaded.tokenizer, mesh, keep, 0, config.max_tokens, plain=True
        )
    expected = "the calibration of a classifier that `jaxnr clean` trained"
    content = read_json(path, expected)
    try:
        calibration = Calibration(**{key: float(value) for key, value in content["calibration"].items()})
        context, max_tokens = int(content["context_texts"]), int(content["max_tokens"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: expected {expected} ({error!r}).") from error
    return RobertaCleaner(loaded.model, loaded.params, loaded.tokenizer, mesh, keep, context, max_tokens, calibration)


def encode(
    tokenizer: PreTrainedTokenizerBase, shown: Sequence[Shown], max_tokens: int, plain: bool = False
) -> list[list[int]]:
    """Token ids of pairs, half of the room for each text; ``plain``: of the event's text alone, without its stream."""
    if not shown:
        return []
    if plain:
        texts = [event.text for event in shown]
        return cast(list, tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"])
    room = max_tokens // 2
    first, second = (
        cast(list, tokenizer(list(texts), truncation=True, max_length=room)["input_ids"])
        for texts in zip(*(event.pair for event in shown), strict=True)
    )
    end = cast(int, tokenizer.sep_token_id)
    return [[*ids, end, *before[1:]] for ids, before in zip(first, second, strict=True)]


def padded(rows: Sequence[Sequence[int]], size: int, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens [size, length] and mask; rows beyond those given are padding."""
    tokens_BS = np.full((size, length), pad_id, np.int32)
    mask_BS = np.zeros((size, length), bool)
    for place, ids in enumerate(rows):
        tokens_BS[place, : len(ids)], mask_BS[place, : len(ids)] = ids, True
    mask_BS[len(rows) :, 0] = True
    return tokens_BS, mask_BS


def noise_logits(model: Classifier, params: dict, keep: np.ndarray, tokens_BS: Array, mask_BS: Array):
    """Log-odds [B] of all labels that mean to drop against all that mean to keep."""
    logits_BL = cast(jax.Array, model.apply({"params": params}, tokens_BS, mask_BS)).astype(jnp.float32)
    return jax.nn.logsumexp(logits_BL[:, ~keep], axis=1) - jax.nn.logsumexp(logits_BL[:, keep], axis=1)


def make_scorer(model: Classifier, params: dict, keep: np.ndarray, mesh: Mesh) -> Callable[..., jax.Array]:
    """The jitted ``score(params, tokens_BS, mask_BS) -> logits_B``."""
    spread = batch_sharding(mesh)

    def score(params: dict, tokens_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
        return noise_logits(model, params, keep, tokens_BS, mask_BS)

    return jax.jit(
        traced_on(mesh, score),
        in_shardings=(tree_shardings(params, mesh), spread, spread),
        out_shardings=replicated(mesh),
    )


class Batch(NamedTuple):
    """Right-padded events with their labels; those of weight 0 are padding."""

    tokens_BS: Array
    mask_BS: Array
    noise_B: Array
    weight_B: Array


def make_step(model: Classifier, optimizer: optax.GradientTransformation, state: TrainState, mesh: Mesh) -> Callable:
    """``step(state, batch) -> (state, loss)`` on the mean cross-entropy; the state is donated."""
    keep = np.array([True, False])

    def loss_fn(params: dict, batch: Batch) -> jax.Array:
        logits_B = noise_logits(model, params, keep, batch.tokens_BS, batch.mask_BS)
        losses_B = optax.sigmoid_binary_cross_entropy(logits_B, batch.noise_B)
        return jnp.sum(losses_B * batch.weight_B) / jnp.sum(batch.weight_B)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_fn)(state.params, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(state.step + 1, cast(dict, optax.apply_updates(state.params, updates)), opt_state), loss

    shardings = tree_shardings(state, mesh)
    return jax.jit(
        traced_on(mesh, step),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def training_batches(
    token_ids: Sequence[Sequence[int]],
    noise: np.ndarray,
    size: int,
    max_tokens: int,
    pad_id: int,
    rng: np.random.Generator,
) -> Iterator[Batch]:
    """One epoch in an order of its own, events of like length together."""
    buckets: dict[int, list[int]] = {}
    for row in rng.permutation(len(token_ids)):
        length = min(-(-len(token_ids[row]) // 16) * 16, max_tokens)
        buckets.setdefault(length, []).append(row)
    batches = [(length, rows[i : i + size]) for length, rows in buckets.items() for i in range(0, len(rows), size)]
    for place in rng.permutation(len(batches)):
        length, rows = batches[place]
        tokens_BS, mask_BS = padded([token_ids[row] for row in rows], size, length, pad_id)
        fill = size - len(rows)
        labels_B = np.pad(noise[rows].astype(np.float32), (0, fill))
        yield Batch(tokens_BS, mask_BS, labels_B, np.pad(np.ones(len(rows), np.float32), (0, fill)))


def with_strangers(train: Labelled, share: float, rng: np.random.Generator) -> tuple[list[Shown], np.ndarray]:
    """The events with this share of those to keep turned into noise: each has the text of another event of its stream.

    What has nothing to do with the texts before it is what tells an errand from an interest, and labels alone show too
    few of them to learn to compare. Streams without noise in the labels stay as they are.
    """
    shown, noise = list(train.shown), train.noise.copy()
    domains = np.array([event.domain for event in shown])
    for domain in np.unique(domains[noise]):
        kept = np.flatnonzero((domains == domain) & ~train.noise)
        turned = kept[rng.random(len(kept)) < share]
        for row, other in zip(turned, rng.choice(kept, len(turned)), strict=True):
            shown[row] = shown[row]._replace(text=train.shown[other].text)
        noise[turned] = True
    return shown, noise


def train_roberta(
    train: Labelled, valid: Labelled, config: CleaningConfig, folder: Path, mesh: Mesh, seed: int
) -> RobertaCleaner:
    """A small RoBERTa from scratch on the labels of ``train``, calibrated on ``valid``; its tokenizer in ``folder``."""
    corpus = [text for event in train.shown for text in event.pair]
    tokenizer = train_pair_tokenizer(corpus, config.vocabulary_size, folder)
    shape = EncoderConfig(
        model_type="roberta",
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=2 * config.hidden_size,
        max_position_embeddings=config.max_tokens + 2,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_act="gelu",
        initializer_range=config.hidden_size**-0.5,
        pad_token_id=1,
    )
    model = Classifier(shape, ("keep", "drop"))
    size = -(-config.batch // batch_ways(mesh)) * batch_ways(mesh)

    def epoch(number: int) -> Iterator[Batch]:
        rng = np.random.default_rng([seed, number])
        shown, noise = with_strangers(train, config.strangers if config.context_texts else 0.0, rng)
        token_ids = encode(tokenizer, shown, config.max_tokens)
        yield from training_batches(token_ids, noise, size, config.max_tokens, shape.pad_token_id, rng)

    steps = config.epochs * (len(train.noise) // size)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=config.learning_rate, warmup_steps=steps // 10), steps)
    texts = [text for event in train.shown for text in (event.text, " ".join((event.text, *event.before)))]
    state = create_state(reading_params(model, tokenizer, texts, seed), optimizer, mesh)
    step = make_step(model, optimizer, state, mesh)
    for number in range(config.epochs):
        for batch in epoch(number):
            state, _ = step(state, batch)
    cleaner = RobertaCleaner(
        model, state.params, tokenizer, mesh, (True, False), config.context_texts, config.max_tokens
    )
    cleaner.calibration = Calibration.fit(cleaner.logits(valid.shown), valid.noise)
    return cleaner


def reading_params(model: Classifier, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], seed: int) -> dict:
    """Fresh parameters of a model that looks for like words from the first step on.

    Words begin near those with which they occur (``training.fresh.token_vectors``), and the queries and keys of the
    first layer as the identity, so that a word attends to itself and its like, in the texts before too. Both would
    take a small model more labels to find than there are.
    """
    params = init_params(model, jax.random.key(seed))
    D = model.config.hidden_size
    nothing = np.zeros(0, int)
    vectors_VD = token_vectors(tokenizer, texts, Parts(np.arange(D // 2), np.arange(D // 2, D), nothing, nothing), seed)
    layers = params["encoder"]["layers"]
    matching = {
        name: {**layers[name], "kernel": layers[name]["kernel"].at[0].set(jnp.eye(D))} for name in ("query", "key")
    }
    words = {"embedding": jnp.asarray(vectors_VD / np.linalg.norm(vectors_VD, axis=1, keepdims=True))}
    return params | {"encoder": params["encoder"] | {"word_embeddings": words, "layers": layers | matching}}


class TfidfCleaner:
    """TF-IDF of words, word pairs and the stream, and of the words before, under logistic regression."""

    def __init__(self, train: Labelled, valid: Labelled):
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
        before = TfidfVectorizer(sublinear_tf=True, token_pattern=r"[^\s;]+")
        columns = zip(*(event.pair for event in train.shown), strict=True)
        # Nothing is known before the event where that is not read.
        self._vectorizers = [
            vectorizer.fit(texts) if any(texts) else None
            for vectorizer, texts in zip((words, before), columns, strict=True)
        ]
        features = self._features(train.shown)
        fitted = {C: LogisticRegression(C=C, max_iter=1000).fit(features, train.noise) for C in (1.0, 10.0, 100.0)}
        scores = {
            C: roc_auc_score(valid.noise, model.decision_function(self._features(valid.shown)))
            for C, model in fitted.items()
        }
        self._model = fitted[max(scores, key=lambda C: scores[C])]
        self.calibration = Calibration.fit(self.logits(valid.shown), valid.noise)

    def logits(self, shown: Sequence[Shown]) -> np.ndarray:
        return self._model.decision_function(self._features(shown))

    def probabilities(self, shown: Sequence[Shown]) -> np.ndarray:
        """P(noise) [N]."""
        return self.calibration.probabilities(self.logits(shown))

    def _features(self, shown: Sequence[Shown]) -> csr_matrix:
        columns = zip(*(event.pair for event in shown), strict=True)
        parts = [
            vectorizer.transform(texts)
            for vectorizer, texts in zip(self._vectorizers, columns, strict=True)
            if vectorizer is not None
        ]
        return csr_matrix(hstack(parts))


def measure(cleaner: RobertaCleaner | TfidfCleaner, test: Labelled) -> dict:
    """Precision, recall and F1 of what is dropped, AUC and Brier score: of all test events and by domain.

    AUC is None where a domain has one class alone.
    """
    probability = cleaner.probabilities(test.shown)
    domains = np.array([event.domain for event in test.shown])
    groups = {"all": np.ones(len(domains), bool)} | {name: domains == name for name in np.unique(domains)}
    return {
        "threshold": cleaner.calibration.threshold,
        **{
            str(name): _figures(test.noise[rows], probability[rows], cleaner.calibration.threshold)
            for name, rows in groups.items()
        },
    }


def _figures(noise: np.ndarray, probability: np.ndarray, threshold: float) -> dict:
    precision, recall, f1, _ = precision_recall_fscore_support(
        noise, probability >= threshold, average="binary", zero_division=cast(Any, 0.0)
    )
    return {
        "events": len(noise),
        "noise": int(noise.sum()),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "auc": float(roc_auc_score(noise, probability)) if 0 < noise.sum() < len(noise) else None,
        "brier": float(brier_score_loss(noise, probability)),
    }
