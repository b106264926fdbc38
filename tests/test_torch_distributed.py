"""`gpuadam.torch` over the DTensors of `fully_shard`: two ranks of gloo on the CPU, beside one process and torch.optim."""

import json
from pathlib import Path

import libraries
import pytest

torch = libraries.imported("torch", reason="torch is not installed")
if not torch.distributed.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
    pytest.skip("fully_shard is public from torch 2.6 on", allow_module_level=True)

import torch.distributed.checkpoint  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor  # noqa: E402

import gpuadam.torch  # noqa: E402

ROWS = 7  # which two ranks share unevenly; of the single row of the last layer one of them has none
OPTIONS = {
    "float32": (torch.float32, {}),
    "amsgrad": (torch.float32, {"amsgrad": True}),
    "remainder": (torch.bfloat16, {"master": "remainder"}),
    "bfloat16 state": (torch.float32, {"state_dtype": "bfloat16"}),
}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, ROWS), torch.nn.Tanh(), torch.nn.Linear(ROWS, 1)).to(dtype)


def sharded(mesh, dtype=torch.float32):
    model = network(dtype)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def train(model, opt, steps=range(3)):
    for k in steps:
        opt.zero_grad()
        x = torch.linspace(-1, 1, 15, dtype=model[0].weight.dtype).reshape(3, 5) * (k + 1)
        model(x).square().mean().backward()
        opt.step()
    return model, opt


def whole(tensor):
    if not isinstance(tensor, DTensor):
        return tensor
    return (tensor.int() if tensor.dtype == torch.int16 else tensor).full_tensor()  # gloo gathers no 16-bit integers


def same(tensors, others):
    return all(torch.equal(whole(a), whole(b)) for a, b in zip(tensors, others, strict=True))


def states(opt):
    return [value for state in opt.state.values() for value in state.values()]


def error(call):
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def parameter(mesh, placement, grad_placement=None, **options):
    """Return a parameter of ones, with a gradient of ones, and its optimizer."""
    p = torch.nn.Parameter(DTensor.from_local(torch.ones(3, 4), mesh, [placement], run_check=False))
    p.grad = DTensor.from_local(torch.ones(3, 4), mesh, [grad_placement or placement], run_check=False)
    return p, gpuadam.torch.AdamW([p], lr=0.5, **options)


