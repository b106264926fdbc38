"""Shuffles, votes and reductions of a warp in the PTX runner."""

import numpy as np
import pytest
from ptx import Incomplete
from ptx_kernels import ALL, LANES, kernel_of, launch, same, warps, words


def shuffled(mode, b, clamp, segment):
    """Return the lane that each lane reads, and whether its own segment holds it, as the PTX manual has it."""
    lanes, within = [], []
    for lane in range(32):
        highest, lowest = lane & segment | clamp & ~segment, lane & segment
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | b & ~segment}[mode]
        within.append(source >= highest if mode == "up" else source <= highest)
        lanes.append(source if within[-1] else lane)
    return lanes, within


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_a_shuffle_gives_each_lane_anothers_value(mode, width):
    x = words("u4", 96)
    for b in (1, 3, 16):
        clamp, segment = 0 if mode == "up" else 31, 32 - width & 31
        lines = f"shfl.sync.{mode}.b32 out|%p0, x, {b}, {segment << 8 | clamp}, -1;"
        out = warps(f"{lines} @!%p0 xor.b32 out, out, -1;", "u4", x)
        lanes, within = shuffled(mode, b, clamp, segment)
        same(out, np.where(within, x.reshape(-1, 32)[:, lanes], ~x.reshape(-1, 32)[:, lanes]).ravel(), f"b={b}")


def test_a_shuffle_without_a_predicate():
    x = words("u4", 64)
    same(warps("shfl.sync.bfly.b32 out, x, 1, 31, -1;", "u4", x, 64), x.reshape(-1, 2)[:, ::-1].ravel())


def test_each_lane_may_name_a_lane_of_its_own():
    x = words("u4", 64)
    lines = "mul.lo.u32 %r4, %t, 7; shfl.sync.idx.b32 out, x, %r4, 31, -1;"
    same(warps(lines, "u4", x), x.reshape(2, 32)[:, LANES * 7 % 32].ravel())


GROUP_MAXIMUM = "".join(f"shfl.sync.bfly.b32 %r4, out, {k}, 31, -1; max.u32 out, out, %r4;" for k in (16, 8, 4, 2, 1))


def test_the_maximum_of_many_groups():
    x = words("u4", 32 * 9000)
    out = warps("mov.b32 out, x;" + GROUP_MAXIMUM, "u4", x, block=32 * 9)
    same(out, np.repeat(x.reshape(-1, 32).max(1), 32))


def test_a_partial_warp_exchanges_within_the_lanes_it_has():
    x = words("u4", 48)
    lines = f"setp.lt.u32 %p0, %t, 32; selp.b32 %r4, -1, {0xFFFF}, %p0; shfl.sync.down.b32 out, x, 1, 31, %r4;"
    with pytest.raises(Incomplete, match=r"thread 47 of block 0 reads lane 16 .* mask 0xffff does not name"):
        warps(lines, "u4", x, block=48)
    lines = lines.replace("31, %r4", "0x100f, %r4")
    expected = x.reshape(-1, 16)[:, [*range(1, 16), 15]].ravel()
    same(warps(lines, "u4", x, block=48), expected)


def test_two_halves_of_a_warp_shuffle_apart_and_then_together():
    x = words("u4", 32)
    out = warps(
        """setp.lt.u32 %p0, %t, 16; @%p0 bra LOW;
        shfl.sync.up.b32 out, x, 1, 0x1000, 0xffff0000; bra BOTH;
        LOW: shfl.sync.down.b32 out, x, 1, 0x100f, 0x0000ffff; add.u32 out, out, 1;
        BOTH: shfl.sync.bfly.b32 out, out, 16, 31, -1;""",
        "u4",
        x,
    )
    low, high = x[[*range(1, 16), 15]] + np.uint32(1), x[[16, *range(16, 31)]]
    same(out, np.concatenate([high, low]))


