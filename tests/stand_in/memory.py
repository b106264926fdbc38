"""The memory of the stand-in: what is allocated where, whose it is, and what an access outside of it is called.

A device's memory is the host's, in a range of addresses of its own. Allocations have their exact size, with a gap after each, and
a map with the bytes that may be touched of every 256, which the executed kernels look at. What is freed or not written yet holds
0xFF, which is NaN to a float and -1 to an integer.
"""

import bisect
import ctypes
import mmap

import numpy as np

GRAIN = 256  # bytes that an entry of the map stands for, and to which allocations are aligned twice over
ARENA = 1 << 36  # addresses of a device: not memory
POISON = 0xFF
HOST = -1
KEPT_POISONED = 1 << 26  # bytes; larger freed blocks are given back to the system, which clears them

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_NORESERVE = 0x4000


def _reserved(n_bytes):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    address = _libc.mmap(None, n_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"{n_bytes >> 30} GiB of addresses could not be reserved: {ctypes.get_errno()}")
    return address


class OutsideError(Exception):
    """An access of memory that is not there. CUDA's CUDA_ERROR_ILLEGAL_ADDRESS."""


class Allocation:
    """A block. live: whether work that runs now may touch it; freed: whether its owner has asked to free it."""

    def __init__(self, address, n_bytes, device, made_by, number):
        self.address, self.n_bytes, self.device, self.made_by, self.number = address, n_bytes, device, made_by, number
        self.live = self.freed = False
        self.again = False  # whether its address is that of one that was freed before
        self.stream = None  # of CuPy's allocations, the one whose order they keep

    def __str__(self):
        where = "pinned memory of the host" if self.device == HOST else f"device {self.device}"
        state = "" if self.live else ", freed" if self.freed else ", which work before this would have allocated"
        return f"allocation {self.number} ({self.n_bytes:,} bytes by {self.made_by} on {where}{state})"


class Arena:
    """The addresses of one device, or of pinned memory."""

    def __init__(self, device):
        self.device = device
        self.start = -(-_reserved(ARENA + GRAIN) // GRAIN) * GRAIN
        self.end = self.start + ARENA
        entries = ARENA // GRAIN
        self.map = np.frombuffer((ctypes.c_uint16 * entries).from_address(_reserved(2 * entries)), np.uint16)
        self.next = self.start + 2 * GRAIN
        self.blocks = {}  # address -> Allocation, the last that was there
        self.starts = []  # their addresses in order
        self.free = {}  # bytes -> addresses to use again
        self.used = 0  # bytes

    def allocate(self, n_bytes, made_by, number, again):
        """Return an Allocation that nothing may touch yet. again: whether to use the address of a freed one."""
        room = -(-n_bytes // (2 * GRAIN)) * 2 * GRAIN + 2 * GRAIN
        reused = bool(again and self.free.get(room))
        if reused:
            address = self.free[room].pop()
        else:
            address, self.next = self.next, self.next + room
            if self.next > self.end:
                raise MemoryError("the stand-in has used all of its addresses")
            bisect.insort(self.starts, address)
        block = self.blocks[address] = Allocation(address, n_bytes, self.device, made_by, number)
        block.again = reused
        self.used += n_bytes
        return block

    def open(self, block):
        """Let a block be touched."""
        block.live = True
        ctypes.memset(block.address, POISON, block.n_bytes)
        self._set(block, GRAIN)

    def close(self, block):
        block.live = False
        self._set(block, 0)
        if block.n_bytes <= KEPT_POISONED:
            ctypes.memset(block.address, POISON, block.n_bytes)
        else:
            _libc.madvise(-(-block.address // 4096) * 4096, block.n_bytes // 4096 * 4096 - 4096, mmap.MADV_DONTNEED)
        room = -(-block.n_bytes // (2 * GRAIN)) * 2 * GRAIN + 2 * GRAIN
        self.free.setdefault(room, []).append(block.address)
        self.used -= block.n_bytes

    def _set(self, block, n):
        first = (block.address - self.start) // GRAIN
        whole, rest = divmod(block.n_bytes, GRAIN)
        self.map[first : first + whole] = n
        self.map[first + whole] = min(n, rest)

    def holds(self, address):
        return self.start <= address < self.end

    def at(self, address):
        """Return the Allocation that begins at an address or before it, or None."""
        k = bisect.bisect_right(self.starts, address) - 1
        return self.blocks[self.starts[k]] if k >= 0 else None


class Memory:
    """The memory of all devices, and pinned memory of the host."""

    def __init__(self, n_devices, total):
        self.devices = [Arena(k) for k in range(n_devices)]
        self.pinned = Arena(HOST)
        self.registered = {}  # address -> bytes, of host memory that was made pinned
        self.total = total
        self.count = 0

    @property
    def arenas(self):
        return [*self.devices, self.pinned]

    def arena(self, address):
        return next((arena for arena in self.arenas if arena.holds(address)), None)

    def allocate(self, device, n_bytes, made_by, again=False):
        arena = self.pinned if device == HOST else self.devices[device]
        if device != HOST and arena.used + n_bytes > self.total:
            return None
        self.count += 1
        return arena.allocate(n_bytes, made_by, self.count, again)

    def block(self, address):
        """Return the Allocation that holds an address, asked for and not asked to be freed, or None."""
        arena = self.arena(address)
        block = arena and arena.at(address)
        inside = block and not block.freed and block.address <= address < block.address + max(block.n_bytes, 1)
        return block if inside else None

    def is_pinned(self, address, n_bytes):
        """Whether host memory is page-locked."""
        if self.pinned.holds(address):
            return True
        return any(start <= address and address + n_bytes <= start + size for start, size in self.registered.items())

    def check(self, address, n_bytes, what):
        """Raise OutsideError unless an access is within one allocation. Memory that no driver gave is the host's."""
        arena = self.arena(address)
        if arena is not None and n_bytes:
            block = arena.at(address)
            if block is None or not block.live or address + n_bytes > block.address + block.n_bytes:
                raise OutsideError(f"{what}: {n_bytes:,} bytes at {address:#x}, {self.where(address)}")

    def where(self, address):
        """Say where an address lies."""
        arena = self.arena(address)
        if arena is None:
            return "which is no memory of the driver"
        block = arena.at(address)
        if block is None:
            return f"before every allocation of device {arena.device}"
        past = address - block.address - block.n_bytes
        place = f"{past:,} bytes after the end" if past >= 0 else f"{address - block.address:,} bytes from the start"
        return f"{place} of {block}"
