"""The door for checkpoints: models in the Hugging Face layout in and out.

| architecture in config.json | model here |
|---|---|
| Qwen2ForCausalLM (Qwen2, Qwen2.5), Qwen3ForCausalLM | Decoder |
| Qwen2Model, Qwen3Model, or a sentence-transformers folder of either (Qwen3-Embedding) | Decoder without a head |
| BertModel, RobertaModel and what is built on them | Encoder |
| RobertaForSequenceClassification | Classifier |
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jaxnr.errors import InputError
from jaxnr.mesh import abstract_on
from jaxnr.models import decoder, encoder
from jaxnr.models.decoder import Decoder, DecoderConfig, init_params
from jaxnr.models.encoder import Classifier, Encoder, load_classifier, load_encoder
from jaxnr.models.lora import merge, without_adapters
from jaxnr.models.weights import load_params, model_folder, new_folder, read_json, save_params
from jaxnr.prompting.tokenizer import load_tokenizer, read_tokenizer

Model = Decoder | Encoder | Classifier


class Loaded(NamedTuple):
    """A model, its parameters and its tokenizer."""

    model: Model
    params: dict
    tokenizer: PreTrainedTokenizerBase


def load(name_or_path: str | Path, *, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> Loaded:
    """A model from a local folder or, by name, from the Hugging Face hub.

    Parameters are cast to ``dtype``, in which the model computes, and spread over ``mesh`` by the table in mesh.py;
    without one they lie on the first device. Raises InputError naming the file, key or tensor that does not fit.
    """
    folder, dtype = model_folder(str(name_or_path)), jnp.dtype(dtype)
    content = read_json(folder / "config.json")
    kind = content.get("model_type")
    if kind in ("qwen2", "qwen3"):
        config = read_decoder_config(folder)
        tokenizer = load_tokenizer(folder) if writes_text(folder, content) else read_tokenizer(folder)
        check_tokenizer(folder, config, tokenizer)
        model = Decoder(config, dtype=dtype)
        return Loaded(model, load_decoder_params(folder, model, mesh, dtype), tokenizer)
    if kind in ("bert", "roberta"):
        classifies = any(name.endswith("ForSequenceClassification") for name in content.get("architectures") or [])
        loader = load_classifier if classifies else load_encoder
        return Loaded(*loader(folder, mesh, dtype), read_tokenizer(folder))
    raise InputError(f"{folder / 'config.json'}: model_type is {kind!r}; expected one of qwen2, qwen3, bert, roberta.")


def writes_text(folder: Path, content: dict) -> bool:
    """Whether a decoder's checkpoint has a head; those that embed have none, or one that is not used."""
    names = content.get("architectures") or []
    return not (folder / "modules.json").is_file() and not any(name.endswith("Model") for name in names)


def read_decoder_config(folder: Path) -> DecoderConfig:
    """The shape in config.json. A model without a head has a tied one here: there are no parameters of it."""
    path = folder / "config.json"
    config = DecoderConfig.read(path)
    return config if writes_text(folder, read_json(path)) else dataclasses.replace(config, tie_word_embeddings=True)


def check_tokenizer(folder: Path, config: DecoderConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError where the embedding has no row for some token."""
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, more than the {config.vocab_size} rows of the "
            "embedding (vocab_size in config.json); expected the tokenizer of this very model."
        )


def load_decoder_params(folder: Path, model: Decoder, mesh: Mesh | None, dtype: Any = None) -> dict:
    """The parameters of a decoder without its adapters, as ``dtype`` (None: as the model has them), over ``mesh``."""
    abstract = without_adapters(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    abstract = abstract_on(abstract, mesh, dtype)
    # A tied head is the embedding; some files have it once more.
    ignored = ("lm_head.",) if model.config.tie_word_embeddings else ()
    return load_params(folder, decoder.table(model.config), abstract, prefix="model.", ignored=ignored)


def save(folder: str | Path, model: Model, params: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes config.json, the tokenizer and safetensors, which transformers loads with equal logits.

    Adapters are merged into the weights. The folder appears whole or not at all. Raises InputError where it exists.
    """
    if isinstance(model, Decoder):
        params = merge(params, model.lora)
        table, prefix, content = decoder.table(model.config), "model.", model.config.to_json()
        content |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    elif isinstance(model, Classifier):
        table, prefix, content = encoder.CLASSIFIER_TABLE, "", model.to_json()
    else:
        kind = {"bert": "BertModel", "roberta": "RobertaModel"}[model.config.model_type]
        table, prefix, content = encoder.ENCODER_TABLE, "", {**model.config.to_json(), "architectures": [kind]}
    dtype = str(jnp.result_type(*jax.tree.leaves(params)))
    content |= {"dtype": dtype, "torch_dtype": dtype}  # transformers 5 and 4
    with new_folder(Path(folder)) as partial:
        tokenizer.save_pretrained(partial)
        (partial / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
        save_params(partial, table, params, prefix=prefix)
