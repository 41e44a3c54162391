"""What the workers with google-tunix share: the checkpoint as its Qwen2, and a tokenizer of token ids."""

import json
from pathlib import Path

import jax
from tunix.models.qwen2.model import ModelConfig, Qwen2
from tunix.models.qwen2.params import create_model_from_safe_tensors


class Numbers:
    """Stands in for a tokenizer: a text is its token ids in decimal."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return -2


def load(checkpoint: Path) -> tuple[Qwen2, jax.sharding.Mesh]:
    """The model, and the mesh of one device that it is on."""
    saved = json.loads((checkpoint / "config.json").read_text())
    config = ModelConfig(
        num_layers=saved["num_hidden_layers"],
        vocab_size=saved["vocab_size"],
        embed_dim=saved["hidden_size"],
        hidden_dim=saved["intermediate_size"],
        num_heads=saved["num_attention_heads"],
        num_kv_heads=saved["num_key_value_heads"],
        head_dim=saved["hidden_size"] // saved["num_attention_heads"],
        rope_theta=saved["rope_parameters"]["rope_theta"],
        norm_eps=saved["rms_norm_eps"],
        use_tied_embedding=saved["tie_word_embeddings"],
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return create_model_from_safe_tensors(str(checkpoint), config, mesh), mesh
