"""Collectives and memory traffic, read from compiled programs and from text as the TPU compiler writes it."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnr.config import MeshConfig
from jaxnr.mesh import make_mesh
from jaxnr.planning.hlo import Collective, Program

L, D, B = 40, 64, 16


def scanned(x, weights):
    return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    """Weights whose rows are on different devices: every layer adds up its products over them."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=8))

    def shape(sizes, *spec):
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    def program(x, weights):
        def layer(x, weight):
            y = jax.lax.with_sharding_constraint(x @ weight, NamedSharding(mesh, P()))
            return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P(None, "tensor"))), None

        return jax.lax.scan(layer, x, weights)[0]

    compiled = jax.jit(program).lower(shape((B, D), None, "tensor"), shape((L, D, D), None, "tensor")).compile()
    found = Program(compiled.as_text()).collectives()
    assert found == {"all-reduce": Collective(L, L * B * D * 4)}


def test_of_scanned_weights_each_layer_reads_its_own():
    arguments = jax.ShapeDtypeStruct((B, D), jnp.float32), jax.ShapeDtypeStruct((L, D, D), jnp.float32)
    moved = Program(jax.jit(scanned).lower(*arguments).compile().as_text()).memory_bytes()
    weights, activations = 4 * L * D * D, 4 * L * B * D
    # A CPU may copy a layer before it reads it; all layers at each step would be L times the weights.
    assert weights + 2 * activations <= moved < 6 * weights


TPU_TEXT = """HloModule jit_f, is_scheduled=true

%fused (p.0: f32[8,64,64], p.1: s32[]) -> f32[64,64] {
  %p.0 = f32[8,64,64]{2,1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = f32[1,64,64]{2,1,0:T(8,128)} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %cast = f32[64,64]{1,0:T(8,128)} bitcast(%slice)
}

%cond (c.0: (s32[], f32[8,64,64])) -> pred[] {
  %bound = s32[]{:T(128)} constant(8)
  %c.0 = (s32[]{:T(128)}, f32[8,64,64]{2,1,0:T(8,128)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%c.0), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %bound), direction=LT
}

%body (b.0: (s32[], f32[8,64,64])) -> (s32[], f32[8,64,64]) {
  %b.0 = (s32[]{:T(128)}, f32[8,64,64]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b.0), index=0
  %w = f32[8,64,64]{2,1,0:T(8,128)} get-tuple-element(%b.0), index=1
  %layer = f32[64,64]{1,0:T(8,128)} fusion(%w, %i), kind=kLoop, calls=%fused
  %near = f32[64,64]{1,0:T(8,128)S(1)} copy(%layer)
  %start = (f32[64,64]{1,0:T(8,128)S(1)}, f32[512,64]{1,0:T(8,128)S(1)}) all-gather-start(%near), dimensions={0}
  %done = f32[512,64]{1,0:T(8,128)S(1)} all-gather-done(%start)
  ROOT %next = (s32[]{:T(128)}, f32[8,64,64]{2,1,0:T(8,128)}) tuple(%i, %w)
}

ENTRY %main (a.0: s32[], a.1: f32[8,64,64]) -> f32[8,64,64] {
  %a.0 = s32[]{:T(128)} parameter(0)
  %a.1 = f32[8,64,64]{2,1,0:T(8,128)} parameter(1)
  %both = (s32[]{:T(128)}, f32[8,64,64]{2,1,0:T(8,128)}) tuple(%a.0, %a.1)
  %loop = (s32[]{:T(128)}, f32[8,64,64]{2,1,0:T(8,128)}) while(%both), condition=%cond, body=%body
  ROOT %out = f32[8,64,64]{2,1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_trips_come_from_the_condition_and_other_memories_do_not_count():
    program = Program(TPU_TEXT)
    assert program.collectives() == {"all-gather": Collective(8, 8 * 512 * 64 * 4)}
    layer, index = 64 * 64 * 4, 4
    # The fusion reads one layer and its number and writes it; the copy reads it, into a nearer memory.
    condition = 4 + 4 + 1  # the comparison reads two numbers and writes a bit
    assert program.memory_bytes() == 8 * (2 * layer + index + layer + condition)


def test_of_a_conditional_the_branch_that_moves_least_is_taken():
    def choose(x):
        return jax.lax.cond(x.sum() > 0, lambda: jnp.sort(x @ x, axis=0), lambda: x)

    def dear(x):
        return jnp.sort(x @ x, axis=0)

    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)

    def choose_other(x):
        return jax.lax.cond(x.sum() > 0, lambda: x, lambda: jnp.sort(x @ x, axis=0))

    functions = (choose, choose_other, dear)
    first, second, one = (Program(jax.jit(f).lower(x).compile().as_text()).memory_bytes() for f in functions)
    assert max(first, second) < one


OVERLAPPED_TEXT = """HloModule jit_f, is_scheduled=true

