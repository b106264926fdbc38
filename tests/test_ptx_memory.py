"""Loads and stores of the PTX runner: what is outside, misaligned or unmapped is an error."""

import numpy as np
import pytest
from ptx_kernels import kernel_of, launch, numpy_kind, same, words


@pytest.mark.parametrize("kind", [f"{x}{n}" for x in "bsu" for n in (8, 16)])
def test_a_narrow_load_fills_its_register_by_its_sign(kind):
    n = int(kind[1:])
    x, out = words(f"u{n // 8}", 256), np.zeros(256, "i4")
    kernel = kernel_of(f"ld.global.{kind} %r4, [%a1]; st.global.u32 [%a0], %r4;", 2, (4, n // 8))
    launch(kernel, [out, x], 256)
    same(out, x.view(numpy_kind(kind)).astype("i4"))
    assert (kernel.loaded_bytes, kernel.stored_bytes) == (256 * n // 8, 1024)


def on_32_bytes(a):
    """Return a copy that starts where the widest vector may."""
    room = np.zeros(a.nbytes + 32, "u1")
    start = -room.ctypes.data % 32
    copy = room[start : start + a.nbytes].view(a.dtype)
    copy[:] = a
    return copy


@pytest.mark.parametrize("lanes", [2, 4])
@pytest.mark.parametrize("kind", ["b8", "u8", "s8", "b16", "u16", "s16", "b32", "b64"])
def test_a_vector_is_loaded_and_stored_in_order(kind, lanes):
    n = int(kind[1:])
    x, size = on_32_bytes(words(f"u{n // 8}", 64 * lanes)), n // 8 * lanes
    out = on_32_bytes(np.zeros_like(x))
    names = [f"v{k}" for k in range(lanes)]
    forward, back = ", ".join(names), ", ".join(names[::-1])
    lines = f".reg .b{max(n, 16)} {forward}; ld.global.v{lanes}.{kind} {{{forward}}}, [%a1]; "
    kernel = kernel_of(lines + f"st.global.v{lanes}.{kind} [%a0], {{{back}}};", 2, (size, size))
    launch(kernel, [out, x], 64)
    same(out, x.reshape(-1, lanes)[:, ::-1].ravel())
    assert kernel.loaded_bytes == kernel.stored_bytes == x.nbytes


@pytest.mark.parametrize("access", ["ld.global.u8 %r4, [%a0+1]", "st.global.s8 [%a0+1], %r4"])
def test_one_byte_outside_is_an_error(access):
    room = np.zeros(64, "u1")
    with pytest.raises(MemoryError, match=r"^1 accesses outside"):
        launch(kernel_of(f"{access};", 1, (1,)), [room[:32]], 32)


def test_half_of_a_narrow_access_outside_is_an_error():
    room = np.zeros(64, "u1")
    with pytest.raises(MemoryError, match=r"^1 accesses outside"):
        launch(kernel_of("ld.global.b16 %r4, [%a0];", 1, (2,)), [room[:31]], 16)


@pytest.mark.parametrize("access", ["ld.global.b16 %r4, [%a0+1]", "st.global.v2.u8 [%a0+1], {%h4, %h5}"])
def test_a_misaligned_narrow_access_is_an_error(access):
    with pytest.raises(MemoryError, match=r"^16 misaligned"):
        launch(kernel_of(f"{access};", 1, (2,)), [np.zeros(64, "u1")], 16)


def test_what_lies_outside_is_not_touched():
    room, out = np.full(64, 7, "u1"), np.full(64, 9, "u4")
    kernel = kernel_of("st.global.u8 [%a0], 1; ld.global.u8 %r4, [%a0]; st.global.u32 [%a1], %r4;", 2, (1, 4))
    with pytest.raises(MemoryError, match="64 accesses outside"):
        launch(kernel, [room, out], 64, memory=[room[:32], out])
    np.testing.assert_array_equal(room, [1] * 32 + [7] * 32)
    np.testing.assert_array_equal(out, [1] * 32 + [0] * 32)


@pytest.mark.parametrize("address", [0, 8, 2**47, 2**63, 2**64 - 16, 2**64 - 4, 2**64 - 1])
@pytest.mark.parametrize("memory", [[], [(0, 0)], [(4096, 4096)]])
def test_an_access_of_unmapped_memory_does_not_end_the_process(address, memory):
    kernel = kernel_of(
        "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%a0]; st.global.v4.b32 [%a0], {%r4, %r5, %r6, %r7};", 1, (16,)
    )
    with pytest.raises(MemoryError):
        kernel.run(1, 1, [address.to_bytes(8, "little")], memory)


def test_memory_may_be_of_any_number_of_ranges():
    arrays = [np.zeros(1, "u4") for _ in range(40)]
    lines = "".join(f"ld.param.u64 %d0, [a{k}]; st.global.u32 [%d0], {k};" for k in range(40))
    launch(kernel_of(lines, 40), arrays, 1)
    assert [int(a[0]) for a in arrays] == list(range(40))
