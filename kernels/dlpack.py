"""What a DLPack capsule says of an array's memory.   (dlpack.h, https://dmlc.github.io/dlpack/latest/c_api.html)

NumPy's `from_dlpack` does not know bfloat16, CuPy's forgets that an array is read-only, and Numba's CUDA target has none.

A capsule is borrowed here, not consumed: while it is alive, so is the memory, and when it goes its producer is told.
"""

import ctypes
import struct

import numpy as np

CPU, CUDA, CUDA_HOST = 1, 2, 3  # DLDeviceType
READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
VERSION = (1, 0)  # of the struct below; later ones of the same major version only add to it
BFLOAT = 4  # DLDataTypeCode
KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}  # of the other DLDataTypeCodes

# DLTensor, with which an unversioned DLManagedTensor begins: data; type and number of the device; ndim; code, bits and lanes of
# the dtype; shape; strides; byte_offset.
TENSOR = struct.Struct("PiiiBBHPPQ")
# DLManagedTensorVersioned, before its DLTensor: major and minor version; manager's context; deleter; flags
VERSIONED = struct.Struct("IIPPQ")

pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_has_name = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))


class Borrowed:
    """The memory of an array that has DLPack, described as NumPy and `__cuda_array_interface__` do.

    stream: on a GPU, the handle of the one that the producer is to make wait for its own work. bits: "bfloat16" for integers
    that stand for such numbers. Old capsules do not say whether one may write; this takes them to be read-only, as NumPy does.

    Raises what the producer raises, and BufferError for what is not known here.
    """

    def __init__(self, array, **stream):
        self.capsule = _capsule(array, stream)
        if _has_name(self.capsule, b"dltensor_versioned"):
            address = pointer(self.capsule, b"dltensor_versioned")
            major, _, _, _, flags = _read(VERSIONED, address)
            if major != VERSION[0]:
                raise BufferError(f"its DLPack is of version {major}; version {VERSION[0]} is needed")
            address, read_only = address + VERSIONED.size, bool(flags & READ_ONLY)
        else:
            address, read_only = pointer(self.capsule, b"dltensor"), True
        data, device, _, ndim, code, bits, lanes, shape, strides, offset = _read(TENSOR, address)
        dtype = _dtype(code, bits, lanes)
        self.bits = "bfloat16" if code == BFLOAT else ""
        described = {"shape": _integers(shape, ndim), "typestr": dtype.str, "version": 3, "data": (data + offset, read_only)}
        # without strides it is in C order
        described["strides"] = tuple(dtype.itemsize * step for step in _integers(strides, ndim)) if strides else None
        if device in (CPU, CUDA_HOST):
            self.__array_interface__ = described
        else:
            self.__cuda_array_interface__ = described


def _capsule(array, stream):
    try:
        return array.__dlpack__(**stream, max_version=VERSION)
    except TypeError:  # a producer of before DLPack 1.0
        return array.__dlpack__(**stream)


def _read(layout, address):
    return layout.unpack(ctypes.string_at(address, layout.size))


def _integers(address, n):
    return tuple((ctypes.c_int64 * n).from_address(address)) if n else ()


def _dtype(code, bits, lanes):
    if lanes == 1 and (code, bits) == (BFLOAT, 16):
        return np.dtype("int16")
    if lanes == 1 and code in KINDS and bits % 8 == 0:
        return np.dtype(f"{KINDS[code]}{bits // 8}")
    raise BufferError(f"elements of DLPack type {code} with {bits} bits are not known here")
