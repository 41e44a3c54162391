"""One process of a tiny run: ``python one_of_several.py DEVICES ARGUMENTS OF JAXNR``. tests/test_hosts.py starts it."""

import os
import sys

devices, *arguments = sys.argv[1:]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"

import jax  # noqa: E402
from tiny_run import WORLD  # noqa: E402

import jaxnr.data.prepare  # noqa: E402
from jaxnr import cli  # noqa: E402
from jaxnr.data.synthetic.world import generate_world  # noqa: E402

jax.config.update("jax_disable_most_optimizations", True)
jaxnr.data.prepare.generate_world = lambda seed: generate_world(seed, WORLD)
sys.argv = ["jaxnr", *arguments]
cli.main()
