"""Names of slices, and the topologies and figures behind them."""

import pytest

from jaxnr.errors import InputError
from jaxnr.planning import slices
from jaxnr.planning.slices import CHIPS, find_slice, slice_devices, slice_names, without_a_tpu


@pytest.mark.parametrize(
    ("name", "chips", "topology"),
    [
        ("v5e-64", 64, "8x8"),
        ("v5litepod-16", 16, "4x4"),
        ("v6e-32", 32, "4x8"),
        ("v6e-8", 8, "2x4"),
        ("v5p-64", 32, "2x4x4"),  # TensorCores, two a chip
        ("v4-32", 16, "2x2x4"),
        ("tpu7x-128", 64, "4x4x4"),
    ],
)
def test_a_name_counts_chips_or_their_cores(name, chips, topology):
    found = find_slice(name)
    assert (found.chips, found.topology) == (chips, topology)


def test_every_name_is_found_and_its_topology_has_its_chips():
    for name in slice_names():
        found = find_slice(name)
        product = 1
        for side in found.topology.split("x"):
            product *= int(side)
        assert product == found.chips
        assert int(name.partition("-")[2]) == found.chips * found.chip.cores_in_name


@pytest.mark.parametrize("name", ["v5e-63", "v5p-63", "v5p-4", "v3-8", "v5e", "v5e-", "gpu", ""])
def test_other_names_are_an_input_error_that_lists_the_known_ones(name):
    with pytest.raises(InputError, match="v5e-64"):
        find_slice(name)


def test_a_device_of_tpu7x_is_half_a_chip():
    found = find_slice("tpu7x-8")
    assert found.memory == CHIPS["tpu7x"].memory / 2
    assert found.flops == CHIPS["tpu7x"].flops / 2
    assert find_slice("v5e-8").memory == CHIPS["v5e"].memory


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"jaxnr\[tpu\]"):
        without_a_tpu()


@pytest.mark.slow
@pytest.mark.parametrize("chip", list(CHIPS))
def test_the_compiler_has_as_many_devices_as_the_table_says(chip):
    pytest.importorskip("libtpu")
    without_a_tpu()
    for chips in list(slices._TOPOLOGIES[chip])[:3]:
        found = find_slice(f"{chip}-{chips * CHIPS[chip].cores_in_name}")
        assert len(slice_devices(found)) == found.chips * found.chip.devices
