"""The examples: each runs in small and finds what it looks for, and the gradients written by hand are gradients."""

import os
import re
import subprocess
import sys
from pathlib import Path

import libraries
import numpy as np
import pytest

import gpuadam
from gpuadam.examples import __main__ as listing
from gpuadam.examples import (
    command_line,
    digits,
    gaussians,
    line_scan,
    photons,
    ptychography,
    thomson,
    tomography,
    torch_digits,
)

ROOT = Path(__file__).parent.parent
FOLDER = Path(listing.__file__).parent

libraries.imported("matplotlib", reason="matplotlib, with which the examples draw, is not installed")


def numbers(pattern, capsys):
    """Return the numbers of the one line that was printed and matches."""
    (found,) = re.findall(pattern, capsys.readouterr().out)
    return [float(x) for x in ([found] if isinstance(found, str) else found)]


def assert_png(path):
    assert path.read_bytes()[:4] == b"\x89PNG"


# the stand-in for a GPU executes what PTX says, and neither cuBLAS nor approximate functions
CUPYS_MATHEMATICS = pytest.mark.real_gpu("CuPy's matrix products, exponentials and sines are not executed on the host")


def on_each(*gpu, also=()):
    """Run a test with NumPy's arrays, and with those on a GPU where there is one."""
    return pytest.mark.parametrize(
        "arrays", ["numpy", *(pytest.param(name, marks=[pytest.mark.gpu, *also]) for name in gpu)]
    )


@on_each("cupy", also=[CUPYS_MATHEMATICS])
def test_digits_are_read(capsys, arrays):
    libraries.imported("sklearn")
    digits.main(["--steps", "4", "--size", "32", "--arrays", arrays])
    (right,) = numbers(r"of 360 digits held out, (\S+)% are read rightly", capsys)
    assert right > 85


@on_each("cupy", also=[CUPYS_MATHEMATICS])
def test_gaussians_that_are_split_come_nearer_to_the_photograph(tmp_path, capsys, arrays):
    libraries.imported("skimage")
    plot = tmp_path / "gaussians.png"
    gaussians.main(["--steps", "80", "--size", "32", "--count", "80", "--plot", str(plot), "--arrays", arrays])
    fixed, split = re.findall(r"80 Gaussians, \d+ of them at the start: PSNR (\S+) dB", capsys.readouterr().out)
    assert 22 < float(fixed) < float(split)
    assert_png(plot)


@on_each("cupy", also=[CUPYS_MATHEMATICS])
def test_tomography_beats_filtered_back_projection(tmp_path, capsys, arrays):
    libraries.imported("skimage")
    plot = tmp_path / "tomography.png"
    tomography.main(["--steps", "80", "--size", "48", "--angles", "16", "--plot", str(plot), "--arrays", arrays])
    classical, found = numbers(r"relative error (\S+)% by filtered back-projection, (\S+)% after 80 steps", capsys)
    assert found < 0.7 * classical < 50
    assert_png(plot)


@pytest.mark.exhaustive
@on_each("cupy", also=[CUPYS_MATHEMATICS])
def test_a_scan_is_sharper_if_rows_that_are_not_read_stay(tmp_path, capsys, arrays):
    libraries.imported("skimage")
    plot = tmp_path / "line_scan.png"
    line_scan.main(["--steps", "30", "--size", "64", "--plot", str(plot), "--arrays", arrays])
    errors = re.findall(r"learning rate \S+: error (\S+)% with where=, (\S+)% without", capsys.readouterr().out)
    rows, without = np.array(errors, float).T
    assert len(errors) == len(line_scan.RATES)
    assert rows.min() < 0.9 * without.min() and rows[-1] < 0.5 * without[-1]
    assert_png(plot)


@pytest.mark.exhaustive
@on_each("cupy", also=[CUPYS_MATHEMATICS])
def test_ptychography_beats_epie_at_as_many_passes(tmp_path, capsys, arrays):
    libraries.imported("skimage")
    plot = tmp_path / "ptychography.png"
    ptychography.main(["--steps", "35", "--size", "64", "--plot", str(plot), "--arrays", arrays])
    epie, adam = re.findall(r"36 patterns, 35 passes over them: error (\S+)% by", capsys.readouterr().out)
    assert float(adam) < 0.8 * float(epie) < 5
    assert_png(plot)


