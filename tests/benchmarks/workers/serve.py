"""What the workers share: requests as JSON lines on stdin, answers as JSON lines on stdout. Only the standard library,
because every worker runs in an environment of its own."""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path


def arguments() -> argparse.Namespace:
    """``checkpoint``: a Hugging Face folder. ``prompts``: a JSON file with the token ids of the prompts, all of one
    length. ``group``: completions a prompt. ``new_tokens``: tokens a completion, never fewer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("group", type=int)
    parser.add_argument("new_tokens", type=int)
    return parser.parse_args()


def serve(sample: Callable[[int, bool], list[list[int]]], about: dict[str, str]) -> None:
    """Answers each request {"seed", "greedy"} with {"seconds", "cpu_seconds", "tokens", "peak_mib", "rows"}.

    ``sample(seed, greedy)`` gives the tokens of every completion, the group of a prompt in consecutive rows; the time
    is that of the call alone, and ``cpu_seconds`` that of all its threads. ``rows`` are sent for greedy requests only.
    ``peak_mib`` is the process's peak memory so far. The first line, before any request, is ``about``.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        started, cpu_started = time.perf_counter(), time.process_time()
        rows = sample(request["seed"], request["greedy"])
        answer = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "tokens": sum(map(len, rows)),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "rows": rows if request["greedy"] else None,
        }
        print(json.dumps(answer), file=answers, flush=True)
