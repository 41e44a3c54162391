"""jaxnr's sampler: one prefill a prompt, whose completions share its keys and values."""

import json

import jax
import numpy as np
from serve import arguments, serve

import jaxnr
from jaxnr.models.decoder import Decoder, DecoderConfig
from jaxnr.models.huggingface import load_decoder_params
from jaxnr.sampling.sampler import SamplingSettings, make_sampler

options = arguments()
model = Decoder(DecoderConfig.read(options.checkpoint / "config.json"))
params = load_decoder_params(options.checkpoint, model, mesh=None)
prompt_BS = np.array(json.loads(options.prompts.read_text()), np.int32)
names = (np.arange(len(prompt_BS), dtype=np.int32), np.arange(options.group, dtype=np.int32))
sampler = make_sampler(model, max_new_tokens=options.new_tokens, vocabulary_size=model.config.vocab_size, pad_id=0)


def sample(seed: int, greedy: bool) -> list[list[int]]:
    settings = SamplingSettings(temperature=0.0 if greedy else 1.0)
    seed_and_step, no_stop = (np.int32(seed), np.int32(0)), np.array([-1], np.int32)
    completions = sampler(params, prompt_BS, np.ones_like(prompt_BS, bool), *names, *seed_and_step, settings, no_stop)
    tokens_BGT = np.asarray(completions.tokens_BGT)
    return tokens_BGT.reshape(-1, tokens_BGT.shape[-1]).tolist()


serve(sample, {"jaxnr": jaxnr.__version__, "jax": jax.__version__, "device": jax.devices()[0].device_kind})
