"""Laws of reading compiled programs: kinds, axes, bytes and loops of collectives, on texts and on real programs."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pretrain.collectives import count, find_collectives

MESH = {"replica": 2, "fsdp": 4}

TEXT = """
HloModule step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %start = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %done = f32[8]{0} all-gather-done(%start)
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %done)
}

%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.2 = (s32[], f32[8]{0}) parameter(0)
  %r = bf16[16]{0} all-reduce(%y), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %loop = (s32[], f32[8]{0}) while(%p.2), condition=%inner_condition, body=%inner
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %shift = f32[8]{0} collective-permute(%x.1), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %loop.1 = (s32[], f32[8]{0}) while(%init), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %all = (f32[8]{0}, f32[4]{0}) all-reduce(%x.1, %z), replica_groups={}, to_apply=%add
}
"""


def test_kinds_axes_bytes_and_loops_of_a_text():
    found = {c.name: c for c in find_collectives(TEXT, MESH)}
    assert found.keys() == {"start", "r", "shift", "all"}
    gather = found["start"]
    assert (gather.kind, gather.axes, gather.executions, gather.loop_trips) == (
        "all-gather",
        ("fsdp",),
        15,
        (5, 3),
    )
    assert gather.bytes_sent == 32 * 3 / 4
    reduce = found["r"]
    assert (reduce.axes, reduce.executions, reduce.bytes_sent) == (("replica",), 5, 2 * 32 / 2)
    assert (found["shift"].axes, found["shift"].bytes_per_step) == (("fsdp",), 32)
    everyone = found["all"]
    assert (everyone.axes, everyone.group_size) == (("replica", "fsdp"), 8)
    assert everyone.bytes_sent == 2 * 48 * 7 / 8
    assert count(found.values()) == {"all-gather": 1, "all-reduce": 2, "collective-permute": 1}
    assert count(found.values(), loop_trips=3) == {"all-gather": 1}


BETWEEN_SLICES = """
HloModule step

ENTRY %main (x: bf16[16,8]) -> bf16[16,8] {
  %x = bf16[16,8]{1,0} parameter(0)
  %send = (bf16[16,8]{1,0}, u32[], token[]) send(%x, %after), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="r_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=6, is_host_transfer=true
  %plain = (bf16[16,8]{1,0}, u32[], token[]) send(%x, %after), channel_id=7, is_host_transfer=true
  ROOT %recv-done = (bf16[16,8]{1,0}, token[]) recv-done(%recv), channel_id=6, is_host_transfer=true
}
"""


def test_what_the_hosts_of_slices_reduce_for_their_devices_goes_over_the_slow_axis():
    """The table had no traffic between slices once: the gradients' all-reduce is a send to the host there."""
    (found,) = find_collectives(BETWEEN_SLICES, MESH)
    assert (found.kind, found.axes, found.group_size) == ("all-reduce", ("replica",), 2)
    assert found.bytes_sent == 2 * 16 * 8


def test_a_real_loop_counts_its_trips():
    """A ZeRO-3 loop: the weights of five layers, gathered over fsdp one at a time."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), tuple(MESH), axis_types=(AxisType.Explicit,) * 2)

    def run(x, weights):
        def layer(x, w):
            return jax.numpy.tanh(x @ jax.sharding.reshard(w, PartitionSpec(None, None))), None

        return jax.lax.scan(layer, x, weights)[0]

    x = jax.ShapeDtypeStruct(
        (8, 16), "float32", sharding=NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))
    )
    w = jax.ShapeDtypeStruct(
        (5, 16, 16), "float32", sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    )
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(x, w).compile().as_text()
    gathers = [c for c in find_collectives(text, MESH) if c.kind == "all-gather"]
    assert {c.axes for c in gathers} == {("fsdp",)}
    assert sum(c.bytes_per_step for c in gathers) == 5 * 16 * 16 * 4 * 3 / 4


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("mesh['a'=2,'b'=4] {'b'}", ("fsdp",), 4),
        ("mesh['a'=2,'b'=4] {'a'}", ("replica",), 2),
        ("mesh['a'=2,'b'=4] {'a','b'}", ("replica", "fsdp"), 8),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ("fsdp",), 2),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("replica",), 2),
    ],
)
def test_groups_written_as_axes_of_a_mesh(groups, axes, size):
    text = TEXT.replace("replica_groups=[2,4]<=[8]", f"replica_groups={groups}")
    found = {c.name: c for c in find_collectives(text, MESH)}["start"]
    assert (found.axes, found.group_size) == (axes, size)


def test_phases_of_one_collective_count_once():
    chain = 'channel_id=1, replica_groups=[2,4]<=[8], frontend_attributes={chain_id="3"}'
    start = "(f32[2]{0}, f32[8]{0}) all-gather-start(%x)"
    once = TEXT.replace("  %done =", f"  %phase = {start}, {chain}\n  %done =")
    twice = once.replace("  %done =", f"  %again = {start}, {chain}\n  %done =")
    assert len(find_collectives(once, MESH)) == len(find_collectives(twice, MESH)) == 5


@pytest.mark.parametrize("count_text", ["", ', backend_config={"known_trip_count":{"n":"7"}}'])
def test_the_compilers_note_wins_over_the_condition(count_text):
    text = TEXT.replace(', backend_config={"known_trip_count":{"n":"5"}}', count_text).replace(
        "condition=%c,", "condition=%inner_condition,"
    )
    reduce = next(c for c in find_collectives(text, MESH) if c.name == "r")
    assert reduce.executions == (7 if count_text else 3)
