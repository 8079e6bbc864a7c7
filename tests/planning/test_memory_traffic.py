"""Bytes moved, read from programs written by hand and from compiled ones of known traffic."""

import jax
import jax.numpy as jnp
from jax import lax

from capjax.planning.memory_traffic import bytes_moved

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%cut (p.0: f32[8,16], p.1: s32[]) -> f32[1,16] {
  %p.0 = f32[8,16]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %row = f32[1,16]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={1,16}
  ROOT %twice = f32[1,16]{1,0} add(%row, %row)
}

%put (q.0: f32[8,16], q.1: f32[1,16], q.2: s32[]) -> f32[8,16] {
  %q.0 = f32[8,16]{1,0} parameter(0)
  %q.1 = f32[1,16]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  ROOT %all = f32[8,16]{1,0} dynamic-update-slice(%q.0, %q.1, %q.2, %q.2)
}

%body (p.3: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p.3 = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p.3), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%p.3), index=1
  %row.3 = f32[1,16]{1,0:T(8,128)S(1)} fusion(%x, %i), kind=kLoop, calls=%cut
  %all.3 = f32[8,16]{1,0} fusion(%x, %row.3, %i), kind=kLoop, calls=%put
  ROOT %t.3 = (s32[], f32[8,16]{1,0}) tuple(%i, %all.3)
}

%condition (p.4: (s32[], f32[8,16])) -> pred[] {
  %p.4 = (s32[], f32[8,16]{1,0}) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  %eight = s32[] constant(8)
  ROOT %less = pred[] compare(%i.4, %eight), direction=LT
}

ENTRY %main (a: f32[8,16], w: f32[16,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %w = f32[16,16]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (f32[16,16]{1,0:S(1)}, f32[16,16]{1,0}, u32[]) copy-start(%w)
  %near = f32[16,16]{1,0:S(1)} copy-done(%start)
  %t = (s32[], f32[8,16]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[8,16]{1,0}) while(%t), condition=%condition, body=%body
  %b = f32[8,16]{1,0} get-tuple-element(%loop), index=1
  ROOT %product = f32[8,16]{1,0} dot(%b, %near), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_a_program_by_hand():
    row, whole, weights = 16 * 4, 8 * 16 * 4, 16 * 16 * 4
    # A turn: a row and an index are read for the fast memory; the index is read again, and the row
    # put back.
    turn = (row + 4) + (4 + row)
    assert bytes_moved(PROGRAM, unknown_trips=0) == 8 * turn + weights + 2 * whole


def test_a_loop_of_products_reads_each_layer_once():
    X, B, D = 6, 128, 256
    weights = jax.ShapeDtypeStruct((X, D, D), jnp.float32)
    x = jax.ShapeDtypeStruct((B, D), jnp.float32)

    def run(weights, x):
        return lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    moved = bytes_moved(jax.jit(run).lower(weights, x).compile().as_text(), unknown_trips=1)
    least = X * (D * D + 2 * B * D) * 4
    # The compiler may copy a layer's weights and the state before it multiplies; and counters.
    copies = X * 2 * (D * D + B * D) * 4 + 2 * B * D * 4
    assert least <= moved <= least + copies + 1000
