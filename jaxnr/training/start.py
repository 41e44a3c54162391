"""What training begins from: the configured decoders, and the parameters of those that are pretrained."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jaxnr.config import ModelConfig
from jaxnr.models.decoder import Decoder, DecoderConfig, init_params
from jaxnr.models.huggingface import check_tokenizer, load_decoder_params, read_decoder_config
from jaxnr.models.lora import LoraConfig, with_new_adapters
from jaxnr.models.weights import model_folder


def make_decoder(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Decoder:
    """The configured decoder, for the run's tokenizer. Raises InputError where a pretrained one does not fit it."""
    shape = _pretrained_shape(config.path, tokenizer) if config.path else fresh_shape(config, len(tokenizer))
    return decoder_of(config, shape)


def decoder_of(config: ModelConfig, shape: DecoderConfig) -> Decoder:
    """The configured decoder of a shape."""
    lora = LoraConfig(rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets)
    return Decoder(shape, dtype=jnp.dtype(config.compute), remat=config.remat, lora=lora)


def pretrained_params(model: Decoder, path: str, mesh: Mesh, seed: int) -> dict:
    """The parameters of a checkpoint, spread over the mesh, with new adapters where the model has any."""
    params = load_decoder_params(model_folder(path), model, mesh)
    abstract = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return with_new_adapters(params, abstract, jax.random.key(seed))


def _pretrained_shape(path: str, tokenizer: PreTrainedTokenizerBase) -> DecoderConfig:
    folder = model_folder(path)
    shape = read_decoder_config(folder)
    check_tokenizer(folder, shape, tokenizer)
    return shape


def fresh_shape(config: ModelConfig, tokens: int) -> DecoderConfig:
    """The shape of a model from scratch, for a tokenizer of so many tokens."""
    return DecoderConfig(
        vocab_size=tokens,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.hidden_size**-0.5,  # 0.02, usual for large widths, leaves small models asleep
    )
