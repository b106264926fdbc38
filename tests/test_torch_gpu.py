"""`gpuadam.torch` on a GPU, and over the stand-in for its driver."""

import copy
import pickle

import libraries
import numpy as np
import pytest

torch = libraries.imported("torch", reason="torch is not installed")

from torch_steps import gradients, replay, small, stepped  # noqa: E402

import gpuadam  # noqa: E402
import gpuadam.torch  # noqa: E402
from gpuadam import backends, torch_tensors  # noqa: E402
from gpuadam.kernels import synchronous  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def on_the_cpu():
    """Parameters after three steps on the CPU."""
    params, _ = stepped(gpuadam.torch.AdamW, lr=0.1)
    return params


@pytest.fixture
def tensors_of_a_gpu(driver, cp, on_the_cpu, monkeypatch):
    """Have torch's tensors in CPU memory taken for a GPU's, which can write there because that memory is registered with it.

    What torch does with a tensor comes in the order of its stream; here it is done at once, so each launch is waited for.
    """
    alive = {}

    def memory(tensor):
        if tensor.dtype is torch.bfloat16:
            return gpuadam.Bits(memory(tensor.view(torch.int16)), "bfloat16")
        array = tensor.detach().numpy()
        if not array.size:
            return cp.empty(array.shape, array.dtype)
        address = array.ctypes.data
        if address not in alive:
            alive[address] = array
            cp.cuda.runtime.hostRegister(address, array.nbytes, 0)
        pointer = cp.cuda.MemoryPointer(cp.cuda.UnownedMemory(address, array.nbytes, array, 0), 0)
        return cp.ndarray(array.shape, array.dtype, pointer, array.strides)

    monkeypatch.setattr(torch_tensors, "_memory", memory)
    monkeypatch.setattr(backends, "takes_numpy", lambda backend: False)
    monkeypatch.setattr(gpuadam.torch.optimizer, "_on_device", lambda group: group["capturable"])
    monkeypatch.setattr(synchronous, "ON", True)
    yield
    for address in alive:
        cp.cuda.runtime.hostUnregister(address)


@pytest.mark.gpu
@pytest.mark.parametrize("capturable, launches", [(False, 1), (True, 2)], ids=["host", "capturable"])
def test_a_group_is_one_launch_and_found_inf_leaves_a_step_out(
    on_the_cpu, driver, tensors_of_a_gpu, monkeypatch, backend, capturable, launches
):
    """In device mode another launch makes the scalars, which looks at the flag and counts the step."""
    params = small()
    opt = gpuadam.torch.AdamW(params, lr=0.1, capturable=capturable, backend=backend)
    replay(opt, params, [gradients(0)])
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    replay(opt, params, [gradients(7)])
    opt.found_inf = torch.tensor(0.0)
    replay(opt, params, [[4 * g for g in gradients(1)]])
    monkeypatch.setattr(driver, "calls", [])
    monkeypatch.setattr(driver, "listening", True)
    replay(opt, params, [[4 * g for g in gradients(2)]])
    assert sum(name.startswith("cuLaunchKernel") for name in driver.calls) == launches
    assert all(torch.equal(p, q) and opt.state[p]["step"] == 3 for p, q in zip(params, on_the_cpu, strict=True))


def on_gpu(opt, params, grads):
    for given in grads:
        for p, g in zip(params, given, strict=True):
            p.grad = g.to(p.device)
        opt.step()


def in_two_groups(**options):
    params = small()
    return params, gpuadam.torch.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, **options)


def swap_groups(opt):
    opt.param_groups.reverse()


def remove_a_group(opt):
    del opt.param_groups[0]


def replace_a_group(opt):
    opt.param_groups[0] = opt.param_groups[0] | {"params": [torch.nn.Parameter(torch.ones(4))]}


def move_a_parameter(opt):
    opt.add_param_group({"params": [opt.param_groups[0]["params"].pop()]})


def reverse_a_group(opt):
    opt.param_groups[0]["params"].reverse()


def begin_anew(opt):
    opt.state.clear()


def set_counts(opt):
    for state in opt.state.values():
        state["step"].fill_(70)


