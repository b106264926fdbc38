"""Right uses of the public interface: mypy and pyright accept them, in strict mode, and `tests/test_typing.py` runs them.

Arrays of CuPy, of torch and the like are written as their protocols, because a type checker may not find these libraries.
"""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

import gpuadam
from gpuadam import foreign_state, planning, testing
from gpuadam.typing import Algorithm, Array, Group, LearningRate, LikeParams, Params

Floats = npt.NDArray[np.float32]


def floats(n: int = 3) -> Floats:
    return np.ones(n, np.float32)


def adam_step_of_arrays() -> None:
    param, grad, m, v = floats(), floats(), np.zeros(3, "float32"), np.zeros(3, "float32")
    gpuadam.adam_step(param, grad, m, v, 1)
    gpuadam.adam_step(param, grad, m, v, step=2, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0, decoupled=True)
    gpuadam.adam_step(param, grad, m, v, np.int64(3), lr=np.float32(0.1), clip_value=1, bounds=(0, None), algorithm="nadam")
    gpuadam.adam_step(param, grad, m, v, 4, bounds=(floats(), None), where=np.ones(3, "bool"), lr_scale=floats())
    gpuadam.adam_step(
        param, grad, m, v, 5, where="nonzero", formula="optax", eps_root=1e-9, ema=floats(), backend="numba-cpu"
    )
    bits, remainder = gpuadam.Bits(np.zeros(3, "uint16"), "bfloat16"), np.zeros(3, "int16")
    gpuadam.adam_step(bits, grad, m, v, 6, remainder=remainder)
    z, n = np.ones(3, np.complex64), floats()
    gpuadam.adam_step(z, np.ones_like(z), np.zeros_like(z), n, 7, complex="joint")


def forms_of_params() -> None:
    w, b = floats(), floats(1)
    for params in (w, [w, b], (w, b), {"w": w, "b": b}):
        gpuadam.Adam(params)
    named: dict[str, Floats] = {"w": w, "b": b}
    gpuadam.AdamW(named, 0.1, (0.9, 0.999), 1e-8, 0.01)
    gpuadam.AdamW(named.values(), betas=[0.9, 0.99])
    gpuadam.AdamW(p for p in (w, b))
    gpuadam.RAdam(gpuadam.Bits(np.zeros(3, "uint16"), "bfloat16"), master="remainder")


def groups_of_params() -> None:
    w, b = floats(), floats(1)
    gpuadam.Adam([{"params": [w], "lr": 1e-3, "amsgrad": True}, {"params": {"b": b}, "weight_decay": 0.0}])
    gpuadam.Adam([{"params": w, "bounds": (0, 1), "clip_value": None}])
    groups: list[Group] = [{"params": {name: p}, "lr": lambda step: 1.0 / step} for name, p in {"w": w, "b": b}.items()]
    opt: gpuadam.Adam = gpuadam.AdamW(groups)
    opt.step({"w": floats(), "b": None})
    opt.groups[0]["lr"] = 0.5
    opt = gpuadam.Adam(gpuadam.decay_groups({"w": w, "b": b}, no_decay="b"))
    opt.step([{"w": floats()}, {"b": None}])
    opt = gpuadam.Adam([{"params": [w]}, {"params": {"b": b}}])
    opt.step([{"params": [floats()]}, {"b": floats(1)}])
    opt.step([[None], {"params": {"b": None}}])


def learning_rates() -> None:
    def schedule(step: int) -> float:
        return 1e-3 * min(1, step / 100)

    w = floats()
    gpuadam.Adam(w, lr=1)
    gpuadam.Adam(w, lr=schedule)
    gpuadam.Adam(w, lr=lambda step: 1e-3 / step)
    gpuadam.Adam(w, lambda step: np.float32(1e-3))
    gpuadam.Adam(w, lr=np.full(1, 1e-3, "float32"), capturable=True).step(floats(), grad_scale=np.full(1, 0.5, "float32"))
    rates: list[LearningRate] = [1e-3, schedule, np.float64(0.1)]
    for lr in rates:
        gpuadam.NAdam(w, lr)