%starts (p.0: bf16[64,8]) -> (bf16[64,8], bf16[64,128], s32[2]) {
  %p.0 = bf16[64,8]{0,1:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[64,128]{0,1:T(8,128)(2,1)} all-gather(%p.0), channel_id=3, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %started = (bf16[64,8]{0,1:T(8,128)(2,1)}, bf16[64,128]{0,1:T(8,128)(2,1)}, s32[2]{0:S(4)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (q.0: bf16[64,8], q.1: bf16[64,128], q.2: s32[2], q.3: f32[16,16]) -> (f32[16,16], bf16[64,8], bf16[64,128], bf16[64,128], s32[2]) {
  %q.0 = bf16[64,8]{0,1:T(8,128)(2,1)} parameter(0)
  %q.1 = bf16[64,128]{0,1:T(8,128)(2,1)} parameter(1)
  %q.2 = s32[2]{0:S(4)} parameter(2)
  %q.3 = f32[16,16]{1,0:T(8,128)} parameter(3)
  %gather.2 = bf16[64,128]{0,1:T(8,128)(2,1)} all-gather(%q.0), channel_id=3, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  %work = f32[16,16]{1,0:T(8,128)} tanh(%q.3)
  ROOT %both = (f32[16,16]{1,0:T(8,128)}, bf16[64,8]{0,1:T(8,128)(2,1)}, bf16[64,128]{0,1:T(8,128)(2,1)}, bf16[64,128]{0,1:T(8,128)(2,1)}, s32[2]{0:S(4)}) tuple(%work, %q.0, %q.1, %gather.2, %q.2)
}

%ends (r.0: bf16[64,8], r.1: bf16[64,128], r.2: s32[2]) -> bf16[64,128] {
  %r.0 = bf16[64,8]{0,1:T(8,128)(2,1)} parameter(0)
  %r.1 = bf16[64,128]{0,1:T(8,128)(2,1)} parameter(1)
  %r.2 = s32[2]{0:S(4)} parameter(2)
  %gather.3 = bf16[64,128]{0,1:T(8,128)(2,1)} all-gather(%r.0), channel_id=3, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %ended = bf16[64,128]{0,1:T(8,128)(2,1)} custom-call(%r.0, %r.1, %gather.3, %r.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a.0: bf16[64,8], a.1: f32[16,16]) -> bf16[64,128] {
  %a.0 = bf16[64,8]{0,1:T(8,128)(2,1)} parameter(0)
  %a.1 = f32[16,16]{1,0:T(8,128)} parameter(1)
  %start = (bf16[64,8]{0,1:T(8,128)(2,1)}, bf16[64,128]{0,1:T(8,128)(2,1)}, s32[2]{0:S(4)}) fusion(%a.0), kind=kCustom, calls=%starts
  %s.0 = bf16[64,8]{0,1:T(8,128)(2,1)} get-tuple-element(%start), index=0
  %s.1 = bf16[64,128]{0,1:T(8,128)(2,1)} get-tuple-element(%start), index=1
  %s.2 = s32[2]{0:S(4)} get-tuple-element(%start), index=2
  %step = (f32[16,16]{1,0:T(8,128)}, bf16[64,8]{0,1:T(8,128)(2,1)}, bf16[64,128]{0,1:T(8,128)(2,1)}, bf16[64,128]{0,1:T(8,128)(2,1)}, s32[2]{0:S(4)}) fusion(%s.0, %s.1, %s.2, %a.1), kind=kCustom, calls=%async_collective_fusion.1
  ROOT %done = bf16[64,128]{0,1:T(8,128)(2,1)} fusion(%s.0, %s.1, %s.2), kind=kCustom, calls=%ends
}
"""  # noqa: E501


def test_a_collective_that_fusions_carry_on_beside_their_own_work_counts_once():
    program = Program(OVERLAPPED_TEXT)
    part, whole, work = 64 * 8 * 2, 64 * 128 * 2, 16 * 16 * 4
    assert program.collectives() == {"all-gather": Collective(1, whole)}
    assert program.memory_bytes() == part + whole + 2 * work
