"""Device mode: the step count, the learning rate and the gradient scale on the device, for steps that a CUDA graph captures.

What a kernel gets by value is frozen in a graph. So one thread computes the step's scalars on the device, from what is there when
the graph runs (`kernels/device_scalars.py`), and the update loads them.
"""

import contextlib

import numpy as np

from . import backends, hyperparameters
from .kernels import array_bytes, device_scalars, synchronous
from .kernels.view import View

NUMBERS = (np.dtype("float32"), np.dtype("float64"))


FLAGS = (*NUMBERS, *map(np.dtype, ("bool", "uint8", "int32", "int64")))


class Clock:
    """The step count of the arrays of one group, one int64 beside them, and room for the scalars that are made from it.

    kernels, device, dtypes: the backend, the device and the compute types of the arrays. On the CPU the count is a NumPy array,
    and nothing else differs.
    """

    def __init__(self, kernels, device, dtypes):
        self.backend, self.device = kernels.name, device
        self.on_cpu = kernels.memory == "CPU"
        self.memory: dict[np.dtype, device_scalars.Memory] = {}  # always the same places, which captured graphs know
        with self._here():
            for dtype in () if self.on_cpu else dtypes:
                owner, address = kernels.device_bytes(device_scalars.MEMORY_BYTES)
                self.memory[dtype] = device_scalars.Memory(owner, address, dtype, device)
            self.step = kernels.from_host(np.zeros(1, np.int64))

    @property
    def kernels(self):
        return backends.load(self.backend)  # not held: a module cannot be copied with its optimizer

    def _here(self):
        if self.on_cpu:
            return contextlib.nullcontext()
        return self.kernels.on(self.device, None)

    def number(self, name, value, dtypes=NUMBERS):
        """Return a View of an array of one number beside the arrays, or None if value is a number of the host."""
        if not is_array(value):
            return None
        _, (view,) = backends.choose([(name, value)], self.backend)
        if view.size != 1 or view.dtype not in dtypes:
            wanted = " or ".join(map(str, dtypes))
            raise ValueError(f"{name} has shape {view.shape} and dtype {view.dtype}: it must be one {wanted}")
        if view.device != self.device and not self.on_cpu:
            raise ValueError(f"{name} is on device {view.device}, the parameters are on {self.device}: move it")
        return view

    def value(self, number, dtypes=NUMBERS):
        """Return a hyperparameter as a number. An array on a GPU is read, after waiting for the device."""
        if not is_array(number):
            return number
        view = self.number("lr, grad_scale, norm or found_inf", number, dtypes)
        return float(array_bytes.number(self.kernels, view))

    def count(self):
        """Return the step count as an int. On a GPU this waits for the device: graphs may count on any stream."""
        return array_bytes.number(self.kernels, self.kernels.view("", self.step))

    def fill(self, array, value):
        """Write a number into an array of one, in place, so that captured graphs see it. On a GPU this waits for the device."""
        array_bytes.store_number(self.kernels, self.kernels.view("", array), value)


class Now:
    """What a step's scalars are made from on the device: a clock, and numbers, or arrays of one number there.

    counts: whether the clock counts the steps; else the host does. found_inf: a flag that leaves the step out.
    norm, max_norm: clip gradients of this norm, an array of one float64. largest_norm: a larger one, or NaN, leaves the step out.
    on_host: name -> number, of the conditions that the host has decided.
    """

    def __init__(
        self, clock, lr, grad_scale, *, counts=True, found_inf=None, norm=None, max_norm=None, largest_norm=None, on_host=()
    ):
        self.clock, self.counts, self.on_host = clock, counts, dict(on_host)
        self.lr, self.grad_scale = clock.number("lr", lr), clock.number("grad_scale", grad_scale)
        self.found_inf = None if found_inf is None else clock.number("found_inf", found_inf, FLAGS)
        self.norm = None if norm is None else clock.number("norm", norm, NUMBERS[1:])
        self.max_norm, self.largest_norm = max_norm, largest_norm

    def check_capture(self, h):
        """Refuse the numbers that a captured graph would freeze, and that are others in each step.

        A graph also keeps max_norm, betas, eps, weight_decay and the like: they belong to the training, not to a step.
        """
        frozen = self.on_host | ({"lr": h.lr} if self.lr is None else {})
        if self.grad_scale is None and h.fixed.grad_scale != 1.0:
            frozen["grad_scale"] = h.fixed.grad_scale
        for name, value in frozen.items():
            raise RuntimeError(
                f"a graph is being captured, and it would repeat this step with {name}={value} for ever: give {name} as an array "
                "of one float64 on the device, and change what is in it"
            )


