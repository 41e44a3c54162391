"""What the comparisons with other systems share: one tiny Qwen2 and batch, and one process a system, each in an
environment of its own, that answers requests."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
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
PACKAGES = {
    "tunix": ["google-tunix"],
    "transformers": ["torch==2.13.0", "transformers>=5"],
    "trl": ["torch==2.13.0", "trl==1.16.0"],
}


class Worker:
    """One system on one prompt length, as a process that answers requests (see workers/serve.py)."""

    def __init__(self, python: Path, script: str, *arguments: object) -> None:
        command = [str(part) for part in (python, WORKERS / script, *arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, env=_variables(), **pipes)
        self.about = self._answer()

    def ask(self, **request: object) -> dict:
        """The worker's answer to one request."""
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
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
            raise SystemExit(f"{' '.join(self.process.args)}: ended without an answer; run it by hand.")
        return json.loads(line)


def environment(folder: Path, name: str) -> Path:
    """The interpreter of an environment, which is made if it is not there."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES[name]], check=True)
    return python


def run(python: Path, script: str, *arguments: object) -> str:
    """What a script of workers/ prints."""
    command = [str(part) for part in (python, WORKERS / script, *arguments)]
    return subprocess.run(command, check=True, text=True, env=_variables(), stdout=subprocess.PIPE).stdout


def write_checkpoint(python: Path, folder: Path, seed: int = 0) -> Path:
    """A Qwen2 of random weights, by an interpreter that has transformers."""
    run(python, "write_checkpoint.py", folder, json.dumps(SHAPE), seed)
    return folder


def write_prompts(folder: Path, length: int) -> Path:
    """A file with random token ids of ``PROMPTS`` prompts of one length."""
    draw = random.Random(length)
    tokens = [[draw.randrange(SHAPE["vocab_size"]) for _ in range(length)] for _ in range(PROMPTS)]
    path = folder / f"prompts_{length}.json"
    path.write_text(json.dumps(tokens))
    return path


def machine() -> dict:
    """What the figures were measured on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    load = os.getloadavg()[0]
    return {"cpu": model, "cores": os.cpu_count(), "load": load, "python": platform.python_version()}


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def _variables() -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "OMP_WAIT_POLICY": "PASSIVE",  # torch's threads would spin on a busy machine, which slows it several times
    }
