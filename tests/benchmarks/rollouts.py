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
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WORKERS = Path(__file__).parent / "workers"
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
PROMPTS, GROUP, NEW_TOKENS = 8, 8, 64
PACKAGES = {"tunix": ["google-tunix"], "transformers": ["torch==2.13.0", "transformers>=5"]}


class Worker:
    """One system on one prompt length, as a process that answers requests."""

    def __init__(self, python: Path, system: str, checkpoint: Path, prompts: Path) -> None:
        command = [python, WORKERS / f"with_{system}.py", checkpoint, prompts, str(GROUP), str(NEW_TOKENS)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        environment = os.environ | {
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
            "OMP_WAIT_POLICY": "PASSIVE",  # torch's threads would spin on a busy machine, which slows it several times
        }
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)
        self.about = self._answer()

    def sample(self, seed: int, greedy: bool = False) -> dict:
        """The worker's answer to one request (see workers/serve.py)."""
        assert self.process.stdin is not None
        print(json.dumps({"seed": seed, "greedy": greedy}), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self.process.args))}: ended without an answer; run it by hand.")
        return json.loads(line)


def environment(folder: Path, name: str) -> Path:
    """The interpreter of an environment, which is made if it is not there."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES[name]], check=True)
    return python


def compare(pythons: dict[str, Path], checkpoint: Path, length: int, repeats: int, scratch: Path) -> dict:
    """Seconds of every call and peak memory of every system at one prompt length."""
    prompts = scratch / f"prompts_{length}.json"
    draw = random.Random(length)
    tokens = [[draw.randrange(SHAPE["vocab_size"]) for _ in range(length)] for _ in range(PROMPTS)]
    prompts.write_text(json.dumps(tokens))
    workers = {system: Worker(python, system, checkpoint, prompts) for system, python in pythons.items()}
    greedy = {system: worker.sample(0, greedy=True)["rows"] for system, worker in workers.items()}
    answers: dict[str, list[dict]] = {system: [] for system in workers}
    for repeat in range(repeats + 1):  # the first warms up
        for system, worker in workers.items():
            answer = worker.sample(repeat)
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
    lines = [
        "| prompt | system | tokens/s | slowest–fastest | jaxnr is faster by | CPU seconds | times those of jaxnr | "
        "peak memory, MiB | greedy tokens as jaxnr |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for length, systems in results.items():
        for system, row in systems.items():
            made = PROMPTS * GROUP * NEW_TOKENS
            cells = [
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
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict:
    """What the figures were measured on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    load = os.getloadavg()[0]
    return {"cpu": model, "cores": os.cpu_count(), "load": load, "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, required=True, help="folder of the other systems' environments")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], help="tokens a prompt")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    pythons = {"jaxnr": Path(sys.executable)} | {name: environment(options.environments, name) for name in PACKAGES}
    print(f"Qwen2 {SHAPE}, float32; {PROMPTS} prompts × {GROUP} completions × {NEW_TOKENS} tokens.\n")
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        write = WORKERS / "write_checkpoint.py"
        subprocess.run([pythons["transformers"], write, checkpoint, json.dumps(SHAPE)], check=True)
        results = {
            length: compare(pythons, checkpoint, length, options.repeats, Path(scratch)) for length in options.lengths
        }
    print(table(results))
    print(f"\n```json\n{json.dumps({'machine': machine(), 'shape': SHAPE, 'results': results})}\n```")


if __name__ == "__main__":
    main()
