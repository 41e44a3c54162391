"""What a process frees stays with it: the same memory costs no page faults again."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")

FAULTS_OF_TEN_ARRAYS = """
import resource
import numpy as np
from jaxnr.memory import keep_freed_memory

keep_freed_memory()
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Each is of 64 MiB, that is 32 pages where they are large and 16384 where they are small."""


def faults(**environment):
    known = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", FAULTS_OF_TEN_ARRAYS]
    done = subprocess.run(command, env=known | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_memory_is_kept():
    assert faults() < 100


def test_what_the_environment_says_of_malloc_comes_first():
    assert faults(MALLOC_TRIM_THRESHOLD_="0") >= 320
