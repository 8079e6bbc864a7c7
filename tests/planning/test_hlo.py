"""Collectives read from programs written by hand, and from compiled ones of known traffic."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from capjax.mesh import MeshShape, make_mesh
from capjax.planning.hlo import Collective, collectives

MESH = {"replica": 1, "data": 1, "fsdp": 4, "tensor": 2}
FSDP = "replica_groups=[2,4]<=[4,2]T(1,0)"
TENSOR = "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}"

LOOPS = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p.1: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x.1 = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %gathered = bf16[32,4]{1,0:T(8,128)(2,1)} all-gather(%x.1), channel_id=1, FSDP, dimensions={0}
  ROOT %t.1 = (s32[], bf16[8,4]{1,0}) tuple(%i.1, %x.1)
}

%inner_condition (p.2: (s32[], bf16[8,4])) -> pred[] {
  %p.2 = (s32[], bf16[8,4]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %less.2 = pred[] compare(%i.2, %five), direction=LT
}

%body (p.3: (s32[], bf16[8,4], s32[])) -> (s32[], bf16[8,4], s32[]) {
  %p.3 = (s32[], bf16[8,4]{1,0}, s32[]) parameter(0)
  %two = s32[] constant(2)
  %x.3 = bf16[8,4]{1,0} get-tuple-element(%p.3), index=1
  %t.3 = (s32[], bf16[8,4]{1,0}) tuple(%two, %x.3)
  %while.3 = (s32[], bf16[8,4]{1,0}) while(%t.3), condition=%inner_condition, body=%inner_body
  %r = (f32[6]{0}, /*index=1*/f32[2,3]{1,0}) all-reduce(%a, %b), channel_id=1, TENSOR, to_apply=%add
  ROOT %t.4 = (s32[], bf16[8,4]{1,0}, s32[]) tuple(%two, %x.3, %two)
}

%condition (p.4: (s32[], bf16[8,4], s32[])) -> pred[] {
  %p.4 = (s32[], bf16[8,4]{1,0}, s32[]) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  %end.4 = s32[] get-tuple-element(%p.4), index=2
  ROOT %less.4 = pred[] compare(%i.4, %end.4), direction=LT
}

ENTRY %main_spmd (x: bf16[8,4], n: s32[]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %end = s32[] END
  %copied = s32[] copy(%end)
  %t.5 = (s32[], bf16[8,4]{1,0}, s32[]) tuple(%zero, %x, %copied)
  %while.5 = (s32[], bf16[8,4]{1,0}, s32[]) while(%t.5), condition=%condition, body=%body
  ROOT %y = bf16[8,4]{1,0} get-tuple-element(%while.5), index=1
}
"""


@pytest.mark.parametrize(("end", "trips"), [("constant(7)", 7), ("add(%n, %n)", 4)])
def test_loops_within_loops_are_multiplied_out(end, trips):
    """The inner one counts from 2 to 5; the outer one to 7, or to what is not known."""
    text = LOOPS.replace("FSDP", FSDP).replace("TENSOR", TENSOR).replace("END", end)
    assert collectives(text, MESH, unknown_trips=4) == [
        Collective("all-gather", ("bf16[32,4]",), 256, 4, ("fsdp",), 3 * trips),
        Collective("all-reduce", ("f32[6]", "f32[2,3]"), 48, 2, ("tensor",), trips),
    ]


def of_lines(*lines: str, called: str = "", mesh=MESH) -> list[Collective]:
    """The collectives of a program of these lines, over the arrays %x (whole) and %s (a part)."""
    text = f"""HloModule m

%add (p: f32[], q: f32[]) -> f32[] {{
  %p = f32[] parameter(0)
  ROOT %r = f32[] add(%p, %p)
}}
{called}
ENTRY %main (x: f32[8,16], s: f32[2,16]) -> f32[] {{
  %x = f32[8,16]{{1,0}} parameter(0)
  %s = f32[2,16]{{1,0}} parameter(1)
"""
    return collectives(text + "".join(f"  {line}\n" for line in lines) + "}\n", mesh, 1)


