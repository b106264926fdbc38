"""Who is measured: gpuadam, its limit, and other fused and unfused Adams, each on arrays of its own unless they are large.

A contender takes a list of shapes and returns a Contender, which does one float32 Adam step on all of them, in place where its
library can. Every one starts from the same numbers, which stay ordinary (finite, no subnormals) however many steps are done: the
gradient is constant, so m and v approach it and its square. `benchmarks/README.md` says how to add one.
"""

import functools
import gc
import importlib
import importlib.util
import itertools
import math
import os
import shutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

import gpuadam
from gpuadam import backends
from gpuadam.cli.measuring import constants, forms, measure, pages
from gpuadam.kernels import adam, huge_pages, limit

HYPERPARAMETERS = forms.HYPERPARAMETERS
LR, BETAS, EPS = HYPERPARAMETERS.values()


class Contender(NamedTuple):
    """step: does, or enqueues, one step. finish: waits for it, where the library has threads or streams of its own.

    extents: returns (address, bytes) of each array that a step reads or writes, on a CPU. movers: of the limit, {name: Contender}
    of the ways to move its bytes.
    """

    step: Callable[[], Any]
    finish: Callable[[], Any] | None = None
    extents: Callable[[], list[tuple[int, int]]] | None = None
    movers: Mapping[str, Any] = MappingProxyType({})

    def percent_huge(self, backend):
        """Return what percentage of the arrays lies on huge pages; None on a GPU, or where the system does not say it."""
        on_cpu = backend.memory == "CPU" and self.extents
        return pages.percent_huge(self.extents()) if on_cpu else None

    def whole(self, kernels):
        """Return a function that does one step between two moments of the backend's clock, and nothing else."""
        if self.finish is None:
            return self.step

        def alone():  # a stream of its own would run beside the step before, and the clock would not wait for it
            measure.drain(kernels)
            self.step()
            self.finish()

        return alone


def with_movers(contenders):
    """Return {name: Contender} with all ways to move the bytes in the place of the limit, which is the fastest of them."""
    result: dict[str, Contender] = {}
    for name, contender in contenders.items():
        movers = {measure.OF_MOVER + mover: way for mover, way in contender.movers.items()}
        result |= movers or {name: contender}
    return result


def wait_for_all(contenders, kernels):
    """Return a function that waits until nothing is running any more."""
    waits = [contender.finish for contender in contenders if contender.finish]

    def wait():
        measure.drain(kernels)
        for finish in waits:
            finish()

    return wait


class Peer(NamedTuple):
    """One row of the table of who can be measured."""

    name: str
    build: Callable[..., Contender]  # build(backend, shapes)
    memory: tuple[str, ...] = ("CPU", "CUDA")
    package: str = "gpuadam"
    floats: int = 4  # an element, held at the peak of a step
    passes: int = 1  # over memory, roughly: many take too long on large arrays
    problem: Callable[[str], str] = lambda memory: ""  # why it cannot run although its package is there
    arrays_of: str = ""  # the backend whose arrays it takes, if it takes no others
    own: bool = False  # whether its arrays are as its library makes them, and not in the memory that all contenders have


# -- gpuadam --


def host_arrays(shapes, count):
    """Yield lists of the first `count` of param, grad, m and v, for each shape. They are others' too: copy them to write."""
    for arrays in _host_arrays(tuple(shapes)):
        yield arrays[:count]


@functools.lru_cache(maxsize=1)  # contenders are built one after the other from the same, and to make 4 GB takes seconds
def _host_arrays(shapes):
    """Return a list of param, grad, m and v for each shape."""
    of_shapes = [[a.reshape(shape) for a in measure.data(math.prod(shape), "float32")] for shape in shapes]
    for array in itertools.chain.from_iterable(of_shapes):
        array.flags.writeable = False
    return of_shapes


SHARED_FROM = 10_000_000  # elements, of which no cache holds much


def own_arrays(backend, shapes, count=4, of_rule=False):
    """Return lists likewise of arrays of the backend. of_rule: for a kernel that is launched without a call.

    Arrays that a cache may hold are for one contender alone: shared ones would be warm after another contender's turn. Larger
    ones in a CPU's memory are the same for all contenders: where a virtual machine's host has put an allocation can make a step
    1.5 times as long. On a GPU they are the same for all kernels that are launched without a call.
    """
    if _are_shared(backend, shapes) or (of_rule and _are_large(shapes)):
        return [arrays[:count] for arrays in _same_arrays(backend, tuple(shapes))]
    return _new_arrays(backend, shapes, count)