@on_each("cupy")
def test_a_photograph_of_few_photons_is_cleared_in_one_kernel_with_the_bits_of_two(tmp_path, capsys, arrays):
    libraries.imported("skimage")
    plot = tmp_path / "photons.png"
    photons.main(["--steps", "60", "--size", "48", "--smoothing", "2.0", "--plot", str(plot), "--arrays", arrays])
    said = r"PSNR (\S+) dB as counted, (\S+) dB after 60 steps\n.* in two; their bits differ in (\d+) pixels"
    before, after, differ = numbers(said, capsys)
    assert before < 15 and after > 17 and differ == 0
    assert_png(plot)


@on_each("numba")
def test_twelve_charges_become_an_icosahedron(tmp_path, capsys, arrays):
    libraries.imported("scipy")
    plot = tmp_path / "thomson.png"
    thomson.main(["--steps", "600", "--size", "12", "--plot", str(plot), "--arrays", arrays])
    energy, known = numbers(r"12 charges: energy (\S+); the least known is (\S+)", capsys)
    assert energy == known == 49.1653
    assert_png(plot)


def test_the_torch_example_learns_as_much_with_either_optimizer(capsys):
    libraries.imported("torch")
    pytest.importorskip("gpuadam.torch", reason="gpuadam.torch is not there")
    libraries.imported("sklearn")
    torch_digits.main(["--steps", "2", "--size", "32"])
    losses, right = zip(*re.findall(r"loss (\S+), (\S+)% of 360", capsys.readouterr().out), strict=True)
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-2)
    assert min(map(float, right)) > 50  # a tenth would be guessing


def test_without_a_gpu_the_numba_example_says_so_in_one_line_and_goes_on(tmp_path, capsys):
    if "numba-cuda" in gpuadam.available_backends():
        pytest.skip("Numba CUDA works here")
    thomson.main(["--steps", "1", "--size", "4", "--plot", str(tmp_path / "thomson.png")])
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("no GPU for Numba CUDA, so this is --arrays numpy: ")
    assert any(line.startswith("4 charges: energy") for line in others)


# Gradients by hand


def assert_is_gradient(f, x, gradient, directions=3, h=1e-5, rel=1e-6):
    """Compare a float64 gradient with differences of f along random directions; f is called with x + a step."""
    rng = np.random.default_rng(0)
    for _ in range(directions):
        d = rng.standard_normal(x.shape)
        along = (f(x + h * d) - f(x - h * d)) / (2 * h)
        assert along == pytest.approx((gradient * d).sum(), rel=rel, abs=1e-9)


@pytest.mark.parametrize("name", ["x", "y", "log_width_x", "log_width_y", "amplitude"])
def test_the_gradients_of_the_gaussians(name):
    rng = np.random.default_rng(1)
    target = rng.random((9, 9))
    p = {"x": rng.random(5), "y": rng.random(5), "amplitude": rng.standard_normal(5)}
    p |= {"log_width_x": rng.uniform(-2, -1, 5), "log_width_y": rng.uniform(-2, -1, 5)}
    _, grads = gaussians.loss_and_gradients(np, p, target)
    assert np.abs(grads[name]).min() > 1e-3
    assert_is_gradient(lambda x: gaussians.loss_and_gradients(np, p | {name: x}, target)[0], p[name], grads[name])


def test_the_picture_is_the_sum_of_the_gaussians():
    p = {"x": np.array([0.25, 0.6]), "y": np.array([0.5, 0.3]), "amplitude": np.array([2.0, -1.0])}
    p |= {"log_width_x": np.log([0.1, 0.2]), "log_width_y": np.log([0.3, 0.05])}
    at = (np.arange(10) + 0.5) / 10
    x, y = at[None, :], at[:, None]  # rows are y
    expected = 2 * np.exp(-(((x - 0.25) / 0.1) ** 2) / 2 - ((y - 0.5) / 0.3) ** 2 / 2)
    expected -= np.exp(-(((x - 0.6) / 0.2) ** 2) / 2 - ((y - 0.3) / 0.05) ** 2 / 2)
    np.testing.assert_allclose(gaussians.picture(np, p, 10), expected, rtol=1e-12, atol=1e-15)


