"""google-tunix's sampler, given every prompt once a completion: it has no shared prompts."""

import importlib.metadata
import json

import jax
import numpy as np
from serve import arguments, serve
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen2.model import ModelConfig
from tunix.models.qwen2.params import create_model_from_safe_tensors


class Numbers:
    """Stands in for a tokenizer: a prompt is its token ids in decimal."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return ""

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return -2


options = arguments()
saved = json.loads((options.checkpoint / "config.json").read_text())
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
prompts = json.loads(options.prompts.read_text())
repeated = [" ".join(map(str, prompt)) for prompt in prompts for _ in range(options.group)]
length = len(prompts[0])
cache = CacheConfig(
    cache_size=length + options.new_tokens,
    num_layers=config.num_layers,
    num_kv_heads=config.num_kv_heads,
    head_dim=config.head_dim,
)
sampler = Sampler(create_model_from_safe_tensors(str(options.checkpoint), config, mesh), Numbers(), cache)


def sample(seed: int, greedy: bool) -> list[list[int]]:
    # Without top_p Tunix takes the likeliest token; with top_p = 1 it samples and sorts nothing.
    mode = {} if greedy else {"temperature": 1.0, "top_p": 1.0}
    output = sampler(repeated, options.new_tokens, max_prompt_length=length, seed=seed, eos_tokens=[-1], **mode)
    return [np.asarray(row).tolist() for row in output.tokens]


serve(
    sample,
    {
        "google-tunix": importlib.metadata.version("google-tunix"),
        "jax": jax.__version__,
        "flax": importlib.metadata.version("flax"),
    },
)
