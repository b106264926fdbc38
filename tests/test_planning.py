"""A plan of a step: cases worked out by hand, what must hold of all plans, and bytes that are exact."""

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gpuadam
from gpuadam import backends, hyperparameters, transports
from gpuadam.kernels.operands import GROUP, Arrays, bytes_per_element, operands_of
from gpuadam.options import Options
from gpuadam.planning import Prediction, Settings, Way, best, machines, plan, prediction
from gpuadam.planning import model as performance_model
from gpuadam.planning.machines import MACHINES, Link, Processor
from gpuadam.planning.model import Ranks, collective_seconds, kernel_seconds, update
from gpuadam.sharded.buffer import Buffer, Member
from gpuadam.sharded.layout import CELL
from gpuadam.sharded.shard_adam import ShardAdam

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


def test_components_are_of_real_parameters_alone():
    of_parts = update(999, complex="parts")
    assert update(999, complex="parts", components=3) == of_parts and of_parts.arrays.numbers == 1
    assert update(999, complex="joint", components=3).arrays.numbers == 2


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
    found = Prediction(IN_MEMORY, update(TRILLIONS, **options), H100, Settings()).bytes
    assert found == dict.fromkeys(performance_model.ROLES, 0) | {
        role: int(4 * each) * TRILLIONS // 4 for role, each in by_role.items()
    }
    odd = Prediction(IN_MEMORY, update(TRILLIONS + 1, **options), H100, Settings()).bytes
    scales = 2 * 4 if options.get("state") == "8bit" else 0  # of the group that the last element begins
    assert odd["moments"] - found["moments"] == int(by_role["moments"]) + scales
    assert odd["gradients"] - found["gradients"] == by_role["gradients"]


def test_bytes_are_those_of_the_kernels_operands():
    for arrays in (Arrays(), Arrays(state="8bit"), Arrays("bfloat16", "bfloat16", remainder=True, ema="float32")):
        h = hyperparameters.checked(1e-3, (0.9, 0.999), 1e-8, 0.0, False, False)
        form, _ = hyperparameters.form_and_scalars(h, 1, arrays)
        assert performance_model.bytes_moved_of(operands_of(arrays), 32_000) == 32_000 * bytes_per_element(form)


def test_a_sharded_device_has_its_share_of_the_state_in_whole_cells():
    n, world = 10 * CELL + 5, 4  # 11 cells: 3 each, and one that nobody uses
    found = Prediction(SHARDED, update(n), H100, Settings(world))
    own, whole = 3 * CELL, 12 * CELL
    assert found.bytes["moments"] == 8 * own
    assert found.bytes["parameters"] == found.bytes["gradients"] == 4 * whole
    assert found.bytes["buffers"] == 4 * own  # the sums of gradients


def test_narrow_gradients_are_summed_in_a_float32_buffer():
    n = 8 * CELL
    found = Prediction(SHARDED, update(n, "bfloat16", master="remainder"), H100, Settings(8))
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
    found = Prediction(IN_MEMORY, planned, H100, Settings()).bytes
    assert found["moments"] + found["mean"] == held
    assert found["parameters"] == sum(p.nbytes for p in params.values())
    assert found["gradients"] == sum(g.nbytes for g in grads.values())
    gpuadam.OffloadAdam(params, state=tmp_path, **own).close()
    files = [path.stat().st_size for path in tmp_path.iterdir() if path.name not in ("lock", "state.json", "steps.json")]
    assert Prediction(Way(False, "files"), planned, H100, Settings()).file_bytes == sum(files)
    assert Prediction(Way(False, "host"), planned, H100, Settings()).host_bytes == sum(files)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("options", OF_OPTIMIZERS)
