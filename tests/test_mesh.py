"""The mesh and the table from parameter path to PartitionSpec."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiny import TINY, UNOPTIMISED, tiny_decoder

from jaxnr.config import Config, DistillConfig, MeshConfig, OptimizerConfig
from jaxnr.errors import InputError
from jaxnr.mesh import (
    AXES,
    abstract_on,
    batch_sharding,
    batch_ways,
    check_batch_sizes,
    make_mesh,
    partition_spec,
    spread,
    traced_on,
    tree_shardings,
)
from jaxnr.models import encoder
from jaxnr.models.decoder import init_params
from jaxnr.training.steps import make_optimizer


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=8), (1, 8, 1)),
        (MeshConfig(data=4, tensor=-1), (4, 1, 2)),
    ],
)
def test_the_mesh_has_the_configured_shape_and_automatic_axes(config, shape):
    mesh = make_mesh(config)
    assert tuple(mesh.shape[axis] for axis in AXES) == shape
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3),
        MeshConfig(data=16),
        MeshConfig(data=2),
        MeshConfig(data=0),
        MeshConfig(data=-2),
        MeshConfig(data=-1, fsdp=-1),
        MeshConfig(data=-1, fsdp=3),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_an_input_error(config):
    with pytest.raises(InputError, match="mesh"):
        make_mesh(config)


def test_devices_of_several_tpu_slices_are_an_input_error():
    devices = [SimpleNamespace(platform="tpu", slice_index=index // 4) for index in range(8)]
    with pytest.raises(InputError, match="several TPU slices"):
        make_mesh(MeshConfig(), devices)


def leaves(tree, mesh):
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    specs = [sharding.spec for sharding in jax.tree.leaves(tree_shardings(tree, mesh))]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): spec for path, spec in zip(paths, specs, strict=True)
    }


def test_each_device_computes_its_own_prompts_with_gathered_weights():
    """Of the feed-forward activations a device has those of one prompt; left to itself the partitioner gives it a part
    of the width of all eight, and adds up every product over the devices."""
    mesh, model, S, F = make_mesh(MeshConfig(data=1, fsdp=8)), tiny_decoder(), 16, TINY.intermediate_size
    params = abstract_on(jax.eval_shape(lambda: init_params(model, jax.random.key(0))), mesh)
    prompts = [jax.ShapeDtypeStruct((8, S), dtype, sharding=batch_sharding(mesh)) for dtype in (jnp.int32, bool)]

    def forward(params, *prompts):
        return model.apply({"params": params}, *prompts)

    def program(function) -> str:
        return jax.jit(function).lower(params, *prompts).compile(UNOPTIMISED).as_text()

    held, free = program(traced_on(mesh, forward)), program(forward)
    assert f"[1,{S},{F}]" in held
    assert f"[8,{S},{F}]" not in held
    assert "all-reduce" not in held
    assert f"[8,{S},{F}]" in free


def test_an_activation_that_does_not_divide_or_has_no_mesh_is_left_as_it_is():
    mesh, x = make_mesh(MeshConfig(data=1, fsdp=8)), jnp.arange(6.0)
    assert spread(x) is x
    assert jax.jit(traced_on(mesh, spread))(x).tolist() == x.tolist()
    assert (batch_ways(), batch_ways(mesh)) == (1, 8)


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_shards_every_parameter_but_the_norms_and_their_moments_alike(tied):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = tiny_decoder(tie_word_embeddings=tied)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    specs = leaves(params, mesh)
    for name, spec in specs.items():
        assert any(spec) == ("norm" not in name), name
    opt_state = jax.eval_shape(make_optimizer(OptimizerConfig(), 10).init, params)
    moments = leaves(opt_state, mesh)
    for name, spec in specs.items():
        assert [other for path, other in moments.items() if path.endswith(f"/{name}")] == [spec, spec], name


ENCODER = encoder.EncoderConfig(
    model_type="roberta",
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=20,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
    hidden_act="gelu",
    initializer_range=0.02,
    pad_token_id=1,
)


def test_the_table_shards_every_matrix_of_encoders_and_classifiers():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows, columns = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")
    layers = {
        **{f"layers/{name}/kernel": rows for name in ("query", "key", "value", "intermediate")},
        **{f"layers/{name}/bias": P(None, "tensor") for name in ("query", "key", "value", "intermediate")},
        **{f"layers/{name}/kernel": columns for name in ("attention_output", "output")},
        "word_embeddings/embedding": P("tensor", "fsdp"),
    }
    head = {
        "classifier_dense/kernel": P("fsdp", "tensor"),
        "classifier_dense/bias": P("tensor"),
        "classifier_out/kernel": P("tensor", None),  # three labels cannot be spread over two devices
    }
    whole = {f"encoder/{name}": spec for name, spec in layers.items()} | head
    for model, expected in (
        (encoder.Encoder(ENCODER), layers),
        (encoder.Classifier(ENCODER, ("a", "b", "c")), whole),
    ):
        specs = leaves(jax.eval_shape(lambda m=model: encoder.init_params(m, jax.random.key(0))), mesh)
        assert {name: spec for name, spec in specs.items() if any(spec)} == expected
        replicated = {name.split("/")[-2] for name in specs if name not in expected}
        assert {"position_embeddings", "embeddings_norm", "attention_norm", "output_norm"} <= replicated


def test_an_axis_that_does_not_divide_its_dimension_is_left_out():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    assert partition_spec("layers/q_proj/kernel", (2, 32, 32), mesh) == P(None, "fsdp", "tensor")
    assert partition_spec("layers/q_proj/kernel", (2, 30, 32), mesh) == P(None, None, "tensor")
    assert partition_spec("embed_tokens/embedding", (61, 32), mesh) == P(None, "fsdp")
    assert partition_spec("something/else", (8, 8), mesh) == P()


def test_prompts_are_spread_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert batch_sharding(mesh).shard_shape((8, 3)) == (2, 3)


def test_prompts_that_cannot_be_spread_evenly_are_an_input_error_that_names_the_setting():
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    check_batch_sizes(Config(), mesh)
    uneven = Config(distill=DistillConfig(prompts_per_step=6))
    with pytest.raises(InputError, match=r"`distill.prompts_per_step` is 6: expected a multiple of 4"):
        check_batch_sizes(uneven, mesh)
    check_batch_sizes(uneven, make_mesh(MeshConfig(data=2, tensor=4)))
