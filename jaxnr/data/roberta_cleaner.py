"""A RoBERTa that keeps or drops events (the paper's first stage).

One from elsewhere reads a text alone. One that is trained here also compares it with the user's texts before it: what
has nothing to do with what its user does otherwise is a one-off errand, which no word in it tells from an interest.
Every text is read once, whatever number of events it stands before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from jaxnr.config import CleaningConfig, OptimizerConfig
from jaxnr.data.classifier import Calibration, Labelled, Shown
from jaxnr.data.schema import DOMAINS
from jaxnr.errors import InputError
from jaxnr.files import read_json, write_text
from jaxnr.mesh import batch_sharding, batch_ways, replicated, traced_on, tree_shardings
from jaxnr.models.encoder import Classifier, EncoderConfig, init_params, mean_pool
from jaxnr.models.huggingface import Loaded, load, save
from jaxnr.prompting.tokenizer import train_roberta_tokenizer
from jaxnr.retrieval.sentence_encoder import length_batches
from jaxnr.training.fresh import Parts, token_vectors
from jaxnr.training.steps import TrainState, create_state, make_optimizer

SETTINGS_FILE, COMPARISON_FILE = "cleaner.json", "comparison.safetensors"
_EVENTS_A_COMPARISON = 1024
_REMEMBERED = 2**16
"""Texts whose reading is kept from call to call: in a log, those before an event were events themselves."""
_BLOCK = 16
"""Events of one user in a row that are trained on together, since they have texts before them in common."""
_LEAST_TEXTS = 128
PAD = 1
"""Number of the padding token in RoBERTa's vocabulary, and so in that of a small one."""
Array = np.ndarray | jax.Array


class Comparison(nn.Module):
    """Log-odds of noise from those of the text alone and from how like the user's texts before it are.

    Likeness is the cosine of projected mean word embeddings. That of the likest text counts, softened so that all of
    them learn, and the mean: a text unlike many is a stranger, one unlike few may be the first of an interest.
    """

    hidden_size: int = 32

    @nn.compact
    def __call__(
        self, alone_B: jax.Array, vectors_BD: jax.Array, before_BKD: jax.Array, known_BK: jax.Array, domain_B: jax.Array
    ) -> jax.Array:
        """``known_BK`` is false where there is no text; ``domain_B`` counts ``DOMAINS``."""
        # Which directions count is learned, beginning with all of them alike.
        project = nn.Dense(vectors_BD.shape[-1], use_bias=False, kernel_init=_identity)
        sharpness = jnp.exp(self.param("log_sharpness", nn.initializers.constant(np.log(8.0)), ()))
        cosine_BK = jnp.einsum("BD,BKD->BK", _unit(project(vectors_BD)), _unit(project(before_BKD)))
        count_B = known_BK.sum(axis=1)
        # Not -inf where nothing is known: its gradient is not a number, also where the value is not used.
        likest_B = jax.nn.logsumexp(jnp.where(known_BK, sharpness * cosine_BK, -1e9), axis=1) / sharpness
        mean_B = jnp.sum(cosine_BK, axis=1, where=known_BK) / jnp.maximum(count_B, 1)
        likeness_BF = jnp.stack([alone_B, jnp.where(count_B > 0, likest_B, 0.0), mean_B, jnp.log1p(count_B)], axis=1)
        features_BF = jnp.concatenate([likeness_BF, jax.nn.one_hot(domain_B, len(DOMAINS))], axis=1)
        inner_BH = nn.gelu(nn.Dense(self.hidden_size)(features_BF))
        # Nothing is added at first: what words alone tell is learned from the first step on.
        return alone_B + nn.Dense(1, kernel_init=nn.initializers.zeros)(inner_BH)[:, 0]


def fresh_comparison(vector_size: int, seed: int) -> dict:
    """Parameters of a ``Comparison`` that says what the text alone does."""
    one, vector = jnp.zeros(1), jnp.zeros((1, vector_size))
    arguments = one, vector, vector[:, None], jnp.ones((1, 1), bool), jnp.zeros(1, int)
    return cast(dict, Comparison().init(jax.random.key(seed), *arguments)["params"])


def noise_logits(model: Classifier, params: dict, keep: np.ndarray, tokens_NS: Array, mask_NS: Array) -> jax.Array:
    """Log-odds [N] of all labels that mean to drop against all that mean to keep."""
    logits_NL = cast(jax.Array, model.apply({"params": params}, tokens_NS, mask_NS)).astype(jnp.float32)
    return jax.nn.logsumexp(logits_NL[:, ~keep], axis=1) - jax.nn.logsumexp(logits_NL[:, keep], axis=1)


