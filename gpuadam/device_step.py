"""A step whose scalars are computed on the device, by one thread that is launched before the update.

What a kernel gets by value is frozen in a captured CUDA graph. The thread reads the learning rate, the flags and the count when
the graph runs (`kernels/scalars.py` has its formula), and the update loads the scalars that it has written.
"""

import functools

import numpy as np

from . import hyperparameters
from .kernels import synchronous
from .kernels.scalars import ScalarsForm, Settings
from .kernels.view import View

NUMBERS = (np.dtype("float32"), np.dtype("float64"))
FLAGS = (*NUMBERS, *map(np.dtype, ("bool", "uint8", "int32", "int64")))


class Now:
    """What a step's scalars are made from on the device: a count, and numbers, or arrays of one number there.

    counts: whether the device counts the steps; else the host does. found_inf: a flag that leaves the step out.
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
        if self.grad_scale is None and h.grad_scale != 1.0:
            frozen["grad_scale"] = h.grad_scale
        for name, value in frozen.items():
            raise RuntimeError(
                f"a graph is being captured, and it would repeat this step with {name}={value} for ever: give {name} as an array "
                "of one float64 on the device, and change what is in it"
            )


@functools.cache  # the same object at each step, by which a batch knows its kernel
def _skipping(form):
    """Return the form of an update that a flag in device memory leaves out."""
    return form._replace(skips=True)


class ScalarsLaunch:
    """The launches that compute the scalars of a step on the device: one for each compute type; the first counts the step.

    group: the `update.Updates` of the step.
    """

    def __init__(self, group, stream):
        self.group, self.stream, self.begun, self._capturing = group, stream, False, False
        self._launches: dict[np.dtype, tuple] = {}

    def of(self, formats):
        """Return the Form of the step for arrays of some formats, and the `scalars.ScalarsMemory` where its scalars will be."""
        now, h, fixed = self.group.now, self.group.h, self.group.h.fixed
        hyperparameters.form_and_scalars(h, 1, formats)  # or an error if a scalar of step 1 overflows
        scaled = h.scale != 1.0 or now.grad_scale is not None or now.max_norm is not None
        constants = hyperparameters.constants(fixed, formats, scaled)
        skips = now.found_inf is not None or now.largest_norm is not None
        form = _skipping(constants.form) if skips else constants.form
        dtype = form.dtype
        out = now.clock.memory[dtype]
        first = not self._launches or next(iter(self._launches)) == dtype
        settings = Settings(
            advance=(1 if first else 0) if now.counts else self.group.step,
            seed=self.group.seed - (self.group.seed >> 63 << 64),
            sign=-1.0 if fixed.maximize else 1.0,
            beta1=fixed.beta1,
            beta2=fixed.beta2,
            weight_decay=fixed.weight_decay,
            w1=constants.w1,
            w2=constants.w2,
            eps=constants.eps,
            **{f"further{k}": value for k, value in enumerate(constants.later, 1)},
            first_w_ema=constants.first[-1] if formats.ema else 0.0,
            max_norm=np.inf if now.max_norm is None else now.max_norm,
            largest_norm=np.inf if now.largest_norm is None else now.largest_norm,
        )
        scalars_form = ScalarsForm(
            dtype,
            None if now.lr is None else now.lr.dtype,
            None if now.grad_scale is None else now.grad_scale.dtype,
            form.decoupled,
            fixed.variant,
            further=len(constants.later),
            ema=formats.ema != "",
            random=formats.random or (dtype in self._launches and self._launches[dtype][0].random),
            counts=now.counts,
            found_inf=None if now.found_inf is None else now.found_inf.dtype,
            norm=now.max_norm is not None,
            checks=now.largest_norm is not None,
        )
        self._launches[dtype] = scalars_form, settings, out
        return form, out

    def prepare(self):
        """Compile what `launch` launches, before anything is written. While a graph is captured it has to be there."""
        kernels, device = self.group.now.clock.kernels, self.group.now.clock.device
        given = self._given()
        with kernels.on(device, self.stream):
            self._capturing = kernels.is_capturing(self.stream)
            for form, settings, out in self._launches.values():
                if self._capturing:
                    kernels.check_loaded(device, form)
                    continue
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
            "grad_scale": h.grad_scale if now.grad_scale is None else now.grad_scale,
        }
        given |= {"found_inf": now.found_inf} if now.found_inf is not None else {}
        given |= {"norm": now.norm} if now.norm is not None else {}
        if now.counts:
            given["step"] = now.clock.kernels.view("step", now.clock.step)
        return given

    def launch(self):
        """Enqueue them. `begun` says from then on that the device has counted the step."""
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
                self.begun = now.counts
                if not self._capturing:
                    kernels.launched(clock.device, form)