def count_on_the_host(opt):
    capturable = [group["capturable"] for group in opt.param_groups]
    for now in ([False] * len(capturable), capturable):
        for group, value in zip(opt.param_groups, now, strict=True):
            group["capturable"] = value
        step_all(opt)


def load_itself(opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


CHANGES = [
    swap_groups, remove_a_group, replace_a_group, move_a_parameter, reverse_a_group, begin_anew, set_counts, count_on_the_host,
    load_itself,
]  # fmt: skip


def step_all(opt, groups=None):
    for group in opt.param_groups if groups is None else groups:
        for p in group["params"]:
            p.grad = torch.cos(p.detach())
    opt.step()
    opt.zero_grad()


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES)
def test_the_count_on_the_device_is_that_of_the_parameters_whatever_becomes_of_groups(
    driver, tensors_of_a_gpu, backend, change
):
    """The second group has taken two steps more than the first one, and both go on."""
    trained = []
    for options in ({}, {"capturable": True, "backend": backend}):
        params, opt = in_two_groups(**options)
        step_all(opt)
        step_all(opt, opt.param_groups[1:])
        step_all(opt, opt.param_groups[1:])
        change(opt)
        step_all(opt)
        step_all(opt)
        trained.append([*params, *(opt.state[p]["step"] for p in params)])
    assert all(map(torch.equal, *trained))


@pytest.mark.gpu
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_of_an_optimizer_counts_on_the_device_by_itself(driver, tensors_of_a_gpu, backend, copied):
    _, opt = in_two_groups(capturable=True, backend=backend)
    step_all(opt, opt.param_groups[1:])
    other = copied(opt)
    step_all(other)
    step_all(opt)
    step_all(other)
    assert [[int(s["step"]) for s in one.state.values()] for one in (opt, other)] == [[2, 1, 1], [3, 2, 2]]


@pytest.mark.gpu
def test_counts_and_random_bits_on_the_device_go_on_where_a_float32_stands_still(driver, tensors_of_a_gpu, backend):
    options = {"state_dtype": "bfloat16", "betas": (0.9, 1 - 2**-26), "lr": 0.5}
    trained = []
    for more in ({}, {"capturable": True, "backend": backend}):
        params, opt = stepped(gpuadam.torch.Adam, seeds=(0,), **options, **more)
        for p in params:
            opt.state[p]["step"].fill_(2**24 - 1)
        for k in range(5):
            opt.found_inf = torch.tensor(float(k == 2))
            replay(opt, params, [gradients(k)])
        assert [int(opt.state[p]["step"]) for p in params] == [int(np.float32(2**24 + 3))] * 3
        trained.append([*params, *(state["exp_avg"] for state in opt.state.values())])
    assert all(map(torch.equal, *trained))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"capturable": True}, {"state_dtype": "8bit"}], ids=str)
@pytest.mark.parametrize("backend", ["cupy", "numba-cuda"])
def test_cuda_parameters_have_the_bits_of_cpu_parameters(cuda_torch, backend, options):
    expected, _ = stepped(gpuadam.torch.AdamW, **options)
    params = [torch.nn.Parameter(p.detach().cuda()) for p in small()]
    opt = gpuadam.torch.AdamW(params, backend=backend, **options)
    on_gpu(opt, params, [gradients(seed) for seed in range(3)])
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p.cpu(), q)
        assert opt.state[p]["step"] == 3 and all(key == "step" or t.is_cuda for key, t in opt.state[p].items())