def _are_shared(backend, shapes):
    return backend.memory == "CPU" and _are_large(shapes)


def _are_large(shapes):
    return sum(map(math.prod, shapes)) >= SHARED_FROM


def _new_arrays(backend, shapes, count):
    """Return lists of new arrays: on a CPU each operand's are parts of one allocation, on huge pages."""
    kernels = backends.load(backend.name)
    if backend.memory != "CPU":
        return [[kernels.from_host(a) for a in arrays] for arrays in host_arrays(shapes, count)]
    places = [_places(shapes) for _ in range(count)]
    for k, arrays in enumerate(host_arrays(shapes, count)):
        for place, array in zip(places, arrays, strict=True):
            place[k][...] = array
    return list(map(list, zip(*places, strict=True)))


def _places(shapes):
    """Return zeros of these shapes, float32, in one allocation, on huge pages if it is large."""
    arrays = backends.load("numba-cpu").zeros_in_one(list(map(math.prod, shapes)), np.float32, None)
    return [array.reshape(shape) for array, shape in zip(arrays, shapes, strict=True)]


def _extents(of_parameters):
    return lambda: pages.extents(itertools.chain.from_iterable(of_parameters))


@functools.lru_cache(maxsize=2)  # of a list of arrays, and of one flat array
def _same_arrays(backend, shapes):
    """Return the same arrays in every call: which pages an array has can matter more than the arithmetic."""
    return _new_arrays(backend, shapes, 4)


def adam_step(backend, shapes):
    arrays = own_arrays(backend, shapes)
    count = itertools.count(1)

    def step():
        number = next(count)
        for param, grad, m, v in arrays:
            gpuadam.adam_step(param, grad, m, v, number, **HYPERPARAMETERS)

    return Contender(step, extents=_extents(arrays))


def adam_class(backend, shapes):
    return _of_class(own_arrays(backend, shapes, 4 if _are_shared(backend, shapes) else 2))


def adam_class_on_numpys(backend, shapes):
    """`gpuadam.Adam` over arrays as NumPy makes them; the moments are gpuadam's own."""
    return _of_class([[array.copy() for array in arrays] for arrays in host_arrays(shapes, 2)])


def _of_class(arrays):
    params, grads, *moments = map(list, zip(*arrays, strict=True))
    opt = gpuadam.Adam(params, **HYPERPARAMETERS)
    if moments:
        for state, m, v in zip(opt.state.values(), *moments, strict=True):
            state["m"], state["v"] = m, v
    moments = [(state["m"], state["v"]) for state in opt.state.values()]
    return Contender(lambda: opt.step(grads), extents=_extents([params, grads, *moments]))


def _rule(rule):
    def build(backend, shapes):
        rules = limit.movers(backend.memory) if rule is limit else {"": rule}
        ways = {name: _launching(backend, own_arrays(backend, shapes, of_rule=True), way) for name, way in rules.items()}
        first = next(iter(ways.values()))
        return first._replace(movers=ways) if rule is limit else first

    return build


def _launching(backend, of_arrays, rule):
    """Return the Contender that launches a rule on each of several sets of arrays."""
    kernels = backends.load(backend.name)
    launchers = [forms.launcher(kernels, forms.FORMS["float32"], arrays, rule) for arrays in of_arrays]

    def step():
        for launch in launchers:
            launch()

    return Contender(launchers[0] if len(launchers) == 1 else step, extents=_extents(of_arrays))


# -- plain array code --


def plain(xp):
    """Adam as it is written by hand with NumPy or CuPy, with no more temporaries than it needs: one."""

    def build(backend, shapes):
        arrays = own_arrays(backend, shapes)
        count = itertools.count(1)
        module = importlib.import_module(xp)

        def step():
            number = next(count)
            for param, grad, m, v in arrays:
                plain_step(module, param, grad, m, v, number)

        return Contender(step, extents=_extents(arrays))

    return build