ONE = {
    f"%g = f32[8,16]{{1,0}} all-gather(%s), channel_id=1, {FSDP}, dimensions={{0}}": (
        Collective("all-gather", ("f32[8,16]",), 512, 4, ("fsdp",), 1),
        512 * 3 / 4,
    ),
    f"%g = (f32[2,16]{{1,0}}, f32[8,16]{{1,0}}) all-gather-start(%s), channel_id=1, {FSDP}": (
        Collective("all-gather", ("f32[8,16]",), 512, 4, ("fsdp",), 1),
        512 * 3 / 4,
    ),
    "%g = ((f32[2]{0}, bf16[3]{0}), (f32[8]{0}, bf16[12]{0})) all-gather-start(%a, %b), "
    f"{FSDP}": (
        Collective("all-gather", ("f32[8]", "bf16[12]"), 56, 4, ("fsdp",), 1),
        56 * 3 / 4,
    ),
    f"%r = f32[2,16]{{1,0}} reduce-scatter(%x), channel_id=1, {FSDP}, to_apply=%add": (
        Collective("reduce-scatter", ("f32[8,16]",), 512, 4, ("fsdp",), 1),
        512 * 3 / 4,
    ),
    f"%r = f32[8,16]{{1,0}} all-reduce-start(%x), channel_id=1, {FSDP}, to_apply=%add": (
        Collective("all-reduce", ("f32[8,16]",), 512, 4, ("fsdp",), 1),
        2 * 512 * 3 / 4,
    ),
    f"%r = f32[8,16]{{1,0}} all-to-all(%x), channel_id=1, {TENSOR}, dimensions={{0}}": (
        Collective("all-to-all", ("f32[8,16]",), 512, 2, ("tensor",), 1),
        512 / 2,
    ),
    "%p = (f32[2,16]{1,0}, f32[2,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) "
    "collective-permute-start(%s), channel_id=1, source_target_pairs={{0,2},{2,4},{4,6},{6,0}}": (
        Collective("collective-permute", ("f32[2,16]",), 128, 4, ("fsdp",), 1),
        128,
    ),
    "%r = pred[] all-reduce(%b), channel_id=1, replica_groups={}, to_apply=%add": (
        Collective("all-reduce", ("pred[]",), 1, 8, ("fsdp", "tensor"), 1),
        2 * 7 / 8,
    ),
}


@pytest.mark.parametrize("line", ONE)
def test_each_kind_of_collective(line):
    expected, traffic = ONE[line]
    (found,) = of_lines(line)
    assert found == expected
    assert found.traffic == traffic


def test_the_end_of_what_was_started_and_groups_of_one_count_for_nothing():
    assert not of_lines(
        "%d = f32[8,16]{1,0} all-gather-done(%g)",
        "%e = f32[8,16]{1,0} async-done(%s), calls=%add",
        "%f = f32[2,16]{1,0} all-gather(%s), replica_groups=[8,1]<=[8], dimensions={0}",
    )


def test_what_is_wrapped_to_run_apart_is_counted_once():
    called = f"""
%wrapped (w: f32[8,16]) -> f32[2,16] {{
  %w = f32[8,16]{{1,0}} parameter(0)
  ROOT %rs = f32[2,16]{{1,0}} reduce-scatter(%w), channel_id=9, {FSDP}, to_apply=%add
}}
"""
    (found,) = of_lines(
        "%a = ((f32[8,16]{1,0}), f32[2,16]{1,0}, s32[]) async-start(%x), calls=%wrapped",
        "%b = f32[2,16]{1,0} async-done(%a), calls=%wrapped",
        called=called,
    )
    assert found == Collective("reduce-scatter", ("f32[8,16]",), 512, 4, ("fsdp",), 1)


def test_the_parts_of_an_overlapped_collective_are_one():
    part = """
%fused.N (w: f32[2,16]) -> f32[8,16] {
  %w = f32[2,16]{1,0} parameter(0)
  ROOT %g.N = f32[8,16]{1,0} all-gather(%w), channel_id=3, GROUPS, attributes={chain_id="C"}
}
"""
    called = "".join(
        part.replace("N", n).replace('"C"', f'"{c}"').replace("GROUPS", FSDP)
        for n, c in (("1", "0"), ("2", "0"), ("3", "1"))
    )
    lines = [f"%f.{n} = f32[8,16]{{1,0}} fusion(%s), calls=%fused.{n}" for n in "123"]
    found = of_lines(*lines, called=called)
    # Two chains of them.
    assert found == [Collective("all-gather", ("f32[8,16]",), 512, 4, ("fsdp",), 1)] * 2


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%yes, %no}", "true_computation=%yes, false_computation=%no"],
)
def test_branches_count_as_if_taken(branches):
    called = f"""
%yes (w: f32[2,16]) -> f32[2,16] {{
  %w = f32[2,16]{{1,0}} parameter(0)
  %r = f32[2,16]{{1,0}} all-reduce(%w), channel_id=3, {FSDP}, to_apply=%add
  ROOT %q = f32[2,16]{{1,0}} all-reduce(%r), channel_id=3, {FSDP}, to_apply=%add
}}

%no (w: f32[2,16]) -> f32[2,16] {{
  ROOT %w = f32[2,16]{{1,0}} parameter(0)
}}
"""
    found = of_lines(f"%c = f32[2,16]{{1,0}} conditional(%p, %s, %s), {branches}", called=called)
    assert found == [Collective("all-reduce", ("f32[2,16]",), 128, 4, ("fsdp",), 1)] * 2


