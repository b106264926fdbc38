"""A rule as a Numba CUDA kernel.

Numba has no vector type for array elements, and passing an array to a kernel takes it longer than launching one. So a kernel
here takes addresses, and loads and stores 16 bytes by LLVM.
"""

import functools
import importlib
from unittest import mock

import numpy as np
from numba import cuda, from_dtype, types
from numba.core.errors import TypingError
from numba.cuda.extending import intrinsic

from gpuadam.kernels import adam, element_numba, numba_access, primitives
from gpuadam.kernels.gpu_table import BLOCK, CHUNK, FIRST_CHUNK, HEAD, ITEMS, KEY, OPERANDS, SIZE, START, VECTORS
from gpuadam.kernels.layout import WARP
from gpuadam.kernels.norm_numba_cuda import tuple_of
from gpuadam.kernels.numba_memory import load_at, store_at, tuple_at
from gpuadam.kernels.operands import GROUP, GROUP_LANES, lanes_of, operands_of_form
from gpuadam.kernels.scalars import KEY_AT, REALS_AT, SKIP_AT, formula_in_python

if not hasattr(np, "row_stack"):
    # numba-cuda up to 0.30.4 names np.row_stack when it first loads its array functions. NumPy 2.5 has it no more, so no kernel
    # could be compiled. It was another name for vstack, and is one again while they load.
    with mock.patch.object(np, "row_stack", np.vstack, create=True):
        importlib.import_module("numba.cuda.cudaimpl")

UNSIGNED = {1: types.uint8, 2: types.uint16, 4: types.uint32, 8: types.uint64}  # by bytes

# functions from an element's type to a load or a store of one in global memory
global_load = functools.partial(load_at, intrinsic, addrspace=1)
global_store = functools.partial(store_at, intrinsic, addrspace=1)
load_int32, load_int64, store_int64 = global_load(types.int32), global_load(types.int64), global_store(types.int64)


@functools.cache
def compiled(build, *arguments):
    """Return the kernel build(*arguments) as a Numba dispatcher, which compiles it at its first launch.

    It is compiled as the tests look at it: to PTX, and that to machine code. Where Numba finds nvJitLink, it would optimise a
    second time while it links; an 8-bit kernel then has 72 registers and not 64.
    """
    return cuda.jit(build(*arguments), lto=False)