def findings(mesh, folder):
    """Yield (name, value) of what this rank finds."""
    for name, (dtype, options) in OPTIONS.items():
        model, opt = sharded(mesh, dtype), network(dtype)
        model, opt = train(model, gpuadam.torch.AdamW(model.parameters(), lr=0.1, **options))
        alone = network(dtype)
        alone, reference = train(alone, gpuadam.torch.AdamW(alone.parameters(), lr=0.1, **options))
        yield f"bits of one process: {name}", same(model.parameters(), alone.parameters())
        yield f"state of one process: {name}", same(states(opt), states(reference))

        saved = {"opt": get_optimizer_state_dict(model, opt)}
        torch.distributed.checkpoint.save(saved, checkpoint_id=f"{folder}/{name}")
        other = sharded(mesh, dtype)
        resumed = gpuadam.torch.AdamW(other.parameters(), lr=0.9, **options)
        into = {"opt": get_optimizer_state_dict(other, resumed)}
        torch.distributed.checkpoint.load(into, checkpoint_id=f"{folder}/{name}")
        set_optimizer_state_dict(other, resumed, into["opt"])
        with torch.no_grad():
            for p, q in zip(other.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        train(model, opt, range(3, 5))
        train(other, resumed, range(3, 5))
        yield f"resumed: {name}", same(model.parameters(), other.parameters()) and same(states(opt), states(resumed))

    model = sharded(mesh)
    model, opt = train(model, gpuadam.torch.AdamW(model.parameters(), lr=0.1))
    kinds = {(type(s["exp_avg"]) is DTensor, s["exp_avg"].placements == p.placements) for p, s in opt.state.items()}
    yield "state is distributed", kinds == {(True, True)}
    other = sharded(mesh)
    other, theirs = train(other, torch.optim.AdamW(other.parameters(), lr=0.1))
    differences = [
        (whole(p) - whole(q)).abs().max().item() for p, q in zip(model.parameters(), other.parameters(), strict=True)
    ]
    yield "as torch", max(differences) < 1e-6
    opt.load_state_dict(theirs.state_dict())
    yield "loaded from torch", same(states(opt), states(theirs))
    theirs.load_state_dict(opt.state_dict())
    yield "loaded by torch", same(states(opt), states(theirs))
    alone, reference = train(network(), gpuadam.torch.AdamW(network().parameters()), ())
    reference = gpuadam.torch.AdamW(alone.parameters())
    train(alone, reference)
    yield "plain state is refused", error(lambda: opt.load_state_dict(reference.state_dict()))
    yield "distributed state is refused", error(lambda: reference.load_state_dict(opt.state_dict()))

    p, opt = parameter(mesh, Partial())
    yield "a sum is refused", error(opt.step)
    p, opt = parameter(mesh, Replicate(), Partial())
    opt.step()
    q = torch.nn.Parameter(torch.ones(3, 4))
    q.grad, reference = torch.full((3, 4), 2.0), gpuadam.torch.AdamW([q], lr=0.5)
    reference.step()
    yield "a gradient that is a sum", same([p, *states(opt)], [q, *states(reference)])
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
    grad = torch.arange(24.0).reshape(4, 6)
    p.grad, q = distribute_tensor(grad, mesh, [Shard(0)]), torch.nn.Parameter(torch.ones(4, 6))
    q.grad = grad
    gpuadam.torch.AdamW([p, q], lr=0.5).step()
    yield "sharded by columns, the gradient by rows, beside a plain parameter", same([p], [q])
    p, opt = parameter(mesh, Shard(0), state_dtype="8bit")
    yield "8 bits are refused", error(opt.step)
    p, opt = parameter(mesh, Shard(0))
    opt.step()
    before = whole(p)
    opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].redistribute(mesh, [Replicate()])
    yield "state elsewhere is refused", error(opt.step)
    opt.state[p]["exp_avg"] = torch.zeros(3, 4)
    yield "state of one rank is refused", error(opt.step)
    yield "nothing was written", same([p], [before])
    loss = (p * p).sum()
    opt.state.clear()
    opt.step()
    yield "a stale backward pass", error(loss.backward)


def of_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = dict(findings(init_device_mesh("cpu", (2,)), folder))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks find."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(of_rank, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("what", ["bits of one process", "state of one process", "resumed"])
def test_parts_of_parameters_are_trained_and_saved_as_the_whole_is(found, what, name):
    assert [of_rank[f"{what}: {name}"] for of_rank in found] == [True, True]


HOLDS = (
    "state is distributed",
    "as torch",
    "loaded from torch",
    "loaded by torch",
    "a gradient that is a sum",
    "sharded by columns, the gradient by rows, beside a plain parameter",
    "nothing was written",
)


@pytest.mark.parametrize("what", HOLDS)
def test_it_holds_on_both_ranks(found, what):
    assert [of_rank[what] for of_rank in found] == [True, True]


REFUSED = {
    "a sum is refused": "ValueError: params['0'] has the placements (Partial(sum),): ranks hold summands",
    "8 bits are refused": "ValueError: params['0'] is a DTensor, which cannot have state_dtype='8bit'",
    "state elsewhere is refused": "ValueError: the state of params['0'] has the placements (Replicate(),), its parameter (Shard",
    "state of one rank is refused": "TypeError: params['0'] is a DTensor and its state a Tensor",
    "plain state is refused": "TypeError: the loaded exp_avg of params[0] is a Tensor and the parameter a DTensor",
    "distributed state is refused": "TypeError: the loaded exp_avg of params[0] is a DTensor and the parameter a Parameter",
    "a stale backward pass": "RuntimeError: one of the variables needed for gradient computation has been modified",
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_on_both_ranks(found, what):
    assert all(of_rank[what].startswith(REFUSED[what]) for of_rank in found), [of_rank[what] for of_rank in found]