def steps_of_optimizers() -> None:
    w, b = floats(), floats(1)
    opt = gpuadam.Adam({"w": w, "b": b}, param_copies={"w": np.zeros(3, "float16"), "b": None}, ema_decay=0.99)
    opt.step({"w": floats(), "b": None})
    opt.step({"w": floats(), "b": floats(1)}, max_norm=1.0, check_finite=True, found_inf=False)
    grads: dict[str, Floats | None] = {"w": floats(), "b": None}
    opt.step(grads, max_norm=1, norm=gpuadam.global_norm(grads))
    change, param = opt.step(grads, norms=True)
    print(float(change), float(param))
    opt.zero_grad({"w": floats(), "b": None})
    one = gpuadam.AdaMax(w, maximize=True)
    one.step(floats(), where="nonzero", lr_scale=floats(), change=np.zeros(3, "float32"))
    several = gpuadam.AdamW([w, b], state_dtype="bfloat16", seed=np.int64(1))
    several.step([floats(), None])
    several.step((floats(), floats(1)))
    several.step(g for g in (floats(), floats(1)))
    count: int = several.steps
    dtype: str | None = several.options.state_dtype
    print(count, dtype, several.state["0"]["m"].shape, opt)


def growing() -> None:
    opt = gpuadam.Adam({"points": np.zeros((3, 2), "float32")})
    opt.replace("points", np.zeros((2, 2), "float32"), [0, -1])
    opt.replace("points", np.zeros((1, 2), "float32"), np.array([1]))
    opt.add("b", floats())
    opt.remove("b")


def checkpoints() -> None:
    w = {"w": floats()}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "adam.safetensors")
        opt = gpuadam.AdamW(w)
        opt.step({"w": floats()})
        opt.save(path, with_params=True)
        again = gpuadam.load(str(path), w, lr=lambda step: 1.0 / step, with_params=False, state_dtype="8bit")
        again.load_state_dict(opt.state_dict(), convert=True, names={"w": "w"})
        with gpuadam.load_offload(path, w, state=pathlib.Path(folder, "state"), with_params=False) as offloaded:
            print(offloaded.steps)
        print(gpuadam.load_sharded(path, w, gpuadam.transports.Local(), with_params=False, names={"w": "w"}).steps)
    foreign_state.to_optax(opt, foreign_state_like(opt))


def foreign_state_like(opt: gpuadam.Adam) -> Any:
    class ScaleByAdamState:
        count: Any = 1
        mu: Any
        nu: Any
        _fields = ("count", "mu", "nu")

        def _replace(self, **changes: Any) -> "ScaleByAdamState":
            self.__dict__.update(changes)
            return self

    state = ScaleByAdamState()
    state.mu, state.nu = ({name: own[key] for name, own in opt.state.items()} for key in ("m", "v"))
    return state


def elsewhere() -> None:
    w = floats()
    with gpuadam.OffloadAdam({"w": w}, lr=0.1, state="memory", budget=1e6, update="host", decoupled=True) as opt:
        opt.step({"w": floats()}, max_norm=1.0)
        text: str = opt.describe()
    sharded = gpuadam.ShardedAdam(
        [w], gpuadam.transports.Local(), lr=0.1, algorithm="radam", reduction="sum", bucket_bytes=1 << 20
    )
    sharded.step([floats()], grad_scale=2)
    moments = sharded.gathered("m")["0"]
    gpuadam.ShardedAdamW({"w": w}, gpuadam.transports.Local(), views=True).step({"w": floats()})
    print(text, moments.sum(), [shard.start for shard in sharded.shards])


class Sums:
    """A transport of a user: one rank."""

    def __init__(self) -> None:
        self.rank, self.size, self.memory, self.calls = 0, 1, "CPU", gpuadam.transports.Calls()

    def reduce_scatter(self, buffer: Any, part: Any) -> gpuadam.transports.Work:
        part[...] = buffer
        return gpuadam.transports.Work()

    def all_gather(self, buffer: Any) -> gpuadam.transports.Work:
        return gpuadam.transports.Work(lambda: None)

    def broadcast(self, buffer: Any) -> None:
        return

    def exchange(self, item: Any) -> list[Any]:
        return [item]


