'''Testing: training loops for GPUs, tested on a CPU.

Every backend of gpuadam gives the same bits. If your training loop is right on NumPy arrays, then everything that gpuadam
computes in it is right on a GPU, too. Only errors of the loop itself remain: an array in the wrong memory, a gradient that
overflowed. These tools find them. Write each test once. It runs on every backend, and where there is no GPU it skips and
says why:

```python
# test_training.py
import numpy as np
import pytest

import gpuadam
from gpuadam import testing

START = np.linspace(-2, 2, 12, dtype="float32").reshape(3, 4)


def train(backend, steps, faults=None):
    """The loop under test: w goes to 1. Returns the parameters and the optimizer."""
    params = {"w": backend.array(START)}
    opt = gpuadam.AdamW(params, lr=0.1, weight_decay=0.0, capturable=True)
    for step in range(steps):
        w = backend.numpy(params["w"])
        grads = {"w": backend.array(w - 1)}  # your backward pass
        bad = faults.inject(grads) if faults else []
        if bad:
            with testing.unchanged(params=params, opt=opt):
                opt.step(grads, check_finite=True)
        else:
            opt.step(grads, check_finite=True)
    return params, opt


def test_the_loss_falls(gpuadam_backend):
    params, _ = train(gpuadam_backend, 200)
    assert np.abs(gpuadam_backend.numpy(params["w"]) - 1).max() < 0.01


def test_a_gpu_computes_the_bits_of_the_cpu(gpuadam_backend):
    params, opt = train(gpuadam_backend, 20)
    expected, expected_opt = train(testing.array_backend("numba-cpu"), 20)
    testing.assert_same_bits(params, expected, "params")
    testing.assert_same_bits(opt.state, expected_opt.state, "state")


def test_a_bad_gradient_leaves_its_step_out(gpuadam_backend):
    faults = testing.Faults(seed=0, probability=0.2)
    params, opt = train(gpuadam_backend, 50, faults)
    bad = sum(map(bool, faults.log))
    assert bad > 0 and opt.state_dict()["state"]["w"]["step"] == 50 - bad
    assert np.isfinite(gpuadam_backend.numpy(params["w"])).all()


def test_a_flag_leaves_the_step_out(gpuadam_backend):
    params, opt = train(gpuadam_backend, 3)
    with testing.unchanged(params=params, opt=opt):
        grads = {"w": gpuadam_backend.array(START)}
        opt.step(grads, found_inf=gpuadam_backend.flag(1))


def test_it_is_adam(gpuadam_backend):
    w = gpuadam_backend.array(START)
    opt, exact = gpuadam.Adam(w, lr=0.1), testing.Reference(w, lr=0.1)
    for step in range(20):
        grad = gpuadam_backend.array(np.float32(step) - START)
        opt.step(grad)
        exact.step(grad)
    exact.assert_close(w)


@pytest.mark.gpuadam_backends("cupy", "numba-cuda")
def test_only_a_gpu_can_show_this(gpuadam_backend):
    assert gpuadam_backend.on_gpu
```

`pip install gpuadam` installs the pytest plugin, too. In a test run that does not use the plugin, it imports neither gpuadam
nor NumPy, and prints nothing. `-p no:gpuadam` leaves it out. `-p pytest_gpuadam` loads it where
PYTEST_DISABLE_PLUGIN_AUTOLOAD is set.

| tool | use |
|---|---|
| fixture `gpuadam_backend` | an `ArrayBackend` for each backend in turn; a test skips where one is not available |
| `@pytest.mark.gpuadam_backends("cupy")` | the backends that a test with the fixture is for |
| `--gpuadam-backends=numba-cpu,cupy` | the backends to run on; a good line for `addopts` |
| `GPUADAM_REQUIRE_GPU=1` | a GPU backend that is not available is a failure, not a skip: set it where CI has a GPU |
| a line at the end of the run | how many tests ran on which backend, how many skipped, and why; each skip says what mends it |
| `array_backend(name)` | an `ArrayBackend` without pytest |
| `require_backends(*names)` | skips the test that calls it where a backend is not available |
| `assert_same_bits(a, b)` | arrays of any library, bit for bit |
| `unchanged(params=params, opt=opt)` | a block that changes no bit of them |
| `inject(grads, ...)`, `Faults` | NaN, infinities and huge numbers in gradients, in given or random places |
| `Reference` | the same training in float64, and a tolerance |

A CI without a GPU needs no settings: `python -m pytest` runs the tests on the CPU backend and says what it skipped. On a
machine with a GPU run `GPUADAM_REQUIRE_GPU=1 python -m pytest`, so that a broken driver is a failure and not a skip.

A GPU reports the error of a launch late, often to another library. If `GPUADAM_SYNC=1` is set when gpuadam is imported,
gpuadam waits for each of its launches, and its error names the operation, the parameters and their sizes. This is slow, and
for debugging only, as CUDA_LAUNCH_BLOCKING=1 is for all of CUDA.

For `1` both variables also take `true`, `yes` and `on`. `0`, `false`, `no`, `off` and nothing are off. Any other value raises
ValueError.
'''

from .array_backends import ArrayBackend, array_backend
from .bits import assert_same_bits, unchanged
from .faults import Fault, Faults, inject
from .float64 import Reference
from .required import require_backends

__all__ = [
    "ArrayBackend",
    "Fault",
    "Faults",
    "Reference",
    "array_backend",
    "assert_same_bits",
    "inject",
    "require_backends",
    "unchanged",
]
