"""OffloadAdam: Adam whose state lies in the host's memory or in files, and goes through each step in chunks."""

from __future__ import annotations

import importlib
import os
import time
import weakref
from numbers import Integral
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from .. import backends, checks, torch_tensors
from ..clipping import global_norm
from ..description import of_adam
from ..groups import OF_PARAMS
from ..kernels.backend import refuse_stream
from ..kernels.messages import how_many, shown
from ..kernels.operands import NARROW
from ..kernels.view import Bits, bare, is_array
from ..optimizer import Adam
from ..options import arguments
from ..typing import (
    Array,
    Betas,
    Bounds,
    Complex,
    Components,
    FilePath,
    Formula,
    Integer,
    LearningRate,
    LikeParams,
    Number,
    Params,
    Side,
    StateDtype,
    Stream,
)
from .folder import Folder
from .jobs import check_contiguous, jobs_of
from .mapped import drop_mapped
from .runner import Runner
from .state import Memory, Store, copy, copy_master

SelfT = TypeVar("SelfT", bound="OffloadAdam")
TRIAL = 1 << 22  # elements of the update by which the faster side is found
# The options that decide what the numbers of state mean: a folder of state belongs to an optimizer with the same ones
DESCRIBED = ("algorithm", "decoupled", "state_dtype", "seed", "stochastic_rounding", "formula", "eps_root", "ema_decay")

# Options that the trial leaves at their defaults: it has one parameter, of real numbers and one dimension
OF_TRIAL = ("params", "lr", "betas", "eps", "weight_decay", "bounds", "complex", "components")