def test_equal_collectives_on_one_channel_are_several():
    """Those of a `shard_map` all have channel 1 on TPUs."""
    lines = [
        f"%g.{n} = f32[8,16]{{1,0}} all-gather(%s), channel_id=1, {FSDP}, dimensions={{0}}"
        for n in range(3)
    ]
    assert len(of_lines(*lines)) == 3


def test_an_all_reduce_of_which_a_fusion_keeps_a_part_scatters():
    called = f"""
%all-reduce-scatter (w: f32[8,16]) -> f32[2,16] {{
  %w = f32[8,16]{{1,0}} parameter(0)
  %r = f32[8,16]{{1,0}} all-reduce(%w), channel_id=2, {FSDP}, to_apply=%add
  ROOT %d = f32[2,16]{{1,0}} dynamic-slice(%r, %i, %j), dynamic_slice_sizes={{2,16}}
}}
"""
    (found,) = of_lines(
        "%f = f32[2,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter", called=called
    )
    assert found == Collective("reduce-scatter", ("f32[8,16]",), 512, 4, ("fsdp",), 1)


@pytest.mark.parametrize(
    ("kind", "sent", "received", "larger"),
    [
        ("ALL_REDUCE", 4, 4, 4),
        ("ALL_GATHER", 4, 8, 8),
        ("REDUCE_SCATTER", 8, 4, 8),
    ],
)
def test_transfers_between_slices(kind, sent, received, larger):
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="x.1_0",'
        f'_xla_megascale_target="{{1,2}}x{{0:7}}",_xla_megascale_transfer_type="{kind}"}}'
    )
    (found,) = of_lines(
        f"%s.1 = (f32[{sent},128]{{1,0}}, u32[], token[]) send(%x, %t), channel_id=2, {attributes}",
        f"%r.1 = (f32[{received},128]{{1,0}}, u32[], token[]) recv(%t), channel_id=1, {attributes}",
        "%r.2 = (f32[99]{0}, u32[], token[]) recv(%t), channel_id=3, is_host_transfer=true",
        mesh={"replica": 2, "data": 1, "fsdp": 8, "tensor": 1},
    )
    shape = f"f32[{larger},128]"
    name = kind.lower().replace("_", "-")
    assert found == Collective(name, (shape,), larger * 512, 2, ("replica",), 1)


@pytest.fixture(scope="module")
def compiled() -> tuple[str, dict[str, int]]:
    """A scan of three layers that gather, reduce and scatter a known number of bytes."""
    mesh = make_mesh(MeshShape(data=1, fsdp=4, tensor=2))

    def layer(x, w):
        w = lax.all_gather(w, "fsdp", axis=0, tiled=True)  # f32[64,32]
        x = lax.psum(x @ w, "tensor")  # f32[16,32]
        y = lax.psum_scatter(w @ x.T, "fsdp", scatter_dimension=0, tiled=True)  # f32[64,16]
        return jnp.tile(x, 2) + y.sum(), None

    def program(x, w):
        return lax.scan(layer, x, w)[0]

    specs = (P(None, None), P(None, "fsdp", None))
    sharded = jax.shard_map(
        program, mesh=mesh, in_specs=specs, out_specs=P(None, None), check_vma=False
    )
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip([(16, 64), (3, 64, 32)], specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        return jax.jit(sharded).lower(*shapes).compile().as_text(), dict(mesh.shape)


def test_a_compiled_program_sends_what_is_known(compiled):
    found = {c.kind: c for c in collectives(*compiled, unknown_trips=1)}
    gather, reduce, scatter = (
        found[kind] for kind in ("all-gather", "all-reduce", "reduce-scatter")
    )
    assert (gather.axes, gather.bytes, gather.calls) == (("fsdp",), 64 * 32 * 4, 3)
    assert (reduce.axes, reduce.bytes, reduce.calls) == (("tensor",), 16 * 32 * 4, 3)
    assert (scatter.axes, scatter.bytes, scatter.calls) == (("fsdp",), 64 * 16 * 4, 3)
    assert gather.traffic == 3 * 8192 * 3 / 4
    assert reduce.traffic == 3 * 2 * 2048 / 2
