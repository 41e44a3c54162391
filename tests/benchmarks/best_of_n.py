"""Seconds for N lists of one prompt: one call that prefills it once, against N calls of one list each.

    python tests/benchmarks/best_of_n.py

Both draw the same lists: a list is named by seed, step, prompt and sample, not by the call that draws it. The two ways
take turns; medians count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from rollouts import SHAPE, machine

from jaxnr.models.decoder import Decoder, DecoderConfig, init_params
from jaxnr.sampling.sampler import SamplingSettings, make_sampler

NEW_TOKENS = 64


def seconds(call: Callable[[], list[np.ndarray]]) -> float:
    """What one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare(length: int, lists: int, repeats: int) -> dict:
    """Median seconds of both ways at one prompt length; the first repeat warms up and checks that they agree."""
    names = set(DecoderConfig.__dataclass_fields__) & set(SHAPE)
    head_dim = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    model = Decoder(DecoderConfig(**{name: SHAPE[name] for name in names}, head_dim=head_dim))
    params = init_params(model, jax.random.key(0))
    sampler = make_sampler(model, max_new_tokens=NEW_TOKENS, vocabulary_size=SHAPE["vocab_size"], pad_id=0)
    prompt_BS = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (1, length), np.int32)
    settings, no_stop, zero = SamplingSettings(), np.array([-1], np.int32), np.int32(0)

    def sample(sample_ids: list[int]) -> np.ndarray:
        arguments = (prompt_BS, np.ones_like(prompt_BS, bool), np.zeros(1, np.int32), np.array(sample_ids, np.int32))
        return np.asarray(sampler(params, *arguments, zero, zero, settings, no_stop).tokens_BGT[0])

    def together() -> list[np.ndarray]:
        return list(sample(list(range(lists))))

    def apart() -> list[np.ndarray]:
        return [sample([sample_id])[0] for sample_id in range(lists)]

    agreeing = [np.mean(a == b) for a, b in zip(together(), apart(), strict=True)]
    pairs = [(seconds(together), seconds(apart)) for _ in range(repeats)]
    return {
        "together_s": statistics.median(pair[0] for pair in pairs),
        "apart_s": statistics.median(pair[1] for pair in pairs),
        "times_faster": statistics.median(pair[1] / pair[0] for pair in pairs),
        "same_tokens": float(np.mean(agreeing)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="tokens of the prompt")
    parser.add_argument("--lists", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    results = {length: compare(length, options.lists, options.repeats) for length in options.lengths}
    print(f"Qwen2 {SHAPE}, float32; {NEW_TOKENS} tokens a list.\n")
    print(
        "| prompt | lists | one prefill, s | separate calls, s | faster by | same tokens |\n|---|---|---|---|---|---|"
    )
    for length, row in results.items():
        print(
            f"| {length} | {options.lists} | {row['together_s']:.2f} | {row['apart_s']:.2f} | "
            f"{row['times_faster']:.1f}× | {row['same_tokens']:.1%} |"
        )
    print(f"\n```json\n{json.dumps({'machine': machine(), 'shape': SHAPE, 'results': results})}\n```")


if __name__ == "__main__":
    main()
