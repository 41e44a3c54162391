"""BERT and RoBERTa encoders in Flax Linen (arXiv 1810.04805, 1907.11692): scanned post-norm blocks, absolute positions.

The two differ in how they count positions, and nowhere else. RoBERTa also comes with its classification head.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxnr.errors import InputError
from jaxnr.mesh import abstract_on, spread
from jaxnr.models.weights import Row, load_params, read_json

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}
"""By their names in config.json; "gelu" is the exact one, with erf."""


_PAD = {"bert": 0, "roberta": 1}
"""The kinds of encoder, and the pad_token_id of each where config.json does not give one (as in transformers)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of a BERT or RoBERTa encoder; the names are those of the Hugging Face config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str
    initializer_range: float
    pad_token_id: int

    @classmethod
    def read(cls, path: Path) -> EncoderConfig:
        """From a config.json. Raises InputError naming the key that is missing, or the kind of model it is instead."""
        content = read_json(path)
        kind = content.get("model_type")
        if kind not in _PAD:
            raise InputError(f"{path}: model_type {kind!r}; expected {' or '.join(map(repr, _PAD))}.")
        content = {"pad_token_id": _PAD[kind]} | content
        for name, supported in (("position_embedding_type", "absolute"), ("is_decoder", False)):
            if content.get(name, supported) != supported:
                raise InputError(f"{path}: {name} {content[name]!r}; expected {supported!r}.")
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if content.get(name) is None]
        if missing:
            raise InputError(f"{path}: expected the key {missing[0]} of a {kind} encoder.")
        if content["hidden_act"] not in ACTIVATIONS:
            raise InputError(f"{path}: hidden_act {content['hidden_act']!r}; expected one of {', '.join(ACTIVATIONS)}.")
        return cls(**{name: content[name] for name in names})

    def to_json(self) -> dict[str, Any]:
        """What config.json says of this shape."""
        return {**dataclasses.asdict(self), "position_embedding_type": "absolute"}

    @property
    def max_tokens(self) -> int:
        """The longest text: no token of a RoBERTa has a position up to and including the padding's."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.model_type == "roberta" else 0)


class Block(nn.Module):
    """One layer: self-attention and feed-forward, each added to its input and then normalised (post-norm)."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array, mask_BS: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        x_BSD = spread(x_BSD)
        B, S, D = x_BSD.shape
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.normal(c.initializer_range))
        norm = functools.partial(nn.LayerNorm, epsilon=c.layer_norm_eps, use_fast_variance=False)

        def heads(name: str) -> jax.Array:
            return dense(D, name=name)(x_BSD).reshape(B, S, c.num_attention_heads, -1)

        attended_BSNH = jax.nn.dot_product_attention(
            heads("query"), heads("key"), heads("value"), mask=mask_BS[:, None, None, :]
        )
        projected = dense(D, name="attention_output")(attended_BSNH.reshape(B, S, D))
        x_BSD = norm(name="attention_norm")(x_BSD + projected)
        inner_BSF = ACTIVATIONS[c.hidden_act](dense(c.intermediate_size, name="intermediate")(x_BSD))
        return norm(name="output_norm")(x_BSD + dense(D, name="output")(inner_BSF)), None