class Scalars:
    """The launches that compute the scalars of a step on the device: one for each compute type; the first counts the step.

    group: the `functional.Updates` of the step.
    """

    def __init__(self, group, stream):
        self.group, self.stream = group, stream
        self._launches: dict[np.dtype, tuple] = {}

    def of(self, formats):
        """Return the Form of the step for arrays of some formats, and the `device_scalars.Memory` where its scalars will be."""
        now, h, fixed = self.group.now, self.group.h, self.group.h.fixed
        form, scalars = hyperparameters.form_and_scalars(h, 1, formats)
        _, later = hyperparameters.form_and_scalars(h, 2, formats)
        skips = now.found_inf is not None or now.largest_norm is not None
        scaled = form.scaled or now.grad_scale is not None or now.max_norm is not None
        form = form._replace(scaled=scaled, skips=skips)
        dtype = form.dtype
        out = now.clock.memory[dtype]
        first = not self._launches or next(iter(self._launches)) == dtype
        settings = device_scalars.Settings(
            advance=(1 if first else 0) if now.counts else self.group.step,
            seed=self.group.seed - (self.group.seed >> 63 << 64),
            sign=-1.0 if fixed.maximize else 1.0,
            beta1=fixed.beta1,
            beta2=fixed.beta2,
            weight_decay=fixed.weight_decay,
            w1=scalars.w1,
            w2=scalars.w2,
            eps=fixed.eps if form.algorithm == "radam" else scalars.eps,
            eps_root=getattr(scalars, "eps_root", 0.0),
            w_ema=later[-1] if formats.ema else 0.0,
            first_w_ema=scalars[-1] if formats.ema else 0.0,
            max_norm=np.inf if now.max_norm is None else now.max_norm,
            largest_norm=np.inf if now.largest_norm is None else now.largest_norm,
        )
        own = device_scalars.Form(
            dtype,
            None if now.lr is None else now.lr.dtype,
            None if now.grad_scale is None else now.grad_scale.dtype,
            form.decoupled,
            fixed.variant,
            ema=formats.ema != "",
            random=formats.random or (dtype in self._launches and self._launches[dtype][0].random),
            counts=now.counts,
            found_inf=None if now.found_inf is None else now.found_inf.dtype,
            norm=now.max_norm is not None,
            checks=now.largest_norm is not None,
        )
        self._launches[dtype] = own, settings, out
        return form, out

    def prepare(self):
        """Compile what `launch` launches, before anything is written."""
        kernels, device = self.group.now.clock.kernels, self.group.now.clock.device
        given = self._given()
        with kernels.on(device, self.stream):
            if kernels.is_capturing(self.stream):
                return
            for form, settings, out in self._launches.values():
                kernels.rehearse(
                    device,
                    form,
                    lambda stream, launch=(form, settings, given, out): kernels.launch_scalars(*launch, stream),
                )

    def _given(self):
        """Return what the scalars are made from by name: a View of one number on the device, or a number."""
        now, h = self.group.now, self.group.h
        given = {
            "lr": h.lr if now.lr is None else now.lr,
            "grad_scale": h.fixed.grad_scale if now.grad_scale is None else now.grad_scale,
        }
        given |= {"found_inf": now.found_inf} if now.found_inf is not None else {}
        given |= {"norm": now.norm} if now.norm is not None else {}
        if now.counts:
            given["step"] = now.clock.kernels.view("step", now.clock.step)
        return given

    def launch(self, counted):
        """Enqueue them. counted: a list that gets these Scalars as soon as the step is counted."""
        now, clock, given = self.group.now, self.group.now.clock, self._given()
        kernels, stream = clock.kernels, self.stream
        views = [value for value in given.values() if isinstance(value, View)]
        # after the step before, which may be on another stream: it reads the memory that is written here
        with kernels.ordered(clock.device, views, stream):
            for form, settings, out in self._launches.values():
                launched = form, settings, given, out, stream

                def what(form=form):
                    return f"the computation of a step's scalars from {sorted(given)} ({form.dtype}, device {clock.device})"

                synchronous.launch(kernels, stream, what, kernels.launch_scalars, *launched)
                if now.counts:
                    counted.append(self)


# The norm of gradients from which one of their squares may overflow the type that is computed with
LARGEST_NORM = {dtype: float(np.sqrt(np.float64(np.finfo(dtype).max))) for dtype in NUMBERS}


def clipped(grad_scale, norm, max_norm):
    """Return the grad_scale that clips gradients of a norm, as a device does it.

    >>> round(clipped(0.5, norm=4.0, max_norm=1.0), 6)  # scaled, the norm is 2
    0.25
    """
    clip = max_norm / (norm * abs(grad_scale) + device_scalars.CLIP_EPS)
    return grad_scale * clip if clip < 1.0 else grad_scale


def is_array(value):
    """Whether a hyperparameter is given as an array rather than as a number."""
    kind = type(value)
    return kind is not float and (hasattr(kind, "__dlpack__") or hasattr(kind, "__cuda_array_interface__"))
