"""A Qwen2 or Qwen3 decoder in Flax Linen, built so that G completions share the keys and values of one prompt.

Two streams go through every layer side by side: the prompt ``[B, S]`` and its completions ``[B, G, T]``. Completions
attend to the prompt's keys and values, which are never repeated G times, and to their own; the prompt attends to
itself. The same layer serves training (both streams), prefill (prompt alone) and decoding (one new token a completion,
with the prompt's and the completion's past in a cache), so sampling and training cannot drift apart.

Layers are one scanned block, rematerialised as ``Remat`` says: compile time does not grow with depth.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxnr.config import Remat
from jaxnr.errors import InputError
from jaxnr.mesh import HEAD, columns, constrain, spread
from jaxnr.models.lora import NO_LORA, LoraConfig, Projection, frozen_dtype
from jaxnr.models.weights import Row, read_json

_CHUNK_QUERIES = 128  # at least; a long prompt has longer chunks
_MOST_CHUNKS = 8  # they follow one another in the program, which must not grow with the prompt
_MASKED = -1e30  # finite: a query with no visible key (padding) then gives a harmless mean instead of NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a decoder; the names are those of the Hugging Face config.json."""

    model_type: Literal["qwen2", "qwen3"] = "qwen2"
    """Qwen2 has biases of queries, keys and values; Qwen3 has none, and normalises queries and keys head by head."""
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    max_position_embeddings: int = 32_768

    @classmethod
    def read(cls, path: Path) -> DecoderConfig:
        """From a config.json. Raises InputError naming what is missing, or what these decoders do not have."""
        content = read_json(path)
        rope = content.get("rope_parameters") or {}
        given = {"rope_theta": rope.get("rope_theta"), "tie_word_embeddings": False, **content}
        if "head_dim" not in given and given.keys() >= {"hidden_size", "num_attention_heads"}:
            given["head_dim"] = given["hidden_size"] // given["num_attention_heads"]
        wanted = {
            "model_type": ("qwen2", "qwen3"),
            "hidden_act": ("silu",),
            "use_sliding_window": (False, None),
            "rope_scaling": (None,),
        }
        for key, values in wanted.items():
            if given.get(key) not in values:
                raise InputError(f"{path}: {key} is {given.get(key)!r}; expected {' or '.join(map(repr, values))}.")
        if rope.get("rope_type", "default") != "default" or (
            given["model_type"] == "qwen3" and given.get("attention_bias")
        ):
            raise InputError(f"{path}: scaled rotary embeddings, or Qwen3 with attention_bias, are not supported.")
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        values = {name: given.get(name, default) for name, default in defaults.items()}
        if missing := [name for name, value in values.items() if value is None or value is dataclasses.MISSING]:
            raise InputError(f"{path}: expected the key {missing[0]} of a {given['model_type']} decoder.")
        return cls(**values)

    @property
    def max_tokens(self) -> int:
        """The longest text that the model was made for."""
        return self.max_position_embeddings

    def to_json(self) -> dict[str, Any]:
        """What config.json says of this shape, for transformers 4 and 5."""
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
        name = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[self.model_type]
        fixed = {"architectures": [name], "hidden_act": "silu", "rope_parameters": rope, "use_sliding_window": False}
        return {**dataclasses.asdict(self), **fixed, "attention_bias": self.model_type == "qwen2"}


