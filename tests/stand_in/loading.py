"""Modules, kernels and launches."""

import ctypes
import re
from typing import NamedTuple

from .driver import ENTRIES, I32, U64, Failure, entry
from .library import write


@entry("cuModuleLoadData", "pp", unsafe=True)
def module_load(d, out, image):
    write(out, U64, d.load(image))


@entry("cuModuleLoadDataEx", "ppupp", unsafe=True)
def module_load_with_options(d, out, image, n, options, values):
    write(out, U64, d.load(image))


@entry("cuLibraryLoadData", "pppupppu"[:8], unsafe=True)
def library_load(d, out, image, *options):
    write(out, U64, d.load(image))


@entry("cuModuleUnload", "p")
def module_unload(d, module):
    d.modules.unload(module)


@entry("cuLibraryUnload", "p")
def library_unload(d, module):
    d.modules.unload(module)


@entry("cuLibraryGetModule", "pp")
def library_module(d, out, module):
    write(out, U64, module)


@entry("cuModuleGetFunction", "ppp")
def module_function(d, out, module, name):
    return _function(d, out, module, name)


@entry("cuLibraryGetKernel", "ppp")
def library_kernel(d, out, module, name):
    return _function(d, out, module, name)


def _function(d, out, module, name):
    function = d.modules.find(module, ctypes.string_at(name).decode())
    if function is None:
        raise Failure("NOT_FOUND")
    write(out, U64, function)


@entry("cuKernelGetFunction", "pp")
def kernel_function(d, out, kernel):
    write(out, U64, kernel)


@entry("cuKernelGetName", "pp")
def kernel_name(d, out, kernel):
    text = ctypes.create_string_buffer(d.modules.function(kernel).name.encode())
    d.kept.append(text)
    write(out, U64, ctypes.addressof(text))


@entry("cuModuleGetGlobal_v2", "pppp")
def module_global(d, out, size, module, name):
    raise Failure("NOT_FOUND")


# max threads per block, shared, const, local bytes, registers, PTX and binary version
FUNCTION_ATTRIBUTES = {0: 1024, 1: 0, 2: 0, 3: 0, 4: 32, 5: 90, 6: 90, 7: 0, 8: 49152, 9: 0}


@entry("cuFuncGetAttribute", "pip")
def function_attribute(d, out, attribute, function):
    d.modules.function(function)
    write(out, I32, FUNCTION_ATTRIBUTES.get(attribute, 0))


@entry("cuKernelGetAttribute", "pipi")
def kernel_attribute(d, out, attribute, kernel, device):
    return function_attribute(d, out, attribute, kernel)


@entry("cuFuncSetAttribute", "pii")
def set_function_attribute(d, function, attribute, value):
    pass


@entry("cuFuncSetCacheConfig", "pi")
def set_cache_config(d, function, config):
    pass


@entry("cuOccupancyMaxActiveBlocksPerMultiprocessor", "ppin")
def occupancy(d, out, function, block, shared):
    write(out, I32, max(1, 2048 // max(block, 1)))


@entry("cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", "ppinu")
def occupancy_with_flags(d, out, function, block, shared, flags):
    write(out, I32, max(1, 2048 // max(block, 1)))


@entry("cuOccupancyMaxPotentialBlockSize", "ppppni")
def potential_block(d, grid, block, function, shared_of, shared, limit):
    write(grid, I32, 264)
    write(block, I32, 256)


@entry("cuLaunchKernel", "puuuuuuuppp")
def launch_kernel(d, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
    d.launch(function, (gx, gy, gz), (bx, by, bz), shared, stream, parameters)


@entry("cuLaunchKernelEx", "pppp")
def launch_kernel_with_config(d, config, function, parameters, extra):
    gx, gy, gz, bx, by, bz, shared = (ctypes.c_uint * 7).from_address(config)
    d.launch(function, (gx, gy, gz), (bx, by, bz), shared, U64.from_address(config + 32).value, parameters)


PTX_INPUT = 1
ERROR_LOG = 5  # CU_JIT_ERROR_LOG_BUFFER
VERSION_OF_PTX = re.compile(rb"^\.version (\d+)\.(\d+)", re.MULTILINE)
UNSUPPORTED = "ptxas application ptx input, line 1; fatal   : Unsupported .version {}.{}; current version is '{}.{}'"


@entry("cuLinkCreate_v2", "uppp")
def link_create(d, n, options, values, out):
    handle = d.handle()
    names = [I32.from_address(options + 4 * k).value for k in range(n)]
    logs = [U64.from_address(values + 8 * k).value for k, name in enumerate(names) if name == ERROR_LOG]
    d.links[handle] = Link([], logs[0] if logs else 0)
    write(out, U64, handle)


class Link(NamedTuple):
    """The texts that were added, and the address where errors are told; 0 for nowhere."""

    texts: list[bytes]
    log: int


@entry("cuLinkAddData_v2", "pipnpupp")
def link_add(d, state, kind, data, size, name, n, options, values):
    if kind != PTX_INPUT:
        d.problem(f"the linker was given input of kind {kind}: the stand-in executes PTX alone")
        raise Failure("NOT_SUPPORTED")
    link, text = d.links[state], ctypes.string_at(data, size).rstrip(b"\0")
    if d.refuses_new_ptx:
        version = tuple(map(int, VERSION_OF_PTX.search(text).groups()))
        known = d.version // 1000 - 4, d.version % 1000 // 10  # from CUDA 11 on, but for those from 12.6 to 12.9
        if version > known:
            if link.log:
                said = UNSUPPORTED.format(*version, *known).encode() + b"\0"
                ctypes.memmove(link.log, said, len(said))
            raise Failure("UNSUPPORTED_PTX_VERSION")
    link.texts.append(text)


@entry("cuLinkComplete", "ppp")
def link_complete(d, state, out, size):
    """Give the PTX back as what was linked: this driver executes that."""
    text = ctypes.create_string_buffer(b"\n".join(d.links.pop(state).texts))
    d.kept.append(text)
    write(out, U64, ctypes.addressof(text))
    write(size, U64, len(text))


# By C: cuda.core calls it while it raises what the linker refused, and then no function of Python can run
ENTRIES["cuLinkDestroy"] = "p", None
