"""PTX that is newer than what links it: what doctor says of it, and the error at the first step."""

from types import SimpleNamespace

import in_process
import libraries
import numpy as np
import pytest

import gpuadam
from gpuadam import backends, testing
from gpuadam.cli import doctor
from gpuadam.kernels import cuda_linker
from gpuadam.kernels.cuda_linker import Linked

PTX = ".version {}.{}\n.target sm_90\n.address_size 64\n"
OLDER_NVVM = 'or an older NVVM, pip install "nvidia-nvvm<13.'
# by what is wrong: the Linked, and how to mend it
TOO_NEW = {
    "no nvJitLink": (Linked((9, 5), "the driver", (13, 0), (13, 0)), ['"nvidia-nvjitlink>=13.5,<14"', OLDER_NVVM + '1"']),
    "an old nvJitLink": (Linked((9, 5), "nvJitLink", (13, 2), (13, 0)), ['"nvidia-nvjitlink>=13.5,<14"', OLDER_NVVM + '3"']),
    "CUDA 12": (
        Linked((8, 8), "the driver", (12, 4), (12, 4)),
        ['"nvidia-nvjitlink-cu12>=12.9,<13"', '"nvidia-cuda-nvcc-cu12<12.5"'],
    ),
    "nvJitLink of CUDA 12": (Linked((9, 0), "nvJitLink", (12, 9), (13, 0)), ['"nvidia-nvjitlink>=13.0,<14"']),
    "a driver of CUDA 12": (
        Linked((9, 0), "nvJitLink", (12, 9), (12, 8)),
        ["the driver is of CUDA 12.8", '"gpuadam[cuda12]"', "a driver of CUDA 13.0 or later"],
    ),
}


@pytest.mark.parametrize("what", TOO_NEW)
def test_ptx_that_is_too_new_is_told_with_what_mends_it(what):
    linked, fixes = TOO_NEW[what]
    assert linked.is_too_new
    assert all(fix in linked.fix for fix in fixes)
    assert ("older NVVM" in linked.fix) == (linked.cuda[0] == linked.needed[0])


def test_ptx_of_the_linkers_version_or_an_older_one_is_not_too_new():
    for version in ((9, 0), (9, 4), (9, 5), (8, 8), (7, 0)):
        assert not Linked(version, "nvJitLink", (13, 5), (13, 0)).is_too_new
    assert Linked((9, 6), "nvJitLink", (13, 5), (13, 0)).is_too_new


