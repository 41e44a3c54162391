"""A BERT encoder in Flax Linen (arXiv 1810.04805): post-norm blocks under absolute positions, scanned."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnr.errors import InputError
from jaxnr.models.weights import Row, load_params, read_json

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}
"""By their names in config.json; "gelu" is the exact one, with erf."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of a BERT encoder; the names are those of the Hugging Face config.json."""

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

    @classmethod
    def read(cls, path: Path) -> EncoderConfig:
        """From a config.json. Raises InputError naming the key that is missing, or the kind of model it is instead."""
        content = read_json(path)
        if content.get("model_type") != "bert" or content.get("position_embedding_type", "absolute") != "absolute":
            raise InputError(
                f"{path}: model_type {content.get('model_type')!r} with position_embedding_type "
                f"{content.get('position_embedding_type', 'absolute')!r}; expected 'bert' with 'absolute'."
            )
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in content]
        if missing:
            raise InputError(f"{path}: expected the key {missing[0]} of a BERT encoder.")
        if content["hidden_act"] not in ACTIVATIONS:
            raise InputError(f"{path}: hidden_act {content['hidden_act']!r}; expected one of {', '.join(ACTIVATIONS)}.")
        return cls(**{name: content[name] for name in names})


class Block(nn.Module):
    """One layer: self-attention and feed-forward, each added to its input and then normalised (post-norm)."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array, mask_BS: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
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
    """BERT without its pooler, for single texts (all tokens of segment 0)."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
        """Hidden states [B, S, D] of right-padded texts (mask false on padding); those of padding mean nothing."""
        c = self.config
        embed = functools.partial(
            nn.Embed, features=c.hidden_size, embedding_init=nn.initializers.normal(c.initializer_range)
        )
        words_BSD = embed(c.vocab_size, name="word_embeddings")(tokens_BS)
        positions_SD = embed(c.max_position_embeddings, name="position_embeddings")(jnp.arange(tokens_BS.shape[1]))
        segment_D = embed(c.type_vocab_size, name="token_type_embeddings")(jnp.array(0))
        x_BSD = nn.LayerNorm(epsilon=c.layer_norm_eps, use_fast_variance=False, name="embeddings_norm")(
            words_BSD + positions_SD + segment_D
        )
        layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=c.num_hidden_layers,
        )
        return layers(c, name="layers")(x_BSD, mask_BS)[0]


def mean_pool(hidden_BSD: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """Mean [B, D] of the hidden states of attended tokens; zero where there is none."""
    weight_BS1 = mask_BS[..., None].astype(hidden_BSD.dtype)
    return (hidden_BSD * weight_BS1).sum(axis=1) / jnp.maximum(weight_BS1.sum(axis=1), 1)


def _linear(name: str, path: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", f"{path}/kernel", transpose=True), Row(f"{name}.bias", f"{path}/bias")


def _norm(name: str, path: str) -> tuple[Row, Row]:
    return Row(f"{name}.weight", f"{path}/scale"), Row(f"{name}.bias", f"{path}/bias")


_LAYER = "encoder.layer.{layer}"
TABLE = (
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
_UNUSED = ("pooler.", "cls.", "embeddings.position_ids")
"""Next-sentence pooler, pre-training heads, and a constant that old checkpoints carry."""


def load_encoder(folder: Path) -> tuple[Encoder, dict]:
    """The encoder of a BERT in the Hugging Face layout and its float32 parameters, on the host.

    Raises InputError naming the file, key or tensor that does not fit.
    """
    model = Encoder(EncoderConfig.read(folder / "config.json"))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens, mask)["params"]
    return model, load_params(folder, TABLE, abstract, prefix="bert.", ignored=_UNUSED)
