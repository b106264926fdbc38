"""Checkpoints in `checkpoints/`, which an earlier version of gpuadam wrote, are still loaded with all that they hold."""

from pathlib import Path

import numpy as np

import gpuadam

SAVED = Path(__file__).parent / "checkpoints"


def numbers(shape, start, dtype="f4"):
    """Return start, start + 1, ...: what is in the arrays of those checkpoints."""
    return np.arange(start, start + int(np.prod(shape)), dtype=dtype).reshape(shape)


def test_a_file_of_adamw_with_options():
    params = {"größe": np.zeros((3, 5), "f4"), "empty": np.zeros((0, 2), "f4")}
    narrow = {"narrow": gpuadam.Bits(np.zeros(7, "u2"), "bfloat16")}
    opt = gpuadam.load(SAVED / "adamw.safetensors", [{"params": params}, {"params": narrow}], with_params=True)
    assert type(opt) is gpuadam.AdamW and opt.steps == 9
    assert {name: getattr(opt.options, name) for name in ("state_dtype", "ema_decay", "master", "seed", "zero_grad")} == {
        "state_dtype": "8bit", "ema_decay": 0.5, "master": "remainder", "seed": 2**63 + 5, "zero_grad": True
    }  # fmt: skip
    wide, own = opt.groups
    assert (wide["lr"], wide["betas"], wide["weight_decay"]) == (0.25, (0.5, 0.75), 0.01)
    assert (own["lr"], own["betas"], own["weight_decay"], own["maximize"]) == (0.125, (0.9, 0.999), 0.5, True)
    assert [opt.state[name]["step"] for name in ("größe", "empty", "narrow")] == [9, 0, 8]
    assert (params["größe"] == numbers((3, 5), 100)).all()
    assert (narrow["narrow"].array == numbers(7, 200, "u2")).all()
    wanted = {"m": ("u1", 10), "v": ("u1", 20), "ema": ("f4", 30)}
    for name, shape, groups in (("größe", (3, 5), 1), ("empty", (0, 2), 0), ("narrow", (7,), 1)):
        state = opt.state[name]
        for key, (dtype, start) in wanted.items():
            assert state[key].dtype == dtype and (state[key] == numbers(shape, start, dtype)).all()
        for key, start in (("m_scale", 40), ("v_scale", 50)):
            assert state[key].dtype == "f4" and (state[key] == numbers(groups, start)).all()
    assert (opt.state["narrow"]["remainder"] == numbers(7, 60, "i2")).all()


def test_a_folder_of_many_ranks():
    """Two ranks wrote it: the first has 4096 elements of `large`, the second the other 4 and all of `small`."""
    for load in (gpuadam.load, lambda *a, **o: gpuadam.load_sharded(a[0], a[1], gpuadam.transports.Local(), **o)):
        params = {"large": np.zeros(4100, "f2"), "small": np.zeros((2, 3), "f2")}
        opt = load(SAVED / "sharded", params, with_params=True)
        assert type(opt) in (gpuadam.AdamW, gpuadam.ShardedAdamW) and opt.steps == 5
        assert opt.groups[0]["lr"] == 0.0625 and opt.options.state_dtype == "8bit"
        for name, param in params.items():
            assert (param.reshape(-1) == np.arange(param.size) % 8).all()
            state = opt.state[name] if load is gpuadam.load else next(s.state for s in opt.shards if s.name == name)
            assert state["step"] == (5 if name == "large" else 4)
            assert (state["m"].reshape(-1) == np.arange(param.size) % 16).all()
            assert (state["v"].reshape(-1) == np.arange(param.size) % 32).all()
            assert (state["m_scale"] == numbers(-(-param.size // 32), 1)).all() and (state["v_scale"] == 2).all()
