"""What makes machine code of the PTX that NVVM writes for numba-cuda, and whether it knows PTX of that version.

NVVM writes PTX of its own CUDA's version. cuda.core has nvJitLink make machine code of it, or the driver where there is no
nvJitLink. Each knows the versions of PTX up to that of its own CUDA.
"""

import contextlib
import ctypes
import importlib
import re
from typing import NamedTuple

from gpuadam.kernels import gpu_driver

# The libraries of CUDA that numba-cuda compiles and links with: the function that says the version. nvvm has one of its interface
# alone.
LIBRARIES = {"nvvm": "", "nvrtc": "nvrtcVersion", "nvJitLink": "nvJitLinkVersion"}
REFUSED = "UNSUPPORTED_PTX_VERSION", "Unsupported .version"  # in an error of the driver's, and in what nvJitLink logs
# The packages of nvJitLink and of NVVM
OF_CUDA_12, SINCE_CUDA_13 = ("nvidia-nvjitlink-cu12", "nvidia-cuda-nvcc-cu12"), ("nvidia-nvjitlink", "nvidia-nvvm")

LAST_BEFORE_12_6 = 5  # CUDA 12.6 had the PTX of 12.5, 8.5; that of 12.7 is 8.6


class Linked(NamedTuple):
    """The version of the PTX that NVVM writes; what makes machine code of it, and of which CUDA that is; the driver's CUDA."""

    ptx: tuple[int, int]
    linker: str
    cuda: tuple[int, int]
    driver: tuple[int, int]

    @property
    def needed(self):
        """The CUDA of the PTX: 7.0 came with CUDA 11.0, and since then both count on together, but for the PTX of CUDA 12.6."""
        major, minor = self.ptx
        return major + 4, minor + (major == 8 and minor > LAST_BEFORE_12_6)

    @property
    def is_too_new(self):
        """Whether the linker does not know the PTX."""
        return self.needed > self.cuda

    @property
    def text(self):
        major, minor = self.cuda
        known = major - 4, minor - (major == 12 and minor > LAST_BEFORE_12_6)
        return (
            f"NVVM writes PTX {_dotted(self.ptx)}, of CUDA {_dotted(self.needed)}; {self.linker}, of CUDA {_dotted(self.cuda)}, "
            f"makes machine code of it, and knows PTX up to {_dotted(known)}"
        )

    @property
    def fix(self):
        """How to mend it where the PTX is too new."""
        major, minor = self.needed
        if major > self.driver[0]:
            return (
                f"the driver is of CUDA {_dotted(self.driver)}: install the packages of CUDA {self.driver[0]} and not those of "
                f'CUDA {major}, pip install "gpuadam[cuda{self.driver[0]}]", or a driver of CUDA {_dotted(self.needed)} or later'
            )
        nvjitlink, nvvm = OF_CUDA_12 if major == 12 else SINCE_CUDA_13
        newer = f'install nvJitLink of NVVM\'s version, pip install "{nvjitlink}>={major}.{minor},<{major + 1}"'
        if major != self.cuda[0]:
            return newer
        return f'{newer}, or an older NVVM, pip install "{nvvm}<{major}.{self.cuda[1] + 1}"'


def linked(ptx, by_nvjitlink):
    """Return the Linked of a text in PTX. by_nvjitlink: whether nvJitLink makes machine code of it if it is there."""
    version = gpu_driver.asked("cuDriverGetVersion", kind=ctypes.c_int)
    driver = version // 1000, version % 1000 // 10
    major, minor = map(int, re.findall(r"^\.version (\d+)\.(\d+)", ptx, re.MULTILINE)[0])
    nvjitlink: tuple[int, int] | None = None
    if by_nvjitlink:
        with contextlib.suppress(RuntimeError, OSError, AttributeError):  # there is none, or one older than CUDA 12.3's
            _, nvjitlink = library("nvJitLink")
    if nvjitlink:
        return Linked((major, minor), "nvJitLink", nvjitlink, driver)
    return Linked((major, minor), "the driver", driver, driver)


def library(name):
    """Return the path of a library of CUDA, and its version if a function says it, or None.

    Raises ImportError, RuntimeError, OSError or AttributeError if there is none, or none that says its version.
    """
    path = importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib(name).abs_path
    if not LIBRARIES[name]:
        return path, None
    major, minor = ctypes.c_int(), ctypes.c_int()
    getattr(ctypes.CDLL(path), LIBRARIES[name])(ctypes.byref(major), ctypes.byref(minor))
    return path, (major.value, minor.value)


def refuses(error):
    """Whether an error says that PTX is of a version which the linker does not know."""
    return any(text in str(error) for text in REFUSED)


def _dotted(version):
    return ".".join(map(str, version))
