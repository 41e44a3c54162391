"""What the workers share: requests as JSON lines on stdin, answers as JSON lines on stdout. Only the standard library,
because every worker runs in an environment of its own."""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """``checkpoint``: a Hugging Face folder. ``prompts``: a JSON file with the token ids of the prompts, all of one
    length. ``group``: completions a prompt. ``new_tokens``: tokens a completion, never fewer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("group", type=int)
    parser.add_argument("new_tokens", type=int)
    return parser


def arguments() -> argparse.Namespace:
    """Of a worker that samples."""
    return parser().parse_args()


def step_arguments() -> argparse.Namespace:
    """Of a worker that trains. ``what``: grpo or distill. ``teacher``: a Hugging Face folder, for distillation."""
    steps = parser()
    steps.add_argument("what", choices=["grpo", "distill"])
    steps.add_argument("teacher", type=Path)
    steps.add_argument("--variant", default="", help="which of a system's ways")
    return steps.parse_args()


class Requests:
    """Requests one at a time, for a worker whose library runs the loop: ``begin``, ``stop``, ``answer``, and again.

    The first line on stdout, before any request, is ``about``; what libraries print goes to stderr.
    """

    def __init__(self, about: dict[str, str]) -> None:
        self._answers, sys.stdout = sys.stdout, sys.stderr
        self.answer(about)

    def begin(self) -> dict | None:
        """The next request, or None where there are no more. Its time starts here."""
        line = sys.stdin.readline()
        self._lap: float | None = None
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        return json.loads(line) if line else None

    def sampled(self) -> None:
        """Marks the end of the rollout within a request."""
        self._lap = time.perf_counter() - self._started

    def stop(self) -> None:
        """Ends the request's time; ``cpu_seconds`` is that of all threads, ``peak_mib`` the process's memory so far."""
        self.measured = {
            "seconds": time.perf_counter() - self._started,
            "cpu_seconds": time.process_time() - self._cpu_started,
            "rollout_seconds": self._lap,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }

    def answer(self, values: dict) -> None:
        """Sends what a request has given."""
        print(json.dumps(values), file=self._answers, flush=True)


def serve(sample: Callable[[int, bool], list[list[int]]], about: dict[str, str]) -> None:
    """Answers each request {"seed", "greedy"} with what was measured, {"tokens", "rows"}.

    ``sample(seed, greedy)`` gives the tokens of every completion, the group of a prompt in consecutive rows; the time
    is that of the call alone. ``rows`` are sent for greedy requests only.
    """
    requests = Requests(about)
    while request := requests.begin():
        rows = sample(request["seed"], request["greedy"])
        requests.stop()
        found = {"tokens": sum(map(len, rows)), "rows": rows if request["greedy"] else None}
        requests.answer(requests.measured | found)


def reward(completion: list[int]) -> float:
    """The trivial reward: the share of even tokens."""
    return sum(token % 2 == 0 for token in completion) / len(completion)
