"""The pytest plugin of gpuadam: the fixture `gpuadam_backend` runs a test once for each backend. `gpuadam.testing` is its manual.

It is a module of its own because pytest imports every installed plugin in every run: here that imports neither gpuadam nor NumPy,
whose environment variables a conftest.py may still want to set.
"""

import collections
import itertools

import pytest

FIXTURE, OPTION, MARKER = "gpuadam_backend", "--gpuadam-backends", "gpuadam_backends"


def pytest_addoption(parser):
    parser.getgroup("gpuadam").addoption(
        OPTION,
        metavar="NAME,NAME",
        help=f"the backends that tests with the fixture {FIXTURE} run on: cupy, numba-cuda, numba-cpu; by default all. "
        "With the environment variable GPUADAM_REQUIRE_GPU=1 tests fail where a GPU backend is not available, and do not skip",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", f"{MARKER}(*names): the backends that a test with the fixture {FIXTURE} is for")
    if config.getoption(OPTION) is not None:
        names, gpu = _chosen(config), [name for name, backend in _backends().items() if backend.memory == "CUDA"]
        if _requires_gpu() and not set(names) & set(gpu):
            raise pytest.UsageError(
                f"GPUADAM_REQUIRE_GPU=1, but {OPTION}={config.getoption(OPTION)} has no GPU backend: add {' or '.join(gpu)}"
            )


def pytest_report_header(config):
    if config.getoption(OPTION) is not None:
        return f"gpuadam: on {', '.join(_chosen(config))}, as {OPTION} says"
    return None


def pytest_generate_tests(metafunc):
    if FIXTURE in metafunc.fixturenames:
        names = _chosen(metafunc.config)
        marker = metafunc.definition.get_closest_marker(MARKER)
        if marker:
            # an error that pytest shows without its own code
            error = pytest.Collector.CollectError
            _known(marker.args, f"the marker {MARKER} of {metafunc.definition.nodeid}", error)
            names = [name for name in names if name in marker.args]
        metafunc.parametrize(FIXTURE, names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def gpuadam_backend(request):
    """Each backend in turn, a `gpuadam.testing.ArrayBackend`: its name, and arrays in its memory.

    Where a backend is not available the test skips with the reason, or fails if GPUADAM_REQUIRE_GPU=1.
    """
    from gpuadam import testing

    return testing.array_backend(request.param)


def pytest_runtest_setup(item):
    name = item.callspec.params.get(FIXTURE) if hasattr(item, "callspec") else None
    if name is not None:
        from gpuadam import backends, testing

        status = backends.backend_status()[name]
        # which reports have, and which pytest-xdist sends on with them
        item.user_properties.append((FIXTURE, [name, "" if status.available else status.reason]))
        testing.require_backends(name)


def pytest_terminal_summary(terminalreporter):
    # {what is said: the tests of which it is}; a test has several reports if it has subtests, or is run again
    ran: dict[str, set[str]] = collections.defaultdict(set)
    left_out: dict[str, set[str]] = collections.defaultdict(set)
    for report in itertools.chain(*terminalreporter.stats.values()):
        for name, why_not in _used(report):
            if why_not and report.when == "setup":
                left_out[f"{report.outcome} for want of {name} ({why_not})"].add(report.nodeid)
            elif report.when == "call":
                ran[f"ran on {name}"].add(report.nodeid)
    parts = [f"{len(nodeids)} {said}" for said, nodeids in (ran | left_out).items()]
    if parts:
        terminalreporter.write_line(f"gpuadam: {'; '.join(parts)}")


def _used(report):
    """Yield the backend of a report, and why it is not available. The properties of others may be anything."""
    for each in getattr(report, "user_properties", None) or ():
        match each:
            case str() as key, [str() as name, str() as why_not] if key == FIXTURE:
                yield name, why_not


def _requires_gpu():
    from gpuadam.kernels import switches

    try:
        return switches.is_on("GPUADAM_REQUIRE_GPU")
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def _backends():
    from gpuadam.backends import BACKENDS

    return BACKENDS


def _chosen(config):
    listed = config.getoption(OPTION)
    names = list(_backends()) if listed is None else [name.strip() for name in listed.split(",")]
    _known(names, OPTION)
    return list(dict.fromkeys(names))


def _known(names, source, error=pytest.UsageError):
    strange = [name for name in names if not isinstance(name, str) or name not in _backends()]
    if strange or not names:
        wrong = f"there is no backend {strange[:1] or names!r}, only {', '.join(_backends())}"
        raise error(f"{source}: {wrong}: give one or more of these names")
