"""Tokens per second of jaxnr's sampler, google-tunix's sampler and transformers' ``generate``, in one run.

    python tests/benchmarks/rollouts.py --environments FOLDER

Each system is a process in an environment of its own (jaxnr: the one that runs this script; the others are made in
FOLDER with venv and pip if they are not there), reads the same random checkpoint, and samples G completions of the same
prompts, none of which ends early. Systems take turns within every repeat, so that other work on the machine meets all
alike; medians count. Where the machine is busy the ratio of CPU seconds is the steadier one. Before that each warms up,
and greedy completions are compared: the models are the same.
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
    write_checkpoint,
    write_prompts,
)


def compare(pythons: dict[str, Path], checkpoint: Path, length: int, repeats: int, scratch: Path) -> dict:
    """Seconds of every call and peak memory of every system at one prompt length."""
    arguments = (checkpoint, write_prompts(scratch, length), GROUP, NEW_TOKENS)
    workers = {system: Worker(python, f"with_{system}.py", *arguments) for system, python in pythons.items()}
    greedy = {system: worker.ask(seed=0, greedy=True)["rows"] for system, worker in workers.items()}
    answers: dict[str, list[dict]] = {system: [] for system in workers}
    for repeat in range(repeats + 1):  # the first warms up
        for system, worker in workers.items():
            answer = worker.ask(seed=repeat, greedy=False)
            answers[system].append(answer)
            took = f"{answer['seconds']:.2f} s, CPU {answer['cpu_seconds']:.2f} s"
            print(f"prompt {length}, repeat {repeat}: {system} {took}", file=sys.stderr)
    for worker in workers.values():
        worker.close()
    result = {}
    for system, given in answers.items():
        assert {answer["tokens"] for answer in given} == {PROMPTS * GROUP * NEW_TOKENS}
        seconds = [answer["seconds"] for answer in given[1:]]
        same = [a == b for ours, row in zip(greedy["jaxnr"], greedy[system], strict=True) for a, b in zip(ours, row)]  # noqa: B905
        result[system] = {
            "about": workers[system].about,
            "seconds": seconds,
            "cpu_s": statistics.median(answer["cpu_seconds"] for answer in given[1:]),
            "tokens_per_s": PROMPTS * GROUP * NEW_TOKENS / statistics.median(seconds),
            "peak_mib": given[-1]["peak_mib"],
            "greedy_tokens_as_jaxnr": statistics.fmean(same),
        }
    for system in result:
        pairs = zip(result[system]["seconds"], result["jaxnr"]["seconds"], strict=True)
        result[system]["times_jaxnr_is_faster"] = statistics.median(theirs / ours for theirs, ours in pairs)
        result[system]["times_cpu_seconds"] = result[system]["cpu_s"] / result["jaxnr"]["cpu_s"]
    return result


def table(results: dict[int, dict]) -> str:
    """The results in Markdown."""
    heads = ["prompt", "system", "tokens/s", "slowest–fastest", "jaxnr is faster by", "CPU seconds"]
    heads += ["times those of jaxnr", "peak memory, MiB", "greedy tokens as jaxnr"]
    made = PROMPTS * GROUP * NEW_TOKENS
    rows = [
        [
            str(length),
            system,
            f"{row['tokens_per_s']:.0f}",
            f"{made / max(row['seconds']):.0f}–{made / min(row['seconds']):.0f}",
            f"{row['times_jaxnr_is_faster']:.2f}×",
            f"{row['cpu_s']:.2f}",
            f"{row['times_cpu_seconds']:.2f}×",
            f"{row['peak_mib']:.0f}",
            f"{row['greedy_tokens_as_jaxnr']:.0%}",
        ]
        for length, systems in results.items()
        for system, row in systems.items()
    ]
    return markdown(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, required=True, help="folder of the other systems' environments")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="tokens a prompt")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    others = {name: environment(options.environments, name) for name in ("tunix", "transformers")}
    pythons = {"jaxnr": Path(sys.executable)} | others
    print(f"Qwen2 {SHAPE}, float32; {PROMPTS} prompts × {GROUP} completions × {NEW_TOKENS} tokens.\n")
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = write_checkpoint(pythons["transformers"], Path(scratch) / "checkpoint")
        results = {
            length: compare(pythons, checkpoint, length, options.repeats, Path(scratch)) for length in options.lengths
        }
    print(table(results))
    print(f"\n```json\n{json.dumps({'machine': machine(), 'shape': SHAPE, 'results': results})}\n```")


if __name__ == "__main__":
    main()