def test_the_cuda_of_each_version_of_ptx_is_that_of_nvidias_table():
    utils = libraries.imported("cuda.bindings.utils")
    compared = 0
    for version in ((major, minor) for major in (7, 8, 9) for minor in range(10)):
        try:
            cuda = utils.get_minimal_required_cuda_ver_from_ptx_ver("{}.{}".format(*version))
        except ValueError:  # there is none, or the table is older
            continue
        linked = Linked(version, "the driver", (cuda // 1000, cuda % 1000 // 10), (13, 0))
        assert linked.needed == linked.cuda
        assert linked.text.endswith("knows PTX up to {}.{}".format(*version))
        compared += 1
    assert compared > 15


@pytest.mark.parametrize(
    "by_nvjitlink, nvjitlink, linker",
    [
        (True, (13, 2), ("nvJitLink", (13, 2))),
        (True, RuntimeError("Failure finding libnvJitLink.so.13"), ("the driver", (13, 1))),
        (True, AttributeError("undefined symbol: nvJitLinkVersion"), ("the driver", (13, 1))),
        (False, (13, 2), ("the driver", (13, 1))),
    ],
)
def test_nvjitlink_links_where_it_is_there_and_else_the_driver(monkeypatch, by_nvjitlink, nvjitlink, linker):
    def library(name):
        if isinstance(nvjitlink, Exception):
            raise nvjitlink
        return f"lib{name}.so", nvjitlink

    monkeypatch.setattr(cuda_linker, "library", library)
    monkeypatch.setattr(cuda_linker.gpu_driver, "asked", lambda name, kind: {"cuDriverGetVersion": 13010}[name])
    linked = cuda_linker.linked(PTX.format(9, 5), by_nvjitlink)
    assert linked == ((9, 5), *linker, (13, 1))
    assert linked.text.startswith(f"NVVM writes PTX 9.5, of CUDA 13.5; {linker[0]}, of CUDA 13.{linker[1][1]}, makes")


def test_doctor_says_once_that_nothing_can_be_linked_and_what_mends_it(monkeypatch):
    linked, (fix, _) = TOO_NEW["no nvJitLink"]

    def refused(name, known):
        raise RuntimeError("Unsupported .version 9.5")

    monkeypatch.setattr(doctor.contract, "digest_on", refused)
    monkeypatch.setattr(doctor, "_linked", lambda name: (linked, linked.text))
    monkeypatch.setattr(doctor, "_launches", lambda name: pytest.fail("no step worked, and an optimizer was tried"))
    found = doctor._examine("numba-cpu")
    assert found["reason"].count("Unsupported .version 9.5") == 1 and all(name in found["reason"] for name in found["steps"])
    assert fix in found["fix"] and found["linked"] == linked.text


def test_what_cannot_be_found_out_of_the_linker_is_said(monkeypatch):
    monkeypatch.setattr(doctor.backends, "load", lambda name: SimpleNamespace(linked=lambda: 1 / 0))
    said = "what links the PTX of NVVM cannot be told: ZeroDivisionError: division by zero"
    assert doctor._linked("numba-cuda") == (None, said) and doctor._linked("cupy") == (None, None)


# Over the stand-in for the driver


@pytest.fixture
def old_driver(driver, monkeypatch):
    """The driver of a CUDA whose linker does not know the PTX of NVVM."""
    monkeypatch.setattr(driver, "version", 12040)
    monkeypatch.setattr(driver, "refuses_new_ptx", True)
    return driver


@pytest.mark.gpu
def test_numba_cuda_says_what_links_its_kernels(driver):
    linked = backends.load("numba-cuda").linked()
    assert (linked.linker, linked.cuda) == ("the driver", (driver.version // 1000, driver.version % 1000 // 10))
    assert linked.ptx >= (8, 0)


@pytest.mark.gpu
def test_the_first_step_says_what_is_too_old_for_nvvms_ptx_and_what_mends_it(old_driver):
    library = testing.array_backend("numba-cuda")
    param, grad = (library.array(np.ones(100, "f4")) for _ in range(2))
    unusual = {"formula": "eps-hat", "amsgrad": True, "ema_decay": 0.625, "clip_value": 3.0}  # compiled by no other test
    opt = gpuadam.AdamW([param], **unusual)
    linked = backends.load("numba-cuda").linked()
    with pytest.raises(RuntimeError) as raised:
        opt.step([grad])
    said = str(raised.value)
    assert said.startswith(f"numba-cuda cannot link its kernels: {linked.text}. To mend it: {linked.fix}. (")
    assert "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in said and "current version is '8.4'" in said
    assert opt.state["0"]["step"] == 0 and (library.numpy(param) == 1).all()
    old_driver.refuses_new_ptx = False
    opt.step([grad])
    assert (library.numpy(param) < 1).all()


@pytest.mark.gpu
def test_doctor_says_it_too(old_driver, monkeypatch):
    from gpuadam.kernels import numba_cuda_backend

    compiled = numba_cuda_backend.compiled.__wrapped__  # anew, as in a new process
    monkeypatch.setattr(numba_cuda_backend, "compiled", compiled)
    said = " ".join(in_process.command("doctor").stdout.split())
    linked = backends.load("numba-cuda").linked()
    assert f"to mend it: {linked.fix}" in said and linked.text in said