@pytest.fixture
def few_gaussians():
    """Return parameters of 6 Gaussians on a picture of 20 x 20 pixels, one of them faint."""
    rng = np.random.default_rng(8)
    p = {name: rng.uniform(*limits, 6) for name, limits in {"x": (0.3, 0.7), "y": (0.3, 0.7), "amplitude": (0.5, 1)}.items()}
    p |= {"log_width_x": rng.uniform(-3, -2, 6), "log_width_y": rng.uniform(-3, -2, 6)}
    p["amplitude"][2] = 0.01
    return p, rng.random((20, 20))


def test_what_pulls_a_gaussian_is_added_up_without_cancelling(few_gaussians):
    p, target = few_gaussians
    _, grads = gaussians.loss_and_gradients(np, p, target, absolute=True)
    x, y = (np.arange(20) + 0.5) / 20, (np.arange(20)[:, None] + 0.5) / 20
    residual = gaussians.picture(np, p, 20) - target
    for k in range(6):
        dx, dy = (x - p["x"][k]) * np.exp(-p["log_width_x"][k]), (y - p["y"][k]) * np.exp(-p["log_width_y"][k])
        bell = p["amplitude"][k] * np.exp(-(dx**2 + dy**2) / 2)
        assert grads["x"][k] == pytest.approx(np.abs(residual * bell * dx).sum() * np.exp(-p["log_width_x"][k]))
        assert grads["y"][k] == pytest.approx(np.abs(residual * bell * dy).sum() * np.exp(-p["log_width_y"][k]))


def test_halves_have_the_integral_the_centre_and_the_variance_of_the_gaussian_that_was_split(few_gaussians):
    old, target = few_gaussians
    new, rows = gaussians.split_and_prune(np, old, target, 8)
    # of 5 that are bright 2 stay whole and 3 are split; the faint one is pruned
    assert set(rows[:2]) < {0, 1, 3, 4, 5} and list(rows[2:]) == [-1] * 6
    for name, param in new.items():
        np.testing.assert_array_equal(param[:2], old[name][rows[:2]])

    def moments(p, which):  # of each axis: integral, first and second moment, of all Gaussians
        integral = (p["amplitude"] * 2 * np.pi * np.exp(p["log_width_x"] + p["log_width_y"]))[which]
        centres = np.stack([p["x"], p["y"]])[:, which]
        variances = np.exp(2 * np.stack([p["log_width_x"], p["log_width_y"]]))[:, which]
        return integral.sum(), (integral * centres).sum(axis=1), (integral * (variances + centres**2)).sum(axis=1)

    split = [k for k in range(6) if k != 2 and k not in rows]
    for halves, whole in zip(moments(new, slice(2, 8)), moments(old, split), strict=True):
        np.testing.assert_allclose(halves, whole, rtol=1e-6)


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2"])
def test_the_gradients_of_the_digits(name):
    rng = np.random.default_rng(2)
    p = {n: a + 0.1 for n, a in digits.initial_parameters(6).items()}
    x, y = rng.random((7, 64)), rng.integers(0, 10, 7)
    _, grads = digits.loss_and_gradients(np, p, x, y)
    assert_is_gradient(lambda w: digits.loss_and_gradients(np, p | {name: w}, x, y)[0], p[name], grads[name])


def test_back_projection_is_the_transpose_of_projection():
    rays, rng = tomography.Rays(np, 17, 11), np.random.default_rng(3)
    image, readings = rng.standard_normal((17, 17)), rng.standard_normal((11, rays.bins))
    one, other = (rays.project(image) * readings).sum(), (image * rays.back_project(readings)).sum()
    # shares and readings are rounded to float32
    assert one == pytest.approx(other, abs=1e-6 * np.abs(rays.project(image) * readings).sum())