def text_vectors(params: dict, tokens_NS: Array, mask_NS: Array) -> jax.Array:
    """Mean word embeddings [N, D] of texts.

    Not their last hidden states: those of a small model that is trained on labels alone do not learn to be compared.
    """
    return mean_pool(params["encoder"]["word_embeddings"]["embedding"][tokens_NS], jnp.asarray(mask_NS))


def _identity(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    return jnp.eye(*shape, dtype=dtype)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


class Compared(NamedTuple):
    """How a classifier compares."""

    params: dict
    """Of a ``Comparison``."""
    context: int
    """Texts before an event, at most."""


class RobertaCleaner:
    """P(noise) of events: texts padded to few lengths, spread over the mesh, one program a length.

    ``loaded`` is a ``Classifier``; ``keep`` says which of its labels mean to keep. Without ``compared``, texts are
    judged alone.
    """

    def __init__(
        self,
        loaded: Loaded,
        mesh: Mesh,
        keep: Sequence[bool],
        max_tokens: int,
        compared: Compared | None = None,
        calibration: Calibration | None = None,
    ):
        self.loaded, self.compared = loaded, compared
        self.calibration = calibration or Calibration()
        model = cast(Classifier, loaded.model)
        self._shape = model.config
        self._ways = batch_ways(mesh)
        self._max_tokens = min(max_tokens, model.config.max_tokens)
        self._read = make_reader(model, loaded.params, np.array(keep), mesh, compared is not None)
        self._compare = jax.jit(lambda params, *known: Comparison().apply({"params": params}, *known))
        self._readings: dict[str, np.ndarray] = {}

    @property
    def context(self) -> int:
        """Texts before an event that are read, at most."""
        return self.compared.context if self.compared else 0

    def logits(self, shown: Sequence[Shown]) -> np.ndarray:
        """Log-odds of noise [N], before calibration."""
        wanted = dict.fromkeys(text for event in shown for text in (event.text, *event.before[: self.context]))
        readings = self._readings_of(list(wanted))
        if self.compared is None:
            return np.array([readings[event.text][0] for event in shown])
        parts = [shown[i : i + _EVENTS_A_COMPARISON] for i in range(0, len(shown), _EVENTS_A_COMPARISON)]
        return np.concatenate([np.zeros(0), *(self._compare_all(self.compared, part, readings) for part in parts)])

    def probabilities(self, shown: Sequence[Shown]) -> np.ndarray:
        """P(noise) [N]."""
        return self.calibration.probabilities(self.logits(shown))

    def _readings_of(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Of every text its log-odds alone, followed by its vector."""
        readings = {text: self._readings[text] for text in texts if text in self._readings}
        new = [text for text in texts if text not in readings]
        token_ids = token_ids_of(self.loaded.tokenizer, new, self._max_tokens)
        pending = []
        for length, rows in length_batches({row: len(ids) for row, ids in enumerate(token_ids)}, self._max_tokens):
            size = len(rows) + -len(rows) % max(self._ways, 8)
            batch = padded([token_ids[row] for row in rows], size, length, self._shape.pad_token_id)
            pending.append((rows, self._read(self.loaded.params, *batch)))
        for rows, (logits_N, vectors_ND) in pending:  # read back only now: the device is not waited for in between
            found = np.concatenate([np.asarray(logits_N)[:, None], np.asarray(vectors_ND)], axis=1)
            readings |= {new[row]: reading.copy() for row, reading in zip(rows, found, strict=False)}
        self._readings = dict(list({**self._readings, **readings}.items())[-_REMEMBERED:])
        return readings

    def _compare_all(self, compared: Compared, shown: Sequence[Shown], readings: dict[str, np.ndarray]) -> np.ndarray:
        size, K, D = _EVENTS_A_COMPARISON, compared.context, self._shape.hidden_size
        own, before_BKD = np.zeros((size, 1 + D), np.float32), np.zeros((size, K, D), np.float32)
        known_BK, domain_B = np.zeros((size, K), bool), np.zeros(size, np.int32)
        for row, event in enumerate(shown):
            own[row], domain_B[row] = readings[event.text], DOMAINS.index(event.domain)
            for place, text in enumerate(event.before[:K]):
                before_BKD[row, place], known_BK[row, place] = readings[text][1:], True
        logits_B = self._compare(compared.params, own[:, 0], own[:, 1:], before_BKD, known_BK, domain_B)
        return np.asarray(logits_B, np.float64)[: len(shown)]

    def save(self, folder: Path) -> None:
        """A Hugging Face checkpoint with the comparison and the calibration beside it; what was there is replaced."""
        shutil.rmtree(folder, ignore_errors=True)
        save(folder, *self.loaded)
        if self.compared is None:
            return
        arrays = flatten_dict(jax.tree.map(np.asarray, self.compared.params), sep="/")
        save_file(cast(dict, arrays), folder / COMPARISON_FILE)
        calibration = self.calibration._asdict()
        content = {"context_texts": self.context, "max_tokens": self._max_tokens, "calibration": calibration}
        write_text(folder / SETTINGS_FILE, json.dumps(content, indent=2))


def load_cleaner(name: str, config: CleaningConfig, mesh: Mesh) -> RobertaCleaner:
    """A RoBERTa classifier from a folder or the hub; one that was not trained here judges texts alone.

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
        return RobertaCleaner(loaded, mesh, keep, config.max_tokens)
    expected = "the calibration of a classifier that `jaxnr clean` trained"
    content = read_json(path, expected)
    try:
        calibration = Calibration(**{key: float(value) for key, value in content["calibration"].items()})
        context, max_tokens = int(content["context_texts"]), int(content["max_tokens"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: expected {expected} ({error!r}).") from error
    comparison = _load_comparison(path.with_name(COMPARISON_FILE), loaded.model.config.hidden_size)
    return RobertaCleaner(loaded, mesh, keep, max_tokens, Compared(comparison, context), calibration)


def _load_comparison(path: Path, vector_size: int) -> dict:
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not the comparison of a classifier that `jaxnr clean` trained: {error}") from error
    expected = flatten_dict(jax.tree.map(jnp.shape, fresh_comparison(vector_size, 0)), sep="/")
    if (found := {key: array.shape for key, array in arrays.items()}) != expected:
        raise InputError(f"{path}: holds {found}; expected {expected}.")
    return cast(dict, unflatten_dict(arrays, sep="/"))


def token_ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int) -> list[list[int]]:
    """With the special tokens; longer texts are cut."""
    return cast(list, tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]) if texts else []


def padded(rows: Sequence[Sequence[int]], size: int, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens [size, length] and mask; rows beyond those given are padding."""
    tokens_NS = np.full((size, length), pad_id, np.int32)
    mask_NS = np.zeros((size, length), bool)
    for place, ids in enumerate(rows):
        tokens_NS[place, : len(ids)], mask_NS[place, : len(ids)] = ids, True
    mask_NS[len(rows) :, 0] = True
    return tokens_NS, mask_NS


def make_reader(
    model: Classifier, params: dict, keep: np.ndarray, mesh: Mesh, compared: bool
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted ``read(params, tokens_NS, mask_NS) -> (log-odds alone [N], vectors [N, D])``, D 0 if not compared."""
    spread = batch_sharding(mesh)

    def read(params: dict, tokens_NS: jax.Array, mask_NS: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_N = noise_logits(model, params, keep, tokens_NS, mask_NS)
        return logits_N, text_vectors(params, tokens_NS, mask_NS) if compared else jnp.zeros((len(logits_N), 0))

    return jax.jit(
        traced_on(mesh, read),
        in_shardings=(tree_shardings(params, mesh), spread, spread),
        out_shardings=replicated(mesh),
    )


class Batch(NamedTuple):
    """B events and the N different texts in them, right-padded. Events of weight 0 are padding."""

    tokens_NS: Array
    mask_NS: Array
    text_B: Array
    """Which of the texts an event has, and which stand before it in ``before_BK``."""
    before_BK: Array
    known_BK: Array
    domain_B: Array
    noise_B: Array
    weight_B: Array


def make_step(model: Classifier, optimizer: optax.GradientTransformation, state: TrainState, mesh: Mesh) -> Callable:
    """``step(state, batch) -> (state, loss)`` on the mean cross-entropy; the state is donated."""
    keep = np.array([True, False])

    def loss_fn(params: dict, batch: Batch) -> jax.Array:
        alone_N = noise_logits(model, params["roberta"], keep, batch.tokens_NS, batch.mask_NS)
        vectors_ND = text_vectors(params["roberta"], batch.tokens_NS, batch.mask_NS)
        own = alone_N[batch.text_B], vectors_ND[batch.text_B]
        before = vectors_ND[batch.before_BK], batch.known_BK
        logits_B = Comparison().apply({"params": params["comparison"]}, *own, *before, batch.domain_B)
        losses_B = optax.sigmoid_binary_cross_entropy(cast(jax.Array, logits_B), batch.noise_B)
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


def training_order(users: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """Every event once, in blocks of up to ``_BLOCK`` of one user in a row, cut elsewhere every time and shuffled."""
    of_user: dict[str, list[int]] = {}
    for row, user in enumerate(users):
        of_user.setdefault(user, []).append(row)
    blocks = [
        block
        for rows in of_user.values()
        for block in np.split(rows, np.arange(rng.integers(1, _BLOCK + 1), len(rows), _BLOCK))
    ]
    return np.concatenate([blocks[place] for place in rng.permutation(len(blocks))])


def to_batch(
    events: Sequence[Shown], noise: np.ndarray, token_ids: dict[str, list[int]], size: int, context: int, ways: int
) -> Batch:
    """Up to ``size`` events; their texts are padded to one of few numbers and lengths, each a program."""
    texts = list(dict.fromkeys(text for event in events for text in (event.text, *event.before)))
    number = {text: place for place, text in enumerate(texts)}
    rows = [token_ids[text] for text in texts]
    N = max(_LEAST_TEXTS, 1 << (len(rows) - 1).bit_length())
    S = _rounded(max(map(len, rows)))
    before_BK, known_BK = np.zeros((size, context), np.int32), np.zeros((size, context), bool)
    for row, event in enumerate(events):
        known_BK[row, : len(event.before)] = True
        before_BK[row, : len(event.before)] = [number[text] for text in event.before]

    def filled(values: Any, kind: type) -> np.ndarray:
        return np.pad(np.asarray(values, kind), (0, size - len(values)))

    return Batch(
        *padded(rows, N + -N % ways, S, pad_id=PAD),
        filled([number[event.text] for event in events], np.int32),
        before_BK,
        known_BK,
        filled([DOMAINS.index(event.domain) for event in events], np.int32),
        filled(noise, np.float32),
        filled(np.ones(len(events)), np.float32),
    )


def _rounded(length: int) -> int:
    """Up, to one of few lengths."""
    return -(-length // 16) * 16


def train_roberta(
    train: Labelled, valid: Labelled, config: CleaningConfig, folder: Path, mesh: Mesh, seed: int
) -> RobertaCleaner:
    """A small RoBERTa from scratch on the labels of ``train``, calibrated on ``valid``; its tokenizer in ``folder``."""
    tokenizer = train_roberta_tokenizer([event.text for event in train.shown], config.vocabulary_size, folder)
    shape = EncoderConfig(
        model_type="roberta",
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=2 * config.hidden_size,
        max_position_embeddings=_rounded(config.max_tokens) + PAD + 1,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_act="gelu",
        initializer_range=config.hidden_size**-0.5,
        pad_token_id=PAD,
    )
    model = Classifier(shape, ("keep", "drop"))
    texts = list(dict.fromkeys(text for event in train.shown for text in (event.text, *event.before)))
    token_ids = dict(zip(texts, token_ids_of(tokenizer, texts, config.max_tokens), strict=True))
    ways = batch_ways(mesh)
    size = -(-config.batch // ways) * ways
    steps = config.epochs * -(-len(train.noise) // size)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=config.learning_rate, warmup_steps=steps // 10), steps)
    params = {
        "roberta": fresh_params(model, tokenizer, train.shown, seed),
        "comparison": fresh_comparison(config.hidden_size, seed),
    }
    state = create_state(params, optimizer, mesh)
    step = make_step(model, optimizer, state, mesh)
    for epoch in range(config.epochs):
        order = training_order(train.users, np.random.default_rng([seed, epoch]))
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            events = [train.shown[row] for row in rows]
            state, _ = step(state, to_batch(events, train.noise[rows], token_ids, size, config.context_texts, ways))
    trained = Loaded(model, state.params["roberta"], tokenizer)
    compared = Compared(state.params["comparison"], config.context_texts)
    cleaner = RobertaCleaner(trained, mesh, (True, False), config.max_tokens, compared)
    cleaner.calibration = Calibration.fit(cleaner.logits(valid.shown), valid.noise)
    return cleaner


def fresh_params(model: Classifier, tokenizer: PreTrainedTokenizerBase, shown: Sequence[Shown], seed: int) -> dict:
    """Parameters of a model whose words begin near those that the same users write (``training.fresh``), the rarer the
    longer, so that mean word embeddings can be compared from the first step on; from elsewhere it seldom gets there.
    """
    params = init_params(model, jax.random.key(seed))
    D, nothing = model.config.hidden_size, np.zeros(0, int)
    texts = [" ".join((event.text, *event.before)) for event in shown]
    vectors_VD = token_vectors(tokenizer, texts, Parts(np.arange(D), nothing, nothing, nothing), seed)
    vectors_VD *= inverse_document_frequency(tokenizer, [event.text for event in shown])[:, None]
    words = {"embedding": jnp.asarray(vectors_VD / np.linalg.norm(vectors_VD, axis=1).mean())}
    return params | {"encoder": params["encoder"] | {"word_embeddings": words}}


def inverse_document_frequency(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> np.ndarray:
    """log(texts / texts with it) [V] of every token; 0 of those that are in no text."""
    token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    count_V = np.bincount([token for ids in token_ids for token in set(ids)], minlength=len(tokenizer))
    return np.where(count_V > 0, np.log(len(texts) / np.maximum(count_V, 1)), 0.0)
