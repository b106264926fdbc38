"""`python -m gpuadam plan` and the model behind it: cases worked out by hand, what must hold of all, exactness, the command."""

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gpuadam
from gpuadam import backends, hyperparameters, planning, transports
from gpuadam.__main__ import main
from gpuadam.cli import output
from gpuadam.cli.measuring import measure
from gpuadam.kernels import storage
from gpuadam.kernels.storage import Arrays, operands
from gpuadam.planning import CELL, Settings, Way, best, machines, plan, predict
from gpuadam.planning import model as performance_model
from gpuadam.planning.machines import MACHINES, Link, Processor
from gpuadam.planning.model import Ranks, collective_seconds, kernel_seconds, update

ROOT = Path(__file__).parent.parent
H100 = MACHINES["h100"]
# Round figures, to be followed by hand: 1 TB/s of memory; rings of 100 GB/s and 10 GB/s, PCIe of 50 GB/s, without latencies.
ROUND = H100._replace(
    device=Processor(1e12),
    within=Link(100e9),
    across=Link(10e9),
    pcie=Link(50e9),
    host=Processor(400e9),
    disk_read=40e9,
    disk_write=20e9,
)
IN_MEMORY, SHARDED = Way(False, "device"), Way(True, "device")
TRILLIONS = 10**13


# Bytes


@pytest.mark.parametrize(
    "options, by_role",
    [
        ({}, {"parameters": 4, "gradients": 4, "moments": 8}),
        ({"param": "float64"}, {"parameters": 8, "gradients": 8, "moments": 16}),
        ({"param": "bfloat16", "state": "bfloat16"}, {"parameters": 2, "gradients": 2, "moments": 4}),
        ({"param": "bfloat16", "master": "remainder"}, {"parameters": 2, "gradients": 2, "moments": 8, "masters": 2}),
        ({"param": "bfloat16", "master": "float32"}, {"parameters": 2, "gradients": 2, "moments": 8, "masters": 4}),
        ({"amsgrad": True, "ema": True}, {"parameters": 4, "gradients": 4, "moments": 12, "mean": 4}),
        ({"state": "8bit"}, {"parameters": 4, "gradients": 4, "moments": 2.25}),
    ],
)
def test_bytes_of_a_device_are_exact_at_ten_trillion(options, by_role):
    found = predict(IN_MEMORY, update(TRILLIONS, **options), H100, Settings()).bytes
    assert found == dict.fromkeys(performance_model.ROLES, 0) | {
        role: int(4 * each) * TRILLIONS // 4 for role, each in by_role.items()
    }
    odd = predict(IN_MEMORY, update(TRILLIONS + 1, **options), H100, Settings()).bytes
    scales = 2 * 4 if options.get("state") == "8bit" else 0  # of the group that the last element begins
    assert odd["moments"] - found["moments"] == int(by_role["moments"]) + scales
    assert odd["gradients"] - found["gradients"] == by_role["gradients"]


def test_bytes_are_those_of_the_kernels_operands():
    for arrays in (Arrays(), Arrays(state="8bit"), Arrays("bfloat16", "bfloat16", remainder=True, ema="float32")):
        h = hyperparameters.checked(1e-3, (0.9, 0.999), 1e-8, 0.0, False, False)
        form, _ = hyperparameters.form_and_scalars(h, 1, arrays)
        assert performance_model.bytes_moved_of(operands(arrays), 32_000) == 32_000 * storage.bytes_moved(form)


def test_a_sharded_device_has_its_share_of_the_state_in_whole_cells():
    n, world = 10 * CELL + 5, 4  # 11 cells: 3 each, and one that nobody uses
    found = predict(SHARDED, update(n), H100, Settings(world))
    own, whole = 3 * CELL, 12 * CELL
    assert found.bytes["moments"] == 8 * own
    assert found.bytes["parameters"] == found.bytes["gradients"] == 4 * whole
    assert found.bytes["buffers"] == 4 * own  # the sums of gradients


def test_narrow_gradients_are_summed_in_a_float32_buffer():
    n = 8 * CELL
    found = predict(SHARDED, update(n, "bfloat16", master="remainder"), H100, Settings(8))
    assert found.bytes["gradients"] == 2 * n and found.bytes["buffers"] == 4 * n + 4 * CELL


FEW_ELEMENTS = [5000, 3, 33, 4097, *[5] * 40, *[1] * 60]  # whose groups and places in files are rounded up, each by itself


