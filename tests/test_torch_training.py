"""`gpuadam.torch` beside `torch.optim`: the same training."""

import io

import libraries
import pytest

torch = libraries.imported("torch", reason="torch is not installed")

from torch_steps import PAIRS, replay  # noqa: E402

import gpuadam  # noqa: E402
import gpuadam.torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def digits():
    """Handwritten digits: (images, labels) to train with, (images, labels) to test with."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.Tanh(), torch.nn.Linear(24, 10))


def batches(images, labels, n):
    for k in range(n):
        at = torch.arange(100 * k, 100 * k + 100) % len(labels)
        yield images[at], labels[at]


def backward(model, images, labels):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss


@pytest.fixture(scope="module")
def recorded(digits):
    """The gradients of 1,000 steps of a training with torch.optim.Adam."""
    model = network()
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    grads = []
    for images, labels in batches(*digits[0], 1000):
        opt.zero_grad()
        backward(model, images, labels)
        grads.append([p.grad.clone() for p in model.parameters()])
        opt.step()
    return grads


SETTINGS = [
    ("Adam", {"lr": 1e-3}),
    ("Adam", {"lr": torch.tensor(1e-3), "weight_decay": 0.1, "amsgrad": True, "betas": (0.8, 0.99), "eps": 1e-6}),
    ("Adam", {"lr": 1e-2, "maximize": True}),
    ("AdamW", {"lr": 1e-3}),
]


@pytest.mark.parametrize("name, settings", SETTINGS, ids=[f"{name}: {', '.join(options)}" for name, options in SETTINGS])
def test_a_thousand_steps_over_recorded_gradients_agree_with_torch(name, settings, recorded):
    mine, reference = PAIRS[name]
    ours, theirs = list(network().parameters()), list(network().parameters())
    replay(mine(ours, **settings), ours, recorded)
    replay(reference(theirs, **settings, foreach=False), theirs, recorded)
    lr = float(settings["lr"])
    atol = 2e-6 if lr <= 1e-3 + 1e-9 else 2e-3 * lr  # both round at each step
    # AdamW of torch multiplies by 1 - lr * weight_decay, which float32 rounds the same way at each step
    rtol = 1000 * 2**-25 if name == "AdamW" else 0
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


def test_a_thousand_steps_with_decoupled_decay_agree_with_torch_in_float64(recorded):
    ours, theirs = list(network().parameters()), list(network().double().parameters())
    replay(gpuadam.torch.AdamW(ours), ours, recorded)
    replay(torch.optim.AdamW(theirs, foreach=False), theirs, [[g.double() for g in given] for given in recorded])
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=0, atol=5e-6)  # float32's rounding of v and of param


def test_each_trained_by_itself_is_as_accurate_as_with_torch(pair, digits):
    images, labels = digits[1]
    right = []
    for make in pair:
        model = network()
        opt = make(model.parameters(), lr=5e-3)
        for batch in batches(*digits[0], 300):
            opt.zero_grad()
            backward(model, *batch)
            opt.step()
        right.append(int((model(images).argmax(1) == labels).sum()))
    assert right[0] > 0.93 * len(labels)
    assert abs(right[0] - right[1]) <= 2  # images of 397: those that lie on the edge


OPTIONS = {
    "plain": ({}, torch.float32),
    "8bit": ({"state_dtype": "8bit"}, torch.float32),
    "remainder": ({"master": "remainder"}, torch.bfloat16),
    "stochastic rounding": ({"stochastic_rounding": True, "seed": 3}, torch.bfloat16),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resume_in_the_middle_changes_no_bit(name, recorded):
    options, dtype = OPTIONS[name]
    grads = [[g.to(dtype) for g in given] for given in recorded[:20]]

    def made(lr):
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in network().parameters()]
        return params, gpuadam.torch.AdamW(params, lr=lr, **options)

    params, opt = made(1e-2)
    replay(opt, params, grads[:10])
    file = io.BytesIO()
    torch.save([opt.state_dict(), params], file)
    replay(opt, params, grads[10:])
    file.seek(0)
    saved, saved_params = torch.load(file, weights_only=True)
    others, resumed = made(0.5)
    with torch.no_grad():
        for p, q in zip(others, saved_params, strict=True):
            p.copy_(q)
    resumed.load_state_dict(saved)
    replay(resumed, others, grads[10:])
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert opt.state[p].keys() == resumed.state[q].keys()
        assert all(torch.equal(opt.state[p][key], resumed.state[q][key]) for key in opt.state[p])


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}])
def test_the_bits_are_those_of_gpuadams_own_optimizers(options):
    for one, other in ((gpuadam.torch.Adam, gpuadam.Adam), (gpuadam.torch.AdamW, gpuadam.AdamW)):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 300)]
        arrays = [p.detach().numpy().copy() for p in params]
        opt, reference = one(params, lr=0.1, **options), other(arrays, lr=0.1, **options)
        for step in range(1, 5):
            replay(opt, params, [[torch.cos(step * p.detach()) for p in params]])
            reference.step([p.grad.numpy() for p in params])
        assert all((p.detach().numpy() == a).all() for p, a in zip(params, arrays, strict=True))
