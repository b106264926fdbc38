"""What a DLPack capsule says of an array's memory.   (dlpack.h, https://dmlc.github.io/dlpack/latest/c_api.html)

NumPy's `from_dlpack` does not know bfloat16, CuPy's forgets that an array is read-only, and Numba's CUDA target has none.

A capsule is borrowed here, not consumed: while it is alive, so is the memory, and when it goes its producer is told.
"""

import ctypes

import numpy as np

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType
READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
VERSION = (1, 0)  # of the struct below; later ones of the same major version only add to it
FLOAT, BFLOAT = 2, 4  # DLDataTypeCode
KINDS = {0: "i", 1: "u", FLOAT: "f", 5: "c", 6: "b"}


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("number", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    """DLTensor, with which an unversioned DLManagedTensor begins."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
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
            whole = _Versioned.from_address(_pointer(self.capsule, b"dltensor_versioned"))
            if whole.major != VERSION[0]:
                raise BufferError(f"its DLPack is of version {whole.major}; version {VERSION[0]} is needed")
            tensor, read_only = whole.tensor, bool(whole.flags & READ_ONLY)
        else:
            tensor, read_only = _Tensor.from_address(_pointer(self.capsule, b"dltensor")), True
        dtype = _dtype(tensor.dtype)
        self.bits = "bfloat16" if tensor.dtype.code == BFLOAT else ""
        shape = tuple(tensor.shape[: tensor.ndim])
        strides = (
            tuple(dtype.itemsize * step for step in tensor.strides[: tensor.ndim]) if tensor.strides else None
        )  # in C order
        described = {"shape": shape, "typestr": dtype.str, "strides": strides, "version": 3}
        described["data"] = ((tensor.data or 0) + tensor.byte_offset, read_only)
        if tensor.device.type in (CPU, CUDA_HOST):
            self.__array_interface__ = described
        else:
            self.__cuda_array_interface__ = described


def _capsule(array, stream):
    try:
        return array.__dlpack__(**stream, max_version=VERSION)
    except TypeError:  # a producer of before DLPack 1.0
        return array.__dlpack__(**stream)


def _dtype(dtype):
    if dtype.lanes == 1 and (dtype.code, dtype.bits) == (BFLOAT, 16):
        return np.dtype("int16")
    if dtype.lanes == 1 and dtype.code in KINDS and dtype.bits % 8 == 0:
        return np.dtype(f"{KINDS[dtype.code]}{dtype.bits // 8}")
    raise BufferError(f"elements of DLPack type {dtype.code} with {dtype.bits} bits are not known here")