def test_two_masks_at_one_shuffle():
    x = words("u4", 64)
    lines = f"and.b32 %r4, %t, 1; setp.eq.u32 %p0, %r4, 0; selp.b32 %r5, {0x55555555}, {0xAAAAAAAA}, %p0;"
    out = warps(lines + "shfl.sync.bfly.b32 out, x, 2, 31, %r5;", "u4", x)
    same(out, x.reshape(-1, 32)[:, LANES ^ 2].ravel())


def test_lanes_that_exit_first_need_no_shuffle():
    x, out = words("u4", 32), np.zeros(32, "u4")
    lines = "setp.ge.u32 %p0, %t, 8; @%p0 exit; ld.global.u32 %r4, [%a1]; shfl.sync.bfly.b32 %r4, %r4, 1, 31, 0xff;"
    launch(kernel_of(lines + "st.global.u32 [%a0], %r4;", 2, (4, 4)), [out, x], 32)
    same(out, np.where(LANES < 8, x[LANES ^ 1], 0).astype("u4"))


def test_a_shuffle_in_a_loop_of_other_lengths_for_each_warp():
    x = words("u4", 128)
    lines = """shr.u32 %r4, %t, 5; mov.b32 out, x;
        AGAIN: shfl.sync.up.b32 out, out, 1, 0, -1; add.u32 out, out, 1;
        setp.ne.u32 %p0, %r4, 0; sub.u32 %r4, %r4, 1; @%p0 bra AGAIN;"""
    out = warps(lines, "u4", x, block=128).reshape(4, 32)
    for warp in range(4):
        expected = x.reshape(4, 32)[warp][np.maximum(LANES - warp - 1, 0)]
        same(out[warp], expected + np.uint32(warp + 1))