class Encoder(nn.Module):
    """BERT or RoBERTa without its pooler."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens_BS: jax.Array, mask_BS: jax.Array, segment_BS: jax.Array | None = None) -> jax.Array:
        """Hidden states [B, S, D] of right-padded texts (mask false on padding); those of padding mean nothing.

        ``segment_BS``: the token types; None for single texts, all of segment 0. Raises InputError for an S over
        ``config.max_tokens``.
        """
        c = self.config
        if tokens_BS.shape[1] > c.max_tokens:
            raise InputError(f"Texts of {tokens_BS.shape[1]} tokens: the encoder has positions for {c.max_tokens}.")
        embed = functools.partial(
            nn.Embed, features=c.hidden_size, embedding_init=nn.initializers.normal(c.initializer_range)
        )
        words_BSD = embed(c.vocab_size, name="word_embeddings")(tokens_BS)
        positions_BSD = embed(c.max_position_embeddings, name="position_embeddings")(positions(c, tokens_BS, mask_BS))
        segments_BSD = embed(c.type_vocab_size, name="token_type_embeddings")(
            jnp.zeros((1, 1), jnp.int32) if segment_BS is None else segment_BS
        )
        x_BSD = nn.LayerNorm(epsilon=c.layer_norm_eps, use_fast_variance=False, name="embeddings_norm")(
            words_BSD + positions_BSD + segments_BSD
        )
        layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=c.num_hidden_layers,
        )
        return layers(c, name="layers")(x_BSD, mask_BS)[0]


class Classifier(nn.Module):
    """RoBERTa with its classification head, one of ``labels`` a text. Its dropout, a thing of training, is left out."""

    config: EncoderConfig
    labels: tuple[str, ...]

    @nn.compact
    def __call__(self, tokens_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
        """Logits [B, labels] of right-padded texts (mask false on padding), from the state of their first token."""
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.normal(self.config.initializer_range))
        first_BD = Encoder(self.config, name="encoder")(tokens_BS, mask_BS)[:, 0]
        inner_BD = jnp.tanh(dense(self.config.hidden_size, name="classifier_dense")(first_BD))
        return dense(len(self.labels), name="classifier_out")(inner_BD)

    def to_json(self) -> dict[str, Any]:
        """What config.json says of this model."""
        names = {str(number): label for number, label in enumerate(self.labels)}
        numbers = {label: number for number, label in enumerate(self.labels)}
        kind = {"architectures": ["RobertaForSequenceClassification"], "id2label": names, "label2id": numbers}
        return self.config.to_json() | kind


def positions(config: EncoderConfig, tokens_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """Rows of the position embedding, [1, S] for BERT and [B, S] for RoBERTa.

    BERT counts places from 0. RoBERTa counts the tokens that are not padding, the first at pad_token_id + 1; padding is
    at pad_token_id, also where it is attended to.
    """
    if config.model_type == "bert":
        return jnp.arange(tokens_BS.shape[1])[None]
    real_BS = jnp.logical_and(mask_BS, tokens_BS != config.pad_token_id)
    return jnp.cumsum(real_BS, axis=1) * real_BS + config.pad_token_id


def init_params(model: Encoder | Classifier, key: jax.Array) -> dict:
    """Fresh parameters, as a plain nested dict."""
    return cast(dict, jax.jit(model.init)(key, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))["params"])


def mean_pool(hidden_BSD: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """Mean [B, D] of the hidden states of attended tokens; zero where there is none."""
    weight_BS1 = mask_BS[..., None].astype(hidden_BSD.dtype)
    return (hidden_BSD * weight_BS1).sum(axis=1) / jnp.maximum(weight_BS1.sum(axis=1), 1)


def _linear(name: str, path: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", f"{path}/kernel", transpose=True), Row(f"{name}.bias", f"{path}/bias")


def _norm(name: str, path: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", f"{path}/scale"), Row(f"{name}.bias", f"{path}/bias")


_LAYER = "encoder.layer.{layer}"
ENCODER_TABLE = (
    Row("embeddings.word_embeddings.weight", "word_embeddings/embedding"),
    Row("embeddings.position_embeddings.weight", "position_embeddings/embedding"),
    Row("embeddings.token_type_embeddings.weight", "token_type_embeddings/embedding"),
    *_norm("embeddings.LayerNorm", "embeddings_norm"),
    *_linear(f"{_LAYER}.attention.self.query", "layers/query"),
    *_linear(f"{_LAYER}.attention.self.key", "layers/key"),
    *_linear(f"{_LAYER}.attention.self.value", "layers/value"),
    *_linear(f"{_LAYER}.attention.output.dense", "layers/attention_output"),
    *_norm(f"{_LAYER}.attention.output.LayerNorm", "layers/attention_norm"),
    *_linear(f"{_LAYER}.intermediate.dense", "layers/intermediate"),
    *_linear(f"{_LAYER}.output.dense", "layers/output"),
    *_norm(f"{_LAYER}.output.LayerNorm", "layers/output_norm"),
)
"""Encoder, under the names of a BertModel or RobertaModel; a model around it puts "bert." or "roberta." before them."""
CLASSIFIER_TABLE = (
    *(row._replace(name=f"roberta.{row.name}", path=f"encoder/{row.path}") for row in ENCODER_TABLE),
    *_linear("classifier.dense", "classifier_dense"),
    *_linear("classifier.out_proj", "classifier_out"),
)
"""Classifier, under the names of a RobertaForSequenceClassification."""
_POOLER_AND_CONSTANT = ("pooler.", "embeddings.position_ids")  # the second is in old checkpoints
_HEADS = ("cls.", "lm_head.", "classifier.")


def load_encoder(folder: Path, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> tuple[Encoder, dict]:
    """The encoder of a BERT or RoBERTa in the Hugging Face layout; its parameters as ``dtype``, spread over ``mesh``.

    The heads of a checkpoint are left out. Raises InputError naming the file, key or tensor that does not fit.
    """
    config = EncoderConfig.read(folder / "config.json")
    model = Encoder(config)
    abstract = _abstract(model, mesh, dtype)
    ignored = (*_POOLER_AND_CONSTANT, *_HEADS)
    return model, load_params(folder, ENCODER_TABLE, abstract, prefix=f"{config.model_type}.", ignored=ignored)


def load_classifier(folder: Path, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> tuple[Classifier, dict]:
    """A RoBERTa with its classification head in the Hugging Face layout, and its parameters, as by ``load_encoder``.

    Raises InputError naming the file, key or tensor that does not fit.
    """
    path = folder / "config.json"
    config = EncoderConfig.read(path)
    if config.model_type != "roberta":
        raise InputError(f"{path}: model_type {config.model_type!r}; expected 'roberta', whose classifiers are read.")
    model = Classifier(config, _read_labels(path))
    ignored = (*(f"roberta.{name}" for name in _POOLER_AND_CONSTANT), "lm_head.")
    return model, load_params(folder, CLASSIFIER_TABLE, _abstract(model, mesh, dtype), prefix="", ignored=ignored)


def _abstract(model: Encoder | Classifier, mesh: Mesh | None, dtype: Any) -> dict:
    return abstract_on(jax.eval_shape(lambda: init_params(model, jax.random.key(0))), mesh, dtype)


def _read_labels(path: Path) -> tuple[str, ...]:
    """Names of the labels in the order of their logits; two where config.json does not say (as in transformers).

    Raises InputError when the labels are not alternatives, of which a text has one.
    """
    content = read_json(path)
    problem = content.get("problem_type") or "single_label_classification"
    if problem != "single_label_classification":
        raise InputError(f"{path}: problem_type {problem!r}; expected 'single_label_classification'.")
    names = content.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    numbers = [str(number) for number in range(len(names))] if isinstance(names, dict) else []
    if len(numbers) < 2 or set(names) != set(numbers):
        raise InputError(f"{path}: id2label {names!r}; expected the names of two or more labels, from '0' on.")
    return tuple(str(names[number]) for number in numbers)
