"""What would do nothing, or something else than was meant, is said: by an error, or by a warning where it may be meant."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

import gpuadam
from gpuadam import backends, transports


def ones(dtype="float32"):
    return np.ones(3, dtype)


# Backends


@pytest.mark.parametrize("name", ["", False, 0])
@pytest.mark.parametrize(
    "call",
    [
        lambda name: gpuadam.Adam(ones(), backend=name),
        lambda name: gpuadam.adam_step(ones(), ones(), ones(), ones(), 1, backend=name),
        lambda name: gpuadam.global_norm([ones()], backend=name),
        lambda name: gpuadam.OffloadAdam(ones(), backend=name),
        lambda name: gpuadam.ShardedAdam(ones(), transports.Local(), backend=name),
        lambda name: gpuadam.load("nowhere", ones(), backend=name),
    ],
)
def test_what_names_no_backend_is_not_taken_for_none(call, name):
    with pytest.raises(ValueError, match=f"backend: there is no backend {name!r}, only cupy, numba-cuda, numba-cpu"):
        call(name)


def test_an_empty_environment_variable_is_none(monkeypatch):
    monkeypatch.setattr(backends, "_environment", "")
    gpuadam.Adam(ones()).step(ones())


@pytest.mark.parametrize(
    "code, name, said",
    [
        ("gpuadam.Adam(np.ones(3, 'f4'))", "cupy", "asks for it: unset it"),
        ("gpuadam.adam_step(*(np.ones(3, 'f4') for _ in range(4)), 1)", "gpu", "GPUADAM_BACKEND: there is no backend 'gpu'"),
    ],
)
def test_the_environment_variable_is_named_as_the_cause(code, name, said):
    result = subprocess.run(
        [sys.executable, "-c", f"import numpy as np, gpuadam; {code}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"GPUADAM_BACKEND": name},
    )
    assert said in result.stderr and "GPUADAM_BACKEND" in result.stderr


def test_it_is_named_too_where_its_backend_is_unavailable(monkeypatch):
    monkeypatch.setattr(backends, "_environment", "numba-cpu")
    monkeypatch.setattr(backends, "_probe", lambda name: backends.Status(False, "it is not installed", "install it"))
    backends.load.cache_clear()
    with pytest.raises(
        gpuadam.BackendUnavailableError, match=r"install it. .* variable GPUADAM_BACKEND asks for it: unset it"
    ):
        gpuadam.Adam(ones())


# Options that do nothing for these parameters


MAKE = {
    "Adam": gpuadam.Adam,
    "AdamW": gpuadam.AdamW,
    "OffloadAdam": gpuadam.OffloadAdam,
    "ShardedAdam": lambda params, **options: gpuadam.ShardedAdam(params, transports.Local(), **options),
}


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("options", [{"master": "remainder"}, {"stochastic_rounding": True}], ids=str)
def test_an_option_that_does_nothing_for_these_parameters_warns(make, options):
    with pytest.warns(
        UserWarning, match=rf"{next(iter(options))}=.* does nothing here: no parameter is .*they are float32"
    ) as said:
        MAKE[make]({"w": ones(), "b": ones()}, **options)
    assert [warning.filename for warning in said] == [__file__]


def test_a_float32_master_of_float32_parameters_warns():
    with pytest.warns(UserWarning, match="master='float32' does nothing here: no parameter is bfloat16 or float16"):
        gpuadam.OffloadAdam(ones(), master="float32")


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("options", [{"master": "remainder"}, {"stochastic_rounding": True}], ids=str)
def test_one_parameter_for_which_it_does_something_is_enough(make, options):
    MAKE[make]({"w": gpuadam.Bits(np.zeros(3, "uint16"), "bfloat16"), "b": ones()}, **options)


# Where state is


@pytest.mark.parametrize("state", ["mem", "Memory", "ram", "gpu"])
def test_a_word_is_no_path(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf'state={state!r} must be "memory" or the path .* give state=.*{state}'):
        gpuadam.OffloadAdam(ones(), state=state)
    assert not list(tmp_path.iterdir())
    with gpuadam.OffloadAdam(ones(), state=f"./{state}"):
        pass
    with gpuadam.OffloadAdam(ones(), state=state):  # now that it is there
        pass


@pytest.mark.parametrize("budget", [1e6, np.int64(10**6)])
def test_a_budget_is_a_whole_number_of_bytes(budget):
    gpuadam.OffloadAdam(ones(), budget=budget).step(ones())


@pytest.mark.parametrize(
    "budget, error, said",
    [
        ("1GB", TypeError, r"budget='1GB' must be a number of bytes, such as 10\*\*9 for 1 GB"),
        (1.5, TypeError, "budget=1.5 must be a number of bytes"),
        (float("inf"), TypeError, "budget=inf must be a number of bytes"),
        (True, TypeError, "budget=True must be a number of bytes"),
        (-1, ValueError, "budget=-1 must be a positive number of bytes"),
        (0, ValueError, "budget=0 must be a positive number of bytes"),
    ],
)
def test_of_another_budget_it_is_said_what_it_must_be(budget, error, said):
    with pytest.raises(error, match=said):
        gpuadam.OffloadAdam(ones(), budget=budget)


# Saved parameters


def adam_loaded(path, params, **options):
    return gpuadam.load(path, params, **options)


def offload_loaded(path, params, **options):
    return gpuadam.load_offload(path, params, **options)


def sharded_loaded(path, params, **options):
    return gpuadam.load_sharded(path, params, transports.Local(), **options)


@pytest.mark.parametrize("load", [adam_loaded, offload_loaded, sharded_loaded])
def test_saved_parameters_that_are_not_loaded_are_told(load, tmp_path):
    gpuadam.Adam({"w": ones()}).save(tmp_path / "file", with_params=True)
    params = {"w": np.zeros(3, "float32")}
    with pytest.warns(UserWarning, match=r"file' has parameters, which are not loaded: with_params=True") as said:
        load(tmp_path / "file", params)
    assert [warning.filename for warning in said] == [__file__] and not params["w"].any()
    load(tmp_path / "file", params, with_params=False)
    assert not params["w"].any()
    load(tmp_path / "file", params, with_params=True)
    assert params["w"].all()


@pytest.mark.parametrize("load", [adam_loaded, offload_loaded, sharded_loaded])
def test_a_file_without_parameters_needs_no_word(load, tmp_path):
    gpuadam.Adam({"w": ones()}).save(tmp_path / "file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "file", {"w": ones()})