class KeyValues(NamedTuple):
    """Keys and values that queries may attend to, laid out as the matrix products of attention read them.

    ``shared``: key [B, K, H, U], value [B, K, U, H], mask [B, T or 1, U], the same for the G completions of a prompt.
    Otherwise: key [B, K, G, H, U], value [B, K, G, U, H] and mask broadcastable to [B, G, T, U].
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array
    shared: bool


class Cache(NamedTuple):
    """What decoding has to remember, a layer per leading index, in the layout of KeyValues: a step of decoding reads it
    all, and transposing it each time would cost more than the products themselves."""

    prompt_key_LBKHS: jax.Array
    prompt_value_LBKSH: jax.Array
    own_key_LBKGHT: jax.Array
    own_value_LBKGTH: jax.Array


_ABSENT = cast(Any, None)  # what a layer does not read, because its stream or the cache is not there


class Context(NamedTuple):
    """Positions and masks, the same in every layer; None where a stream is absent."""

    prompt_position_BS: jax.Array = _ABSENT
    prompt_mask_BS: jax.Array = _ABSENT
    own_position_BGT: jax.Array = _ABSENT
    past_mask_T: jax.Array = _ABSENT


def attend(query_BGTNH: jax.Array, sources: tuple[KeyValues, ...]) -> jax.Array:
    """Grouped-query attention with one softmax over all ``sources`` together. Returns [B, G, T, N, H].

    Each source keeps its own scores; only the row maxima and sums are merged, so the large arrays are neither
    concatenated nor transposed. Scores and softmax are float32 whatever the compute type.
    """
    B, G, T, N, H = query_BGTNH.shape
    K = sources[0].key.shape[1]
    R = N // K  # query heads a key head
    query_BKGTRH = query_BGTNH.reshape(B, G, T, K, R, H).transpose(0, 3, 1, 2, 4, 5) * H**-0.5
    scores = [_scores(query_BKGTRH, source) for source in sources]
    highest = functools.reduce(
        jnp.maximum, [jnp.max(score, axis=-1, keepdims=True, initial=_MASKED) for score in scores]
    )
    highest = jax.lax.stop_gradient(highest)  # subtracting it changes no weight, only their range
    weights = [jnp.exp(score - highest) for score in scores]
    total = sum(jnp.sum(weight, axis=-1, keepdims=True) for weight in weights)
    mixed = sum(_mix(weight.astype(query_BGTNH.dtype), source) for weight, source in zip(weights, sources, strict=True))
    out_BKGTRH = jnp.asarray(mixed / total, query_BGTNH.dtype)
    return out_BKGTRH.transpose(0, 2, 3, 1, 4, 5).reshape(B, G, T, N, H)


def attend_causally(query_BSNH: jax.Array, key_BKHS: jax.Array, value_BKSH: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """Attention of sequences to themselves, up to each query's own position. Returns [B, S, N, H].

    Long sequences go a chunk of queries at a time, each with the keys up to its own end: what no query of the chunk may
    see is never computed, and the scores of one chunk exist at once, in the backward pass too (``jax.checkpoint``).
    """
    S = query_BSNH.shape[1]
    chunk = max(_CHUNK_QUERIES, -(-S // _MOST_CHUNKS))

    def attended(start: int) -> jax.Array:
        stop = min(start + chunk, S)
        visible_1SU = jnp.tril(jnp.ones((stop - start, stop), bool), start)[None]
        keys = KeyValues(key_BKHS[..., :stop], value_BKSH[:, :, :stop], visible_1SU & mask_BS[:, None, :stop], True)
        return attend(query_BSNH[:, None, start:stop], (keys,))[:, 0]

    if chunk >= S:
        return attended(0)
    rematerialised = jax.checkpoint(attended, static_argnums=0)
    return jnp.concatenate([rematerialised(start) for start in range(0, S, chunk)], axis=1)


def _scores(query_BKGTRH: jax.Array, source: KeyValues) -> jax.Array:
    """Masked float32 scores [B, K, G, T, R, U] of one source, as plain batched matrix products."""
    B, K, G, T, R, H = query_BKGTRH.shape
    rows = (G * T * R,) if source.shared else (G, T * R)
    score = jnp.matmul(query_BKGTRH.reshape(B, K, *rows, H), source.key, preferred_element_type=jnp.float32)
    score = score.reshape(B, K, G, T, R, source.key.shape[-1])
    mask = source.mask[:, None] if source.shared else source.mask  # [B, G or 1, T or 1, U]
    return jnp.where(mask[:, None, :, :, None], score, _MASKED)


def _mix(weight_BKGTRU: jax.Array, source: KeyValues) -> jax.Array:
    """The values [B, K, G, T, R, H] of one source, summed by weight in float32."""
    B, K, G, T, R, U = weight_BKGTRU.shape
    rows = (G * T * R,) if source.shared else (G, T * R)
    mixed = jnp.matmul(weight_BKGTRU.reshape(B, K, *rows, U), source.value, preferred_element_type=jnp.float32)
    return mixed.reshape(B, K, G, T, R, source.value.shape[-1])


def rotate(x: jax.Array, position: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding of x [..., heads, H] at position [...], halves layout (as in Hugging Face)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("weight", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(self.dtype)


class Block(nn.Module):
    """One layer: attention and SwiGLU, each after an RMSNorm and added to the residual stream."""

    config: DecoderConfig
    dtype: jnp.dtype
    lora: LoraConfig = NO_LORA

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        has_bias = c.model_type == "qwen2"

        def projection(name: str, features: int, use_bias: bool = False) -> Projection:
            rank = self.lora.rank if name in self.lora.targets else 0
            kept = frozen_dtype(self.lora, self.dtype)
            return Projection(features, use_bias, self.dtype, init, rank, self.lora.scale, kept)

        self.input_layernorm = RMSNorm(c.rms_norm_eps, self.dtype)
        self.q_proj = projection("q_proj", c.num_attention_heads * c.head_dim, has_bias)
        self.k_proj = projection("k_proj", c.num_key_value_heads * c.head_dim, has_bias)
        self.v_proj = projection("v_proj", c.num_key_value_heads * c.head_dim, has_bias)
        if c.model_type == "qwen3":
            self.q_norm = RMSNorm(c.rms_norm_eps, self.dtype)
            self.k_norm = RMSNorm(c.rms_norm_eps, self.dtype)
        self.o_proj = projection("o_proj", c.hidden_size)
        self.post_attention_layernorm = RMSNorm(c.rms_norm_eps, self.dtype)
        self.gate_proj = projection("gate_proj", c.intermediate_size)
        self.up_proj = projection("up_proj", c.intermediate_size)
        self.down_proj = projection("down_proj", c.hidden_size)

    def project(self, x: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [..., N, H] of x [B, ..., T, D], and rotated keys and values in the layout of KeyValues."""
        c = self.config
        x = self.input_layernorm(x)
        query = self.q_proj(x).reshape(*x.shape[:-1], c.num_attention_heads, c.head_dim)
        key = self.k_proj(x).reshape(*x.shape[:-1], c.num_key_value_heads, c.head_dim)
        value = self.v_proj(x).reshape(*x.shape[:-1], c.num_key_value_heads, c.head_dim)
        if c.model_type == "qwen3":
            query, key = self.q_norm(query), self.k_norm(key)
        key = rotate(key, position, c.rope_theta)
        key = jnp.moveaxis(key, (-2, -3), (1, -1))
        return rotate(query, position, c.rope_theta), key, jnp.moveaxis(value, -2, 1)

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Adds the attention output and the feed-forward output to the residual stream x [..., D]."""
        width = attended.shape[-2] * attended.shape[-1]
        x = x + self.o_proj(attended.reshape(*x.shape[:-1], width))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(nn.silu(self.gate_proj(h)) * self.up_proj(h))

    def __call__(self, streams, cache: Cache | None, context: Context) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """(prompt_BSD, own_BGTD), either None -> the same, and the keys and values that this layer computed."""
        # Where one token a completion is decoded, few numbers go through many weights, and the numbers move; else the
        # weights do, gathered for this layer.
        lay = spread if cache is None else columns
        prompt, own = (stream if stream is None else lay(stream) for stream in streams)
        computed: dict[str, tuple[jax.Array, jax.Array]] = {}
        sources: tuple[KeyValues, ...] = ()
        if prompt is not None:
            query, key, value = self.project(prompt, context.prompt_position_BS)
            prompt = self.finish(prompt, attend_causally(query, key, value, context.prompt_mask_BS))
            computed["prompt"] = (key, value)
            sources = (KeyValues(key, value, context.prompt_mask_BS[:, None, :], True),)
        if cache is not None:
            past = context.past_mask_T[None, None, None, :]
            sources = (
                KeyValues(cache.prompt_key_LBKHS, cache.prompt_value_LBKSH, context.prompt_mask_BS[:, None, :], True),
                KeyValues(cache.own_key_LBKGHT, cache.own_value_LBKGTH, past, False),
            )
        if own is not None:
            query, key, value = self.project(own, context.own_position_BGT)
            T = own.shape[2]
            causal = jnp.tril(jnp.ones((T, T), bool))[None, None]
            own = self.finish(own, attend(query, (*sources, KeyValues(key, value, causal, False))))
            computed["own"] = (key, value)
        return (prompt, own), computed


_KEPT = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "layers": None}
"""What the backward pass finds of a layer beyond its input: the outputs of its projections, or nothing."""


class Decoder(nn.Module):
    """Embedding, scanned blocks, final norm. Heads are applied outside, in chunks (see training/losses.py)."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    remat: Remat = "layers"
    lora: LoraConfig = NO_LORA

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        kept = frozen_dtype(self.lora, self.dtype)
        self.embed_tokens = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=self.dtype, param_dtype=kept, embedding_init=init
        )
        block = Block if self.remat == "none" else nn.remat(Block, prevent_cse=False, policy=_KEPT[self.remat])
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  # one an argument
            out_axes=0,
            length=c.num_hidden_layers,
        )(c, self.dtype, self.lora)
        self.norm = RMSNorm(c.rms_norm_eps, self.dtype)
        if not c.tie_word_embeddings:
            self.lm_head = self.param("lm_head", init, (c.vocab_size, c.hidden_size), kept)

    def __call__(self, tokens_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
        """Hidden states [B, S, D] of plain sequences, padded on either side (mask false)."""
        context = Context(prompt_position_BS=positions(mask_BS), prompt_mask_BS=mask_BS)
        (hidden, _), _ = self.layers((self.embed_prompts(tokens_BS), None), None, context)
        return self.norm(hidden)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings [B, ..., D] of tokens, looked up where the columns of the table lie."""
        return columns(self.embed_tokens(constrain(tokens, P("data"))))

    def embed_prompts(self, tokens: jax.Array) -> jax.Array:
        """The same, spread over the mesh by prompts."""
        return spread(self.embed(tokens))

    def prefill(self, tokens_BS: jax.Array, mask_BS: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Last hidden state [B, D] of left-padded prompts, and their keys and values as a cache holds them."""
        context = Context(prompt_position_BS=positions(mask_BS), prompt_mask_BS=mask_BS)
        (hidden, _), computed = self.layers((self.embed_prompts(tokens_BS), None), None, context)
        return self.norm(hidden[:, -1]), *computed["prompt"]

    def decode(self, tokens_BG: jax.Array, t: jax.Array, cache: Cache, mask_BS: jax.Array):
        """Hidden state [B, G, D] after the completions' t-th token, and its keys and values: a cache's with T = 1."""
        position_BGT = (mask_BS.sum(-1)[:, None, None] + t) * jnp.ones_like(tokens_BG)[..., None]
        context = Context(
            prompt_mask_BS=mask_BS,
            own_position_BGT=position_BGT,
            past_mask_T=jnp.arange(cache.own_key_LBKGHT.shape[-1]) < t,
        )
        (_, hidden), computed = self.layers((None, self.embed(tokens_BG[..., None])), cache, context)
        return self.norm(spread(hidden[:, :, 0])), *computed["own"]

    def shared(self, prompt_BS: jax.Array, mask_BS: jax.Array, completion_BGT: jax.Array) -> jax.Array:
        """Hidden states [B, G, T, D] that predict each completion token; prompts are left-padded.

        The prompt runs through the layers once for its G completions (DESIGN decision 4); gradients flow through both.
        """
        B, G, T = completion_BGT.shape
        own_position = mask_BS.sum(-1)[:, None, None] + jnp.arange(T - 1)[None, None]
        context = Context(
            prompt_position_BS=positions(mask_BS),
            prompt_mask_BS=mask_BS,
            own_position_BGT=jnp.broadcast_to(own_position, (B, G, T - 1)),
        )
        streams = (self.embed_prompts(prompt_BS), self.embed_prompts(completion_BGT[..., :-1]))
        (prompt, own), _ = self.layers(streams, None, context)
        last = jnp.broadcast_to(prompt[:, None, -1:], (B, G, 1, prompt.shape[-1]))
        return self.norm(jnp.concatenate([last, own], axis=2))


def positions(mask_BS: jax.Array) -> jax.Array:
    """Position of each attended token in its own sequence; 0 on padding before it."""
    return jnp.maximum(jnp.cumsum(mask_BS, axis=-1) - 1, 0)


def head_VD(params: dict) -> jax.Array:
    """The output projection: the untied head where there is one, else the token embedding.

    Gathered over the fsdp axis here, once for all the tokens that it is applied to.
    """
    return constrain(params["lm_head"] if "lm_head" in params else params["embed_tokens"]["embedding"], HEAD)


def table(config: DecoderConfig) -> tuple[Row, ...]:
    """Every parameter of a decoder under its Hugging Face name; adapters are merged before they get one."""
    layer = "layers.{layer}"
    biases = ("q_proj", "k_proj", "v_proj") if config.model_type == "qwen2" else ()
    head_norms = ("q_norm", "k_norm") if config.model_type == "qwen3" else ()
    return (
        Row("embed_tokens.weight", "embed_tokens/embedding"),
        *(Row(f"{layer}.{name}.weight", f"layers/{name}/weight") for name in _LAYER_NORMS),
        *(Row(f"{layer}.self_attn.{name}.weight", f"layers/{name}/kernel", transpose=True) for name in _ATTENTION),
        *(Row(f"{layer}.self_attn.{name}.bias", f"layers/{name}/bias") for name in biases),
        *(Row(f"{layer}.self_attn.{name}.weight", f"layers/{name}/weight") for name in head_norms),
        *(Row(f"{layer}.mlp.{name}.weight", f"layers/{name}/kernel", transpose=True) for name in _FEED_FORWARD),
        Row("norm.weight", "norm/weight"),
        *(() if config.tie_word_embeddings else (Row("lm_head.weight", "lm_head", outside=True),)),
    )


_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def init_params(model: Decoder, key: jax.Array) -> dict:
    """Fresh parameters, as a plain nested dict."""
    return cast(dict, jax.jit(model.init)(key, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))["params"])


def parameter_count(params: dict) -> int:
    """Number of scalars in a parameter tree (arrays or their abstract shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
