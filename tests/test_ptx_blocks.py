"""Shared memory and barriers of a block in the PTX runner."""

import numpy as np
import pytest
from ptx import Incomplete
from ptx_kernels import kernel_of, launch, same, warps, words

REVERSED = """mov.u64 %d0, room; mul.wide.u32 %d1, %t, 8; add.s64 %d1, %d0, %d1; st.shared.b64 [%d1], x; bar.sync 0;
    sub.u32 %r4, %r1, %t; sub.u32 %r4, %r4, 1; mad.wide.u32 %d2, %r4, 8, %d0; ld.shared.b64 out, [%d2];"""


ROOM = ".shared .align 8 .b8 room[8192];"


@pytest.mark.parametrize("block", [1, 31, 33, 1024])
def test_a_block_is_reversed_through_shared_memory(block):
    x = words("u8", 5 * block)
    same(warps(REVERSED, "u8", x, block, ROOM), x.reshape(5, block)[:, ::-1].ravel())


TREE = """mul.wide.u32 %d1, %t, 8; mov.u64 %d0, room; add.s64 %d1, %d1, %d0; st.shared.f64 [%d1], x; shr.u32 %r4, %r1, 1;
    AGAIN: bar.sync 0; setp.ge.u32 %p0, %t, %r4; @%p0 bra SKIP;
    mad.wide.u32 %d2, %r4, 8, %d1; ld.shared.f64 %d3, [%d2]; ld.shared.f64 %d4, [%d1];
    add.rn.f64 %d3, %d3, %d4; st.shared.f64 [%d1], %d3;
    SKIP: shr.u32 %r4, %r4, 1; setp.ne.u32 %p1, %r4, 0; @%p1 bra AGAIN; bar.sync 0; ld.shared.f64 out, [room];"""


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("block", [2, 32, 256, 1024])
def test_a_block_is_summed_by_a_tree(block, backwards):
    x = np.random.default_rng(0).normal(size=7 * block)
    rest = x.reshape(7, block)
    while rest.shape[1] > 1:
        half = rest.shape[1] // 2
        rest = rest[:, half:] + rest[:, :half]
    same(warps(TREE, "f8", x, block, ROOM, backwards=backwards), np.repeat(rest[:, 0], block))


def test_a_missing_barrier_shows_in_one_of_the_two_orders():
    x = np.random.default_rng(0).normal(size=256)
    lacking = TREE.replace("AGAIN: bar.sync 0;", "bar.sync 0; AGAIN:")
    orders = [warps(lacking, "f8", x, 256, ROOM, backwards=backwards)[0] for backwards in (False, True)]
    assert orders[0] != orders[1]


def test_shared_memory_that_nobody_wrote_is_nan():
    assert np.isnan(warps("ld.shared.f64 out, [room];", "f8", np.zeros(64), 32, ROOM)).all()


def test_a_barrier_waits_for_no_thread_that_has_exited():
    x = words("u8", 64)
    lines = "setp.ge.u32 %p0, %t, 40; @%p0 exit;" + REVERSED.replace("%r1, %t", "40, %t")
    expected = np.where(np.arange(64) < 40, np.resize(x[:40][::-1], 64), 0).astype("u8")
    same(warps(lines, "u8", x, 64, ROOM), expected)


INCOMPLETE_BARRIERS = {
    "another barrier": (
        "setp.lt.u32 %p0, %t, 33; @%p0 bra LOW; bar.sync 0; bra END; LOW: bar.sync 0; END:",
        "thread 0 of block 0 waits at `bar.sync 0` for thread 33, which waits at `bar.sync 0`",
    ),
    "a shuffle": (
        "setp.lt.u32 %p0, %t, 40; @%p0 bra LOW; shfl.sync.bfly.b32 out, x, 1, 31, -1; bra END; LOW: bar.sync 0; END:",
        "thread 0 .* for thread 40, which waits at `shfl",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE_BARRIERS)
def test_an_incomplete_barrier_is_an_error(case):
    lines, message = INCOMPLETE_BARRIERS[case]
    with pytest.raises(Incomplete, match=message):
        warps(f"mov.b32 out, 0; {lines}", "u4", words("u4", 64), 64)


@pytest.mark.parametrize(
    "access", ["ld.shared.b64 out, [room+8192]", "ld.shared.b64 out, [room+-8]", "ld.shared.b64 out, [%a1]"]
)
def test_an_access_outside_shared_memory_is_an_error(access):
    with pytest.raises(MemoryError, match="32 accesses outside the variables of shared memory"):
        warps(f"{access};", "u8", words("u8", 32), 32, ROOM + ".shared .align 8 .b8 more[8];")


def test_an_address_of_shared_memory_is_none_of_global_memory():
    with pytest.raises(MemoryError, match="outside the arrays"):
        warps("mov.u64 %d0, room; ld.global.b64 out, [%d0];", "u8", words("u8", 32), 32, ROOM)


def test_a_misaligned_access_of_shared_memory_is_an_error():
    with pytest.raises(MemoryError, match="32 misaligned"):
        warps("ld.shared.b64 out, [room+4];", "u8", words("u8", 32), 32, ROOM)


def test_shared_memory_counts_no_bytes():
    x, out = words("u8", 64), np.zeros(64, "u8")
    lines = ".reg .b64 x, out; ld.global.b64 x, [%a1];" + REVERSED + "st.global.b64 [%a0], out;"
    kernel = launch(kernel_of(lines, 2, (8, 8), ROOM), [out, x], 64)
    assert (kernel.loaded_bytes, kernel.stored_bytes) == (512, 512)


def test_some_blocks_of_a_grid_can_be_run():
    x = words("u8", 320)
    expected = x.reshape(10, 32)[:, ::-1].copy()
    expected[[0, 1, 2, 7, 8, 9]] = 0
    same(warps(REVERSED, "u8", x, 32, ROOM, first_block=3, last_block=7), expected.ravel())