def plain_step(xp, param, grad, m, v, step):
    beta1, beta2 = BETAS
    m *= beta1
    t = xp.multiply(grad, 1 - beta1)
    m += t
    v *= beta2
    xp.multiply(grad, grad, out=t)
    t *= 1 - beta2
    v += t
    xp.sqrt(v, out=t)
    t *= 1 / math.sqrt(1 - beta2**step)
    t += EPS
    xp.divide(m, t, out=t)
    t *= LR / (1 - beta1**step)
    param -= t


def one_element_a_thread(backend, shapes):
    """An ElementwiseKernel whose body is Adam as published kernels write it, chainer's for one, with CuPy's own indexing."""
    import cupy

    kernel = cupy.ElementwiseKernel(
        "T grad, T lr, T one_minus_beta1, T one_minus_beta2, T eps",
        "T param, T m, T v",
        "m += one_minus_beta1 * (grad - m); v += one_minus_beta2 * (grad * grad - v); param -= lr * m / (sqrt(v) + eps);",
        "one_element_a_thread_adam",
    )
    arrays = own_arrays(backend, shapes)

    def step():
        for param, grad, m, v in arrays:
            kernel(grad, LR, 1 - BETAS[0], 1 - BETAS[1], EPS, param, m, v)

    return Contender(step)


def thinc_adam(backend, shapes):
    """thinc's kernel is `one_element_a_thread`; thinc then fills the gradient with zeros, in a pass of its own."""
    from thinc.api import CupyOps

    ops, arrays = CupyOps(), own_arrays(backend, shapes)

    def step():
        for param, grad, m, v in arrays:
            ops.adam(param, grad, m, v, *BETAS, EPS, LR)

    return Contender(step)


def _thinc_problem(memory):
    from thinc.backends import cupy_ops

    return "" if cupy_ops.adam_kernel is not None else "thinc finds no CuPy"


def cub_transform(backend, shapes):
    """CUB's transform of four arrays into three, by CCCL's Python: one launch for each array, tuned for the GPU by NVIDIA.

    The arithmetic is that of `one_element_a_thread`.
    """
    import cupy
    from cuda.compute import ZipIterator, make_unary_transform

    op = numbers_of_an_element()
    launches = []
    for arrays in own_arrays(backend, shapes):
        param, grad, m, v = (array.ravel() for array in arrays)  # views: they have no gaps
        given, taken = ZipIterator(param, grad, m, v), ZipIterator(param, m, v)
        transform = make_unary_transform(d_in=given, d_out=taken, op=op)
        launches.append((transform, given, taken, param.size))

    def step():
        stream = cupy.cuda.get_current_stream()
        for transform, given, taken, n in launches:
            transform(d_in=given, d_out=taken, op=op, num_items=n, stream=stream)

    return Contender(step)


def numbers_of_an_element():
    """Return the function of one element, of (param, grad, m, v) to (param, m, v), that cuda.compute compiles."""
    lr, w1, w2, eps = (np.float32(x) for x in (LR, 1 - BETAS[0], 1 - BETAS[1], EPS))

    def update(element):
        param, grad, m, v = element[0], element[1], element[2], element[3]
        m += w1 * (grad - m)
        v += w2 * (grad * grad - v)
        return param - lr * m / (math.sqrt(v) + eps), m, v

    return update


def _cub_problem(memory):
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.compute") is None:
        return "cuda-cccl is not installed: pip install 'cuda-cccl[cu13]', or [cu12]"
    try:
        compute = importlib.import_module("cuda.compute")
    except Exception as error:  # noqa: BLE001 - of CUDA's libraries, which it loads; the reason is kept
        return f"cuda.compute cannot be loaded: {error}".splitlines()[0]
    return "" if hasattr(compute, "make_unary_transform") else "this cuda-cccl has no cuda.compute.make_unary_transform"


# -- PyTorch, DeepSpeed --


def _torch_parameters(backend, shapes, own):
    """Return parameters with gradients. own: in torch's memory; on a GPU they always are."""
    import torch

    if own or backend.memory != "CPU":
        device = "cuda" if backend.memory == "CUDA" else "cpu"
        pairs = ([torch.tensor(array, device=device) for array in arrays] for arrays in host_arrays(shapes, 2))
    else:
        pairs = (map(torch.from_numpy, arrays) for arrays in own_arrays(backend, shapes, 2))
    params = []
    for param, grad in pairs:
        params.append(torch.nn.Parameter(param))
        params[-1].grad = grad
    return params


