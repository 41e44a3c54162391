"""Whole steps of jaxnr: its sampler, the trivial reward, its jitted step. ``--variant flat`` is the flattened twin."""

import json

import jax
import numpy as np
from jaxnr_step import load, make_sample, make_update, rewards, scored, unscored
from serve import Requests, step_arguments

import jaxnr

options = step_arguments()
prompt_BS = np.array(json.loads(options.prompts.read_text()), np.int32)
model, params = load(options.checkpoint, flattened=options.variant == "flat")
sample = make_sample(model, prompt_BS, options.group, options.new_tokens)
state, update = make_update(options.what, model, params, options.teacher)
del params

requests = Requests({"jaxnr": jaxnr.__version__, "jax": jax.__version__, "device": jax.devices()[0].device_kind})
step = 0
while requests.begin() is not None:
    *prompts, completions = sample(state.params, step)
    if options.what == "grpo":
        reward_BG = rewards(completions)
        requests.sampled()
        batch = scored(*prompts, completions, reward_BG)
    else:
        jax.block_until_ready(completions)
        requests.sampled()
        batch = unscored(*prompts, completions)
    state, metrics = jax.block_until_ready(update(state, batch))
    requests.stop()
    found = {"loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"])}
    requests.answer(requests.measured | found | {"tokens": int(np.sum(completions.mask_BGT))})
    step += 1
