"""What tests with the marker gpu share: a busy stream, arrays of other libraries, and what the driver's calls are called."""

import random

import conftest
import numpy as np

SPIN = r'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n); }'

# The names of `driver.calls`
LAUNCHES = ("cuLaunchKernel", "cuLaunchKernelEx")
SYNCHRONIZATIONS = ("cuStreamSynchronize", "runtime_cudaStreamSynchronize")  # of the host with one stream


def there(cp, arrays):
    """Return {name: array} on the GPU. Copies may be under way, in the order of the current stream."""
    return {name: cp.asarray(a) for name, a in arrays.items()}


def arrived(cp, arrays):
    """Likewise arrays that are there when this returns, whichever stream is the next."""
    on_gpu = there(cp, arrays)
    cp.cuda.Device().synchronize()
    return on_gpu


def busy_stream(cp):
    """Return a new stream that waits for no other and has some 0.05 s of work, so that what is enqueued there comes late."""
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    cp.RawKernel(SPIN, "spin")((1,), (1,), (np.int64(100_000_000),), stream=stream)
    return stream


def any_order(monkeypatch):
    """On the stand-in, do what no stream and no event orders in an order by chance, not as it was enqueued."""
    if conftest.DRIVER is not None:
        monkeypatch.setattr(conftest.DRIVER.work, "seed", 1)
        monkeypatch.setattr(conftest.DRIVER.work, "random", random.Random(1))


class Lent:
    """An array that DLPack alone lends."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OnStream:
    """A CuPy array that is another library's, which names the stream that it works on."""

    def __init__(self, array, stream):
        self.array = array
        self.__cuda_array_interface__ = array.__cuda_array_interface__ | {"stream": stream.ptr}