def own_transport() -> None:
    gpuadam.ShardedAdam(floats(), Sums()).step(floats())


def further_functions() -> None:
    w, b = floats(), floats(1)
    gpuadam.global_norm(w)
    gpuadam.global_norm([w, {"b": b, "c": None}, (w, b)], out=np.zeros(()))
    flat = gpuadam.flatten({"w": w, "b": b})
    flat.grads["w"][0] = 5.0
    gpuadam.Adam(flat.param, lr=0.1).step(flat.grad)
    print(gpuadam.flatten([w, b]).params[0], gpuadam.flatten(w, backend="numba-cpu").grads)
    with gpuadam.use_backend("numba-cpu"):
        gpuadam.Adam(w).step(floats())
    names: tuple[str, ...] = gpuadam.available_backends()
    print(names, [status.fix for status in gpuadam.backend_status().values() if not status.available])
    rule = gpuadam.Rule("float32", lr=0.1, bounds=(0, None), ema_decay=0.9)
    update: Callable[..., Any] = rule.for_njit()
    print(rule.scalars(1, lr=0.2, bounds=(0, 1)), rule.struct(2), update, rule.for_cuda_c("own"), rule.for_elementwise()[0])


def tools_for_tests() -> None:
    w = floats()
    opt, exact = gpuadam.Adam({"w": w}, lr=0.1), testing.Reference({"w": w}, lr=0.1)
    with testing.unchanged(w=w):
        opt.step({"w": None})
    grads = {"w": floats()}
    testing.inject(grads, "huge", at={"w": 0})
    testing.inject(grads["w"], float("inf"), at=(1,))
    fault: testing.Fault | None = next(iter(testing.Faults(seed=0, probability=1.0).inject(grads)), None)
    grads = {"w": floats()}
    opt.step(grads, lr_scale={"w": floats()}, where="nonzero")
    exact.step(grads, lr_scale={"w": floats()}, where="nonzero")
    exact.assert_close({"w": w}, atol=1e-3)
    testing.assert_same_bits([w, None], [w, None], "w")
    backend = testing.array_backend("numba-cpu")
    print(fault, backend.numpy(backend.array([1.0, 2.0])).sum(), backend.zeros((2, 3)), backend.flag(1))


def plans() -> None:
    update = planning.update([10**9, 2], "bfloat16", master="remainder", state="8bit")
    predictions = planning.plan(update, planning.MACHINES["h100"], planning.Settings(world=8), auto=True)
    best = planning.best(predictions)
    print(best.seconds if best else None, [p.way.name for p in predictions])


def own_functions(params: Params, grads: LikeParams, algorithm: Algorithm = "adam") -> None:
    gpuadam.Adam(params, lr=0.1).step(grads)
    gpuadam.Rule(algorithm=algorithm)


class CuPyLike:
    """An array as CuPy has them."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise NotImplementedError


class TorchLike:
    """A tensor as torch has them."""

    grad: "TorchLike | None" = None

    def __dlpack__(self, stream: Any = -1) -> Any:
        raise NotImplementedError

    def __dlpack_device__(self) -> tuple[int, int]:
        raise NotImplementedError


class StreamLike:
    """A stream as CuPy and Numba have them."""

    def __cuda_stream__(self) -> tuple[int, int]:
        raise NotImplementedError


def on_a_gpu(x: CuPyLike, tensors: list[TorchLike], stream: StreamLike) -> None:
    """For type checkers alone: there are no such arrays."""
    gpuadam.adam_step(x, x, x, x, 1, stream=stream)
    gpuadam.Adam({"x": x}, lr=x, capturable=True).step({"x": x}, found_inf=x, norm=x, max_norm=1.0, stream=12345)
    gpuadam.Adam(tensors).step()
    gpuadam.Adam(iter(tensors)).step([t.grad for t in tensors])
    gpuadam.Adam([{"params": tensors, "lr": 0.1}]).zero_grad()
    array: Array = gpuadam.Bits(x, "float16")
    gpuadam.global_norm([array, *tensors])