def made(options):
    """Return what an optimizer is made and stepped with: params, grads and options, and the update of a plan."""
    dtypes = [performance_model.update(1, **options).arrays._asdict()[key] for key in ("param", "grad")]
    params, grads = ({str(k): np.zeros(n, dtype) for k, n in enumerate(FEW_ELEMENTS)} for dtype in dtypes)
    own = {
        "state_dtype": options.get("state"),
        "amsgrad": "amsgrad" in options,
        "ema_decay": 0.9 if "ema" in options else None,
    }
    return params, grads, own, update(FEW_ELEMENTS, **options)


OF_OPTIMIZERS = [{}, {"state": "8bit", "ema": True}, {"param": "float64", "grad": "float32", "amsgrad": True}]


@pytest.mark.parametrize("options", OF_OPTIMIZERS)
def test_bytes_are_those_that_optimizers_hold(options, tmp_path):
    params, grads, own, planned = made(options)
    opt = gpuadam.Adam(params, **own)
    held = sum(array.nbytes for state in opt.state.values() for key, array in state.items() if key != "step")
    found = predict(IN_MEMORY, planned, H100, Settings()).bytes
    assert found["moments"] + found["mean"] == held
    assert found["parameters"] == sum(p.nbytes for p in params.values())
    assert found["gradients"] == sum(g.nbytes for g in grads.values())
    gpuadam.OffloadAdam(params, state=tmp_path, **own).close()
    files = [path.stat().st_size for path in tmp_path.iterdir() if path.name not in ("lock", "state.json", "steps.json")]
    assert predict(Way(False, "files"), planned, H100, Settings()).file_bytes == sum(files)
    assert predict(Way(False, "host"), planned, H100, Settings()).host_bytes == sum(files)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("options", OF_OPTIMIZERS)
def test_bytes_of_ranks_are_no_more_than_planned(options, world):
    from gpuadam.options import Options
    from gpuadam.sharded.adam import ShardAdam
    from gpuadam.sharded.buffer import Buffer, Member

    params, _, own, planned = made(options)
    kernels, views = backends.choose([*params.items()])
    amsgrad = own.pop("amsgrad")
    make = functools.partial(ShardAdam, options=Options(**own), lr=0.1, amsgrad=amsgrad)
    found = predict(SHARDED, planned, H100, Settings(world)).bytes
    held = []
    for rank in range(world):
        transport = SimpleNamespace(size=world, rank=rank)
        members = [Member(k, 0, name, view) for k, (name, view) in enumerate(zip(params, views, strict=True))]
        buffer = Buffer(kernels, members, transport, 1 << 25, make)
        assert buffer.param.nbytes == found["parameters"]
        states = [state for bucket in buffer.buckets if bucket.optimizer for state in bucket.optimizer.state.values()]
        held.append(sum(array.nbytes for state in states for key, array in state.items() if key != "step"))
    assert max(held) <= found["moments"] + found["mean"]


def test_what_sharded_adam_refuses_is_made_by_no_class():
    params, grads = np.zeros(5, "float32"), np.zeros(5, "float64")
    with pytest.raises(TypeError, match="float64"):
        gpuadam.ShardedAdam(params, transports.Local()).step(grads)
    assert SHARDED.made_by(update(5, grad="float64")) == "" and SHARDED.made_by(update(5)) == "gpuadam.ShardedAdam"
    assert SHARDED.made_by(update(5, "float64", grad="float64")) == "gpuadam.ShardedAdam"