class OffloadAdam(Adam):
    """Adam with its state elsewhere: in the host's memory, for parameters of a GPU, or in files. The same bits as `Adam`.

    params, lr, betas, eps, weight_decay, and of the options amsgrad, maximize, formula, eps_root, state_dtype, param_copies,
        ema_decay, zero_grad, stochastic_rounding, seed and backend: as in `Adam`. Parameters and gradients are C-contiguous, and
        may be memory-mapped files: np.memmap. A folder does not keep lr and the other hyperparameters of a group: give them
        again when it is opened again.
    decoupled: weight decay as in `AdamW`.
    master: "float32" keeps a float32 master of each bfloat16 or float16 parameter with the state. The master begins at the
        parameter's value, the update is of the master, and the parameter is its rounded copy. "remainder" as in `Adam`.
    state: "memory", which is pinned if a GPU takes part, or the path of a folder for files of state: "./state" and not "state",
        which may be a slip for "memory", unless the folder is there. A folder of an earlier
        optimizer, with the same options and parameters of the same names, shapes and formats, is continued where it was closed.
        The order of names matters only where numbers are rounded randomly.
        The values of the parameters are not in it: they are the caller's to keep.
    budget: bytes of the arrays that are under way at once: of mapped files, and of copies, in the host's memory and on the GPU
        each. A step needs no more memory than this beside the arrays that stay, but for the rounding to pages: small parameters
        in files of their own take a page each, and where Linux caches files in pages of 2 MB, chunks take whole ones. Parameters
        and state in files that all fit in it stay in the process's memory between steps, which saves half of a step's time.
    update: "device": the state goes through the GPU; "host": gradients come down and parameters go up; "auto": with a GPU, both
        are measured once, and the faster is taken. `describe()` says which, and why.
    progress: show a bar during each step, by the package rich.

    `step` is that of `Adam`, but returns when everything is done, on a GPU too. With max_norm or check_finite, gradients in files
    count as the process's memory until the norm is known; norm= avoids that.

    If a step is cut short, by an error of the disk or Ctrl-C, parameters and state are of two different steps. Further steps are
    refused until `load_state_dict` has set all of the state, and so is a folder that a process left in the midst of a step.
    `close()` flushes the files and frees the folder; the optimizer is a context manager that does so, too. A process that is
    forked does not own the folder: it can take no steps, and its `close()` leaves the folder to the process that opened it.

    `load_state_dict` takes the `state_dict()` of this class and, but for a float32 master, of an `Adam` on the CPU.

    >>> import numpy as np, gpuadam, tempfile
    >>> param = np.full(3, 0.5, "float32")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with gpuadam.OffloadAdam(param, lr=0.1, state=folder, budget=1 << 20) as opt:
    ...         opt.step(np.array([-33.0, 1.0, 0.0], "float32"))
    ...     with gpuadam.OffloadAdam(param, lr=0.1, state=folder, budget=1 << 20) as opt:
    ...         print(opt.steps, param)
    1 [0.6 0.4 0.5]
    """

    repeats = False  # a step reads and writes files

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 0.0,
        *,
        decoupled: bool = False,
        state: FilePath = "memory",
        budget: Number = 1 << 28,
        update: Side = "auto",
        master: Literal["float32", "remainder"] | None = None,
        progress: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        clip_value: Number | None = None,
        bounds: Bounds | None = None,
        complex: Complex | None = None,
        components: Components = 1,
        capturable: Literal[False] = False,
        formula: Formula = "torch",
        eps_root: Number = 0.0,
        state_dtype: StateDtype | None = None,
        param_copies: LikeParams = None,
        ema_decay: Number | None = None,
        zero_grad: bool = False,
        stochastic_rounding: bool = False,
        seed: Integer = 0,
        backend: str | None = None,
    ) -> None:
        of_adam = arguments(locals(), besides=("decoupled", "state", "budget", "update", "master", "progress"))
        if capturable:
            raise ValueError("OffloadAdam cannot be capturable: its steps are many launches and copies that the host orders")
        if master is not None:
            checks.one_of(("float32", "remainder"), "master", master)
        if master == "float32" and param_copies is not None:
            raise ValueError("with master='float32' the parameters are the copies: leave param_copies out")
        if master == "float32" and stochastic_rounding:
            raise ValueError("with a float32 master nothing of a parameter is lost: leave stochastic_rounding out")
        check_place(state)
        self._budget = _bytes(budget)
        self._update = checks.one_of(("auto", "device", "host"), "update", update)
        self.decoupled = checks.flag("decoupled", decoupled)
        self._master, self._state_in = master, state
        bar = _progress_bar() if checks.flag("progress", progress) else None
        try:
            super().__init__(**of_adam, master=master if master == "remainder" else None)
            self.arrangement.places.can_replace = False
            self.state_backend = "numba-cpu"
            if self._store.existed:
                self.steps = self._store.marks["steps"]
                for name, arrays in self.state.items():
                    arrays["step"] = self._store.marks["behind"].get(name, self.steps)
            on_device, self._why = self._chosen_side(arguments(of_adam, besides=OF_TRIAL))
            self._runner = Runner(on_device, self._gpu, self._device, self._budget, bar)
        except BaseException:
            if "_store" in vars(self):  # a folder that was there is the caller's to keep
                (self._store.close if self._store.existed else self._store.discard)()
            raise

    # The state

    def new_state(self, beginnings):
        self._gpu, self._device = self._usable_gpu(list(beginnings.values()))
        self._largest = max(beginnings.values(), key=lambda beginning: beginning.view.size)
        for _, view, kept, _ in beginnings.values():
            check_contiguous(view)
            if self._master == "float32" and view.format in NARROW:
                kept["master"] = "float32"
        if self._state_in == "memory":
            self._store: Store = Memory(beginnings, self._gpu, self._device)
        else:
            described = {name: getattr(self.options, name) for name in DESCRIBED}
            self._store = Folder(self._state_in, described, beginnings)
            weakref.finalize(self, self._store.close)
        if not self._store.existed:
            for name, (kernels, view, kept, _) in beginnings.items():
                if "master" in kept:
                    copy_master(self._store.arrays[name]["master"], view, kernels, to_master=True)
            self._store.end_at(0, {})
        self.under_way = self._store
        return self._store.arrays

    def warn_of_no_effect(self, options):
        super().warn_of_no_effect(options | {"master": self._master})

    # Where the update runs

    def _usable_gpu(self, views):
        """Return (the kernels of the backend on whose GPU an update can run, or None; the device of the parameters, or None)."""
        # an empty array of Numba or of torch has no device, wherever it is
        places = {(kernels.name, view.device) for kernels, view, *_ in views if view.size or kernels.name == "numba-cpu"}
        if len(places) > 1:
            raise ValueError(f"all parameters of an OffloadAdam are on one device and of one library; these are on {places}")
        name, device = next(iter(places), (views[0][0].name, None))
        if name != "numba-cpu":
            return backends.load(name), device
        if self._update == "host" or (self._update == "auto" and self.backend == "numba-cpu"):
            return None, None
        names = [name for name in backends.available_backends() if backends.BACKENDS[name].memory == "CUDA"]
        if not names and self._update == "device":
            why = "update='device' needs a GPU, and none can be used here: `python -m gpuadam doctor` says why"
            raise backends.BackendUnavailableError(why)
        return (backends.load(names[0]) if names else None), None

    def _chosen_side(self, options):
        """Return whether the update runs on the GPU, and why. options: of an optimizer to measure."""
        if self._update != "auto":
            return self._update == "device", f"update={self._update!r} was asked for"
        if self._gpu is None:
            return False, "no backend for a GPU is available"
        seconds = {side: self._seconds(side, options) for side in ("host", "device")}
        times = ", ".join(f"{1e3 * value:.3g} ms on the {side}" for side, value in seconds.items())
        return seconds["device"] < seconds["host"], f"measured with {TRIAL:,} elements: {times}"

    def _seconds(self, side, options):
        """Return how long an update of TRIAL elements takes, in the memories and formats of the largest parameter."""
        kernels, view, *_ = self._largest
        param, grad = (kernels.zeros(TRIAL, view.dtype, view.device) for _ in range(2))
        if view.bits:
            param, grad = Bits(param, view.bits), Bits(grad, view.bits)
        options = options | {"master": self._master, "param_copies": None}
        if checks.without_effect([view.format], self._master, options["stochastic_rounding"]):  # it is of smaller parameters
            options |= {"master": None, "stochastic_rounding": False}
        trial = OffloadAdam(param, update=side, decoupled=self.decoupled, budget=self._budget, **options)
        moments = [time.perf_counter()]
        for _ in range(4):
            trial.step(grad)
            moments.append(time.perf_counter())
        return min(np.diff(moments)[1:])  # the first step compiles

    def describe(self) -> str:
        """Return a text: how much state there is and where, where the update runs and why, and the chunks of the last step."""
        n = sum(state["m"].size for state in self.state.values())
        n_bytes = sum(array.nbytes for state in self.state.values() for key, array in state.items() if key != "step")
        return (
            f"{how_many(len(self.state), 'parameter')} of {how_many(n, 'element')}, {n_bytes:,} bytes of state in "
            f"{self._store.place}\n"
            f"updated on the {'device' if self._runner.on_gpu else 'host'}: {self._why}\n{self._runner.last_step}"
        )

    # A step

    def step(  # type: ignore[override]  # what goes piece by piece has none of these four
        self,
        grads: LikeParams = OF_PARAMS,
        *,
        grad_scale: Number = 1.0,
        max_norm: Number | None = None,
        norm: Number | Array | None = None,
        check_finite: bool = False,
        found_inf: Number | Array | None = None,
        change: None = None,
        lr_scale: None = None,
        where: None = None,
        norms: Literal[False] = False,
        stream: Stream | None = None,
    ) -> None:
        """Update every parameter that has a gradient, in place. As `Adam.step`, but on a GPU too it returns when all is done."""
        of_step = arguments(locals())
        self._store.check_open()
        super().step(**of_step)

    def ended(self):
        counts = {name: int(state["step"]) for name, state in self.state.items()}  # a caller may have set NumPy's integers
        self._store.end_at(int(self.steps), {name: n for name, n in counts.items() if n != self.steps})

    def _description(self):
        own = {
            "decoupled": self.decoupled,
            "state": os.fspath(self._state_in),
            "budget": self._budget,
            "update": self._update,
        }
        return of_adam(self, master=self._master, **own)

    def with_groups(self, groups, states, copies):
        raise ValueError("OffloadAdam has its parameters for good: load their state into an optimizer of other ones")

    def step_arrays(self, change, lr_scale, where, bounds):
        raise ValueError(
            "OffloadAdam takes no change, lr_scale or where, and no bounds that are arrays: its steps go piece by piece. Use "
            "Adam, or leave them out"
        )

    def norms_of_step(self):
        raise ValueError(
            "OffloadAdam takes no norms: its steps go piece by piece. Leave norms out; gpuadam.global_norm takes the norm of the "
            "parameters"
        )

    def conditions(self, grads_of_groups, grad_scale, max_norm, norm, check_finite, found_inf, stream):
        present = [grad for grads in grads_of_groups for grad in grads if grad is not None]
        if norm is None and present and (max_norm is not None or check_finite is not False):
            norm = global_norm(present, backend=self.backend, stream=stream)
            drop_mapped(bare(present)[0])
        norm, found_inf = _number("norm", norm), _number("found_inf", found_inf)
        return super().conditions(grads_of_groups, grad_scale, max_norm, norm, check_finite, found_inf, stream)

    def check(self, updates, stream):
        if self._device is None:
            refuse_stream(stream)
        return jobs_of(updates, self.state, self._runner.on_gpu, self.backend)

    def leave_out(self, updates, stream):
        super().leave_out(updates, stream)
        if self._device is not None:
            with self._gpu.on(self._device, None):
                self._gpu.synchronize()

    def launch(self, updates, stream, norms=None):
        self._runner.run(self.check(updates, stream), stream, self._store.begin)
        for group in updates:
            torch_tensors.wrote(group.written())

    # Saving and ending

    def save(self, path: FilePath, *, with_params: bool = False) -> None:
        """Write a checkpoint that `gpuadam.load_offload` goes on from, and `gpuadam.load`, as `Adam` or `AdamW`: see `Adam.save`.

        A float32 master is the exact value of its parameter, and is saved as it, with_params or not. To `Adam` that is a float32
        parameter with a copy: `gpuadam.load(path, float32_arrays, param_copies=narrow_arrays, with_params=True)`.
        """
        self._store.check_open()
        super().save(path, with_params=with_params)
        let_go(self)

    def copy_state(self, copies):
        for _, to, source in copies:
            copy(to.array, source.array)

    def flush(self) -> None:
        """Wait until the state in files is on the disk. Raises ValueError while another thread takes a step."""
        self._store.check_open()
        self._store.flush()

    def close(self) -> None:
        """Flush the files and free the folder. No step, load or save can follow; `state` and `state_dict` stay."""
        self._store.close()
        let_go(self)

    def discard(self) -> None:
        """Take the files of the folder away, and the folder unless this optimizer found it empty. No step can follow."""
        self._store.discard()

    def __enter__(self: SelfT) -> SelfT:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self):
        raise TypeError("an OffloadAdam is not copied or pickled, because its state is not in it alone: use state_dict()")

    __copy__ = __reduce__


