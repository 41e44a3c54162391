"""google-tunix's sampler, given every prompt once a completion: it has no shared prompts."""

import importlib.metadata
import json

import jax
import numpy as np
from serve import arguments, serve
from tunix.generate.sampler import CacheConfig, Sampler
from tunix_qwen2 import Numbers, load

options = arguments()
model, mesh = load(options.checkpoint)
prompts = json.loads(options.prompts.read_text())
repeated = [" ".join(map(str, prompt)) for prompt in prompts for _ in range(options.group)]
length = len(prompts[0])
cache = CacheConfig(
    cache_size=length + options.new_tokens,
    num_layers=model.config.num_layers,
    num_kv_heads=model.config.num_kv_heads,
    head_dim=model.config.head_dim,
)
sampler = Sampler(model, Numbers(), cache)


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
