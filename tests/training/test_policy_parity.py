"""Parity of the policy losses with TRL's own code: its loss, and its gradient in the log-probabilities.

``GRPOTrainer._compute_loss`` runs on a trainer made without its constructor (which wants a model, a data set and a
checkpoint folder); the model's forward pass alone is replaced, by log-probabilities that are given. Float64 on both
sides.
"""

import collections
import types

import jax
import numpy as np
import pytest

from jaxnr.training.policy_losses import (
    cispo_loss,
    clipped,
    dapo_loss,
    dr_grpo_loss,
    grpo_loss,
    gspo_loss,
    kl_k3,
    sequence_ratio,
    token_ratio,
    truncated_importance_weights,
)

torch = pytest.importorskip("torch", reason="parity needs torch (pip install -e .[parity])")
pytest.importorskip("trl", reason="parity needs TRL (pip install -e .[parity])")

B, G, T = 2, 4, 6
BUDGET, CAP, BETA = 9, 1.3, 0.1
RNG = np.random.default_rng(0)
LOGPROBS = -RNG.exponential(size=(B, G, T))
OLD, SAMPLER, REFERENCE = LOGPROBS + RNG.normal(size=(3, B, G, T)) * 0.3
ADVANTAGES = RNG.normal(size=(B, G))
MASK = np.arange(T) < RNG.permutation(np.arange(B * G) % (T + 1)).reshape(B, G, 1)  # one has no token

NAMES = {
    "dr_grpo": ("dr_grpo", "token"),
    "grpo": ("grpo", "token"),
    "dapo": ("dapo", "token"),
    "bnpo": ("bnpo", "token"),
    "gspo": ("grpo", "sequence"),
    "cispo": ("cispo", "token"),
}
"""Ours to TRL's loss_type and importance_sampling_level. On one batch its bnpo is its dapo."""

RANGE = {"gspo": (0.03, 0.04), "cispo": (1.0, 0.28)}
"""ε_low and ε_high where they are not 0.2 and 0.28: at work on some of the completions, and with no lower bound."""


def of_trl(name: str, weighted: bool, beta: float):
    """TRL's loss, its gradient in the log-probabilities [B, G, T], and its metrics."""
    from trl import GRPOTrainer

    def tensor(array):
        return torch.tensor(array.reshape(B * G, -1))

    logprobs = tensor(LOGPROBS).requires_grad_()
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    loss_type, level = NAMES[name]
    low, high = RANGE.get(name, (0.2, 0.28))
    settings = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}
    vars(trainer).update(
        args=types.SimpleNamespace(**settings),
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=low,
        epsilon_high=1 + high if name == "cispo" else high,  # TRL names the cap itself
        beta=beta,
        max_completion_length=BUDGET,
        use_vllm=weighted,
        vllm_importance_sampling_correction=True,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": collections.defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
    )
    tokens = torch.zeros((B * G, T), dtype=torch.long)
    inputs = {
        "prompt_ids": tokens[:, :1],
        "prompt_mask": torch.ones_like(tokens[:, :1]),
        "completion_ids": tokens,
        "completion_mask": tensor(MASK).long(),
        "advantages": torch.tensor(ADVANTAGES.reshape(-1)),
        "old_per_token_logps": tensor(OLD),
        "ref_per_token_logps": tensor(REFERENCE),
        "importance_sampling_ratio": torch.clamp(torch.exp(tensor(OLD) - tensor(SAMPLER)), max=CAP),
        "num_items_in_batch": torch.tensor(MASK.sum()),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), logprobs.grad.numpy().reshape(B, G, T), trainer._metrics["train"]


def ours(name: str, weighted: bool, beta: float, logprobs):
    function, totals = {
        "dr_grpo": (dr_grpo_loss, {"rows": B * G, "budget": BUDGET}),
        "grpo": (grpo_loss, {"rows": B * G}),
        "dapo": (dapo_loss, {"tokens": MASK.sum()}),
        "bnpo": (dapo_loss, {"tokens": MASK.sum()}),
        "gspo": (gspo_loss, {"rows": B * G}),
        "cispo": (cispo_loss, {"tokens": MASK.sum()}),
    }[name]
    low, high = RANGE.get(name, (0.2, 0.28))
    return function(
        logprobs,
        OLD,
        ADVANTAGES,
        MASK,
        **totals,
        clip_low=low,
        clip_high=high,
        weight_BGT=truncated_importance_weights(OLD, SAMPLER, CAP) if weighted else 1.0,
        penalty_BGT=beta * kl_k3(logprobs, REFERENCE),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("extras", ["plain", "importance weights", "KL", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_trls(name, extras):
    weighted, beta = extras in ("importance weights", "both"), BETA if extras in ("KL", "both") else 0.0
    expected, expected_gradient, metrics = of_trl(name, weighted, beta)
    with jax.enable_x64(True):
        loss, gradient = jax.value_and_grad(lambda x: ours(name, weighted, beta, x))(LOGPROBS)
        ratio = sequence_ratio(LOGPROBS, OLD, MASK) if name == "gspo" else token_ratio(LOGPROBS, OLD)
        cut = np.asarray(clipped(ratio, ADVANTAGES, *RANGE.get(name, (0.2, 0.28))))
        estimate = np.asarray(kl_k3(LOGPROBS, REFERENCE))
    assert loss == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-15)
    assert (np.asarray(gradient) != 0).any()
    clip_metric = metrics["cispo_clip_ratio" if name == "cispo" else "clip_ratio/region_mean"]
    assert cut.any()
    assert clip_metric == [pytest.approx(cut.mean() if name == "gspo" else cut[MASK].mean())]
    if beta:
        assert metrics["kl"] == [pytest.approx(estimate[MASK].mean())]
