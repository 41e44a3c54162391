"""A full disk stops training with the last checkpoint intact, and an error that names the folder."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxnr.checkpoint import Checkpoints
from jaxnr.errors import InputError
from jaxnr.files import write_text
from jaxnr.training.metrics import MetricsLog, read_metrics
from jaxnr.training.steps import TrainState

WORKER = Path(__file__).parent / "on_full_disk.py"


class LargestFile:
    """While it is open, no file of this process grows past so many bytes: writes fail, as on a full disk."""

    def __init__(self, size: int):
        self._size = size

    def __enter__(self):
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, self._before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


def state_of(value: float) -> TrainState:
    rng = np.random.default_rng(int(value))
    return TrainState(jnp.int32(0), {"weights": jnp.asarray(rng.normal(size=200_000))}, ())


def test_a_checkpoint_that_does_not_fit_is_an_input_error_and_the_one_before_stays_whole(tmp_path):
    folder = tmp_path / "stage"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state_of(1), {"next": 1})
    with pytest.raises(InputError) as caught, LargestFile(200_000), Checkpoints(folder) as checkpoints:
        checkpoints.save(7, state_of(2), {"next": 2})
    assert str(caught.value).startswith(f"{folder}: the checkpoint of step 7 cannot be written: ")
    assert str(caught.value).endswith("the same command with --resume goes on from step 3.")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.newest_whole() == 3
        checkpoints.discard_after(3)
        assert [path.name for path in folder.iterdir()] == ["3"]
        restored, data = checkpoints.restore(state_of(5))
    np.testing.assert_array_equal(restored.params["weights"], state_of(1).params["weights"])
    assert data == {"next": 1}


def test_the_error_comes_at_the_next_save_at_the_latest(tmp_path):
    with LargestFile(200_000), Checkpoints(tmp_path / "stage") as checkpoints:
        checkpoints.save(1, state_of(1), {})
        with pytest.raises(InputError, match=r"step 1 cannot be written.*there is none before"):
            checkpoints.save(2, state_of(2), {})


def test_a_row_that_does_not_fit_leaves_the_log_as_it_was(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("sft", 1, {"loss": 1.0})
    before = log.path.read_bytes()
    with LargestFile(len(before) + 10), pytest.raises(InputError, match=r"metrics\.jsonl: cannot be written"):
        log.write("sft", 2, {"loss": 0.5})
    assert log.path.read_bytes() == before
    log.write("sft", 2, {"loss": 0.5})
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2]


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    write_text(tmp_path / "a.json", "old")
    with LargestFile(1000), pytest.raises(InputError, match=r"a\.json: cannot be written: .*Make room there"):
        write_text(tmp_path / "a.json", "new" * 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_training_stops_on_a_really_full_disk_and_goes_on_when_there_is_room(tmp_path):
    """On a tmpfs of its own, in a user namespace, where this machine lets one be made."""
    mount = 'mount -t tmpfs -o size=700k none "$1" && shift && exec "$@"'
    small = tmp_path / "small"
    small.mkdir()
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", small]
    try:
        if subprocess.run([*inside, "true"], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    done = subprocess.run([*inside, sys.executable, WORKER, small, tmp_path / "large"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["message"].startswith(f"{small}/")
    assert "No space left on device" in found["message"]
    assert found["whole"] >= 2
    assert found["rows"] == list(range(1, len(found["rows"]) + 1))
    assert found["rows_after"] == list(range(1, 9))
    assert found["equal"]
    assert found["left"] == ["6", "8"]
