"""The PTX that is loaded, and its execution."""

import ctypes
import itertools
import re

import ptx


class KernelError(Exception):
    """A kernel that a GPU would have stopped, or that is not to be executed here."""


class Modules:
    def __init__(self):
        self._handles = itertools.count(0xA0000000, 16)
        self._modules = {}  # handle -> PTX
        self._functions = {}  # handle -> Function
        self._by_name = {}  # (module, name) -> handle

    def load(self, image):
        """Load the PTX at an address, up to its end."""
        text = ctypes.string_at(image)
        if b".entry" not in text:
            raise KernelError(
                f"a module that is no PTX was loaded: {text[:16]!r}. CUPY_COMPILE_WITH_PTX=1 makes CuPy load PTX"
            )
        handle = next(self._handles)
        self._modules[handle] = text.decode()
        return handle

    def unload(self, module):
        self._modules.pop(module, None)

    def find(self, module, name):
        """Return the handle of a kernel, or None."""
        key = module, name
        if key not in self._by_name:
            if not re.search(rf"\.entry\s+{re.escape(name)}\b", self._modules[module]):
                return None
            handle = self._by_name[key] = next(self._handles)
            self._functions[handle] = Function(self._modules[module], name)
        return self._by_name[key]

    def function(self, handle):
        return self._functions[handle]


class Function:
    """A kernel of a module. Translated for execution when it is launched first."""

    def __init__(self, text, name):
        self.text, self.name = text, name
        self._kernel = None

    @property
    def kernel(self):
        if self._kernel is None:
            self._kernel = ptx.loaded(self.text, self.name, strict=re.search("gpuadam(?!.*examples)", self.name) is not None)
        return self._kernel

    @property
    def parameter_sizes(self):
        return self.kernel.parameter_sizes

    def run(self, grid, block, shared, parameters, ranges, where):
        if (*grid[1:], *block[1:]) != (1, 1, 1, 1):
            raise KernelError(f"{self.name}: a grid of {grid} blocks of {block}; one dimension is executed here")
        try:
            self.kernel.run(grid[0], block[0], parameters, ranges)
        except ptx.OutsideError as error:
            raise KernelError(f"the kernel {self.name}: {error}, {where(error.address)}") from None
        except (MemoryError, ZeroDivisionError, ptx.Incomplete, ptx.Endless) as error:
            raise KernelError(f"the kernel {self.name}: {error}") from None