INCOMPLETE = {
    "a lane has exited": ("setp.eq.u32 %p0, %t, 5; @%p0 exit; shfl.sync.bfly.b32 out, x, 1, 31, -1;", "5, which has exited"),
    "a lane goes round it": (
        "setp.eq.u32 %p0, %t, 5; @%p0 bra END; shfl.sync.bfly.b32 out, x, 1, 31, -1; END:",
        "5, which has exited",
    ),
    "a lane is guarded": ("setp.ne.u32 %p0, %t, 9; @%p0 shfl.sync.bfly.b32 out, x, 1, 31, -1;", "9, which has exited"),
    "another shuffle": (
        """setp.lt.u32 %p0, %t, 16; @%p0 bra LOW; shfl.sync.bfly.b32 out, x, 1, 31, -1; bra END;
        LOW: shfl.sync.bfly.b32 out, x, 1, 31, -1; END:""",
        r"thread 0 .* for thread 16, which waits at `shfl",
    ),
    "another instruction": (
        """setp.eq.u32 %p0, %t, 4; @%p0 bra LOW; shfl.sync.bfly.b32 out, x, 1, 31, -1; bra END;
        LOW: bar.warp.sync -1; END:""",
        "for thread 4, which waits at `bar.warp.sync -1`",
    ),
    "another mask": (
        "setp.eq.u32 %p0, %t, 3; selp.b32 %r4, 8, -1, %p0; shfl.sync.bfly.b32 out, x, 1, 31, %r4;",
        "thread 3 of block 0 reads lane 2 .* mask 0x8 does not name",
    ),
    "two masks that overlap": (
        "setp.eq.u32 %p0, %t, 3; selp.b32 %r4, 12, -1, %p0; shfl.sync.bfly.b32 out, x, 1, 31, %r4;",
        "thread 0 .* for thread 3, which has the mask 0xc",
    ),
    "a mask without its own lane": ("shfl.sync.bfly.b32 out, x, 0, 31, 1;", "thread 1 of block 0 is not in the mask 0x1"),
    "a vote": ("setp.eq.u32 %p0, %t, 5; @%p0 exit; vote.sync.ballot.b32 out, %p0, -1;", "`vote.*5, which has exited"),
    "a warp's barrier": ("setp.eq.u32 %p0, %t, 5; @%p0 exit; bar.warp.sync -1;", "`bar.warp.*5, which has exited"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_an_incomplete_shuffle_is_an_error(case):
    lines, message = INCOMPLETE[case]
    with pytest.raises(Incomplete, match=message):
        warps(f"mov.b32 out, 0; {lines}", "u4", words("u4", 32))


def test_a_mask_that_names_lanes_beyond_the_block_is_an_error():
    with pytest.raises(Incomplete, match=r"thread 32 of block 0 .* for thread 36, which is not in the block"):
        warps("shfl.sync.bfly.b32 out, x, 1, 31, -1;", "u4", words("u4", 36), block=36)


def test_the_block_of_an_incomplete_shuffle_is_named():
    lines = "setp.eq.u32 %p0, %i, 9613; @%p0 exit; shfl.sync.idx.b32 out, x, 0, 31, -1;"
    with pytest.raises(Incomplete, match=r"thread 0 of block 300 .* for thread 13,"):
        warps(lines, "u4", words("u4", 32 * 400))


@pytest.mark.parametrize("mask", [ALL, 0x0F0F00FF])
def test_votes_count_the_lanes_of_their_mask(mask):
    x = np.array([0] * 32 + [1] * 32 + [0, 1] * 16 + [*(mask >> LANES & 1)] + [5] + [0] * 31, "u4")
    named = mask >> LANES & 1 == 1
    lines = f"""mov.b32 out, 99; shl.b32 %r4, 1, %t; and.b32 %r4, %r4, {mask}; setp.eq.u32 %p1, %r4, 0; @%p1 bra END;
        setp.ne.u32 %p0, x, 0;
        vote.sync.all.pred %p2, %p0, {mask}; vote.sync.any.pred %p3, %p0, {mask}; vote.sync.uni.pred %p4, !%p0, {mask};
        selp.b32 out, 1, 0, %p2; @%p3 add.u32 out, out, 2; @%p4 add.u32 out, out, 4; END:"""
    votes = x.reshape(-1, 32)[:, named] != 0
    every, some = votes.all(1), votes.any(1)
    expected = np.where(named, (every + 2 * some + 4 * (every | ~some))[:, None], 99)
    same(warps(lines, "u4", x), expected.ravel().astype("u4"))


def test_a_ballot_has_the_bit_of_every_lane_that_votes():
    x = words("u4", 128)
    votes = (x.reshape(-1, 32) & 1).astype("u8") << LANES.astype("u8")
    out = warps("and.b32 %r4, x, 1; setp.eq.u32 %p0, %r4, 1; vote.sync.ballot.b32 out, %p0, -1;", "u4", x)
    same(out, np.repeat(votes.sum(1), 32).astype("u4"))


def test_the_active_lanes_are_those_of_one_branch():
    lines = "setp.lt.u32 %p0, %t, 5; @%p0 bra LOW; activemask.b32 out; bra END; LOW: activemask.b32 out; END:"
    same(warps(lines, "u4", words("u4", 32)), np.where(LANES < 5, 0x1F, 0xFFFFFFE0).astype("u4"))


REDUCTIONS = {
    "add.u32": lambda a: a.sum(1, dtype="u4"),
    "min.u32": lambda a: a.min(1),
    "max.u32": lambda a: a.max(1),
    "min.s32": lambda a: a.view("i4").min(1),
    "max.s32": lambda a: a.view("i4").max(1),
    "and.b32": lambda a: np.bitwise_and.reduce(a, 1),
    "or.b32": lambda a: np.bitwise_or.reduce(a, 1),
    "xor.b32": lambda a: np.bitwise_xor.reduce(a, 1),
}


@pytest.mark.parametrize("operation", REDUCTIONS)
def test_a_warp_is_reduced(operation):
    x = words("u4", 96)
    expected = np.repeat(REDUCTIONS[operation](x.reshape(-1, 32)), 32)
    same(warps(f"redux.sync.{operation} out, x, -1;", "u4", x), expected)


def test_the_lane_is_known():
    same(
        warps("mov.u32 out, %laneid; add.u32 out, out, WARP_SZ;", "u4", words("u4", 64), 64),
        np.tile(LANES + 32, 2).astype("u4"),
    )