def _of_torch(opt, backend, own, step):
    """Return the Contender of an optimizer of torch's interface. step: the count with which its state begins."""
    import torch

    params = [param for group in opt.param_groups for param in group["params"]]
    if not own and backend.memory == "CPU":
        shapes = [tuple(param.shape) for param in params]
        shared = _are_shared(backend, shapes)
        moments = (
            [arrays[2:] for arrays in own_arrays(backend, shapes)]
            if shared
            else zip(*(_places(shapes) for _ in range(2)), strict=True)
        )
        for param, of_param in zip(params, moments, strict=True):
            exp_avg, exp_avg_sq = map(torch.from_numpy, of_param)
            opt.state[param].update(step=step(), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)

    def extents():
        tensors = [tensor for param in params for tensor in (param, param.grad, *opt.state[param].values())]
        tensors = [tensor for tensor in tensors if torch.is_tensor(tensor) and tensor.dim()]  # a step count is a number
        return [(tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in tensors]

    return Contender(opt.step, extents=extents)


def torch_adam(own=False, module="torch.optim", **form):
    def build(backend, shapes):
        import torch

        adam = importlib.import_module(module).Adam
        opt = adam(_torch_parameters(backend, shapes, own), **HYPERPARAMETERS, **form)
        return _of_torch(opt, backend, own, lambda: torch.zeros((), dtype=torch.float32))

    return build


def _torch_problem(memory):
    import torch

    return "" if memory == "CPU" or torch.cuda.is_available() else "torch finds no GPU"


def deepspeed_cpu_adam(backend, shapes, own=False):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for a GPU, and says at length that there is none
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    opt = DeepSpeedCPUAdam(_torch_parameters(backend, shapes, own), **HYPERPARAMETERS, adamw_mode=False)
    return _of_torch(opt, backend, own, int)


def _deepspeed_problem(memory):
    lacking = [tool for tool in ("g++", "ninja") if not shutil.which(tool)]  # it is compiled when it is first used
    return f"not on the PATH: {', '.join(lacking)}" if lacking else ""


# -- JAX --


def optax_adam(backend, shapes, own=False):
    import jax
    import optax

    transform = optax.adam(LR, *BETAS, eps=EPS)
    device = jax.devices("gpu" if backend.memory == "CUDA" else "cpu")[0]

    def on_device(array):
        return jax.device_put(np.array(array), device)

    params, grads = map(list, zip(*([on_device(a) for a in arrays] for arrays in host_arrays(shapes, 2)), strict=True))
    held = [params, jax.device_put(transform.init(params), device)]

    def update(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(update, donate_argnums=(0, 1))

    def finish():
        return jax.block_until_ready(held)

    def extents():
        arrays = [array for array in jax.tree_util.tree_leaves([held, grads]) if array.ndim]
        return [(array.unsafe_buffer_pointer(), array.nbytes) for array in arrays]

    def step():
        held[:] = jitted(*held, grads)

    if not own and backend.memory == "CPU":  # JAX takes no memory of others to write into: its own is moved to huge pages
        step()  # which makes the arrays that later steps write
        finish()
        for start, n_bytes in extents():
            huge_pages.make_huge(start, n_bytes)
    return Contender(step, finish, extents)


def _optax_problem(memory):
    if importlib.util.find_spec("jax") is None:
        return "jax is not installed"
    import jax

    platforms = {device.platform for device in jax.devices()}
    return "" if memory == "CPU" or "gpu" in platforms else "JAX finds no GPU"


# -- the table --

OURS = (
    Peer("gpuadam.adam_step", adam_step),
    Peer("gpuadam.Adam.step", adam_class),
    Peer("gpuadam kernel + launch", _rule(adam)),
    Peer(measure.LIMIT, _rule(limit)),
)
OF_TORCH = {"package": "torch", "problem": _torch_problem}
OF_DEEPSPEED = {"package": "deepspeed", "problem": _deepspeed_problem}
OF_OPTAX = {"package": "optax", "floats": 5, "problem": _optax_problem}
OWN = {"memory": ("CPU",), "own": True}
OF_CUPY = {"arrays_of": "cupy"}
PEERS = (
    Peer("gpuadam.torch.Adam", torch_adam(module="gpuadam.torch"), **OF_TORCH),
    Peer(measure.TORCH_FUSED, torch_adam(fused=True), **OF_TORCH),
    Peer("DeepSpeed CPUAdam", deepspeed_cpu_adam, ("CPU",), **OF_DEEPSPEED),
    Peer("optax under jit", optax_adam, **OF_OPTAX),
    Peer("torch foreach", torch_adam(foreach=True), floats=6, passes=5, **OF_TORCH),
    Peer("CUB's transform", cub_transform, ("CUDA",), "cuda", problem=_cub_problem, **OF_CUPY),
    Peer("thinc", thinc_adam, ("CUDA",), "thinc", passes=2, problem=_thinc_problem, **OF_CUPY),
    Peer("one element a thread", one_element_a_thread, ("CUDA",), "cupy", **OF_CUPY),
    Peer("plain CuPy", plain("cupy"), ("CUDA",), "cupy", floats=5, passes=13, **OF_CUPY),
    Peer("torch for-loop", torch_adam(foreach=False, fused=False), floats=6, passes=13, **OF_TORCH),
    Peer("plain NumPy", plain("numpy"), ("CPU",), "numpy", floats=5, passes=13),
    Peer("gpuadam.Adam.step (NumPy's memory)", adam_class_on_numpys, **OWN),
    Peer("gpuadam.torch.Adam (torch's memory)", torch_adam(own=True, module="gpuadam.torch"), **OWN, **OF_TORCH),
    Peer("torch fused (its own memory)", torch_adam(own=True, fused=True), **OWN, **OF_TORCH),
    Peer("DeepSpeed CPUAdam (its own memory)", functools.partial(deepspeed_cpu_adam, own=True), **OWN, **OF_DEEPSPEED),
    Peer("optax under jit (its own memory)", functools.partial(optax_adam, own=True), **OWN, **OF_OPTAX),
)


def chosen(backend, names=None, own=False):
    """Return (those peers that can run on this backend, {the others' name: why not}).

    names: only these; None for all. own: also those in their own memory, which is another one if arrays are large.
    """
    present, absent = [], {}
    for peer in PEERS:
        if backend.memory not in peer.memory or peer.own > own or not (names is None or peer.name in names):
            continue
        if peer.arrays_of not in ("", backend.name):
            absent[peer.name] = f"measured with the backend {peer.arrays_of}, whose arrays it takes"
        elif importlib.util.find_spec(peer.package) is None:
            absent[peer.name] = f"{peer.package} is not installed"
        elif problem := peer.problem(backend.memory):
            absent[peer.name] = problem
        else:
            present.append(peer)
    return present, absent


SLOW_PASSES, LARGE_FOR_A_CPU = 10, 5e7


def fitting(peers, elements, backend):
    """Return (the peers that fit in memory together and do not take too long, {the others' name: why not})."""
    large = backend.memory == "CPU" and elements > LARGE_FOR_A_CPU
    slow = {peer.name: f"too slow at {elements:,} elements" for peer in peers if large and peer.passes >= SLOW_PASSES}
    needs = {peer.name: 4 * peer.floats * elements for peer in peers if peer.name not in slow}
    kept, too_large = in_memory(needs, backend, elements)
    return [peer for peer in peers if peer.name in kept], slow | too_large


def in_memory(needs, backend, elements, taken=0):
    """Return (the names of those that fit in the free memory together, {the others' name: why not}).

    needs: {name: bytes}; the first come first. taken: bytes of that memory that others will have.
    """
    kept, absent = [], {}
    free = 0.85 * free_bytes(backend) - taken
    for name, need in needs.items():
        if need > free:
            absent[name] = f"no memory left at {elements:,} elements: it needs {need / 1e9:.1f} GB"
        else:
            kept.append(name)
            free -= need
    return kept, absent


def free_bytes(backend):
    """Return the memory that is free on the backend's device."""
    return constants.memory(backend.name)[0]


def release(backend):
    """Give the memory of contenders that are no more back to the device, so that other libraries' can have it."""
    _same_arrays.cache_clear()
    _host_arrays.cache_clear()
    gc.collect()
    if backend.memory == "CPU":
        return
    if backend.name == "cupy":
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()
    else:
        from numba import cuda

        cuda.current_context().deallocations.clear()
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
