"""Seconds of whole training steps: jaxnr, its flattened twin, google-tunix and TRL, in one run.

    python tests/benchmarks/steps.py --environments FOLDER [--what grpo distill] [--systems ...] [--lengths ...]

A Dr.GRPO step is rollout, a trivial reward (the share of even tokens), and one update; a distillation step is rollout
and one update by exact reverse KL to a teacher of the same shape. Each system is a process in an environment of its own
(see harness.py), reads the same random checkpoints, and steps on the same prompts: none of the completions ends early,
float32, AdamW at a constant 1e-6 (β 0.9 and 0.999, ε 1e-8, no decay) after clipping to norm 1, activations kept rather
than computed again, β = 0 (no reference model), one update a batch. Systems take turns step by step, so that other work
on the machine meets all alike; medians count, and the first step, which compiles, does not. Where the machine is busy
the ratio of CPU seconds is the steadier one. ``peak_mib`` is the largest resident size of the whole process,
compilation included. That the steps do the same work is seen in the gradient norm, which for equal work differs only by
what was sampled; and for distillation in the loss, the mean KL a token.

- ``jaxnr``: ``make_sampler`` and ``make_grpo_step`` or ``make_distill_step``. Log-probabilities at sampling come from
  the sampler. Its process does without torch, which jaxnr does not need but which transformers would load.
- ``jaxnr-flat``: the same functions, each prompt repeated for each of its completions in the sampler and in the model.
  Before the timing, loss and gradient are compared with those of the shared step on one batch.
- ``tunix`` (Dr.GRPO only): its DrGRPOLearner and RLCluster, own rollout. It computes no log-probabilities before the
  update but takes those of the update itself as the old ones. It also computes the entropy of the policy, for its
  metrics.
- ``trl``: GRPOTrainer (loss_type "dr_grpo", no scaling of rewards), transformers' ``generate``. Old log-probabilities
  and entropy as with tunix. Distillation: DistillationTrainer with beta = 1, in its convention reverse KL, whose loss
  goes over chunks of logits; GKDTrainer names it as the one to use where all samples are the student's.
- ``trl-gkd`` (distillation only): GKDTrainer with lmbda = 1 (all samples are the student's) and beta = 1, in its
  convention too reverse KL. Its logits are of prompt and completion.

The other systems turn prompts from text into tokens, and tunix completions into text, which is thousandths of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from harness import (
    GROUP,
    NEW_TOKENS,
    PROMPTS,
    SHAPE,
    Worker,
    environment,
    machine,
    markdown,
    run,
    write_checkpoint,
    write_prompts,
)

SYSTEMS = {
    # name: (environment, or None for the one that runs this script; what it can do; variant)
    "jaxnr": (None, ("grpo", "distill"), ""),
    "jaxnr-flat": (None, ("grpo", "distill"), "flat"),
    "tunix": ("tunix", ("grpo",), ""),
    "trl": ("trl", ("grpo", "distill"), ""),
    "trl-gkd": ("trl", ("distill",), "gkd"),
}
TOLERANCE = 1e-4
"""Of the flattened twin: loss, and gradient by relative norm."""


def compare(what: str, pythons: dict[str, Path], arguments: tuple, length: int, repeats: int) -> dict:
    """Seconds of every step and peak memory of every system at one prompt length."""
    workers = {}
    for system, python in pythons.items():
        name, variant = system.split("-")[0], SYSTEMS[system][2]
        workers[system] = Worker(python, f"step_{name}.py", *arguments, "--variant", variant)
    answers: dict[str, list[dict]] = {system: [] for system in workers}
    for repeat in range(repeats + 1):  # the first compiles
        for system, worker in workers.items():
            answer = worker.ask()
            assert answer["tokens"] == PROMPTS * GROUP * NEW_TOKENS, (system, answer)
            answers[system].append(answer)
            took = f"{answer['seconds']:.2f} s, CPU {answer['cpu_seconds']:.2f} s"
            print(f"{what}, prompt {length}, step {repeat}: {system} {took}", file=sys.stderr)
    for worker in workers.values():
        worker.close()
    result = {system: summary(given[1:]) | {"about": workers[system].about} for system, given in answers.items()}
    for row in result.values() if "jaxnr" in result else ():
        pairs = zip(row["seconds"], result["jaxnr"]["seconds"], strict=True)
        row["times_jaxnr_is_faster"] = statistics.median(theirs / ours for theirs, ours in pairs)
        row["times_cpu_seconds"] = row["cpu_s"] / result["jaxnr"]["cpu_s"]
    return result


def summary(answers: list[dict]) -> dict:
    """Medians over the steps of a system; what it does not tell is None."""

    def median(key: str) -> float | None:
        values = [answer.get(key) for answer in answers]
        return None if None in values else statistics.median(values)

    return {
        "seconds": [answer["seconds"] for answer in answers],
        "median_s": median("seconds"),
        "rollout_s": median("rollout_seconds"),
        "cpu_s": median("cpu_seconds"),
        "peak_mib": answers[-1]["peak_mib"],
        "loss": median("loss"),
        "grad_norm": median("grad_norm"),
    }


def check_flattened(arguments: tuple) -> dict:
    """How far the flattened twin is from the shared step. Ends the program where that is more than rounding."""
    gaps = json.loads(run(Path(sys.executable), "check_flattened.py", *arguments))
    if max(gaps["loss"], gaps["gradient"]) > TOLERANCE:
        raise SystemExit(f"The flattened twin is not the same step: {gaps}; expected gaps up to {TOLERANCE}.")
    return gaps


def table(results: dict[int, dict]) -> str:
    """The results in Markdown."""
    heads = ["prompt", "system", "seconds a step", "fastest–slowest", "of it rollout", "jaxnr is faster by"]
    heads += ["CPU seconds", "times those of jaxnr", "peak memory, MiB", "loss", "gradient norm"]

    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    rows = [
        [
            str(length),
            system,
            f"{row['median_s']:.2f}",
            f"{min(row['seconds']):.2f}–{max(row['seconds']):.2f}",
            cell(row["rollout_s"], ".2f"),
            cell(row.get("times_jaxnr_is_faster"), ".2f"),
            f"{row['cpu_s']:.2f}",
            cell(row.get("times_cpu_seconds"), ".2f"),
            f"{row['peak_mib']:.0f}",
            cell(row["loss"], ".4g"),
            cell(row["grad_norm"], ".3g"),
        ]
        for length, systems in results.items()
        for system, row in systems.items()
    ]
    return markdown(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="folder of the other systems' environments")
    parser.add_argument("--what", choices=["grpo", "distill"], nargs="+", default=["grpo", "distill"])
    parser.add_argument("--systems", choices=list(SYSTEMS), nargs="+", default=list(SYSTEMS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="tokens a prompt")
    parser.add_argument("--repeats", type=int, default=7, help="steps that count, after one that compiles")
    options = parser.parse_args()
    writer = environment(options.environments, "trl")
    pythons = {}
    for system in options.systems:
        name = SYSTEMS[system][0]
        pythons[system] = environment(options.environments, name) if name else Path(sys.executable)
    print(f"Qwen2 {SHAPE}, float32; {PROMPTS} prompts × {GROUP} completions × {NEW_TOKENS} tokens.")
    report: dict = {"machine": machine(), "shape": SHAPE, "results": {}, "flattened": {}}
    with tempfile.TemporaryDirectory() as scratch:
        student, teacher = (write_checkpoint(writer, Path(scratch) / str(seed), seed) for seed in (0, 1))
        for what in options.what:
            able = {system: python for system, python in pythons.items() if what in SYSTEMS[system][1]}
            results, gaps = {}, {}
            for length in options.lengths:
                prompts = write_prompts(Path(scratch), length)
                arguments = (student, prompts, GROUP, NEW_TOKENS, what, teacher)
                if "jaxnr-flat" in able:
                    gaps[length] = check_flattened(arguments)
                results[length] = compare(what, able, arguments, length, options.repeats)
            report["results"][what], report["flattened"][what] = results, gaps
            print(f"\n{what}\n\n{table(results)}", flush=True)
    print(f"\n```json\n{json.dumps(report)}\n```")


if __name__ == "__main__":
    main()