def test_bytes_of_ranks_are_no_more_than_planned(options, world):
    params, _, own, planned = made(options)
    kernels, views = backends.choose([*params.items()])
    amsgrad = own.pop("amsgrad")
    make = functools.partial(ShardAdam, options=Options(**own), lr=0.1, amsgrad=amsgrad)
    found = Prediction(SHARDED, planned, H100, Settings(world)).bytes
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
    found = Prediction(
        SHARDED, update(TRILLIONS, "bfloat16", master="remainder"), H100, Settings(100_000, model_parallel=1000)
    )
    cells = -(-(10**10) // CELL)  # of a piece, over 100 ranks
    assert found.bytes["moments"] == 8 * -(-cells // 100) * CELL
    assert found.bytes["masters"] == 2 * -(-cells // 100) * CELL
    assert found.device_bytes == sum(found.bytes.values()) and all(type(b) is int for b in found.bytes.values())


def test_offloaded_state_is_in_the_node_and_the_budget_in_the_device():
    settings = Settings(8, budget=10**9)
    state = 8 * (8 * 10**9)  # m and v, of eight devices that all have all of it
    host, files = (Prediction(Way(False, where), update(10**9), H100, settings) for where in ("host", "files"))
    assert (host.host_bytes, host.file_bytes) == (state, 0) and host.bytes["buffers"] == 10**9
    assert (files.host_bytes, files.file_bytes) == (8 * 10**9, state)
    assert host.bytes["moments"] == 0 and host.device_bytes == 8 * 10**9 + 10**9


def test_what_does_not_fit_says_where_and_how_much():
    found = Prediction(IN_MEMORY, update(10 * 10**9), H100, Settings(reserve=10**9))
    assert not found.fits and found.short == {"device": 160 * 10**9 - 79 * 10**9}
    found = Prediction(Way(False, "host"), update(300 * 10**9, "bfloat16"), H100, Settings(8))
    assert set(found.short) == {"device", "host"} and found.short["host"] == 8 * 8 * 300 * 10**9 - 2000 * 10**9


# Seconds


def test_a_kernel_takes_the_slower_of_bytes_and_elements():
    arrays = Arrays(state="bfloat16")  # 20 bytes
    seconds = [
        kernel_seconds(arrays, operands_of(arrays), 10**9, Processor(1e12, rates={arrays: rate})) for rate in (1e12, 1e10)
    ]
    assert seconds == pytest.approx([0.02, 0.1])


def test_what_stays_in_the_caches_is_bound_by_elements_alone():
    arrays = Arrays()
    processor = Processor(1e9, launch=1e-6, rates={arrays: 1e9}, cache=16_000)
    assert kernel_seconds(arrays, operands_of(arrays), 1000, processor) == pytest.approx(2e-6)
    assert kernel_seconds(arrays, operands_of(arrays), 1001, processor) == pytest.approx(1e-6 + 28_028e-9)


def test_a_ring_takes_the_bus_bandwidth_of_nccl():
    assert collective_seconds(8 * 10**9, Ranks(8, 1), ROUND) == pytest.approx(7 / 8 * 8e9 / 100e9)
    slow = ROUND._replace(within=Link(100e9, 1e-3))
    assert collective_seconds(0, Ranks(8, 1), slow, calls=5) == pytest.approx(5 * 7e-3)
    assert collective_seconds(0, Ranks(8, 1), slow, "halving") == pytest.approx(3e-3)


def test_over_nodes_only_a_devices_share_crosses():
    expected = 7 / 8 * 80e9 / 100e9 + 3 / 4 * 10e9 / 10e9
    assert collective_seconds(80 * 10**9, Ranks(8, 4), ROUND) == pytest.approx(expected)


def test_a_replicated_step_all_reduces_its_gradients_first():
    found = Prediction(IN_MEMORY, update(10**9), ROUND, Settings(8))
    assert found.stages == pytest.approx({"all-reduce": 2 * 7 / 8 * 4e9 / 100e9, "update": 0.028})
    assert found.seconds == pytest.approx(0.07 + 0.028)


def test_a_sharded_step_updates_its_share_behind_the_collectives():
    n = 8 * CELL * 1000
    one = Prediction(SHARDED, update(n), ROUND, Settings(8, bucket=4 * n))
    links, kernel = 2 * 7 / 8 * 4 * n / 100e9, 28 * n / 8 / 1e12
    assert one.stages == pytest.approx({"reduce-scatter": links / 2, "all-gather": links / 2, "update": kernel})
    assert one.seconds == pytest.approx(links + kernel)  # one bucket: nothing overlaps
    ten = Prediction(SHARDED, update(n), ROUND, Settings(8, bucket=4 * n // 10))
    assert ten.seconds == pytest.approx(links + kernel / 10)


def test_state_that_is_updated_on_the_device_goes_through_it():
    found = Prediction(Way(False, "host"), update(10**9), ROUND, Settings(2))
    assert found.stages["to the device"] == found.stages["to the host"] == pytest.approx(8e9 / 50e9)
    assert found.stages["host memory"] == pytest.approx(2 * 16e9 / 400e9)
    assert found.stages["update"] == pytest.approx(0.028)


def test_an_update_on_the_host_takes_gradients_down_and_parameters_both_ways():
    found = Prediction(Way(False, "host", "host"), update(10**9), ROUND, Settings(2))
    assert found.stages["to the host"] == pytest.approx(8e9 / 50e9) and found.stages["to the device"] == pytest.approx(
        4e9 / 50e9
    )
    assert found.stages["update"] == pytest.approx(2 * 28e9 / 400e9)  # two devices share the host
    master = Prediction(Way(False, "host", "host"), update(10**9, "bfloat16", master="float32"), ROUND, Settings())
    assert master.stages["to the host"] == master.stages["to the device"] == pytest.approx(2e9 / 50e9)


def test_files_take_the_disk_in_both_directions():
    found = Prediction(Way(False, "files"), update(10**9), ROUND, Settings(4))
    assert found.stages["disk"] == pytest.approx(4 * (8e9 / 40e9 + 8e9 / 20e9))


def test_ranks_that_share_a_piece_are_as_far_apart_as_the_model_has_pieces():
    n, found = 16 * CELL, {}
    for pieces in (1, 4, 8):
        stages = Prediction(SHARDED, update(n * pieces), ROUND, Settings(32, pieces, bucket=1 << 40)).stages
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
            Prediction(Way(True, state), update(sizes, **form), MACHINES[machine], Settings(w)) for w in (few, more)
        )
        for role in ("moments", "masters", "mean"):
            assert at_more.bytes[role] <= at_few.bytes[role]
        padding = 20 * CELL * more  # each rank's part of a buffer is whole cells, of all buffers of at most 20 bytes
        assert at_more.device_bytes <= at_few.device_bytes + padding


@QUICK
@given(SIZES, FORMS, st.integers(1, 2000))
def test_a_share_of_all_ranks_is_all_of_the_state(sizes, form, world):
    whole = Prediction(IN_MEMORY, update(sizes, **form), H100, Settings())
    share = Prediction(SHARDED, update(sizes, **form), H100, Settings(world))
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
        fewer = [k for k in prediction.divisors(world) if k < found.model_parallel]
        for pieces in fewer:
            assert not Prediction(found.way, update(sizes, **form), H100, Settings(world, pieces)).fits
        assert found.fits or found.model_parallel == prediction.divisors(world)[-1 - found.way.sharded]


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
        ({"sizes": 5, "param": "int8"}, "param='int8' must be one of"),
        ({"sizes": 5, "state": "4bit"}, "state='4bit' must be one of"),
        ({"sizes": 5, "state": "8bit", "amsgrad": True}, "8-bit state"),
        ({"sizes": 5, "master": "remainder"}, "bfloat16 parameters, not with float32"),
        ({"sizes": 5, "master": "float32"}, "not with float32"),
        ({"sizes": 5, "param": "bfloat16", "master": "float16"}, "master='float16' must be one of 'remainder', 'float32'"),
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
        ({"world": 8, "model_parallel": 3}, "model_parallel=3 must divide world=8: give 1, 2, 4 or 8"),
        ({"reserve": 80 * 10**9}, "less than the 80,000,000,000"),
        ({"collective": "tree"}, "must be one of 'ring', 'halving'"),
        ({"budget": 1000}, "must be an integer of at least 32,768"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given_, said):
    with pytest.raises(ValueError, match=said):
        plan(update(5), H100, Settings(**given_))


def test_the_least_budget_is_enough_for_offload():
    from gpuadam.offload import chunks

    widest = operands_of(Arrays("float64", "float64", "float64", amsgrad=True, param_copy="float64", ema="float64"))
    least = sum(chunks.aligned(operand.nbytes(GROUP)) + chunks.ALIGNMENT for operand in widest)
    assert chunks.MOST_SLOTS * least <= prediction.LEAST_BUDGET


def test_on_a_cpu_the_processors_do_all_of_it_one_after_the_other():
    cpu = machines.cpu_only("cpu", Processor(2e10), 10**12, 10**12, 1e9, 2e9)
    found = Prediction(Way(True, "files"), update(10**7), cpu, Settings(2))
    assert found.stages.keys() == {"reduce-scatter", "all-gather", "update", "disk"}
    assert found.seconds == pytest.approx(sum(found.stages.values()))