@pytest.mark.gpu
def test_parameters_on_two_devices_share_an_optimizer(cuda_torch):
    expected, _ = stepped(gpuadam.torch.AdamW)
    params = small()
    params[1] = torch.nn.Parameter(params[1].detach().cuda())
    opt = gpuadam.torch.AdamW(params)
    on_gpu(opt, params, [gradients(seed) for seed in range(3)])
    assert all(torch.equal(p.cpu(), q) for p, q in zip(params, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_the_gradient_scaler_on_a_gpu_leaves_out_what_overflowed(cuda_torch, capturable, fused):
    params = [torch.nn.Parameter(p.detach().cuda()) for p in small()]
    opt = gpuadam.torch.Adam(params, lr=0.1, capturable=capturable, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    others = small()
    reference = gpuadam.torch.Adam(others, lr=0.1)
    for seed in range(4):
        opt.zero_grad()
        scaler.scale(sum((p * g.cuda()).sum() for p, g in zip(params, gradients(seed), strict=True))).backward()
        if seed == 2:
            params[1].grad[2] = float("inf")
        else:
            replay(reference, others, [gradients(seed)])
        scaler.step(opt)
        scaler.update()
    assert all(torch.equal(p.cpu(), q) and opt.state[p]["step"] == 3 for p, q in zip(params, others, strict=True))


@pytest.mark.gpu
def test_the_recipe_of_torchs_documentation_captures_a_whole_training_step(cuda_torch):
    """Steps on a side stream, no gradients left, and then a backward pass in the graph, whose gradients lie in its memory."""
    params, expected = [torch.nn.Parameter(p.detach().cuda()) for p in small()], small()
    static = [g.cuda() for g in gradients(0)]
    opt = gpuadam.torch.AdamW(params, lr=torch.tensor(0.1, device="cuda"), capturable=True)
    reference = gpuadam.torch.AdamW(expected, lr=torch.tensor(0.1))  # the same float32

    def train():
        opt.zero_grad(set_to_none=True)
        sum((p * g).sum() for p, g in zip(params, static, strict=True)).backward()
        opt.step()

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train()
            replay(reference, expected, [gradients(0)])
    torch.cuda.current_stream().wait_stream(side)
    opt.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        sum((p * g).sum() for p, g in zip(params, static, strict=True)).backward()
        opt.step()
    for k in range(1, 4):
        for tensor, g in zip(static, gradients(k), strict=True):
            tensor.copy_(g)
        graph.replay()
        replay(reference, expected, [gradients(k)])
    torch.cuda.synchronize()
    assert all(torch.equal(p.cpu(), q) and opt.state[p]["step"] == 6 for p, q in zip(params, expected, strict=True))


@pytest.mark.gpu
def test_a_graph_has_gradients_of_its_own(driver, cp, tensors_of_a_gpu, backend, monkeypatch):
    """As in torch's recipe, over the stand-in: the counts are copied by torch at once, and not by the graph."""
    params, expected, lr = small(), small(), cp.full(1, 0.1)
    opt = gpuadam.torch.AdamW(params, lr=torch.tensor(0.1), capturable=True, backend=backend)
    reference = gpuadam.torch.AdamW(expected, lr=0.1, backend=backend)
    monkeypatch.setattr(gpuadam.torch.optimizer, "_number", lambda _, given: lr if torch.is_tensor(given) else given)
    replay(opt, params, [gradients(0)])
    own = [g.clone() for g in gradients(1)]
    for p, g in zip(params, own, strict=True):
        p.grad = g
        torch_tensors._memory(g)  # registers it, which a capture forbids
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture(cp.cuda.runtime.streamCaptureModeGlobal)
        try:
            opt.step()
        finally:
            graph = stream.end_capture()
        for k in range(1, 4):
            for tensor, g in zip(own, gradients(k), strict=True):
                tensor.copy_(g)
            graph.launch(stream)
            stream.synchronize()
    replay(reference, expected, [gradients(k) for k in range(4)])
    assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))


@pytest.mark.gpu
def test_a_captured_step_replays_with_the_learning_rate_of_then(cuda_torch):
    lr = torch.tensor(0.1, device="cuda")
    params, expected = [torch.nn.Parameter(p.detach().cuda()) for p in small()], small()
    opt, reference = gpuadam.torch.AdamW(params, lr=lr, capturable=True), gpuadam.torch.AdamW(expected, lr=torch.tensor(0.1))
    for p, g in zip(params, gradients(0), strict=True):
        p.grad = g.cuda()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        opt.step()
    with torch.cuda.graph(graph, stream=stream):
        opt.step()
    replay(reference, expected, [gradients(0)])
    for k in range(1, 4):
        lr.fill_(0.1 / (k + 1))
        for p, g in zip(params, gradients(k), strict=True):
            p.grad.copy_(g)
        graph.replay()
        reference.param_groups[0]["lr"] = torch.tensor(0.1 / (k + 1))
        replay(reference, expected, [gradients(k)])
    torch.cuda.synchronize()
    assert all(torch.equal(p.cpu(), q) and opt.state[p]["step"] == 4 for p, q in zip(params, expected, strict=True))
