"""Bytes between chips, read from the text of compiled programs."""

from train.transfers import Transfer, read_transfers

# As libtpu prints it, shortened: a loop of 28 iterations with a gather, a transfer to the next chip and another gather
# that run beside other instructions, and a fusion that scatters a sum; after the loop, a sum between slices.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1.clone (input: bf16[64,192]) -> bf16[16,192] {
  %input = bf16[64,192]{0,1:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = (bf16[64,192]{0,1:T(8,128)(2,1)}, /*index=1*/f32[8]{0}) all-reduce(%input), replica_groups={{0,1,2,3}}
  ROOT %dynamic-slice.1 = bf16[16,192]{1,0} dynamic-slice(%all-reduce.1)
}

%body.1 (param: (s32[], bf16[16,192])) -> (s32[], bf16[16,192]) {
  %all-gather.1 = bf16[64,192]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=[8,4]<=[32], dimensions={0}
  %permute.1 = (bf16[64,192]{1,0:T(8,128)(2,1)S(1)}, bf16[64,192]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%all-gather.1), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %gather.1 = (bf16[64,192]{1,0}, bf16[256,192]{1,0}) all-gather-start(%x), replica_groups=[8,4]<=[32], dimensions={0}
  %fusion.1 = bf16[16,192]{1,0} fusion(%all-gather.1), kind=kCustom, calls=%all-reduce-scatter.1.clone
}

%condition.1 (param: (s32[], bf16[16,192])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(28)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

ENTRY %main.1 (p: bf16[16,192]) -> bf16[16,192] {
  %while.1 = (s32[], bf16[16,192]{1,0}) while(%tuple.1), condition=%condition.1, body=%body.1
  %recv.1 = (bf16[16,192]{1,0}, u32[]) recv(%t), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %all-reduce.2 = f32[] all-reduce(%y), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""


def test_transfers_of_a_program() -> None:
    matrix, norm = 64 * 192 * 2, 8 * 4
    assert read_transfers(PROGRAM) == [
        Transfer("reduce-scatter", 28 * (matrix + norm) * 3 // 4),
        Transfer("all-gather", 28 * matrix * 3 // 4),
        Transfer("collective-permute", 28 * matrix),
        Transfer("all-gather", 28 * 4 * matrix * 3 // 4),
        Transfer("all-reduce", matrix // 4, between_slices=True),
        Transfer("all-reduce", 4),
    ]
