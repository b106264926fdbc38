"""The update itself. This page is for those who add to it.

A *rule* is one update of one element: a module with `in_python(form, op)`, which returns a Python function for Numba, and
`in_cuda_c(form)`, which returns the same in CUDA C for CuPy. Both take (param, grad, m, v, max_v, ema) and the scalars of
`adam.scalar_names(form)`; Python returns the new (param, m, v, max_v, ema), C writes through references. The differences between
variants are in the `Form`, known when a kernel is compiled: a rule tests it outside the arithmetic, so that unused parts cost
nothing. `adam.py` is the rule; `limit.py` is one that only moves the bytes.

    To add a variant: a field of `Form`, its line in both texts of `adam.py`, a public name, its line in `gpuadam/reference.py`, a
    row in FORMS of `tests/cases.py`. The tests then compare it on every backend and architecture.

An *operation* of a rule is a row of `primitives.py`: LLVM for Numba beside PTX for CuPy. A *conversion* between a format in
memory and a float is a row of `conversions.py`. `operands.py` says which arrays an update has, in which formats, and by which
conversions; `numba_access.py` and `cuda_c_access.py` write their loads and stores: a loop knows nothing of formats. `scalars.py`
has the formula of a step's scalars, for the host and for a device.

    To add a format: a row of FORMATS in `operands.py`, its conversions in `conversions.py`, and in KINDS the operands that may
    have it.

A *backend* is a file that gives a rule its loop: `cupy_elementwise.py`, `numba_cuda.py`, `numba_cpu.py`. Each has

    view(name, array)                              what `gpuadam.kernels.view.View` needs to know of an array; nothing is copied
    batches(updates, arrays)                       the launches that several updates take: one for all dense arrays
    launch(form, views, scalars, rule, stream, key)   one update, in place
    build(rule, form, loop)                        the kernel, cached
    zeros_like(view, dtype), zeros(n, dtype, device)  memory for state, and for many parameters
    fill_zero(view, stream)                        zeros in a gradient of a step that is left out
    copy, from_host, to_host                       for loading state, and for tests and measurements
    native(view)                                   the array in the backend's own library, for the buffers of many ranks
    now, seconds_between                           the device's clock
    pinned, device_bytes, send, receive            of a GPU: memory of both sides, and copies between them on a stream
    on, new_stream, order, record, wait, finish, synchronize   of a GPU: devices, streams, and what waits for what

`gpu_launch.py` has what both GPU backends do to launch, `pointer_table.py` the table by which one launch finds many arrays,
`streams.py` which stream it goes on, and `synchronous.py` how GPUADAM_SYNC=1 waits for it.
`global_norm.py` is the order in which squares are summed, with a file for each backend.
On the CPU `numpy_struct.py` reads what arrays are in compiled code, and `compiled_cache.py` keeps kernels on disk.

    To add a backend: such a file, and in `gpuadam/backends.py` a row and a probe. The bench picks it up from there, and the tests
    over the fixture `library` once `gpuadam/testing/array_backends.py` can make its arrays.
"""
