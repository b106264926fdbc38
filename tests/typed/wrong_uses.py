"""Wrong uses of the public interface, one a line: each is refused by mypy, by pyright and, when it runs, by gpuadam.

A comment says of each the codes of the errors of mypy and of pyright. `tests/typed/check.py` compares, and `tests/test_typing.py`
runs each line.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

import gpuadam
from gpuadam import backends, foreign_state, planning, testing

Floats = npt.NDArray[np.float32]


def wrong_uses(
    w: Floats, params: dict[str, Floats], opt: gpuadam.Adam, local: gpuadam.transports.Local, nested: dict[str, list[Any]]
) -> None:
    # names
    gpuadam.Adamw(params)  # attr-defined, reportAttributeAccessIssue
    gpuadam.AdamW(params, weight_dacay=1)  # call-arg, reportCallIssue
    gpuadam.Adam(params, learning_rate=0.1)  # call-arg, reportCallIssue
    gpuadam.NAdam(params, momentum_decay=0.004)  # call-arg, reportCallIssue
    gpuadam.RAdam(params, degenerated_to_sgd=True)  # call-arg, reportCallIssue
    gpuadam.AdaMax(params, ams_grad=True)  # call-arg, reportCallIssue
    gpuadam.OffloadAdam(params, folder="./state")  # call-arg, reportCallIssue
    gpuadam.ShardedAdam(params, local, param_copies=params)  # call-arg, reportCallIssue
    gpuadam.ShardedAdamW(params, local, bucket=1 << 20)  # call-arg, reportCallIssue
    gpuadam.adam_step(w, w.copy(), w.copy(), w.copy(), 1, beta1=0.9)  # call-arg, reportCallIssue
    gpuadam.Rule("float32", m_scale=w)  # call-arg, reportCallIssue
    gpuadam.Rule("float32").scalars(1, amsgrad=True)  # call-arg, reportCallIssue
    opt.step(params, clip=1.0)  # call-overload, reportCallIssue
    # choices
    gpuadam.Rule(algorithm="adamw")  # arg-type, reportArgumentType
    gpuadam.Adam(params, formula="pytorch")  # arg-type, reportArgumentType
    gpuadam.Adam(params, state_dtype="float16")  # arg-type, reportArgumentType
    gpuadam.Adam(params, complex=True)  # arg-type, reportArgumentType
    gpuadam.Adam(params, components=5)  # arg-type, reportArgumentType
    gpuadam.Adam(params, master="float32")  # arg-type, reportArgumentType
    gpuadam.NAdam(params, capturable=True)  # arg-type, reportArgumentType
    gpuadam.RAdam(params, amsgrad=True)  # arg-type, reportArgumentType
    gpuadam.AdaMax(params, formula="optax")  # arg-type, reportArgumentType
    gpuadam.OffloadAdam(params, update="gpu")  # arg-type, reportArgumentType
    gpuadam.OffloadAdam(params, capturable=True)  # arg-type, reportArgumentType
    gpuadam.ShardedAdam(params, local, reduction="average")  # arg-type, reportArgumentType
    gpuadam.adam_step(gpuadam.Bits(np.zeros(3, "u2"), "float8"), w, w, w, 1)  # arg-type, reportArgumentType
    gpuadam.adam_step(w, w.copy(), w.copy(), w.copy(), 1, where="finite")  # arg-type, reportArgumentType
    planning.update(10, "int8")  # arg-type, reportArgumentType
    # numbers
    gpuadam.Adam(params, lr="0.1")  # arg-type, reportArgumentType
    gpuadam.Adam(params, lr=None)  # arg-type, reportArgumentType
    gpuadam.Adam(params, lr=lambda: 0.1)  # arg-type misc, reportArgumentType
    gpuadam.Adam(params, betas=0.9)  # arg-type, reportArgumentType
    gpuadam.Adam(params, betas=(0.9,))  # arg-type, reportArgumentType
    gpuadam.Adam(params, weight_decay=[0.1])  # arg-type, reportArgumentType
    gpuadam.Adam(params, bounds=1.0)  # arg-type, reportArgumentType
    gpuadam.Adam(params, seed=0.5)  # arg-type, reportArgumentType
    gpuadam.Adam(params, amsgrad="no")  # arg-type, reportArgumentType
    gpuadam.adam_step(w, w.copy(), w.copy(), w.copy(), 1.5)  # arg-type, reportArgumentType
    gpuadam.adam_step(w, w.copy(), w.copy(), w.copy())  # call-arg, reportCallIssue
    gpuadam.OffloadAdam(params, budget="1GB")  # arg-type, reportArgumentType
    opt.step(params, max_norm="1")  # call-overload, reportArgumentType reportCallIssue
    opt.step(params, stream="main")  # call-overload, reportArgumentType reportCallIssue
    # parameters, gradients and groups
    gpuadam.Adam([1.0, 2.0])  # list-item, reportArgumentType
    gpuadam.Adam("w")  # arg-type, reportArgumentType
    gpuadam.Adam()  # call-arg, reportCallIssue
    gpuadam.Adam({"w": nested})  # arg-type, reportArgumentType
    gpuadam.Adam([("w", w)])  # list-item, reportArgumentType
    gpuadam.Adam([{"lr": 0.1}])  # list-item, reportArgumentType
    gpuadam.Adam([{"params": [w], "learning_rate": 0.1}])  # list-item, reportArgumentType
    gpuadam.Adam([{"params": [w], "state_dtype": "8bit"}])  # list-item, reportArgumentType
    opt.step({"w": 1.0})  # arg-type, reportArgumentType reportCallIssue
    opt.step({"w": [0.1, 0.2]})  # arg-type, reportArgumentType reportCallIssue
    opt.lr = 0.1  # assignment, reportAttributeAccessIssue
    opt.replace("w", w, 0)  # arg-type, reportArgumentType
    gpuadam.adam_step([0.5], w, w, w, 1)  # arg-type, reportArgumentType
    gpuadam.global_norm(1.0)  # arg-type, reportArgumentType
    gpuadam.flatten([1.0])  # list-item, reportArgumentType
    gpuadam.decay_groups([w], "b")  # arg-type, reportArgumentType
    # further arguments
    gpuadam.ShardedAdam(params)  # call-arg, reportCallIssue
    gpuadam.ShardedAdam(params, gpuadam.transports.Local)  # arg-type, reportArgumentType
    gpuadam.OffloadAdam(params).step(params, change=params)  # arg-type, reportArgumentType
    gpuadam.load(None, params)  # arg-type, reportArgumentType
    gpuadam.load("file", params, names=["w"])  # arg-type, reportArgumentType
    opt.save(1.5)  # arg-type, reportArgumentType
    backends.register("jax")  # arg-type, reportArgumentType
    foreign_state.from_torch(opt, [])  # arg-type, reportArgumentType
    testing.array_backend(0)  # arg-type, reportArgumentType
    testing.Reference(params, algorithm="adamw")  # arg-type, reportArgumentType
    testing.Reference(params).step(params, lr_scale=1.0)  # arg-type, reportArgumentType
    planning.plan(10, planning.MACHINES["h100"], planning.Settings())  # arg-type, reportArgumentType