def build(rule, form, loop, on_device=False, vectors=1):
    """Return the kernel of a form as a Python function.

    loop: "contiguous", "table" or "strided N", N the number of dimensions. on_device: whether the scalars are in device memory,
    and the kernel's last argument is their address. vectors: that a thread takes at once, where there are enough.
    """
    if form.arrays.grouped:
        return _over_groups(rule, form, on_device, vectors)
    operands, LANES = operands_of_form(form), lanes_of(form)
    N, SKIPS, ZERO_GRAD, RANDOM = len(operands), form.skips, form.zero_grad, form.arrays.random
    one, several = (numba_access.functions(form, intrinsic, lanes, addrspace=1) for lanes in (1, LANES))
    scalars_of, moved, stepped = _scalars_of(form, on_device), one.moved, one.stepped

    def updating(access, lanes, times=1, apart=0):
        """Return the update of `times` vectors, of which each is some elements behind the one before."""
        update_lanes, store = numba_access.update_of(rule, form, intrinsic, lanes, contracts=True), access.store
        if times == 1:  # each function more takes Numba 12 ms to compile
            load_all, update_all, zero_all = access.load, update_lanes, access.zero_grad

            @cuda.jit(device=True)
            def store_all(at, i, new, start, key):
                store(at, i, new, start, (start + i) >> 32, key)

        else:  # all are loaded before the first is stored
            here = f"i + {{k}} * {apart}"
            load_all = tuple_of("at, i", f"load(at, {here})", times, load=access.load)
            update_all = tuple_of("old, s", "update_lanes(old[{k}], s)", times, update_lanes=update_lanes)
            item = f"store(at, {here}, new[{{k}}], start, (start + {here}) >> 32, key)"
            store_all = tuple_of("at, i, new, start, key", item, times, store=store)
            zero_all = tuple_of("at, i", f"zero_grad(at, {here})", times, zero_grad=access.zero_grad)

        @cuda.jit(device=True)
        def update_at(at, i, start, key, s):
            scalars, step_key, skip = s
            if SKIPS and skip:
                if ZERO_GRAD:
                    zero_all(at, i)
            else:
                store_all(at, i, update_all(load_all(at, i), scalars), start, key ^ step_key)

        return update_at

    V = vectors
    apart = LANES * (WARP if loop == "contiguous" else BLOCK)
    update_element, update_vector = updating(one, 1), updating(several, LANES)
    update_vectors = updating(several, LANES, V, apart) if V > 1 else update_vector

    if loop == "contiguous":

        def contiguous(at, head, vectors, threads, start, key, scalars):
            i = cuda.grid(1)
            if V > 1:  # `layout.Split` says which elements a thread has
                of_several = vectors // (WARP * V) * WARP
                if i < of_several:
                    k = head + (i // WARP * (WARP * V) + i % WARP) * LANES
                    update_vectors(at, k, start, key, scalars_of(scalars))
                    return
                i += of_several * (V - 1)
                threads += of_several * (V - 1)
            if i < vectors:
                k = head + i * LANES
                update_vector(at, k, start, key, scalars_of(scalars))
            elif i < threads:
                k = i - vectors
                k = k if k < head else k + vectors * LANES
                update_element(at, k, start, key, scalars_of(scalars))

        return contiguous

    if loop == "table":
        load_operands, chunk_of = tuple_at(intrinsic, N, addrspace=1), _chunk_of(N)

        def table(rows, owners, key, scalars):
            row, first, vectors_here, items_here = chunk_of(rows, owners)
            begin = load_int64(row + 8 * HEAD) + first * LANES
            at = moved(load_operands(row + 8 * OPERANDS), begin)
            s = scalars_of(scalars)
            start, row_key = types.int64(0), types.int64(0)
            if RANDOM:
                start, row_key = load_int64(row + 8 * START), load_int64(row + 8 * KEY) ^ key
            item = types.int64(cuda.threadIdx.x)
            while item < items_here:
                if V > 1 and item + (V - 1) * BLOCK < vectors_here:
                    update_vectors(at, item * LANES, start + begin, row_key, s)
                    item += (V - 1) * BLOCK
                elif item < vectors_here:
                    update_vector(at, item * LANES, start + begin, row_key, s)
                else:
                    # read from the row again, so that it takes no registers
                    head, vectors = load_int64(row + 8 * HEAD), load_int64(row + 8 * VECTORS)
                    k = item + first - vectors
                    k = k if k < head else k + vectors * LANES
                    update_element(at, k - begin, start + begin, row_key, s)
                item += BLOCK

        return table

    NDIM = int(loop.split()[1])

    def strided(at, shape, strides, size, start, key, scalars):
        i = cuda.grid(1)
        if i < size:
            rest = i
            for d in range(NDIM):
                # the last dimension varies fastest
                at = stepped(at, strides[NDIM - 1 - d], rest % shape[NDIM - 1 - d])
                rest = rest // shape[NDIM - 1 - d]
            update_element(at, 0, start + i, key, scalars_of(scalars))

    return strided


def _over_groups(rule, form, on_device, V):
    """Return the kernel of 8-bit state: an item is a part of a group, and whole warps go through the loop together."""
    operands, LANES = operands_of_form(form), GROUP_LANES
    N, SKIPS, ZERO_GRAD = len(operands), form.skips, form.zero_grad
    APART = BLOCK * LANES  # elements
    one, several = (numba_access.functions(form, intrinsic, lanes, addrspace=1) for lanes in (1, LANES))
    load, store, encode = one.load, one.store, one.encode
    units, codec, scales = one.units, one.codec, one.scales
    load_lanes, store_lanes, magnitudes, encode_lanes = several.load, several.store, several.magnitudes, several.encode
    update_lanes = numba_access.update_of(rule, form, intrinsic, LANES, contracts=True)
    scalars_of, zero_grad = _scalars_of(form, on_device), one.zero_grad
    load_operands, chunk_of = tuple_at(intrinsic, N, addrspace=1), _chunk_of(N)

    @cuda.jit(device=True)
    def store_one(at, i, size, new, how, start, key):
        if i < size:
            store(at, i, new, start, (start + i) >> 32, key)
            encode(at, i, new, how, start, (start + i) >> 32, key)

    load_some = tuple_of("at, i, last, unit", "load(at, min(i + {k}, last), unit)", LANES, load=load)
    arguments = "at, i, size, new, how, start, key"
    item = "store_one(at, i + {k}, size, new[{k}], how, start, key)"
    store_some = tuple_of(arguments, item, LANES, store_one=store_one)

    @cuda.jit(device=True)
    def update_group(at, i, size, whole, unit, old, start, key, s):
        new = update_lanes(old, s)
        m, root = magnitudes(new, size - i)
        for k in range(2):  # among the four threads of a group
            m = max(m, cuda.shfl_xor_sync(0xFFFFFFFF, m, 1 << k))
            root = max(root, cuda.shfl_xor_sync(0xFFFFFFFF, root, 1 << k))
        how = codec(m, root)
        if i < size and i % GROUP == 0:
            scales(at, i // GROUP, m, root)
        if whole:
            store_lanes(at, i, new, start, (start + i) >> 32, key)
            encode_lanes(at, i, new, how, start, (start + i) >> 32, key)
        else:
            store_some(at, i, size, new, how, start, key)

    # all are loaded before the first is stored
    load_all = tuple_of("at, i, unit", f"load_lanes(at, i + {{k}} * {APART}, unit[{{k}}])", V, load_lanes=load_lanes)
    units_of_all = tuple_of("at, i", f"units(at, (i + {{k}} * {APART}) // {GROUP})", V, units=units)
    item = f"update_group(at, i + {{k}} * {APART}, size, True, unit[{{k}}], old[{{k}}], start, key, s)"
    update_all = tuple_of("at, i, size, unit, old, start, key, s", item, V, update_group=update_group)

    def table(rows, owners, key, scalars):
        row, first, vectors_here, items_here = chunk_of(rows, owners)
        size, at = load_int64(row + 8 * SIZE), load_operands(row + 8 * OPERANDS)
        s, step_key, skip = scalars_of(scalars)
        start, row_key = load_int64(row + 8 * START), load_int64(row + 8 * KEY) ^ key ^ step_key
        item = types.int64(cuda.threadIdx.x)
        while item < (items_here + WARP - 1) // WARP * WARP:
            i = (first + item) * LANES
            if SKIPS and skip:
                if ZERO_GRAD:
                    for k in range(LANES):
                        if i + k < size:
                            zero_grad(at, i + k)
            elif V > 1 and (item | (WARP - 1)) + (V - 1) * BLOCK < vectors_here:  # of the last thread of the warp
                unit = units_of_all(at, i)
                update_all(at, i, size, unit, load_all(at, i, unit), start, row_key, s)
                item += (V - 1) * BLOCK
            else:
                unit = units(at, min(i, size - 1) // GROUP)
                whole = item < vectors_here
                old = load_lanes(at, i, unit) if whole else load_some(at, i, size - 1, unit)
                update_group(at, i, size, whole, unit, old, start, row_key, s)
            item += BLOCK

    return table


def _chunk_of(n_operands):
    """Return a function to the address of a block's row in the table, its first item, and how many vectors and items it has."""
    ROW = 8 * (OPERANDS + n_operands)

    @cuda.jit(device=True)
    def chunk_of(rows, owners):
        chunk = cuda.blockIdx.x
        row = rows + ROW * types.int64(load_int32(owners + 4 * chunk))
        first = (chunk - load_int64(row + 8 * FIRST_CHUNK)) * CHUNK
        vectors_here = min(load_int64(row + 8 * VECTORS) - first, CHUNK)
        return row, first, vectors_here, min(load_int64(row + 8 * ITEMS) - first, CHUNK)

    return chunk_of


def _scalars_of(form, on_device):
    """Return a function from a kernel's last argument to the scalars, the step's key and whether to skip the step."""
    if not on_device:
        return cuda.jit(device=True)(lambda scalars: (scalars, types.int64(0), types.int64(0)))
    real, RANDOM, SKIPS = from_dtype(form.dtype), form.arrays.random, form.skips
    load_scalars = tuple_at(intrinsic, len(adam.scalar_names(form)), real, addrspace=1)

    @cuda.jit(device=True)
    def scalars_at(address):
        key, skip = types.int64(0), types.int64(0)
        if RANDOM:
            key = load_int64(address + KEY_AT)
        if SKIPS:
            skip = load_int64(address + SKIP_AT)
        return load_scalars(address + REALS_AT), key, skip

    return scalars_at


@functools.cache
def build_element(form):
    """Return the update of one element, of the rule in kernels of users, as a function for @cuda.jit code."""
    device_function = cuda.jit(device=True, fastmath=False)
    rule = device_function(adam.in_python(form, primitives.in_assembly(intrinsic, form.dtype)))
    return device_function(element_numba.in_python(form, intrinsic, rule, TypingError))


def build_scalars(form):
    """Return the kernel of a `scalars.ScalarsForm` as a Python function. An lr or grad_scale on the device is its address."""
    # Numba's casts between float32 and float64 round to nearest and keep subnormal numbers
    op, real = primitives.for_numba(intrinsic, contracts=True), from_dtype(form.dtype)
    op.u64, op.i64 = types.uint64, types.int64
    formula = formula_in_python(form.algorithm, form.decoupled, op)
    powers, of_step, clipped, too_large, key_of = map(cuda.jit(device=True), formula)
    load_norm, store_real = global_load(types.float64), global_store(real)
    lr_of, grad_scale_of = map(_number_of, (form.lr, form.grad_scale))
    CLIPS, CHECKS, COUNTS, WORDS = form.norm, form.checks, form.counts, form.random or form.skips
    ITEMSIZE, FLAG, EMA, N_SCALARS = form.dtype.itemsize, form.found_inf is not None, form.ema, form.reals
    flag, add, mul = form.found_inf or np.dtype("u1"), op.add, op.mul
    load_flag = global_load(UNSIGNED[flag.itemsize])
    MAGNITUDE = types.uint64((1 << (8 * flag.itemsize - (flag.kind == "f"))) - 1)

    def scalars(
        step, found_inf, norm, lr, grad_scale, out,
        advance, seed, sign, beta1, beta2, weight_decay, w1, w2, eps,
        further1, further2, further3, further4, further5, first_w_ema, max_norm, largest_norm,
    ):  # fmt: skip
        scale, skip = grad_scale_of(grad_scale), False
        if FLAG:
            skip = (types.uint64(load_flag(found_inf)) & MAGNITUDE) != 0
        if CHECKS:
            skip = skip or too_large(load_norm(norm), scale, largest_norm)
        t = advance
        if COUNTS:
            t = load_int64(step)
            if not skip:
                t += advance
            store_int64(step, t)
        power1, power2 = powers(t, beta1, beta2)
        decay, inv_sqrt_bias2, epsilon, neg_lr = of_step(t, power1, power2, lr_of(lr), beta2, weight_decay, eps)
        scale = mul(sign, scale)
        if CLIPS:
            scale = clipped(scale, load_norm(norm), max_norm)
        scale = add(scale, 0.0)  # of -0.0 this makes 0.0
        numbers = (
            scale, decay, w1, w2, inv_sqrt_bias2, epsilon, neg_lr, further1, further2, further3, further4, further5,
        )  # fmt: skip
        for k in range(N_SCALARS):
            store_real(out + REALS_AT + k * ITEMSIZE, real(numbers[k]))
        if EMA and t == 1:
            store_real(out + REALS_AT + (N_SCALARS - 1) * ITEMSIZE, real(first_w_ema))
        if WORDS:
            store_int64(out + KEY_AT, key_of(seed, t))
            store_int64(out + SKIP_AT, types.int64(skip))

    return scalars


def _number_of(dtype):
    """Return a function from an argument to a float64. dtype: of the array whose address the argument is; None of a number."""
    if dtype is None:
        return cuda.jit(device=True)(lambda number: number)
    load = global_load(from_dtype(dtype))
    return cuda.jit(device=True)(lambda address: types.float64(load(address)))


def build_rows(itemsize, ndim, copies):
    """Return the kernel that stores, element by element, row rows[k] of an array in row k of another, none where it is -1.

    copies: or else zeros are stored in all rows, and there is no other array.
    """
    bits = UNSIGNED[itemsize]
    load, store = global_load(bits), global_store(bits)

    def store_rows(to, to_strides, source, source_strides, shape, rows, size):
        i = cuda.grid(1)
        if i < size:
            for d in range(ndim - 1):
                k = i % shape[ndim - 1 - d]
                i = i // shape[ndim - 1 - d]
                to += to_strides[ndim - 1 - d] * k
                source += source_strides[ndim - 1 - d] * k
            row = load_int64(rows + 8 * i) if copies else i
            if row >= 0:
                store(to + to_strides[0] * i, load(source + source_strides[0] * row) if copies else bits(0))

    return store_rows
