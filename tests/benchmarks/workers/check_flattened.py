"""Prints, as JSON, how far loss and gradient of the flattened twin are from those of the shared step on one batch."""

import json

import jax
import numpy as np
import optax
from jaxnr_step import load, make_sample, make_update, rewards, scored, unscored
from serve import step_arguments

options = step_arguments()
prompt_BS = np.array(json.loads(options.prompts.read_text()), np.int32)
given = optax.trace(decay=0.0)  # its state is the last gradient
batch, results = None, []
for flattened in (False, True):
    model, params = load(options.checkpoint, flattened)
    if batch is None:
        *prompts, completions = make_sample(model, prompt_BS, options.group, options.new_tokens)(params, 0)
        if options.what == "grpo":
            batch = scored(*prompts, completions, rewards(completions))
        else:
            batch = unscored(*prompts, completions)
    state, update = make_update(options.what, model, params, options.teacher, given)
    state, metrics = update(state, batch)
    gradient = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.opt_state)])
    results.append((float(metrics["loss"]), gradient.astype(np.float64)))
(loss, gradient), (flat_loss, flat_gradient) = results
gap = np.linalg.norm(flat_gradient - gradient) / np.linalg.norm(gradient)
print(json.dumps({"loss": abs(flat_loss - loss), "gradient": gap, "gradient_norm": np.linalg.norm(gradient)}))
