"""jaxnr's sampler: one prefill a prompt, whose completions share its keys and values."""

import json

import jax
import numpy as np
from serve import arguments, serve

import jaxnr
from jaxnr.models.decoder import Decoder, DecoderConfig, init_params
from jaxnr.models.weights import Row, load_params, read_json
from jaxnr.sampling.sampler import SamplingSettings, make_sampler

LAYER = "model.layers.{layer}."
TABLE = (
    Row("model.embed_tokens.weight", "embed_tokens/embedding"),
    Row("model.norm.weight", "norm/weight"),
    *(
        Row(f"{LAYER}{name}.weight", f"layers/{name}/weight")
        for name in ("input_layernorm", "post_attention_layernorm")
    ),
    *(Row(f"{LAYER}self_attn.{name}_proj.weight", f"layers/{name}_proj/kernel", transpose=True) for name in "qkvo"),
    *(Row(f"{LAYER}self_attn.{name}_proj.bias", f"layers/{name}_proj/bias") for name in "qkv"),
    *(
        Row(f"{LAYER}mlp.{name}_proj.weight", f"layers/{name}_proj/kernel", transpose=True)
        for name in ("gate", "up", "down")
    ),
)

options = arguments()
saved = read_json(options.checkpoint / "config.json")
config = DecoderConfig(
    **{name: saved[name] for name in DecoderConfig.__dataclass_fields__ if name in saved and name != "head_dim"},
    head_dim=saved["hidden_size"] // saved["num_attention_heads"],
)
model = Decoder(config)
abstract = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
params = jax.device_put(load_params(options.checkpoint, TABLE, abstract, prefix="", ignored=()))
prompt_BS = np.array(json.loads(options.prompts.read_text()), np.int32)
names = (np.arange(len(prompt_BS), dtype=np.int32), np.arange(options.group, dtype=np.int32))
sampler = make_sampler(model, max_new_tokens=options.new_tokens, vocabulary_size=config.vocab_size, pad_id=0)


def sample(seed: int, greedy: bool) -> list[list[int]]:
    settings = SamplingSettings(temperature=0.0 if greedy else 1.0)
    seed_and_step, no_stop = (np.int32(seed), np.int32(0)), np.array([-1], np.int32)
    completions = sampler(params, prompt_BS, np.ones_like(prompt_BS, bool), *names, *seed_and_step, settings, no_stop)
    tokens_BGT = np.asarray(completions.tokens_BGT)
    return tokens_BGT.reshape(-1, tokens_BGT.shape[-1]).tolist()


serve(sample, {"jaxnr": jaxnr.__version__, "jax": jax.__version__, "device": jax.devices()[0].device_kind})
