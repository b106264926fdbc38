"""OffloadAdam: Adam whose moments lie in the host's memory or in files, and go through each step in chunks."""

import contextlib
import numbers
import os
import time
import weakref

import numpy as np

from .. import backends, checks, torch_tensors
from .. import step_counts as capturable
from ..clipping import global_norm
from ..groups import OF_PARAMS
from ..kernels import array_bytes, streams
from ..kernels.operands import GROUP
from ..kernels.view import Bits, bare
from ..optimizer import IN_MEMORY, OF_GROUPS, Adam
from . import chunks, pipeline
from . import progress as progress_
from . import state as state_
from .folder import LAYOUT, Folder
from .jobs import jobs_of
from .mapped import drop_mapped
from .stages import OnDevice, OnHost

# A step goes in so many chunks, but they are no smaller than what pays: pages come and go in large numbers at once.
SMALLEST_CHUNK, CHUNKS = 1 << 25, 256
# How many chunks are under way at once. On a GPU one is copied to it, one updated, one copied back; on the host each has a core.
SLOTS_ON_GPU, MOST_SLOTS = 3, 8
TORN = "parameters and state are of two different steps: load a checkpoint into both, with load_state_dict"
TRIAL = 1 << 22  # elements, to measure which update is faster


class OffloadAdam(Adam):
    """Adam with its moments elsewhere: in the host's memory, for parameters of a GPU, or in files. The same bits as `Adam`.

    params, lr, betas, eps, weight_decay, and of the options amsgrad, maximize, formula, eps_root, state_dtype, param_copies,
        ema_decay, zero_grad, stochastic_rounding, seed and backend: as in `Adam`. Parameters and gradients are C-contiguous; they
        may be memory-mapped files: np.memmap. lr and the like are given anew when a folder is opened again.
    decoupled: weight decay as in `AdamW`.
    master: "float32" keeps a float32 master of each bfloat16 or float16 parameter with the state, begun at the parameter's value:
        it is what is updated, and the parameter its rounded copy. "remainder" as in `Adam`.
    state: "memory", which is pinned if a GPU takes part, or the path of a folder for files of state. A folder of a former
        optimizer, with parameters and options of the same names and kinds, is continued where it was closed; the parameters
        themselves are the caller's to keep.
    budget: the bytes of the arrays that a step has under way at once: of files mapped into memory, and of copies on the other
        side, in the host's memory and on the GPU each. No step needs more memory than this beside the arrays that stay; but
        files are mapped in whole pages: of many small parameters in files of their own a page each, and where Linux caches files
        in pages of 2 MB, the rest of those.
    update: "device", where the state goes through the GPU; "host", where gradients come down and parameters go up; or "auto":
        with a GPU both are measured once, and the faster is taken. `describe()` says which, and why.
    progress: show a bar during each step, by the package rich.

    `step` is that of `Adam`, but returns when all is done, on a GPU too. With max_norm or check_finite, gradients in files are
    read through their maps, and count as the process's memory until the norm is known; norm= avoids that.

    If a step is cut short, by an error of the disk or Ctrl-C, parameters and state are of two steps: further steps are refused
    until `load_state_dict` has set all of the state. A folder that a process left in the midst of a step is refused.
    `close()` flushes the files and frees the folder; it also works as a context manager. A process that is forked does not have
    the folder: it takes no steps, and what it closes is left to the process that opened it.

    >>> import numpy as np, gpuadam, tempfile
    >>> param = np.full(3, 0.5, "float32")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with gpuadam.OffloadAdam(param, lr=0.1, state=folder, budget=1 << 20) as opt:
    ...         opt.step(np.float32([-33.0, 1.0, 0.0]))
    ...     with gpuadam.OffloadAdam(param, lr=0.1, state=folder, budget=1 << 20) as opt:
    ...         print(opt.steps, param)
    1 [0.6 0.4 0.5]
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        *,
        decoupled=False,
        state="memory",
        budget=1 << 28,
        update="auto",
        master=None,
        param_copies=None,
        capturable=False,
        progress=False,
        **options,
    ):
        if capturable:
            raise ValueError("OffloadAdam cannot be capturable: its steps are many launches and copies that the host orders")
        self._decoupled = checks.flag("decoupled", decoupled)
        self._budget = _checked_budget(budget)
        self._wanted = checks.one_of(("auto", "device", "host"), "update", update)
        self._where = checks.one_of(("memory",), "state", state) if state == "memory" else _checked_path(state)
        self._master = None if master is None else checks.one_of(("float32", "remainder"), "master", master)
        if self._master == "float32" and param_copies is not None:
            raise ValueError("with master='float32' the parameters are the copies: leave param_copies out")
        if self._master == "float32" and options.get("stochastic_rounding"):
            raise ValueError("with a float32 master nothing of a parameter is lost: leave stochastic_rounding out")
        self._progress = progress_.bars() if checks.flag("progress", progress) else None
        self._options = options
        self._folder = None
        self._cut_short = False
        self._stages = None
        of_adam = "remainder" if self._master == "remainder" else None
        super().__init__(params, lr, betas, eps, weight_decay, master=of_adam, param_copies=param_copies, **options)
        self._state_backend = "numba-cpu"
        self._count_again()
        self._why = f"update={self._wanted!r} was asked for"
        self._choose()
        self._slots = SLOTS_ON_GPU
        if self._runs_on == "host":
            self._slots = min(max(backends.load("numba-cpu").n_threads(), 2), MOST_SLOTS)

    # What is made

    def _param_copies(self, given):
        if self._master != "float32":
            return super()._param_copies(given)
        named = [pair for group in self.groups for pair in zip(group["names"], group["params"], strict=True)]
        formats = {name: backends.choose([(f"params[{name!r}]", param)], self.backend)[1][0].format for name, param in named}
        return {name: param for name, param in named if formats[name] in ("bfloat16", "float16")}

    def _new_state(self, views):
        # an empty array of Numba or of torch says of no device where it is
        on_cpu = [backends.BACKENDS[kernels.name].memory == "CPU" for kernels, *_ in views]
        places = {
            (kernels.name, view.device) for (kernels, view, _), on in zip(views, on_cpu, strict=True) if view.size or on
        }
        if len(places) > 1:
            raise ValueError(f"all parameters of an OffloadAdam are on one device and of one library; these are on {places}")
        self._params_in: str
        self._device: int | None
        self._params_in, self._device = next(iter(places), (views[0][0].name, None))
        self._gpu = self._found_gpu()
        kinds: dict = {}
        for name, (_, view, kept) in zip(self.state, views, strict=True):
            if not view.contiguous:
                raise ValueError(f"{view.name} is not C-contiguous, and is to be cut into runs of neighbours: pass a copy")
            kept |= {"master": "float32"} if self._master == "float32" and name in self._copies else {}
            for kind, format in kept.items():
                shape = (-(-view.size // GROUP),) if kind in OF_GROUPS else view.shape
                kinds.setdefault(kind, []).append((name, shape, np.dtype(IN_MEMORY.get(format, format))))
        if self._where == "memory":
            arrays = state_.in_memory(kinds, self._gpu, self._device)
        else:
            self._folder = Folder(self._where, self._description(views), kinds)
            self._closing = weakref.finalize(self, self._folder.close)
            arrays = self._folder.arrays
        if not (self._folder and self._folder.existed):
            for name, (kernels, view, _) in zip(self.state, views, strict=True):
                if "master" in arrays[name]:
                    state_.fill_master(arrays[name]["master"], view, kernels)
            if self._folder:
                self._folder.end(0, {})
        return [arrays[name] for name in self.state]

    def _found_gpu(self):
        """Return the kernels of the backend on whose GPU an update can run, or None."""
        if self._device is not None or self._params_in != "numba-cpu":
            return backends.load(self._params_in)
        if self._wanted == "host" or (self._wanted == "auto" and self.backend == "numba-cpu"):
            return None
        names = [name for name in backends.available_backends() if backends.BACKENDS[name].memory == "CUDA"]
        if not names and self._wanted == "device":
            raise backends.BackendUnavailableError(
                "update='device' needs a GPU, and no backend for one is available here: `python -m gpuadam doctor` says why. "
                "update='host' needs none"
            )
        return backends.load(names[0]) if names else None

    def _description(self, views):
        """Return what the state in files belongs to."""
        options = {"decoupled": self._decoupled, "master": self._master, "state_dtype": None, "amsgrad": False, "seed": 0}
        options |= {"stochastic_rounding": False, "formula": "torch", "eps_root": 0.0, "ema_decay": None}
        given = {key: value for key, value in self._options.items() if key in options}
        options |= {key: _as_json_has_it(value) for key, value in given.items()}
        parameters = {
            name: {"shape": list(view.shape), "format": view.format, "state": dict(kept)}
            for name, (_, view, kept) in zip(self.state, views, strict=True)
        }
        return {"layout": LAYOUT, "options": options, "parameters": parameters}

    def _count_again(self):
        """Take over the step counts of a folder that was opened again."""
        if self._folder and self._folder.existed:
            self.steps = self._folder.steps["steps"]
            for name, state in self.state.items():
                state["step"] = self._folder.steps["behind"].get(name, self.steps)

    # Where the update runs

    def _choose(self):
        if self._gpu is None:
            self._runs_on, self._why = "host", "no backend for a GPU is available" if self._wanted == "auto" else self._why
        elif self._wanted != "auto":
            self._runs_on = self._wanted
        else:
            seconds = {where: self._seconds(where) for where in ("host", "device")}
            self._runs_on = min(seconds, key=seconds.__getitem__)
            times = ", ".join(f"{1e3 * value:.3g} ms on the {where}" for where, value in seconds.items())
            self._why = f"measured with {TRIAL:,} elements: {times}"

    def _seconds(self, where):
        """Return how long an update of TRIAL elements takes, in the memories and formats of the largest parameter."""
        name, param = max(
            ((name, param) for group in self.groups for name, param in zip(group["names"], group["params"], strict=True)),
            key=lambda pair: self.state[pair[0]]["m"].size,
        )
        kernels, (view,) = backends.choose([(name, param)], self.backend)
        given = [kernels.zeros(TRIAL, view.dtype, view.device) for _ in range(2)]
        if view.bits:
            given = [Bits(array, view.bits) for array in given]
        trial = OffloadAdam(
            {"w": given[0]},
            decoupled=self._decoupled,
            update=where,
            budget=self._budget,
            master=self._master,
            **self._options,
        )
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            trial.step({"w": given[1]})
            seconds.append(time.perf_counter() - began)
        return min(seconds[1:])  # the first compiles

    def describe(self):
        """Return a text: how much state there is and where, where the update runs and why, and the chunks of the last step."""
        n = sum(state["m"].size for state in self.state.values())
        n_bytes = sum(array.nbytes for state in self.state.values() for array in state.values() if hasattr(array, "nbytes"))
        memory = "pinned memory" if self._gpu else "memory"
        where = memory if self._folder is None else f"files in {self._folder.path}"
        text = [
            f"{len(self.state)} parameters of {n:,} elements, {n_bytes:,} bytes of state in {where}",
            f"updated on the {self._runs_on}: {self._why}",
        ]
        if self._stages:
            n_chunks, room = self._last
            text.append(
                f"the last step in {n_chunks} chunks of up to {room:,} bytes, {self._slots} of them under way at once"
            )
        return "\n".join(text)

    # A step

    def step(self, grads=OF_PARAMS, **options):
        """Update every parameter that has a gradient, in place. As `Adam.step`, but on a GPU too it returns when all is done."""
        self._check_open()
        if self._cut_short:
            raise ValueError(f"a step before this one was cut short: {TORN}")
        super().step(grads, **options)
        self._done()

    def _begin(self):
        """Note, here and in the folder, that the state is about to change."""
        if self._folder:
            self._folder.begin()
        self._cut_short = True

    def _done(self):
        if self._folder:
            counts = {name: int(state["step"]) for name, state in self.state.items()}  # which may be NumPy's integers
            self._folder.end(int(self.steps), {name: n for name, n in counts.items() if n != self.steps})
        self._cut_short = False

    def _check_open(self):
        if self._folder and not self._closing.alive:
            raise ValueError("this optimizer is closed: make another with the same folder, which continues where it was")
        if self._folder and not self._folder.is_of_this_process:
            raise ValueError(
                f"this process was forked from the one that opened {self._folder.path}, whose files both would write: make the "
                "optimizer in the process that takes the steps"
            )

    def _conditions(self, grads_of_groups, grad_scale, max_norm, norm, check_finite, found_inf, stream):
        given = [grad for grads in grads_of_groups for grad in grads if grad is not None]
        if norm is None and given and (max_norm is not None or check_finite is not False):
            norm = global_norm(given, backend=self.backend, stream=stream)
            drop_mapped(bare(given)[0])
        norm, found_inf = (self._on_host(x) for x in (norm, found_inf))
        return super()._conditions(grads_of_groups, grad_scale, max_norm, norm, check_finite, found_inf, stream)

    def _on_host(self, x):
        """Return a number that may be on the GPU as one of the host: a step waits for the GPU anyway."""
        if capturable.is_array(x) and not isinstance(x, np.ndarray):
            kernels, (view,) = backends.choose([("a condition of the step", x)], self.backend)
            return array_bytes.number(kernels, view)
        return x

    def _updates(self, h, step, params, grads, names, kind, now=None):
        params = [self.state[name].get("master", param) for name, param in zip(names, params, strict=True)]
        return super()._updates(h, step, params, grads, names, kind, now)

    def _check(self, updates, stream):
        if stream is not None and self._device is None:
            raise TypeError("stream is for parameters on a GPU; these are on the CPU, which has no streams")
        return self._jobs(updates)

    def _leave_out(self, updates, stream):
        super()._leave_out(updates, stream)
        if self._device is not None:
            with self._gpu.on(self._device, None):
                self._gpu.synchronize()

    def _launch(self, updates, stream):
        jobs = self._check(updates, stream)
        room = self._room(jobs)
        work = list(chunks.cut(jobs, room))
        self._last = len(work), room
        stages = self._stages_for(jobs, room)
        stages.alone = len(work) == 1
        if self._device is not None:
            named = [operand.view.stream for job in jobs for operand in job.operands if operand.view.device is not None]
            with self._gpu.on(self._device, None):
                target, others = streams.choose(streams.handle(stream), self._gpu.current_stream(), named)
                if self._gpu.is_capturing(target):
                    raise RuntimeError(
                        "a graph is being captured on this stream, and no graph can hold a step of OffloadAdam, whose launches "
                        "and copies the host orders: take the step outside of the capture"
                    )
            for one in (target, *others):
                stages.after(one)
        elements = sum(job.size for job in jobs)
        self._begin()
        with self._progress(elements) if self._progress else contextlib.nullcontext(lambda n: None) as advance:

            def store(chunk, slot):
                stages.store(chunk, slot)
                advance(sum(stop - start for _, start, stop in chunk))

            try:
                pipeline.run(work, stages.fetch, stages.update, store, self._slots)
            except BaseException as error:
                stages.wait()  # what was begun still uses memory that its owner may give up now
                # one of the disk or Ctrl-C stays what it is; one of the driver does not know what it was for
                if isinstance(error, Exception) and not isinstance(error, OSError):
                    raise RuntimeError(f"the step was cut short ({type(error).__name__}: {error}): {TORN}") from error
                raise
        for group in updates:
            torch_tensors.wrote(group.written())

    def _jobs(self, updates):
        stages = OnHost if self._runs_on == "host" else OnDevice
        return jobs_of(updates, stages, lambda name: "master" in self.state[name], self.backend)

    def _room(self, jobs):
        """Return the bytes of a chunk."""
        most = self._budget // self._slots
        if (least := chunks.smallest(jobs)) > most:
            raise ValueError(
                f"budget={self._budget:,} bytes is too little: {self._slots * least:,} is the least for these arrays"
            )
        total = sum(job.bytes_of(job.size) for job in jobs)
        return max(least, min(most, max(SMALLEST_CHUNK, total // CHUNKS)))

    def _stages_for(self, jobs, room):
        """Return the stages, which keep their memory from step to step."""
        maps = any(operand.mapping for job in jobs for operand in job.operands)
        stages = self._stages
        if stages is None or stages.room < room or (maps and not stages.maps):
            self._stages = stages = None  # gives its memory back first
            device = self._device or 0
            if self._runs_on == "device":
                stages = OnDevice(self._gpu, device, room, self._slots, maps)
            elif self._device is not None:
                stages = OnHost(backends.load("numba-cpu"), room, self._slots, self._gpu, device)
            else:
                stages = OnHost(backends.load("numba-cpu"), room, self._slots)
            self._stages = stages
        return stages

    # Saving and ending

    def load_state_dict(self, state_dict):
        """Copy a `state_dict()`, of this class or, but for a float32 master, of `Adam` on the CPU, into this optimizer."""
        self._check_open()
        super().load_state_dict(state_dict)
        self._done()

    def _copy_state(self, copies):
        n_arrays = sum(len(state) - 1 for state in self.state.values())
        if self._cut_short and len(copies) < n_arrays:
            raise ValueError("a step was cut short, and this is the state that it left: load a checkpoint")
        self._begin()
        for _, own, loaded in copies:
            state_.copy(own.array, loaded.array)

    def flush(self):
        """Wait until the state in files is on the disk."""
        self._check_open()
        if self._folder:
            self._folder.flush()

    def close(self):
        """Flush the files and free the folder. No step can follow."""
        if self._folder:
            self._closing()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __reduce__(self):
        raise TypeError("an OffloadAdam is not copied or pickled, because its state is not in it alone: use state_dict()")


def _as_json_has_it(option):
    """Return an option that was checked as one that JSON can have: a number is any that is a numbers.Real."""
    if option is None or isinstance(option, (str, bool)):
        return option
    if isinstance(option, np.bool_):
        return bool(option)
    return int(option) if isinstance(option, numbers.Integral) else float(option)


def _checked_budget(budget):
    if checks.count("budget", budget) < 1:
        raise ValueError(f"budget={budget} must be a number of bytes")
    return int(budget)


def _checked_path(state):
    if not isinstance(state, (str, os.PathLike)) or not os.fspath(state):
        raise TypeError(f'state={state!r} must be "memory" or the path of a folder')
    return state
