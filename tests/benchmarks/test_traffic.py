"""Bytes to and from a chip's memory, and cycles, read from the text of compiled programs."""

from benchmarks.traffic import Program

# As libtpu prints it, shortened: a loop of unknown length around a loop over five layers, whose body reads one layer of
# the weights, updates one position of the cache in place, copies a slice of an array to on-chip memory, and copies a
# matrix. A conditional follows.
PROGRAM = """\
HloModule jit_decode, is_scheduled=true

%view.1 (param_0: bf16[5,8,64]) -> bf16[5,8,64] {
  %param_0 = bf16[5,8,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %bitcast.1 = bf16[5,8,64]{2,1,0:T(8,128)(2,1)} bitcast(%param_0)
}

%product.1 (param_0.1: bf16[4,64], param_1.1: bf16[5,8,64], param_2.1: s32[]) -> bf16[4,8] {
  %param_0.1 = bf16[4,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.1 = bf16[5,8,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2.1 = s32[]{:T(128)} parameter(2)
  %fusion.9 = bf16[5,8,64]{2,1,0:T(8,128)(2,1)} fusion(%param_1.1), kind=kLoop, calls=%view.1
  %slice.1 = bf16[1,8,64]{2,1,0} dynamic-slice(%fusion.9, %param_2.1), dynamic_slice_sizes={1,8,64}
  ROOT %convolution.1 = bf16[4,8]{1,0:T(8,128)(2,1)} convolution(%param_0.1, %slice.1), dim_labels=bf_oi->bf
}

%update.1 (param_0.2: bf16[5,4,100], param_1.2: bf16[1,4,1], param_2.2: s32[]) -> bf16[5,4,100] {
  %param_0.2 = bf16[5,4,100]{2,1,0} parameter(0)
  %param_1.2 = bf16[1,4,1]{2,1,0} parameter(1)
  %param_2.2 = s32[]{:T(128)} parameter(2)
  ROOT %update.2 = bf16[5,4,100]{2,1,0} dynamic-update-slice(%param_0.2, %param_1.2, %param_2.2)
}

%layers.1 (p.1: (s32[], bf16[4,64])) -> (s32[], bf16[4,64]) {
  %p.1 = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x.1 = bf16[4,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=1
  %w.1 = bf16[5,8,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=2
  %cache.1 = bf16[5,4,100]{2,1,0} get-tuple-element(%p.1), index=3
  %new.1 = bf16[1,4,1]{2,1,0:S(1)} get-tuple-element(%p.1), index=4
  %fusion.1 = bf16[4,8]{1,0} fusion(%x.1, %w.1, %i.1), calls=%product.1, backend_config={"estimated_cycles":"70"}
  %fusion.2 = bf16[5,4,100]{2,1,0} fusion(%cache.1, %new.1, %i.1), kind=kLoop, calls=%update.1
  %slice-start.1 = ((bf16[5,8,64]{2,1,0}), bf16[1,8,64]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%w.1), slice={[0:1]}
  %slice-done.1 = bf16[1,8,64]{2,1,0:S(1)} slice-done(%slice-start.1)
  %copy.1 = bf16[4,8]{0,1} copy(%fusion.1), backend_config={"flag_configs":[],"estimated_cycles":"5"}
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)S(1)}) tuple(%i.1, %x.1)
}

%condition.1 (p.2: (s32[], bf16[4,64])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(5)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%greedy.1 (p.3: f32[1000]) -> f32[1000] {
  ROOT %p.3 = f32[1000]{0:T(1024)} parameter(0)
}

%sampled.1 (p.4: f32[1000]) -> f32[1000] {
  %p.4 = f32[1000]{0:T(1024)} parameter(0)
  ROOT %sort.1 = f32[1000]{0:T(1024)} sort(%p.4), dimensions={0}
}

%step.1 (p.5: (s32[], bf16[4,64])) -> (s32[], bf16[4,64]) {
  %p.5 = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)S(1)}) parameter(0)
  %while.1 = (s32[]{:T(128)}, bf16[4,64]{1,0}) while(%p.5), condition=%condition.1, body=%layers.1
  ROOT %cond.1 = f32[1000]{0} conditional(%b.1, %l.1, %l.1), branch_computations={%greedy.1, %sampled.1}
}

%unfinished.1 (p.6: (s32[], bf16[4,64])) -> pred[] {
  ROOT %lt.2 = pred[]{:T(512)} compare(%i, %steps), direction=LT
}

ENTRY %main.1 (p.7: bf16[4,64]) -> bf16[4,64] {
  %p.7 = bf16[4,64]{1,0} parameter(0)
  %copy.2 = bf16[4,64]{0,1} copy(%p.7)
  %while.2 = (s32[], bf16[4,64]{1,0}) while(%tuple.2), condition=%unfinished.1, body=%step.1
}
"""


def test_bytes_of_a_step() -> None:
    weights, product, index = 8 * 64 * 2, 4 * 8 * 2, 4
    update = 4 * 2  # from on-chip memory
    layer = (weights + index + product) + (index + update) + weights + 2 * product
    program = Program(PROGRAM)
    assert list(program.loops()) == ["%step.1"]
    assert program.traffic("%step.1") == 5 * layer  # the greedy branch is free
    assert program.traffic(program.entry) == 5 * layer + 2 * 4 * 64 * 2


def test_cycles_of_a_step() -> None:
    assert Program(PROGRAM).cycles("%step.1") == 5 * (70 + 5)
