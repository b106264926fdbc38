"""The update itself, for contributors: what a rule is, what a backend is, and how to add either.

## The route of one update

From a call to the memory:

    gpuadam.adam_step(...)            gpuadam/functional.py: arrays and hyperparameters
      update.update([updates])        gpuadam/update.py: first all checks, last all launches
        backends.choose(arrays)       gpuadam/backends.py: the arrays decide; their Views
        backend.batches(...)          a Batch for all dense arrays, one for each other:
                                      cpu_backend.py, gpu_batch.py
      update.prepared(...), launch    gpuadam/update.py again, over all batches:
        batch.place(stream)           on a GPU: its stream, and which streams wait
        batch.check(place, ...)       on a GPU: what a CUDA graph cannot hold is refused
        batch.prepare(rule, form, scalars, place, key)
                                      on a GPU: compile; send the table of addresses. A graph that is being
                                      captured loads no kernel: it is refused if one is missing
        batch.launch()                the kernel, built once for each rule and form:
          build(rule, form, loop)       a loop over elements: *_kernels.py
            load, convert               *_access.py, conversions.py: from memory
            update                      adam.py: THE RULE
            convert, store              and back

Two shorter ways lead to the same batches. Compiled code reads plain NumPy arrays faster than Python can (`numpy_struct.py`).
Arrays of other libraries are remembered from step to step (`gpuadam/remembered.py`).

A step whose settings are the objects of the step before needs less still (`gpuadam/repeated.py`). One compiled call compares
it with the last one (`same_objects.py`). For NumPy arrays the call makes the step, too (`gpuadam/repeated_on_cpu.py`,
`cpu_step.py`). On a GPU the driver repeats the launches (`gpuadam/repeated_on_gpu.py`, `gpu_step.py`, `gpu_launch.py`), if
they were recorded while Python had no other thread. Steps that clip take the norm in between. torch's tensors in CPU memory
are compared by `dlpack_struct.py` (`gpuadam/torch/repeated.py`). If anything differs nothing is done, and the step goes the
route above, where alone things are refused.

**Words.** An *operand* is an array that a kernel touches. A *view* is what is known of an array. An *update* is one
parameter's operands. A *batch* is what one launch takes. A *form* is what is known when a kernel is compiled. *Scalars* are
the numbers of a step.

## A rule

A rule is the update of one element: a module with `in_python(form, op)`, which returns a Python function, and
`in_cuda_c(form)`, which returns the same in CUDA C for CuPy. Both take the values of `operands.VALUES` and the scalars of
`adam.scalar_names(form)`. Python returns the new values of `operands.RESULTS`, C writes through references. The Python
function is called once for each loop of Numba's, with operations `op` that emit LLVM (`numba_access.update_of`). A rule tests
the `Form` outside the arithmetic, so that an unused option costs nothing. `adam.py` is the rule; `limit.py` only moves the
bytes.

Where several numbers share a v, an element is a vector of them: `Arrays.numbers` says of how many. Operations then go number
by number, and `primitives.REDUCTIONS` make one number of a vector. The text of the rule is the same. An array of such elements
is a View whose dtype has several numbers (`View.in_vectors`), so loops, tables and layouts count elements of any size. Complex
arrays become real ones with a last dimension of 2 before anything else looks at them (`View.in_parts`).

An *operation* of a rule is a row of `primitives.py`: LLVM for Numba beside PTX for CuPy. A *conversion* between a format in
memory and a float is a row of `conversions.py`. `operands.py` says which arrays an update has, in which formats, and by
which conversions. `numba_access.py` and `cuda_c_access.py` write their loads and stores: a loop knows nothing of formats.
`scalars.py` has the formula of a step's scalars, for the host and for a device.

**To add a variant of the rule**, in four edits: a field of `Form` and its line in both texts of `adam.py`; a public name;
its line in `gpuadam/reference.py`; a row in FORMS of `tests/cases.py`. The tests then compare the variant on every backend
and architecture.

**To add a format**: a row of FORMATS in `operands.py`, its conversions in `conversions.py`, and in KINDS the operands that
may have it.

## A backend

A backend is a subclass of `backend.Backend`, whose docstrings are the interface in full. In short:

| attribute or method | meaning |
|---|---|
| `name`, `memory`, `boundary` | "numba-cpu"; "CPU" or "CUDA"; at which multiple of bytes state begins |
| `status()` | whether the backend can run here, and its version or what is missing |
| `view(name, array)` | the View of an array; nothing is copied |
| `batches(updates, arrays)` | `Batch`es, which do `place`, `check`, `prepare`, `launch` and `release` |
| `norm(...)`, `chunk_sums(views)` | the global norm, whose bits follow from the order in `norm_order.py` |
| `step_norms(...)` | the norms of a step: sums before its update, and after it (`change_sums.py`) |
| `zeros`, `zeros_in_one`, `shaped`, `fill_zero`, `copy`, `copy_rows` | memory for state |
| `from_host`, `to_host`, `native` | copies from and to NumPy; an array as one of the backend's library |
| `now`, `seconds_between` | the clock of the device |

`Backend` itself has `launch`, for one update, `zeros_like_all`, and a `zeros_in_one` that makes an allocation for each array.
`gpu_backend.GpuBackend` adds what two libraries share on a GPU: batches, streams, events and copies by the driver, rehearsals,
captured graphs, repeated launches, and the passes of the norm. A GPU backend brings devices, memory, and what launches a kernel:
`run`, `launch_one_thread` and `launch_sums`. It may bring `changing`, so that launches are repeated, and `struct`.

**To add a backend**: one class, in a file that ends with `backend = TheClass()`, and one row in BACKENDS of
`gpuadam/backends.py`. Outside this package `gpuadam.backends.register(backend)` takes the place of the row. Then `python -m
gpuadam doctor` compares its bits with the arithmetic contract, the bench measures it, and the tests over the fixture
`library` include it once `gpuadam/testing/array_backends.py` can make its arrays. `tests/test_fourth_backend.py` has a
complete backend, in plain NumPy and some 100 lines.

## The files

| file | contents |
|---|---|
| `adam.py`, `limit.py` | the rules |
| `element.py`, `element_numba.py` | the rule in kernels of users: `gpuadam.Rule` |
| `scalars.py` | THE FORMULA of a step's scalars |
| `primitives.py`, `conversions.py`, `llvm.py` | operations; conversions and random bits; LLVM for both |
| `state_formats.py` | the formats of moments, in NumPy: what 8-bit state is |
| `operands.py`, `numba_access.py`, `cuda_c_access.py` | operands and formats; loads and stores |
| `view.py`, `dlpack.py`, `layout.py`, `array_bytes.py` | what is known of an array; how it lies in memory; its bytes |
| `backend.py` | the interface |
| `cpu_backend.py`, `cpu_kernels.py`, `cpu_threads.py`, `numpy_struct.py`, `cpu_step.py`, `compiled_cache.py` | `numba-cpu` |
| `cpu_strided.py` | arrays of any strides on the CPU |
| `processor.py` | prefetches and vectors of the CPU's loops |
| `step_objects.py`, `same_objects.py`, `dlpack_struct.py` | what a step is given, and its comparison in compiled code |
| `calls.py` | calls that compiled code makes |
| `huge_pages.py` | memory of the host on pages of 2 MB |
| `ownership.py` | which files no other user can have written |
| `messages.py`, `switches.py` | values of users in the messages of errors; environment variables |
| `gpu_backend.py`, `gpu_driver.py`, `gpu_batch.py`, `gpu_table.py`, `streams.py` | both GPU backends |
| `gpu_step.py`, `gpu_launch.py` | steps on a GPU that are as the last one, and launches that the driver repeats |
| `gpu_norm.py` | the global norm on a GPU: a table, and the launches of its passes |
| `gpu_in_flight.py` | how many vectors a thread of a GPU takes |
| `cupy_backend.py`, `cupy_kernels.py`, `cupy_struct.py` | `cupy` |
| `numba_cuda_backend.py`, `numba_cuda_kernels.py`, `numba_attributes.py` | `numba-cuda` |
| `cuda_linker.py` | what links the kernels of `numba-cuda`, and whether it knows NVVM's PTX |
| `numba_memory.py` | numbers in memory, for Numba's code on the CPU and on a GPU |
| `norm_order.py` | THE ORDER of the global norm, and its plan |
| `norm_cpu.py`, `norm_cuda_c.py`, `norm_numba_cuda.py` | its kernels |
| `change_sums.py`, `change_gpu.py` | the norms of a step, and their passes on a GPU |
| `change_cpu.py`, `change_cuda_c.py`, `change_numba_cuda.py` | the kernels of the norm of its change |
| `synchronous.py` | GPUADAM_SYNC=1 |
"""