def let_go(opt):
    """Take the parameters and the state in files of an optimizer out of the process's memory."""
    drop_mapped([array for state in opt.state.values() for key, array in state.items() if key != "step"])
    drop_mapped(bare([param for group in opt.groups for param in group["params"]])[0])


def check_place(state):
    """Refuse what is neither "memory" nor the path of a folder, and a word that may be a slip for "memory"."""
    if not isinstance(state, (str, os.PathLike)) or not os.fspath(state):
        raise TypeError(f'state={shown(state)} must be "memory" or the path of a folder')
    if state != "memory" and Path(state).exists() and not Path(state).is_dir():
        raise ValueError(f"state={shown(state)} is no folder, and something else is there: give the path of a folder")
    is_word = isinstance(state, str) and state not in ("memory", "..") and state == Path(state).name
    if is_word and not Path(state).is_dir():
        raise ValueError(
            f'state={shown(state)} must be "memory" or the path of a folder. For a new folder of that name in the current one '
            f"give state={shown(f'./{state}')}"
        )


def _bytes(budget):
    """Return the budget as an int. 1e9 is a number of bytes, too."""
    if isinstance(budget, float) and budget.is_integer():
        budget = int(budget)
    if not checks.is_number(budget, Integral):
        raise TypeError(f"budget={shown(budget)} must be a number of bytes, such as 10**9 for 1 GB or 2**30 for 1 GiB")
    if budget < 1:
        raise ValueError(f"budget={shown(budget)} must be a positive number of bytes")
    return int(budget)


def _progress_bar():
    """Return rich's bar."""
    try:
        return importlib.import_module("rich.progress").Progress
    except ModuleNotFoundError as error:
        raise ImportError(
            'progress=True needs rich, which is not installed: pip install "gpuadam[progress]", or leave progress out'
        ) from error


def _number(name, value):
    """Return a condition of a step as a number of Python's. It is read from a GPU too, for which the step waits anyway."""
    return backends.number(name, value) if is_array(value) else value
