"""Eight virtual CPU devices for every test; set before anything imports jax."""

import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of the finished tiny run, in its surroundings; only for tests of the xdist group "tiny_run"."""
    from tiny_run import finished_run, tiny_surroundings

    folder = finished_run(tmp_path_factory.getbasetemp())
    with tiny_surroundings(tmp_path_factory.getbasetemp()):
        yield folder
