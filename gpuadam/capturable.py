"""Device mode: the step count, the learning rate and the gradient scale on the device, for steps that a CUDA graph captures.

What a kernel gets by value is frozen in a graph. So one thread computes the step's scalars on the device, from what is there when
the graph runs (`kernels/device_scalars.py`), and the update loads them.
"""

import contextlib

import numpy as np

from . import backends, hyperparameters
from .kernels import device_scalars, gpu_launch

NUMBERS = (np.dtype("float32"), np.dtype("float64"))


class Clock:
    """The step count of the arrays of one group, one int64 beside them, and room for the scalars that are made from it.

    kernels, device, dtypes: the backend, the device and the dtypes of the arrays. On the CPU the count is a NumPy array, and
    nothing else differs.
    """

    def __init__(self, kernels, device, dtypes):
        self.backend, self.device = kernels.NAME, device
        self.on_cpu = self.backend == "numba-cpu"
        self.memory: dict[np.dtype, device_scalars.Memory] = {}  # always the same places, which captured graphs know
        with self._here():
            for dtype in () if self.on_cpu else dtypes:
                owner, address = kernels.device_bytes(64)
                self.memory[dtype] = device_scalars.Memory(owner, address, dtype, device)
            self.step = kernels.from_host(np.zeros(1, np.int64))

    @property
    def kernels(self):
        return backends.load(self.backend)  # not held: a module cannot be copied with its optimizer

    def _here(self):
        if self.on_cpu:
            return contextlib.nullcontext()
        return self.kernels.on(self.device, None)

    def number(self, name, value):
        """Return a View of an array of one number beside the arrays, or None if value is a number of the host."""
        if not is_array(value):
            return None
        _, (view,) = backends.choose([(name, value)], self.backend)
        if view.size != 1 or view.dtype not in NUMBERS:
            raise ValueError(f"{name} has shape {view.shape} and dtype {view.dtype}: it must be one float32 or float64")
        if view.device != self.device and not self.on_cpu:
            raise ValueError(f"{name} is on device {view.device}, the parameters are on {self.device}: move it")
        return view

    def value(self, number):
        """Return a hyperparameter as a number. An array on a GPU is read, which waits for what is enqueued."""
        if not is_array(number):
            return number
        self.number("lr or grad_scale", number)
        return float(np.asarray(self.kernels.to_host(number)).reshape(()))

    def count(self):
        """Return the step count as an int. On a GPU this waits for what is enqueued."""
        return int(self.kernels.to_host(self.step)[0])

    def fill(self, array, value):
        """Write a number into an array of one, in place, so that captured graphs see it."""
        own = self.kernels.view("", array)
        with self._here():
            source = self.kernels.from_host(np.full(own.shape, value, own.dtype))
            self.kernels.copy(own, self.kernels.view("", source))


class Now:
    """A clock with the learning rate and the gradient scale of a step: numbers, or arrays of one number on the device."""

    def __init__(self, clock, lr, grad_scale):
        self.clock = clock
        self.lr, self.grad_scale = clock.number("lr", lr), clock.number("grad_scale", grad_scale)

    def check_capture(self, h):
        """Refuse what a captured graph would freeze."""
        if self.lr is None:
            raise RuntimeError(
                f"a graph is being captured, and it would repeat this step with lr={h.lr} for ever: give lr as an array of one "
                "float64 on the device, and change what is in it"
            )
        if self.grad_scale is None and h.fixed.grad_scale != 1.0:
            raise RuntimeError(
                f"a graph is being captured, and it would repeat this step with grad_scale={h.fixed.grad_scale} for ever: give "
                "it as an array of one float64 on the device"
            )


class Scalars:
    """The launches that compute the scalars of a group's step on the device: one for each dtype, the first counts the step."""

    def __init__(self, now, h, amsgrad, stream):
        self.now, self.h, self.amsgrad, self.stream = now, h, amsgrad, stream
        self._launches: dict[np.dtype, tuple] = {}

    def of(self, dtype):
        """Return the Form of the step, and the `device_scalars.Memory` where its scalars will be."""
        now, h, fixed = self.now, self.h, self.h.fixed
        form, scalars = hyperparameters.form_and_scalars(h, 1, dtype, self.amsgrad)
        form = form._replace(scaled=form.scaled or now.grad_scale is not None)
        out = now.clock.memory[dtype]
        if dtype not in self._launches:
            settings = device_scalars.Settings(
                advance=0 if self._launches else 1,
                sign=-1.0 if fixed.maximize else 1.0,
                beta1=fixed.beta1,
                beta2=fixed.beta2,
                weight_decay=fixed.weight_decay,
                w1=scalars.w1,
                w2=scalars.w2,
                eps=scalars.eps,
            )
            lr_dtype, scale_dtype = (None if view is None else view.dtype for view in (now.lr, now.grad_scale))
            self._launches[dtype] = device_scalars.Form(dtype, lr_dtype, scale_dtype, form.decoupled), settings, out
        return form, out

    def launch(self):
        now, clock = self.now, self.now.clock
        kernels, stream = clock.kernels, self.stream
        step = kernels.view("step", clock.step)
        lr = self.h.lr if now.lr is None else now.lr
        grad_scale = self.h.fixed.grad_scale if now.grad_scale is None else now.grad_scale
        with kernels.on(clock.device, None):
            current = kernels.current_stream() or stream
            named = {view.stream or current for view in (now.lr, now.grad_scale) if view is not None}
            others = gpu_launch.to_order(kernels, stream, list(named - {stream}))
            for other in others:
                kernels.order(other, stream)
            for form, settings, out in self._launches.values():
                kernels.launch_scalars(form, settings, step, lr, grad_scale, out, stream)
            for other in others:
                kernels.order(stream, other)


def is_array(value):
    """Whether a hyperparameter is given as an array rather than as a number."""
    kind = type(value)
    return kind is not float and (hasattr(kind, "__dlpack__") or hasattr(kind, "__cuda_array_interface__"))
