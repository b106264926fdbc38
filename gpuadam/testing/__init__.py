'''Test on a CPU what runs on a GPU: the tools of this package's own tests, for yours.

Every backend of gpuadam gives the same bits. So a training loop that is right on NumPy arrays is right on a GPU in all that
gpuadam computes; what is left to go wrong there is the loop's own: an array in the wrong memory, a gradient that overflowed.
Write each test once, run it over all backends, and let it skip, and say why, where there is no GPU:

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
        grads = {"w": backend.array(backend.numpy(params["w"]) - 1)}  # your backward pass
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
        opt.step({"w": gpuadam_backend.array(START)}, found_inf=gpuadam_backend.flag(1))


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

`pip install gpuadam` installs the pytest plugin with it. It does nothing in a run that does not use it: it then imports neither
gpuadam nor NumPy and prints nothing. `-p no:gpuadam` leaves it out; where plugins are not loaded by themselves
(PYTEST_DISABLE_PLUGIN_AUTOLOAD), `-p pytest_gpuadam` loads it.

| | |
|---|---|
| fixture `gpuadam_backend` | an `ArrayBackend` for each backend in turn; a test skips where one is not available |
| `@pytest.mark.gpuadam_backends("cupy")` | the backends that a test with the fixture is for |
| `--gpuadam-backends=numba-cpu,cupy` | the backends to run on; a good line for `addopts` |
| `GPUADAM_REQUIRE_GPU=1` | a GPU backend that is not available is a failure, not a skip: set it where CI has a GPU |
| a line at the end of the run | how many tests ran on which backend, how many skipped, and why; a skip says what mends it |
| `array_backend(name)` | the same arrays without pytest; `require_backends(*names)` skips a test by hand |
| `assert_same_bits(a, b)` | arrays of any library, bit for bit |
| `unchanged(params=params, opt=opt)` | a block that changes no bit of them |
| `inject(grads, ...)`, `Faults` | NaN, infinities and huge numbers in gradients, in given or random places |
| `Reference` | the same training in float64, and a tolerance |

In a CI without a GPU nothing has to be set: `python -m pytest` runs the tests on the CPU backend and says what it skipped. On a
machine with a GPU run `GPUADAM_REQUIRE_GPU=1 python -m pytest`, so that a broken driver cannot pass for a skip.

An error of a launch is raised late on a GPU, often by another library. With `GPUADAM_SYNC=1`, read when gpuadam is imported,
gpuadam waits for each of its launches and raises at once, naming the operation, its parameters and their sizes. It is to gpuadam
what CUDA_LAUNCH_BLOCKING=1 is to CUDA, for debugging alone.
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
