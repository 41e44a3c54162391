"""Shapes of pretrained models without their weights: from a local config.json, by a known name, or from the hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download

from jaxnr.errors import InputError
from jaxnr.models.decoder import DecoderConfig
from jaxnr.models.encoder import EncoderConfig
from jaxnr.models.huggingface import read_decoder_config
from jaxnr.models.weights import read_json
from jaxnr.prompting.tokenizer import read_tokenizer

Shape = DecoderConfig | EncoderConfig


class Known(NamedTuple):
    """A model by its shape and the number of its tokenizer's tokens."""

    shape: Shape
    tokens: int


def _qwen(model_type, layers, hidden, ffn, heads, kv_heads, head_dim, rows, tied) -> DecoderConfig:
    return DecoderConfig(
        model_type=model_type,
        vocab_size=rows,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=1e6,
        tie_word_embeddings=tied,
    )


_TOKENS = 151_665
_QWEN = {
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen("qwen2", 24, 896, 4864, 14, 2, 64, 151_936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen("qwen2", 28, 1536, 8960, 12, 2, 128, 151_936, True),
    "Qwen/Qwen2.5-3B-Instruct": _qwen("qwen2", 36, 2048, 11_008, 16, 2, 128, 151_936, True),
    "Qwen/Qwen2.5-7B-Instruct": _qwen("qwen2", 28, 3584, 18_944, 28, 4, 128, 152_064, False),
    "Qwen/Qwen2.5-14B-Instruct": _qwen("qwen2", 48, 5120, 13_824, 40, 8, 128, 152_064, False),
    "Qwen/Qwen2.5-32B-Instruct": _qwen("qwen2", 64, 5120, 27_648, 40, 8, 128, 152_064, False),
    "Qwen/Qwen3-8B": _qwen("qwen3", 36, 4096, 12_288, 32, 8, 128, 151_936, False),
    # Embedders have no head here, so that of the 8B, which is untied, is left out.
    "Qwen/Qwen3-Embedding-0.6B": _qwen("qwen3", 28, 1024, 3072, 16, 8, 128, 151_669, True),
    "Qwen/Qwen3-Embedding-4B": _qwen("qwen3", 36, 2560, 9728, 32, 8, 128, 151_665, True),
    "Qwen/Qwen3-Embedding-8B": _qwen("qwen3", 36, 4096, 12_288, 32, 8, 128, 151_665, True),
}
KNOWN: dict[str, Known] = {name: Known(shape, min(_TOKENS, shape.vocab_size)) for name, shape in _QWEN.items()}
"""Models that can be planned for before anything is downloaded, by their names on the hub."""


def find_shape(name: str) -> Known:
    """The shape of a model; no weights are read or downloaded.

    Raises InputError for a name that is no folder, not known here and not on a hub that can be reached.
    """
    if (folder := Path(name)).is_dir():
        return Known(shape := _read(folder), _count_tokens(name, shape))
    if name in KNOWN:
        return KNOWN[name]
    try:
        folder = Path(hf_hub_download(name, "config.json")).parent
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: not a folder, and its config.json is not to be had from the Hugging Face hub; expected a local "
            f"folder in the Hugging Face layout, a name on the hub, or one of {', '.join(KNOWN)}."
        ) from error
    shape = _read(folder)
    return Known(shape, _count_tokens(name, shape))


def decoder_shape(name: str) -> tuple[DecoderConfig, int]:
    """``find_shape`` of a model that writes. Raises InputError where it is an encoder."""
    shape, tokens = find_shape(name)
    if not isinstance(shape, DecoderConfig):
        raise InputError(f"{name}: an encoder; expected a language model.")
    return shape, tokens


def _read(folder: Path) -> Shape:
    kind = read_json(folder / "config.json").get("model_type")
    readers: dict[str, Callable[[], Shape]] = {
        **dict.fromkeys(("qwen2", "qwen3"), lambda: read_decoder_config(folder)),
        **dict.fromkeys(("bert", "roberta"), lambda: EncoderConfig.read(folder / "config.json")),
    }
    if kind not in readers:
        raise InputError(f"{folder / 'config.json'}: model_type is {kind!r}; expected one of {', '.join(readers)}.")
    return readers[kind]()


def _count_tokens(name: str, shape: Shape) -> int:
    """Of the tokenizer; the rows of the embedding, which may be a few more, where there is no tokenizer to be had."""
    try:
        return min(len(read_tokenizer(name)), shape.vocab_size)
    except InputError:
        return shape.vocab_size


def as_embedder(shape: Shape) -> Shape:
    """The shape without a head: an embedder has none, or one that is not used."""
    return dataclasses.replace(shape, tie_word_embeddings=True) if isinstance(shape, DecoderConfig) else shape
