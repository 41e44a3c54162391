"""A process of a tiny run: ``python one_process.py DEVICES CONFIG OUT STAGES [DISTRIBUTED]``, started by test_hosts.py.

It walks the stages as the command line does, with so many virtual devices, through the world of tiny_run.py.
"""

import os
import sys
from pathlib import Path

devices, config, out, stages, *distributed = sys.argv[1:]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"

import jax  # noqa: E402
from tiny_run import WORLD  # noqa: E402

import jaxnr.data.prepare  # noqa: E402
from jaxnr import cli  # noqa: E402
from jaxnr.config import load_config  # noqa: E402
from jaxnr.data.synthetic.world import generate_world  # noqa: E402

jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", str(Path(out).parent / "programs"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jaxnr.data.prepare.generate_world = lambda seed: generate_world(seed, WORLD)


class Walk:
    """Stands for the parsed command line: ``cli.main`` runs it and turns mistakes into exit codes."""

    def __call__(self) -> None:
        cli._walk(load_config(Path(config)), Path(out), tuple(stages.split(",")), True, *(distributed or [""]))


cli._parse = lambda _: Walk()
cli.main()