def test_a_projection_along_an_axis_adds_up_rows_or_columns():
    rays, image = tomography.Rays(np, 16, 2), np.random.default_rng(4).random((16, 16))
    columns, rows = rays.project(image)
    for readings, sums in ((columns, image.sum(axis=0)), (rows, image.sum(axis=1))):
        # the middle of the slice is the middle of the bins: half a bin may be off
        first = (rays.bins - 1) / 2 - 7.5
        expected = np.zeros(rays.bins)
        share = first % 1
        for k, total in enumerate(sums):
            expected[int(first) + k] += (1 - share) * total
            expected[int(first) + k + 1] += share * total
        np.testing.assert_allclose(readings, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_the_total_variation():
    image = np.random.default_rng(5).random((8, 9))
    _, gradient = tomography.total_variation(np, image)
    assert_is_gradient(lambda x: tomography.total_variation(np, x)[0], image, gradient)


def test_the_optics_of_a_scan_keep_the_brightness():
    blur = line_scan.optics(np, 10)
    assert blur.shape == (10, 10 + 2 * line_scan.REACH)
    np.testing.assert_allclose(blur.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(blur[3, 3 : 4 + 2 * line_scan.REACH], blur[0, : 1 + 2 * line_scan.REACH])


@pytest.mark.parametrize("name", ["object", "beam"])
def test_the_gradients_of_the_diffraction_patterns(name):
    rng = np.random.default_rng(9)
    patches = [(slice(y, y + 5), slice(x, x + 5)) for y, x in ((0, 0), (2, 3), (3, 1))]
    waves = {"object": rng.standard_normal((8, 8, 2)) @ [1, 1j], "beam": rng.standard_normal((5, 5, 2)) @ [1, 1j]}
    amplitudes = rng.random((3, 5, 5))

    def loss_and_gradients(of_name):
        found, beam = (waves | {name: of_name}).values()
        return ptychography.loss_and_gradients(np, found, beam, amplitudes, patches)

    gradient = loss_and_gradients(waves[name])[1][name]
    for real, unit in ((gradient.real, 1), (gradient.imag, 1j)):
        assert_is_gradient(lambda d, unit=unit: loss_and_gradients(waves[name] + unit * d)[0], np.zeros(real.shape), real)


def test_patterns_do_not_show_what_the_error_leaves_out():
    """A factor, and a phase ramp in the object that goes against one in the beam."""
    rng = np.random.default_rng(10)
    truth = (1 + 0.3 * rng.standard_normal((64, 64))) * np.exp(0.5j * rng.random((64, 64)))
    y, x = np.mgrid[:64, :64]
    factor, ramp = 0.3 - 0.7j, np.exp(1j * (0.02 * x - 0.03 * y))
    beam, patch = ptychography.focused(np, 10), (slice(7, 39), slice(20, 52))
    pattern = abs(np.fft.fft2(beam * truth[patch]))
    other = abs(np.fft.fft2(beam / factor / ramp[:32, :32] * (factor * ramp * truth)[patch]))
    np.testing.assert_allclose(other, pattern, rtol=1e-5)
    sought = truth[ptychography.INNER]
    assert ptychography.error(factor * ramp * truth, sought)[0] < 1e-3
    assert ptychography.error(truth + 0.1 * abs(truth) * rng.choice([-1, 1], truth.shape), sought)[0] > 0.05


def test_the_gradient_of_the_photons():
    rng, size, smoothing = np.random.default_rng(7), 8, 3.0
    image, counted = rng.uniform(0.2, 1, (2, size, size)).astype("f4")
    gradient = np.empty_like(image)
    photons.on_cpu(gpuadam.Rule("float32"), smoothing, size)[1](image, counted, gradient)

    def loss(image):
        differences = [np.diff(image, axis=axis) for axis in (0, 1)]
        lengths = sum(np.sqrt(x * x + photons.FAINT).sum() for x in differences)
        return (photons.WHITE * image - counted * np.log(image)).sum() + smoothing * lengths

    # float32: some roundings of terms up to WHITE in each element
    assert_is_gradient(loss, image.astype("f8"), gradient, rel=1e-5)


@pytest.fixture(scope="module")
def charges():
    """Return the compiled loop over the charges, places of 37, and what the loop finds for them in float32."""
    loop = thomson.gradient_loop()
    points = np.random.default_rng(6).standard_normal((37, 3)).astype("f4")
    gradient, energies = np.empty_like(points), np.empty(37, "f4")
    loop(points, gradient, energies)
    return loop, points, gradient, energies


def test_the_gradient_of_the_charges(charges):
    _, points, gradient, energies = charges

    def energy(points):
        on_sphere = points / np.linalg.norm(points, axis=1, keepdims=True)
        distances = np.linalg.norm(on_sphere[:, None] - on_sphere, axis=2)
        return (1 / distances[np.triu_indices(len(points), 1)]).sum()

    points = points.astype("f8")
    assert energies.sum() / 2 == pytest.approx(energy(points), rel=1e-6)
    differences = np.empty_like(points)
    for k in np.ndindex(*points.shape):
        h = np.zeros_like(points)
        h[k] = 1e-6
        differences[k] = (energy(points + h) - energy(points - h)) / 2e-6
    # float32: rounding of the 36 terms of each, the largest of which is near its length
    np.testing.assert_allclose(gradient, differences, rtol=1e-4, atol=1e-5 * np.abs(differences).max())


def test_the_cuda_kernel_computes_what_the_loop_does(charges):
    """The PTX that NVVM makes of it is executed on the host."""
    gpu_code = pytest.importorskip("gpu_code")
    from numba import types
    from ptx import Kernel

    _, points, expected, expected_energies = charges
    matrix, vector = (types.Array(types.float32, ndim, "C") for ndim in (2, 1))
    text = gpu_code.compile_numba(thomson.gradient_kernel(gpu_code.cuda), (matrix, matrix, vector), "sm_90")
    assert not re.search(r"\b(fma|add|sub|mul|div|rcp|sqrt|cvt)\.\S*f64\b", text)
    # ptxas may still fuse these; the comparison has a tolerance, and the runner wants them rounded
    kernel = Kernel(re.sub(r"\b(add|sub|mul)\.f32", r"\1.rn.f32", text))
    gradient, energies = np.zeros_like(points), np.zeros(len(points), "f4")
    arrays = points, gradient, energies
    described = [(0, 0, a.size, a.itemsize, a.ctypes.data, *a.shape, *a.strides) for a in arrays]
    kernel.run(2, 32, gpu_code.packed(kernel, *described), gpu_code.memory_of(arrays))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(energies, expected_energies, rtol=1e-5)


# What the examples share


def test_all_examples_are_listed_with_a_line_each():
    done = subprocess.run(
        [sys.executable, "-m", "gpuadam.examples"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^(\w+)  +[A-Z].*\.$", done.stdout, re.M)
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "__main__", "command_line"}
    assert set(listed) == files and len(listed) == len(files)


def test_an_example_is_run_by_its_name():
    done = subprocess.run(
        [sys.executable, "-m", "gpuadam.examples", "thomson", "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m gpuadam.examples thomson "), done.stderr


def test_an_example_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpuadam.examples", "digit"])
    code, error = ended(listing.main, capsys)
    assert code == 2 and error.startswith("there is no example 'digit', only digits, gaussians")


def test_the_examples_are_listed_without_docstrings_too():
    listed = subprocess.run(
        [sys.executable, "-OO", "-m", "gpuadam.examples"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert listed.returncode == 0 and set(listing.NAMES) <= set(listed.stdout.splitlines()), listed.stderr


@pytest.mark.parametrize("name", listing.NAMES)
def test_an_example_is_short(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 120


def test_all_that_the_examples_take_of_an_array_module_is_in_cupy():
    cupy = libraries.imported("cupy")
    texts = [
        (FOLDER / f"{name}.py").read_text() for name in ("digits", "gaussians", "tomography", "line_scan", "ptychography")
    ]
    used = {name for text in texts for name in re.findall(r"\bxp\.((?!fft)\w+)", text)}
    fft = {name for text in texts for name in re.findall(r"\bfft\.(\w+)", text)}
    assert {"exp", "bincount", "maximum"} <= used and "irfft" in fft
    assert [name for name in used if not hasattr(cupy, name)] == []
    assert [name for name in fft if not hasattr(cupy.fft, name)] == []


@pytest.mark.exhaustive
def test_ranks_go_on_where_another_number_of_them_was(tmp_path):
    said = []
    for ranks in ("2", "3"):
        command = [
            libraries.mpiexec(),
            "-n",
            ranks,
            sys.executable,
            "-m",
            "mpi4py",
            "-m",
            "gpuadam.examples.sharded_digits",
            "--steps",
            "25",
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
    assert "ranks: 2, steps before: 0" in said[0] and "ranks: 3, steps before: 25" in said[1]
    assert float(re.search(r"([\d.]+)% are read rightly after 50 steps", said[1])[1]) > 93


def ended(main, capsys):
    """Run an example as the command does; return its exit status and what it said of an error."""
    with pytest.raises(SystemExit) as end:
        command_line.run(main)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "example, missing, said",
    [
        (digits, "sklearn", 'scikit-learn is not installed: pip install "gpuadam[demo]"\n'),
        (gaussians, "matplotlib", 'matplotlib is not installed: pip install "gpuadam[examples]"\n'),
        (gaussians, "skimage", 'scikit-image is not installed: pip install "gpuadam[examples]"\n'),
    ],
)
def test_a_missing_extra_is_explained(monkeypatch, capsys, tmp_path, example, missing, said):
    for module in [m for m in sys.modules if m.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    code, error = ended(lambda: example.main(["--steps", "1", "--size", "8"]), capsys)
    assert code == 2 and error.endswith(said) and error.count("\n") == 1


@pytest.mark.parametrize("example, arrays", [(digits, "cupy"), (tomography, "cupy"), (photons, "cupy"), (thomson, "numba")])
def test_a_gpu_that_is_asked_for_and_not_there_is_explained(capsys, tmp_path, example, arrays):
    backend = {"cupy": "cupy", "numba": "numba-cuda"}[arrays]
    if backend in gpuadam.available_backends():
        pytest.skip(f"{backend} works here")
    code, error = ended(lambda: example.main(["--arrays", arrays]), capsys)
    assert code == 2 and error.startswith(f"backend {backend!r} is not available") and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--steps", "0"], "'0' is not a whole number from 1"),
        (["--steps", "1.5"], "'1.5' is not a whole number from 1"),
        (["--size", "3"], "'3' is not a whole number from 4"),
        (["--arrays", "torch"], "invalid choice"),
        (["--plot", "no/such/folder/x.png"], "there is no folder 'no/such/folder'"),
    ],
)
def test_wrong_arguments_are_explained_before_any_work(capsys, arguments, said):
    code, error = ended(lambda: thomson.main(arguments), capsys)
    assert code == 2 and said in error


@pytest.mark.parametrize("example", [gaussians, tomography, line_scan, ptychography, photons, thomson])
@pytest.mark.parametrize("arguments", [[], ["--plot", "x" * 300], ["--plot", "far"]])
def test_a_picture_that_cannot_be_written_is_named_before_any_work(capsys, tmp_path, monkeypatch, example, arguments):
    monkeypatch.chdir(tmp_path)
    Path("far").symlink_to("/no/such/file")
    Path(f"{example.__name__.rpartition('.')[2]}.png").symlink_to("/no/such/file")  # the default name
    code, error = ended(lambda: example.main(arguments), capsys)
    assert code == 2 and " cannot be written: " in error


def test_a_missing_torch_is_explained(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, error = ended(lambda: torch_digits.main([]), capsys)
    assert (code, error) == (2, 'torch is not installed: pip install "gpuadam[torch]"\n')
