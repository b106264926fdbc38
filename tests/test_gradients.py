"""`zero_grad`: gradients that a program keeps become zeros, and nothing else is written."""

import libraries
import numpy as np
import pytest

import gpuadam


def arrays(dtype="f4"):
    return {"w": np.ones((3, 4), dtype), "b": np.ones(1, dtype)}


def test_gradients_of_every_backend_become_zeros(library):
    ml_dtypes = libraries.imported("ml_dtypes")
    for dtype in ("f4", "f2", ml_dtypes.bfloat16, "c8"):
        params, grads = ({name: library.array(x) for name, x in arrays(dtype).items()} for _ in range(2))
        opt = gpuadam.Adam(params, complex="parts")
        opt.zero_grad(grads | {"b": None})
        library.synchronize()
        host = library.numpy(grads["w"])
        assert not host.view("u1").any() and library.numpy(grads["b"]).view("u1").any()
        assert all((library.numpy(p) == 1).all() for p in params.values())


def test_gradients_have_the_structure_of_a_step():
    w, b = np.ones(3, "f4"), np.ones(2, "f4")
    opt = gpuadam.AdamW([{"params": [w]}, {"params": {"b": b}}])
    grads = [[np.ones(3, "f8")], {"b": np.asfortranarray(np.ones(2, "f2"))}]
    opt.zero_grad(grads)
    assert not grads[0][0].any() and not grads[1]["b"].any()
    with pytest.raises(ValueError, match="list of 2 entries"):
        opt.zero_grad(grads[0])
    assert (opt.steps, opt.state["0"]["step"]) == (0, 0)


def read_only():
    x = np.ones((3, 4), "f4")
    x.flags.writeable = False
    return x


WRONG = {
    "a parameter": (lambda params: params, ValueError, "share memory"),
    "another shape": (
        lambda params: arrays() | {"w": np.ones(12, "f4")},
        ValueError,
        r"has shape \(12,\), params\['w'\] has shape \(3, 4\): nothing is broadcast. Give .*, as by .reshape\(\(3, 4\)\)",
    ),
    "a shape of fewer elements": (
        lambda params: arrays() | {"w": np.ones(4, "f4")},
        ValueError,
        r"has shape \(4,\), params\['w'\] has shape \(3, 4\): nothing is broadcast. Give an array of shape \(3, 4\)$",
    ),
    "complex": (
        lambda params: arrays() | {"w": np.ones((3, 4), "c8")},
        TypeError,
        "the gradient of a real parameter is real: give its real part",
    ),
    "integers": (lambda params: arrays() | {"w": np.ones((3, 4), "i4")}, TypeError, "has dtype int32"),
    "read-only": (lambda params: arrays() | {"w": read_only()}, ValueError, "read-only"),
    "a broadcast": (lambda params: arrays() | {"w": np.broadcast_to(np.float32(1), (3, 4))}, ValueError, "share memory"),
    "no array": (lambda params: arrays() | {"w": 1.0}, TypeError, "the gradient of params"),
    "another name": (lambda params: {"w": params["w"]}, ValueError, "lacks"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_gradient_is_refused_before_anything_is_written(what):
    make, error, match = WRONG[what]
    params = {"b": np.ones(1, "f4"), "w": np.ones((3, 4), "f4")}
    opt = gpuadam.Adam(params)
    grads = make(params)
    with pytest.raises(error, match=match):
        opt.zero_grad(grads)
    assert all((params[name] == 1).all() for name in params) and (np.asarray(grads.get("b", 1)) == 1).all()


def test_arrays_have_no_grad_to_forget():
    with pytest.raises(TypeError, match=r"has no .grad: give the gradients, zero_grad\(grads\)"):
        gpuadam.Adam(arrays()).zero_grad()


def test_gradients_of_a_parameter_that_was_rebound_are_not_zeroed():
    params, grads = arrays(), arrays()
    opt = gpuadam.Adam(params)
    params["w"] = params["w"] * 2
    with pytest.raises(ValueError, match="no longer the array that the optimizer updates"):
        opt.zero_grad(grads)
    assert grads["w"].all()


def test_one_array_is_called_params():
    with pytest.raises(ValueError, match=r"^the gradient of params has shape"):
        gpuadam.Adam(np.ones(3, "f4")).zero_grad(np.ones(4, "f4"))


def test_the_gradients_of_tensors_are_forgotten_or_kept_as_zeros():
    torch = libraries.imported("torch", reason="torch is not installed")
    params = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    opt = gpuadam.Adam(params)
    params[0].sum().backward()
    kept = params[0].grad
    version = kept._version
    opt.zero_grad([p.grad for p in params])
    assert params[0].grad is kept and not kept.any() and kept._version == version + 1
    opt.zero_grad()
    assert params[0].grad is params[1].grad is None
    with pytest.raises(TypeError, match=r"no \.grad"):
        gpuadam.Adam([params[0], np.ones(3, "f4")]).zero_grad()
