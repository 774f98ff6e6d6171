"""What devices send each other, read off a program's text: forms that compilers write, and programs compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from daajax import sharding
from daajax.planning.collectives import collectives_of, groups_of
from daajax.planning.programs import Program

# Lines as the compilers of a GPU (jax 0.10.2) and of a TPU (libtpu 0.0.42) write them, with other sizes.
GPU = """HloModule jit_update, is_scheduled=true

%cond (arg: (s32[], bf16[4,8])) -> pred[] {
  %arg = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %lt = pred[] fusion(%arg), kind=kLoop, calls=%wrapped
}

%body (arg.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg.1 = (s32[], bf16[4,8]{1,0}) parameter(0)
  %gathers = ((bf16[4,8]{1,0}, bf16[4,2]{1,0}), (bf16[32,8]{1,0}, bf16[32,2]{1,0})) all-gather-start(%a, %b), channel_id=14, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %gathered = (bf16[32,8]{1,0}, bf16[32,2]{1,0}) all-gather-done(%gathers)
  %scatter = ((f32[32,8]{0,1}), f32[4,8]{0,1}) reduce-scatter-start(%c), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%i, %x)
}

ENTRY %main (p: bf16[4,8]) -> f32[2] {
  %p = bf16[4,8]{1,0} parameter(0)
  %while.1 = (s32[], bf16[4,8]{1,0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"32"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %sum = f32[2]{0} all-reduce-start(%q), channel_id=54, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add
}
"""  # noqa: E501

TPU = """HloModule jit_update, is_scheduled=true

%ring_cond (p.1: (bf16[8,128], u32[])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8), metadata={op_name="jit(update)/while/body/dot_general" stack_frame_id=464}
  %p.1 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=1
  ROOT %compare = pred[]{:T(512)} compare(%i.1, %eight), direction=LT
}

%ring (p.2: (bf16[8,128], u32[])) -> (bf16[8,128], u32[]) {
  %p.2 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:T(128)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %i.2 = u32[]{:T(128)} get-tuple-element(%p.2), index=1
  %next = u32[]{:T(128)} add(%i.2, %two)
  %sent = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=4, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %done = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%sent)
  ROOT %out.1 = (bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) tuple(%done, %next)
}

%until (p.3: (s32[], s32[])) -> pred[] {
  %p.3 = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  %end.3 = s32[]{:T(128)} get-tuple-element(%p.3), index=1
  ROOT %lt.3 = pred[]{:T(512)} compare(%i.3, %end.3), direction=LT
}

%chunks (p.4: (s32[], s32[])) -> (s32[], s32[]) {
  %p.4 = (s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %largest = s32[]{:T(128)} all-reduce(%p.4), channel_id=155, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%max
  ROOT %out.4 = (s32[]{:T(128)}, s32[]{:T(128)}) tuple(%largest, %largest)
}

%async_collective_fusion.1 (a.1: bf16[1,16]) -> bf16[4,16] {
  %all-gather.40 = bf16[4,16]{1,0:T(8,128)(2,1)} all-gather(%a.1), channel_id=186, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
}

%async_collective_fusion.2 (a.2: bf16[1,16]) -> bf16[4,16] {
  %all-gather.42 = bf16[4,16]{1,0:T(8,128)(2,1)} all-gather(%a.2), channel_id=186, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
}

%all-reduce-scatter.7 (a.3: f32[16,16]) -> f32[4,16] {
  %all-reduce.9 = f32[16,16]{1,0:T(8,128)} all-reduce(%a.3), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[4,16]{1,0:T(8,128)} dynamic-slice(%all-reduce.9, %zero)
}

ENTRY %main (q: bf16[8,128]) -> bf16[8,128] {
  %q = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %begin = u32[]{:T(128)} copy(%zero)
  %given = (bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) tuple(%q, /*index=1*/%begin)
  %while.2 = (bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) while(%given), condition=%ring_cond, body=%ring
  %while.3 = (s32[]{:T(128)}, s32[]{:T(128)}) while(%other), condition=%until, body=%chunks
  %step.1 = bf16[4,16]{1,0:T(8,128)(2,1)} fusion(%q), kind=kCustom, calls=%async_collective_fusion.1
  %step.2 = bf16[4,16]{1,0:T(8,128)(2,1)} fusion(%q), kind=kCustom, calls=%async_collective_fusion.2
  ROOT %scattered = f32[4,16]{1,0:T(8,128)} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.7
}
"""  # noqa: E501


def said(one):
    return one.kind, one.dtype, one.shape, one.size, one.times, one.in_loop, one.is_counted, one.group_size


def test_a_gpus_program_says_what_it_sends():
    assert [said(one) for one in collectives_of(GPU)] == [
        ("all-gather", "bf16", (32, 8), 512, 32, True, True, 8),
        ("all-gather", "bf16", (32, 2), 128, 32, True, True, 8),
        ("reduce-scatter", "f32", (4, 8), 128, 32, True, True, 4),
        ("all-reduce", "f32", (2,), 8, 1, False, True, 4),
    ]


def test_a_tpus_program_says_what_it_sends():
    found = collectives_of(TPU)
    assert [said(one) for one in found] == [
        # From 0 to below 8 in steps of 2.
        ("collective-permute", "bf16", (8, 128), 2048, 4, True, True, 4),
        # Until a number that only the run knows: once.
        ("all-reduce", "s32", (), 4, 1, True, False, 4),
        # Two steps of one collective.
        ("all-gather", "bf16", (4, 16), 128, 1, False, True, 4),
        ("reduce-scatter", "f32", (16, 16), 256, 1, False, True, 4),
    ]
    assert found[0].groups == ((0, 1), (1, 2), (2, 3), (3, 0))
    assert found[1].groups == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_a_device_receives_what_a_ring_would_bring_it():
    received = {one.kind: one.received for one in collectives_of(GPU)[1:]}
    # A gathered array but for the own part; what others add to the own part; twice all but the own share.
    assert received == {"all-gather": 128 * 7 / 8, "reduce-scatter": 128 * 3, "all-reduce": 8 * 2 * 3 / 4}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", ()),  # a part of an axis: not known
        ("channel_id=1", ()),
    ],
)
def test_groups_are_read_in_every_form(text, groups):
    assert groups_of(text) == groups


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives_of("nothing")


def test_a_program_compiled_here_gathers_each_layer_in_its_loop():
    layers, width, mesh = 6, 16, sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    rows = NamedSharding(mesh, PartitionSpec("fsdp", None))
    cut = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))

    def loss(weights, x):
        x, _ = jax.lax.scan(lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None), x, weights)
        return x.sum()

    weights = jax.ShapeDtypeStruct((layers, width, width), np.float32, sharding=cut)
    x = jax.ShapeDtypeStruct((32, width), np.float32, sharding=rows)
    text = jax.jit(loss, in_shardings=(cut, rows)).lower(weights, x).compile().as_text()
    found = collectives_of(text)
    gathers = [one for one in found if one.kind == "all-gather" and one.in_loop]
    assert [(one.dtype, one.times, one.is_counted, one.group_size) for one in gathers] == [("f32", layers, True, 8)]
    assert gathers[0].size == width * width * 4
    assert [one.kind for one in found if not one.in_loop] == ["all-reduce"]
    program = Program(text)
    assert program.entry in program.computations