def test_ten_trillion_on_a_hundred_thousand_gpus_add_up():
    found = predict(SHARDED, update(TRILLIONS, "bfloat16", master="remainder"), H100, Settings(100_000, model_parallel=1000))
    cells = -(-(10**10) // CELL)  # of a piece, over 100 ranks
    assert found.bytes["moments"] == 8 * -(-cells // 100) * CELL
    assert found.bytes["masters"] == 2 * -(-cells // 100) * CELL
    assert found.device_bytes == sum(found.bytes.values()) and all(type(b) is int for b in found.bytes.values())


def test_offloaded_state_is_in_the_node_and_the_budget_in_the_device():
    settings = Settings(8, budget=10**9)
    state = 8 * (8 * 10**9)  # m and v, of eight devices that all have all of it
    host, files = (predict(Way(False, where), update(10**9), H100, settings) for where in ("host", "files"))
    assert (host.host_bytes, host.file_bytes) == (state, 0) and host.bytes["buffers"] == 10**9
    assert (files.host_bytes, files.file_bytes) == (8 * 10**9, state)
    assert host.bytes["moments"] == 0 and host.device_bytes == 8 * 10**9 + 10**9


def test_what_does_not_fit_says_where_and_how_much():
    found = predict(IN_MEMORY, update(10 * 10**9), H100, Settings(reserve=10**9))
    assert not found.fits and found.short == {"device": 160 * 10**9 - 79 * 10**9}
    found = predict(Way(False, "host"), update(300 * 10**9, "bfloat16"), H100, Settings(8))
    assert set(found.short) == {"device", "host"} and found.short["host"] == 8 * 8 * 300 * 10**9 - 2000 * 10**9


# Seconds


def test_a_kernel_takes_the_slower_of_bytes_and_elements():
    arrays = Arrays(state="bfloat16")  # 20 bytes
    seconds = [
        kernel_seconds(arrays, operands(arrays), 10**9, Processor(1e12, rates={arrays: rate})) for rate in (1e12, 1e10)
    ]
    assert seconds == pytest.approx([0.02, 0.1])


def test_what_stays_in_the_caches_is_bound_by_elements_alone():
    arrays = Arrays()
    processor = Processor(1e9, launch=1e-6, rates={arrays: 1e9}, cache=16_000)
    assert kernel_seconds(arrays, operands(arrays), 1000, processor) == pytest.approx(2e-6)
    assert kernel_seconds(arrays, operands(arrays), 1001, processor) == pytest.approx(1e-6 + 28_028e-9)


def test_a_ring_takes_the_bus_bandwidth_of_nccl():
    assert collective_seconds(8 * 10**9, Ranks(8, 1), ROUND) == pytest.approx(7 / 8 * 8e9 / 100e9)
    slow = ROUND._replace(within=Link(100e9, 1e-3))
    assert collective_seconds(0, Ranks(8, 1), slow, calls=5) == pytest.approx(5 * 7e-3)
    assert collective_seconds(0, Ranks(8, 1), slow, "halving") == pytest.approx(3e-3)


def test_over_nodes_only_a_devices_share_crosses():
    expected = 7 / 8 * 80e9 / 100e9 + 3 / 4 * 10e9 / 10e9
    assert collective_seconds(80 * 10**9, Ranks(8, 4), ROUND) == pytest.approx(expected)


def test_a_replicated_step_all_reduces_its_gradients_first():
    found = predict(IN_MEMORY, update(10**9), ROUND, Settings(8))
    assert found.stages == pytest.approx({"all-reduce": 2 * 7 / 8 * 4e9 / 100e9, "update": 0.028})
    assert found.seconds == pytest.approx(0.07 + 0.028)


def test_a_sharded_step_updates_its_share_behind_the_collectives():
    n = 8 * CELL * 1000
    one = predict(SHARDED, update(n), ROUND, Settings(8, bucket=4 * n))
    links, kernel = 2 * 7 / 8 * 4 * n / 100e9, 28 * n / 8 / 1e12
    assert one.stages == pytest.approx({"reduce-scatter": links / 2, "all-gather": links / 2, "update": kernel})
    assert one.seconds == pytest.approx(links + kernel)  # one bucket: nothing overlaps
    ten = predict(SHARDED, update(n), ROUND, Settings(8, bucket=4 * n // 10))
    assert ten.seconds == pytest.approx(links + kernel / 10)


def test_state_that_is_updated_on_the_device_goes_through_it():
    found = predict(Way(False, "host"), update(10**9), ROUND, Settings(2))
    assert found.stages["to the device"] == found.stages["to the host"] == pytest.approx(8e9 / 50e9)
    assert found.stages["host memory"] == pytest.approx(2 * 16e9 / 400e9)
    assert found.stages["update"] == pytest.approx(0.028)


def test_an_update_on_the_host_takes_gradients_down_and_parameters_both_ways():
    found = predict(Way(False, "host", "host"), update(10**9), ROUND, Settings(2))
    assert found.stages["to the host"] == pytest.approx(8e9 / 50e9) and found.stages["to the device"] == pytest.approx(
        4e9 / 50e9
    )
    assert found.stages["update"] == pytest.approx(2 * 28e9 / 400e9)  # two devices share the host
    master = predict(Way(False, "host", "host"), update(10**9, "bfloat16", master="float32"), ROUND, Settings())
    assert master.stages["to the host"] == master.stages["to the device"] == pytest.approx(2e9 / 50e9)


def test_files_take_the_disk_in_both_directions():
    found = predict(Way(False, "files"), update(10**9), ROUND, Settings(4))
    assert found.stages["disk"] == pytest.approx(4 * (8e9 / 40e9 + 8e9 / 20e9))


def test_ranks_that_share_a_piece_are_as_far_apart_as_the_model_has_pieces():
    n, found = 16 * CELL, {}
    for pieces in (1, 4, 8):
        stages = predict(SHARDED, update(n * pieces), ROUND, Settings(32, pieces, bucket=1 << 40)).stages
        found[pieces] = stages["all-gather"]
    padded = 4 * 32 * CELL  # 16 cells over 32 ranks
    assert found[1] == pytest.approx(7 / 8 * padded / 100e9 + 3 / 4 * padded / 8 / 10e9)
    assert found[4] == pytest.approx(1 / 2 * 4 * n / 100e9 + 3 / 4 * 2 * n / 10e9)  # two in each of four nodes
    assert found[8] == pytest.approx(3 / 4 * 4 * n / 10e9)  # four, in nodes of their own


# What holds of all


FORMS = st.sampled_from(
    [
        {},
        {"param": "bfloat16", "master": "remainder"},
        {"param": "bfloat16", "master": "float32"},
        {"state": "8bit", "ema": True},
        {"param": "float64", "amsgrad": True, "zero_grad": True},
    ]
)
SIZES = st.lists(st.integers(1, 10**12), min_size=1, max_size=4)
QUICK = settings(max_examples=60, deadline=None)


@QUICK
@given(SIZES, FORMS, st.sampled_from(sorted(MACHINES)), st.integers(1, 2000), st.integers(1, 2000))
def test_more_devices_never_mean_more_bytes_of_a_device(sizes, form, machine, few, more):
    few, more = sorted((few, few + more))
    for state in ("device", "host", "files"):
        at_few, at_more = (
            predict(Way(True, state), update(sizes, **form), MACHINES[machine], Settings(w)) for w in (few, more)
        )
        for role in ("moments", "masters", "mean"):
            assert at_more.bytes[role] <= at_few.bytes[role]
        padding = 20 * CELL * more  # each rank's part of a buffer is whole cells, of all buffers of at most 20 bytes
        assert at_more.device_bytes <= at_few.device_bytes + padding


@QUICK
@given(SIZES, FORMS, st.integers(1, 2000))
def test_a_share_of_all_ranks_is_all_of_the_state(sizes, form, world):
    whole = predict(IN_MEMORY, update(sizes, **form), H100, Settings())
    share = predict(SHARDED, update(sizes, **form), H100, Settings(world))
    for role in ("moments", "masters", "mean"):
        assert whole.bytes[role] <= world * share.bytes[role] and share.bytes[role] <= whole.bytes[role]


@QUICK
@given(SIZES, FORMS, st.sampled_from([1, 8, 64]), st.floats(1.1, 100))
def test_a_faster_machine_is_never_slower(sizes, form, world, factor):
    faster = H100._replace(
        device=H100.device._replace(bandwidth=factor * H100.device.bandwidth),
        within=H100.within._replace(bandwidth=factor * H100.within.bandwidth),
        across=Link(factor * H100.across.bandwidth),
    )
    for slow, fast in zip(*(plan(update(sizes, **form), m, Settings(world)) for m in (H100, faster)), strict=True):
        assert fast.way == slow.way and fast.seconds <= slow.seconds


@QUICK
@given(SIZES, FORMS, st.integers(1, 10**6), st.sampled_from([1, 2, 8, 16, 100]))
@example([982_250_681], {}, 40_967, 1)
def test_more_elements_never_need_less(sizes, form, more, world):
    larger = [*sizes[:-1], sizes[-1] + more]
    for a, b in zip(*(plan(update(s, **form), H100, Settings(world)) for s in (sizes, larger)), strict=True):
        assert b.device_bytes >= a.device_bytes and b.host_bytes >= a.host_bytes and b.file_bytes >= a.file_bytes
        # chunks are whole bytes, so of 257 one can be left out
        assert b.stages["update"] >= a.stages["update"] - H100.device.launch


@QUICK
@given(SIZES, FORMS, st.sampled_from([1, 6, 8, 96, 1000]))
def test_the_fewest_pieces_that_fit_are_the_fewest(sizes, form, world):
    for found in plan(update(sizes, **form), H100, Settings(world), auto=True):
        fewer = [k for k in planning.divisors(world) if k < found.model_parallel]
        for pieces in fewer:
            assert not predict(found.way, update(sizes, **form), H100, Settings(world, pieces)).fits
        assert found.fits or found.model_parallel == planning.divisors(world)[-1 - found.way.sharded]


def test_the_best_is_the_fastest_that_fits():
    found = plan(update(7 * 10**9), H100, Settings())
    chosen = best(found)
    assert chosen.fits and all(chosen.seconds <= p.seconds for p in found if p.fits)
    assert any(p.seconds < chosen.seconds for p in found if not p.fits)  # in memory it would be faster, and does not fit
    assert best(plan(update(TRILLIONS), H100, Settings(8))) is None


def test_every_kind_of_machine_has_what_a_plan_needs():
    for machine in MACHINES.values():
        assert len(plan(update(10**9), machine, Settings(16))) == 10
        assert 0 < machine.disk_write <= machine.disk_read and machine.memory < machine.host_memory
    cpu = machines.cpu_only("cpu", Processor(2e10), 10**10, 10**11, 1e9, 1e9)
    assert [p.way.name for p in plan(update(10**8), cpu, Settings())] == ["in memory", "files, device updates"]


@pytest.mark.parametrize(
    "given_, said",
    [
        ({"sizes": []}, "at least one parameter"),
        ({"sizes": [3, 0]}, "at least one element"),
        ({"sizes": 5, "param": "int8"}, "param='int8': choose from"),
        ({"sizes": 5, "state": "4bit"}, "state='4bit': choose from"),
        ({"sizes": 5, "state": "8bit", "amsgrad": True}, "8-bit state"),
        ({"sizes": 5, "master": "remainder"}, "bfloat16 parameters, not with float32"),
        ({"sizes": 5, "master": "float32"}, "not with float32"),
        ({"sizes": 5, "param": "bfloat16", "master": "float16"}, "choose 'remainder' or 'float32'"),
        ({"sizes": 5, "stochastic": True}, "stochastic rounding is of"),
        ({"sizes": [10**18, 1]}, r"more than 1e\+18 elements"),
        ({"sizes": 10**400}, r"more than 1e\+18 elements"),
    ],
)
def test_an_update_that_there_is_not_is_refused(given_, said):
    with pytest.raises(ValueError, match=said):
        update(**given_)


@pytest.mark.parametrize(
    "given_, said",
    [
        ({"world": 0}, "world=0 must be"),
        ({"world": 2.0}, "world=2.0 must be an integer"),
        ({"world": 10**9}, "more than the 10,000,000 devices"),
        ({"world": 8, "model_parallel": 3}, "must divide world"),
        ({"reserve": 80 * 10**9}, "less than the 80,000,000,000"),
        ({"collective": "tree"}, "choose from ring, halving"),
        ({"budget": 1000}, "32,768 are enough"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given_, said):
    with pytest.raises(ValueError, match=said):
        plan(update(5), H100, Settings(**given_))


# The command


def run(capsys, *arguments):
    pytest.importorskip("rich")
    code = main(["plan", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


SCHEMA = {
    "way": str,
    "sharded": bool,
    "state": str,
    "updated_on": str,
    "made_by": (str, type(None)),
    "model_parallel": int,
    "fits": bool,
    "bytes": dict,
    "device_bytes": int,
    "host_bytes_of_node": int,
    "file_bytes_of_node": int,
    "short": dict,
    "stages": dict,
    "seconds": float,
}


def test_json_has_all_of_a_plan(capsys):
    code, out, _ = run(
        capsys, "--parameters", "7B", "--param-dtype", "bfloat16", "--master", "remainder", "--world", "8", "--json", "-"
    )
    found = json.loads(out)
    assert code == 0 and found["parameters"] == 7 * 10**9 and found["arrays"]["remainder"] is True
    assert len(found["ways"]) == 10 and found["best"] in {row["way"] for row in found["ways"]}
    for row in found["ways"]:
        assert dict.fromkeys(SCHEMA, True) == {key: isinstance(value, SCHEMA[key]) for key, value in row.items()}
        assert row["device_bytes"] == sum(row["bytes"].values())
    assert found["machine"]["device bandwidth"] == {"value": 3350e9, "source": "data sheet"}
    assert all(set(figure) == {"value", "source"} for name, figure in found["machine"].items() if name != "name")


def test_the_tables_name_every_way_and_the_best(capsys):
    code, out, _ = run(capsys, "--shapes", "768x3072,768", "--world", "2")
    assert code == 0 and "2,360,064 parameters on 2 x H100 SXM 80 GB" in out
    for way in planning.ways(H100, 2):
        assert out.count(f" {way.name} ") >= 2
    assert "best: " in out and "data sheet: " in out and "assumed: " in out


def test_what_does_not_fit_ends_with_1_and_says_what_would(capsys):
    code, out, _ = run(capsys, "--parameters", "10T", "--world", "100000", "--param-dtype", "bfloat16")
    assert code == 1 and "nothing fits. With --model-parallel" in out
    code, out, _ = run(capsys, "--parameters", "10T", "--world", "8")
    assert code == 1 and "in however many pieces" in out


def test_rates_that_are_given_take_the_place_of_data_sheets(capsys):
    given_ = ("--bandwidth", "1000", "--memory", "50", "--per-node", "4", "--reserve", "0")
    _, out, _ = run(capsys, "--parameters", "1e9", *given_, "--json", "-")
    found = json.loads(out)
    assert (
        found["machine"]["memory"] == {"value": 50 * 10**9, "source": "given"} and found["machine"]["per_node"]["value"] == 4
    )
    assert found["ways"][0]["seconds"] == pytest.approx(0.028 + 10e-6)


def test_shapes_come_from_a_json_file(capsys, tmp_path):
    file = tmp_path / "shapes.json"
    file.write_text('{"w": [768, 3072], "b": [768], "scale": []}')
    _, out, _ = run(capsys, "--shapes-file", str(file), "--json", "-")
    assert json.loads(out)["parameters"] == 768 * 3072 + 768 + 1


CONSTANTS = {
    "cpu": {
        "name": "a CPU",
        "bandwidth": 28e9,
        "launch": 0.0,
        "memory": 10**11,
        "cache": 0,
        "rates": [{"arrays": Arrays()._asdict(), "elements_per_second": 1e8}],
    }
}


def test_measured_constants_bind_a_cpu_by_elements(capsys, tmp_path):
    file = tmp_path / "constants.json"
    file.write_text(json.dumps({"constants": CONSTANTS}))
    _, out, _ = run(capsys, "--parameters", "1e9", "--gpu", "cpu", "--constants", str(file), "--json", "-")
    found = json.loads(out)
    assert found["ways"][0]["seconds"] == pytest.approx(10.0)  # by bytes it would be 1
    assert found["machine"]["device bandwidth"]["source"] == "measured, a CPU"
    _, out, _ = run(capsys, "--parameters", "1e9", "--constants", str(file), "--json", "-")
    by_host = next(row for row in json.loads(out)["ways"] if (row["state"], row["updated_on"]) == ("host", "host"))
    assert by_host["stages"]["update"] == pytest.approx(10.0)


def test_constants_are_read_from_bench(capsys, tmp_path):
    common = {"backend": "numba-cpu", "dtype": "float32", "device": "a CPU", "cores": 2, "date": "2026-01-01"}
    kernel, limit = common | {"contender": "gpuadam kernel + launch"}, common | {"contender": "limit"}
    rows = [
        kernel | {"elements": 1000, "p50_us": 5.0},
        kernel | {"elements": 10**5, "p50_us": 50.0},
        limit | {"elements": 1000, "p50_us": 4.0, "gb_per_s": 7.0},
        limit | {"elements": 10**5, "p50_us": 40.0, "gb_per_s": 70.0},
    ]
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"rows": rows}))
    options = ("--gpu", "cpu", "--constants", str(file), "--memory", "100", "--json", "-")
    _, out, _ = run(capsys, "--parameters", "1e9", *options)
    assert json.loads(out)["ways"][0]["seconds"] == pytest.approx(0.5 + 5e-6)  # 2e9 elements a second; by bytes 0.4


def test_this_machine_is_measured(capsys, monkeypatch, tmp_path):
    from gpuadam.cli.measuring import constants

    monkeypatch.setattr(constants, "LARGE", 100_000)
    monkeypatch.setattr(constants, "IN_CACHE", 1000)
    monkeypatch.setattr(constants, "DISK_BYTES", 1 << 23)
    measured = ("--gpu", "cpu", "--measure", "--seconds", "0.01", "--folder", str(tmp_path), "--json", "-")
    code, out, _ = run(capsys, "--parameters", "1e6", *measured)
    found = json.loads(out)
    cpu, disk = found["constants"]["cpu"], found["constants"]["disk"]
    assert code == 0 and found["machine"]["device bandwidth"]["value"] == cpu["bandwidth"] > 0
    assert [rate["arrays"] for rate in cpu["rates"]] == [Arrays()._asdict()] and cpu["rates"][0]["elements_per_second"] > 0
    assert found["machine"]["disk_read"]["value"] == disk["read"] > 0 and disk["write"] > 0
    assert not list(tmp_path.iterdir())  # what was written is gone
    file = tmp_path / "again.json"
    file.write_text(out)
    _, again, _ = run(capsys, "--parameters", "1e6", "--gpu", "cpu", "--constants", str(file), "--json", "-")
    assert [row["seconds"] for row in json.loads(again)["ways"][:1]] == [row["seconds"] for row in found["ways"][:1]]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "is required"),
        (("--parameters", "many"), "not a number such as"),
        (("--parameters", "0.5"), "not a whole number"),
        (("--parameters", "nan"), "not a whole number"),
        (("--parameters", "1e30"), "not a whole number from 1 to 1e18"),
        (("--parameters", "1e9", "--shapes", "3"), "not allowed with"),
        (("--shapes", "3x"), "not a number such as"),
        (("--parameters", "1e9", "--gpu", "h1000"), "invalid choice"),
        (("--parameters", "1e9", "--bandwidth", "0"), "not a number above 0"),
        (("--shapes-file", "/nowhere.json"), "cannot be read as JSON"),
        (("--parameters", "1e9", "--reserve", "nan"), "not a number above 0"),
        (("--parameters", "1e9", "--memory", "inf"), "not a number from 1e-09 to 1e+15"),
        (("--parameters", "1e9", "--budget", "1e300"), "not a number from 1e-09 to 1e+15"),
        (("--parameters", "1e9", "--bandwidth", "1e-320"), "not a number from 1e-09 to 1e+15"),
        (("--parameters", "1e9", "--measure", "--folder", "/nowhere"), "there is no folder '/nowhere'"),
        (("--parameters", "1e9", "--json", ""), "'' is not the name of a file"),
        (("--parameters", "1e9", "--plot", "/"), "'/' is not the name of a file"),
    ],
)
def test_wrong_arguments_are_explained(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        run(capsys, *arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--gpu", "cpu"), "--measure measures this machine's"),
        (("--world", "8", "--model-parallel", "3"), "must divide world"),
        (("--reserve", "90"), "less than the 80,000,000,000 of a device"),
        (("--master", "remainder"), "bfloat16 parameters, not with float32"),
        (("--constants", "/nowhere.json"), "cannot be read as JSON"),
        (("--budget", "1e-6"), "32,768 are enough"),
    ],
)
def test_what_makes_no_sense_ends_with_2(capsys, arguments, said):
    code, out, err = run(capsys, "--parameters", "1e9", *arguments)
    assert code == 2 and out == "" and err.startswith("gpuadam plan: ") and said in err


@pytest.mark.parametrize(
    "content, said",
    [
        ("[]", "has neither"),
        ('{"rows": []}', "no float32 rows of the limit kernel"),
        ('{"constants": {"cpu": {"bandwidth": -1}}}', "must be a number above 0"),
        ('{"constants": {"cpu": {"bandwidth": 1}}}', "its cpu lacks cache, launch, memory, name, rates"),
        ('{"constants": {"cpu": {"bandwidth": 1, "rates": [{}]}}}', "are not those of formats"),
        ("{", "cannot be read as JSON"),
        ('{"constants": {"cpu": {"bandwidth": NaN}}}', "cannot be read as JSON: NaN is no number"),
        ('{"constants": {"cpu": {"bandwidth": 1e999}}}', "must be a number above 0"),
        ('{"constants": {"cpu": []}}', "its cpu is []"),
        ('{"constants": {"disk": {"read": 1}, "cpu": CPU}}', "the write of its disk is None"),
        ('{"constants": {"gpu": CPU, "cpu": {}}}', "the bandwidth of its cpu is None"),
        ('{"rows": [{"backend": "numba-cpu"}]}', 'its "rows" are not those of'),
    ],
)
def test_a_file_without_constants_is_refused(capsys, tmp_path, content, said):
    file = tmp_path / "constants.json"
    file.write_text(content.replace("CPU", json.dumps(CONSTANTS["cpu"])))
    code, _, err = run(capsys, "--parameters", "1e9", "--constants", str(file))
    assert code == 2 and said in err


@pytest.mark.parametrize(
    "key, value", [("launch", "1"), ("launch", -1.0), ("memory", 0), ("memory", 1.5), ("cache", None), ("name", 3)]
)
def test_a_constant_that_is_none_is_named(capsys, tmp_path, key, value):
    file = tmp_path / "constants.json"
    file.write_text(json.dumps({"constants": {"cpu": CONSTANTS["cpu"] | {key: value}}}))
    code, _, err = run(capsys, "--parameters", "1e9", "--constants", str(file))
    assert code == 2 and f"the {key} of its cpu is {value!r}" in err


@pytest.mark.parametrize("content", ['{"w": [0]}', '{"w": 3}', '{"w": [1.5]}', '{"w": [true]}', "[]", "{}"])
def test_a_file_without_shapes_is_refused(capsys, tmp_path, content):
    file = tmp_path / "shapes.json"
    file.write_text(content)
    with pytest.raises(SystemExit):
        run(capsys, "--shapes-file", str(file))
    assert str(file) in capsys.readouterr().err


def test_the_plot_is_made(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan"  # the name is the caller's, whatever its end
    code, out, _ = run(capsys, "--parameters", "7B", "--param-dtype", "bfloat16", "--plot", str(file))
    assert code == 0 and f"plot: {file}" in out.replace("\n", "")
    assert file.read_bytes()[:4] == b"\x89PNG" and file.stat().st_size > 50_000


def test_a_plan_imports_no_library_of_arrays_and_compiles_nothing():
    code = (
        "import sys, gpuadam.__main__ as m\n"
        "code = m.main(['plan', '--parameters', '7B', '--json', '-'])\n"
        "found = {'cupy', 'torch', 'jax', 'numba', 'safetensors', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == 7 * 10**9


def test_what_is_planned_is_what_offload_does():
    from gpuadam.offload import chunks, optimizer

    own = planning.SLOTS, planning.CHUNKS, planning.SMALLEST_CHUNK, planning.ALIGNMENT
    assert own == (optimizer.SLOTS_ON_GPU, optimizer.CHUNKS, optimizer.SMALLEST_CHUNK, chunks.ALIGNMENT)
    widest = operands(Arrays("float64", "float64", "float64", amsgrad=True, param_copy="float64", ema="float64"))
    least = sum(chunks.aligned(operand.nbytes(storage.GROUP)) + chunks.ALIGNMENT for operand in widest)
    assert optimizer.MOST_SLOTS * least <= planning.LEAST_BUDGET


@pytest.mark.exhaustive
def test_the_benchmark_measures_what_it_predicts(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ROOT / "benchmarks" / "plan.py"), "--backend", "numba-cpu", "--seconds", "0.01"]
    command += ["--sizes", "2000", "--forms", "float32,AMSGrad", "--out", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = output.read_csv(tmp_path / "plan.csv", {*measure.NUMBERS, "predicted_us", "error_percent"})
    assert [row["dtype"] for row in rows] == ["float32", "AMSGrad"] and (tmp_path / "plan.png").exists()
    for row in rows:
        assert row["bound"] in ("bytes", "elements") and row["predicted_us"] > 0
        assert row["error_percent"] == pytest.approx(100 * (row["predicted_us"] / row["p20_us"] - 1), rel=1e-2, abs=0.01)


def test_on_a_cpu_the_processors_do_all_of_it_one_after_the_other():
    cpu = machines.cpu_only("cpu", Processor(2e10), 10**12, 10**12, 1e9, 2e9)
    found = predict(Way(True, "files"), update(10**7), cpu, Settings(2))
    assert found.stages.keys() == {"reduce-scatter", "all-gather", "update", "disk"}
    assert found.seconds == pytest.approx(sum(found.stages.values()))


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pytest.importorskip("rich")
    return importlib.import_module("plan")


def test_what_the_benchmark_measures_over_ranks_it_compares_with_a_plan(benchmark, monkeypatch):
    arrays = {"arrays": Arrays()._asdict(), "elements_per_second": 1e12}
    found = {
        "latency": 0.0,
        "bandwidth": 1e9,
        "processor": {"bandwidth": 2.8e10, "launch": 0.0, "rates": [arrays], "cache": 0},
    }
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *a, **o: SimpleNamespace(stdout=json.dumps(found)))
    monkeypatch.setattr(benchmark.sharded, "timed_job", lambda *a: {"seconds": [0.1] * 5})
    monkeypatch.setattr(benchmark, "sys", SimpleNamespace(executable=str(ROOT / "bin" / "python")))
    monkeypatch.setattr(benchmark.Path, "exists", lambda path: True)
    options = SimpleNamespace(forms=[benchmark.TWO_RANKS], sizes=["8e6"], seconds=1.0)
    notes = []
    rows = [row for (row,) in benchmark.over_ranks(backends.BACKENDS["numba-cpu"], options, notes)]
    assert [row["elements"] for row in rows] == [8_000_000, 16_000_000] and "two ranks" in notes[0]
    seconds = 2 * 0.5 * 32e6 / 1e9 + 14 * 8e6 / 2.8e10  # both collectives, and half of 28 bytes an element
    assert rows[0]["predicted_us"] == pytest.approx(1e6 * seconds, rel=2e-3)
    assert rows[0]["error_percent"] == pytest.approx(100 * (seconds / 0.1 - 1), rel=1e-2)


def test_the_benchmark_measures_steps_in_files_and_what_a_plan_says_of_them(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "FILE", 800_000)
    options = SimpleNamespace(forms=[benchmark.IN_FILES], sizes=["1e4"], seconds=0.01)
    notes = []
    rows = [row for (row,) in benchmark.in_files(backends.BACKENDS["numba-cpu"], options, notes)]
    assert [(row["elements"], row["samples"]) for row in rows] == [
        (10_000, 5),
        (20_000, 5),
    ] and "files in the cache" in notes[0]


def test_the_benchmark_collects_as_a_step_does(benchmark, monkeypatch):
    transport = transports.Local()
    calls = []
    monkeypatch.setattr(
        transport, "all_gather", lambda buffer: calls.append(buffer.size) or transports.Work(), raising=False
    )
    assert benchmark._collectives(transport, 20_000_000)() == 3  # buckets of 2**23 elements
    assert calls == [1 << 23, 1 << 23, 20_000_768 - (1 << 24)]
