"""The transports that come with gpuadam: what is left of a collective, torch's process groups, NCCL up to its calls."""

import contextlib
import ctypes
import functools
import importlib
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import libraries
import numpy as np
import pytest
import ranks
from cases import few
from mpi_jobs import ended, expected, started

import gpuadam
from gpuadam import transports
from gpuadam.sharded.transports import nccl as nccl_transport
from gpuadam.sharded.transports import torch as torch_transport


@pytest.mark.parametrize(
    "timeout, error", [(0, ValueError), (-1.0, ValueError), (np.inf, ValueError), ("1", TypeError), (True, TypeError)]
)
def test_a_timeout_is_a_positive_number_of_seconds(timeout, error):
    libraries.imported("mpi4py", reason="mpi4py is not installed")
    with pytest.raises(error, match="timeout"):
        transports.MPI(timeout=timeout)


def test_what_follows_a_collective_that_was_not_waited_for_is_refused():
    libraries.imported("mpi4py", reason="mpi4py is not installed")
    transport = transports.MPI()
    work = transport.all_gather(np.zeros(8, "u1"))
    with pytest.raises(ValueError, match="a collective that was cut short, or whose Work was not waited for"):
        transport.exchange("a")
    work.wait()
    assert transport.exchange("b") == ["b"]


@pytest.mark.parametrize("n", few([2, 4], 4))
def test_sums_over_mpi_are_in_the_order_of_the_ranks_however_they_are_waited_for(n):
    """Bit for bit: of two numbers there is one order, of four there are several."""
    status, _, output = ended(started(n, "sums"))
    found = output.splitlines()
    assert status == 0, output
    assert sum(line.endswith(" True") for line in found) == n * 2 * 4 and found.count(str([1] * n)) == n, output


@pytest.mark.exhaustive
def test_a_rank_that_does_not_come_to_a_sum_is_named_though_pieces_of_the_others_are_under_way():
    status, _, output = ended(started(3, "alone_in_a_sum", run=()))
    assert status != 0
    for rank in (0, 2):
        said = f"RankMissing: rank {rank} has waited for its timeout, 2.0 s, and rank 1 has not come: it may be stopped"
        assert said in output


def of_gloo(rank, file, folder):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    transport = transports.Torch()
    found = [ranks.sharded(case, transport) for case in ("groups, clipped", "8 bits")]
    Path(folder, str(rank)).write_text(json.dumps([found, transport.exchange(rank)]))
    dist.destroy_process_group()


def test_two_ranks_of_gloo_have_the_bits_of_one_optimizer(tmp_path):
    torch = libraries.imported("torch", reason="torch is not installed")
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    wanted = [expected()["groups, clipped"][0], expected()["8 bits"][0]]
    torch.multiprocessing.spawn(of_gloo, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in ("0", "1"):
        assert json.loads((tmp_path / rank).read_text()) == [wanted, [0, 1]]


def test_a_transport_without_a_process_group_says_so():
    libraries.imported("torch", reason="torch is not installed")
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        transports.Torch()


class Stream:
    """A CUDA stream that writes down what it is asked."""

    def __init__(self, name, log):
        self.ptr, self.log = name, log

    def record(self, event):
        return f"an event of {self.ptr}"

    def wait_event(self, event):
        self.log.append(f"{self.ptr} waits for {event}")


class Communicator:
    """CuPy's, of one rank, over the host's memory: methods, and the order of arguments, as CuPy documents them."""

    def __init__(self, log, ndev, commId, rank):
        self.log = log
        assert (ndev, commId, rank) == (1, "a unique id", 0)

    def reduceScatter(self, sendbuf, recvbuf, recvcount, datatype, op, stream):
        self.log.append(f"reduceScatter on {stream}")
        assert op == "sum"
        ctypes.memmove(recvbuf, sendbuf, recvcount * {"f4": 4, "f8": 8}[datatype])

    def allGather(self, sendbuf, recvbuf, count, datatype, stream):
        self.log.append(f"allGather on {stream}")
        assert sendbuf == recvbuf and datatype == "u1"
        ctypes.memset(recvbuf, 7, count)  # so that what is gathered shows

    def broadcast(self, sendbuff, recvbuff, count, datatype, root, stream):
        self.log.append(f"broadcast on {stream}")
        assert sendbuff == recvbuff and (datatype, root) == ("u1", 0)
        ctypes.memset(recvbuff, 8, count)


class Memory:
    """What NCCL's transport asks of a CuPy array."""

    def __init__(self, array):
        self.array, self.size, self.nbytes, self.dtype = array, array.size, array.nbytes, array.dtype
        self.data = SimpleNamespace(ptr=array.ctypes.data)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_nccl_moves_whole_buffers_on_a_stream_of_its_own_and_each_stream_waits_for_the_other(monkeypatch, dtype):
    libraries.imported("mpi4py", reason="mpi4py is not installed")
    log = []
    current, own = Stream("the current one", log), Stream("its own", log)
    cuda = SimpleNamespace(
        Stream=lambda non_blocking: own, get_current_stream=lambda: current, Event=lambda disable_timing: None
    )
    nccl = SimpleNamespace(
        available=True,
        get_unique_id=lambda: "a unique id",
        NcclCommunicator=functools.partial(Communicator, log),
        **{"NCCL_FLOAT32": "f4", "NCCL_FLOAT64": "f8", "NCCL_UINT8": "u1", "NCCL_SUM": "sum"},
    )
    fakes = {"cupy": SimpleNamespace(cuda=cuda), "cupy.cuda.nccl": nccl}
    monkeypatch.setattr(nccl_transport, "imported", lambda name, fix: fakes[name])
    transport = transports.NCCL(timeout=60)
    given, part = np.arange(100, dtype=dtype), np.zeros(100, dtype)
    transport.reduce_scatter(Memory(given), Memory(part)).wait()
    assert (part == given).all()
    transport.all_gather(Memory(given)).wait()
    assert (given.view("u1") == 7).all()
    transport.broadcast(Memory(given))
    assert (given.view("u1") == 8).all()
    before, after = "its own waits for an event of the current one", "the current one waits for an event of its own"
    calls = ("reduceScatter", "allGather", "broadcast")
    assert log == [line for call in calls for line in (before, f"{call} on its own", after)]
    assert transport.exchange("by MPI") == ["by MPI"]
    transport.close()
    with pytest.raises(transports.RankEnded):
        transport.exchange("by MPI")


@pytest.mark.parametrize(("handle", "stream"), [(0, "torch's default stream"), (77, "the stream of handle 77")])
def test_torchs_nccl_is_enqueued_on_cupys_current_stream(monkeypatch, handle, stream):
    """Of ExternalStream(0) torch makes any stream of its pool, which waits for nothing."""
    log = []

    @contextlib.contextmanager
    def entered(stream):
        log.append(stream)
        yield

    cuda = SimpleNamespace(
        stream=entered,
        default_stream=lambda: "torch's default stream",
        ExternalStream=lambda handle: f"the stream of handle {handle}" if handle else "any stream",
    )
    fakes = {
        "torch": SimpleNamespace(cuda=cuda, from_dlpack=lambda array: array),
        "torch.distributed": SimpleNamespace(
            is_available=lambda: True,
            is_initialized=lambda: True,
            get_rank=lambda group: 0,
            get_world_size=lambda group: 1,
            get_backend=lambda group: "cuda:nccl",
            reduce_scatter_tensor=None,
            all_gather_into_tensor=None,
            broadcast=lambda *arguments, **options: SimpleNamespace(wait=lambda: log.append("waited")),
        ),
        "cupy": SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=handle))),
    }
    monkeypatch.setattr(torch_transport, "imported", lambda name, fix: fakes[name])
    transports.Torch().broadcast(np.zeros(3))
    assert log == [stream, stream, "waited"]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5}, {"check_finite": True}])
@pytest.mark.parametrize("make", [transports.Local, transports.NCCL])
def test_one_rank_on_a_gpu_has_the_bits_of_the_cpu(make, options):
    cp = libraries.imported("cupy")
    if make is transports.NCCL:
        libraries.imported("mpi4py")
        with warnings.catch_warnings():  # CuPy's own module looks for the library first, and warns where there is none
            warnings.simplefilter("ignore")
            found = importlib.import_module("cupy.cuda.nccl").available
        if not found:
            pytest.skip("CuPy finds no NCCL")
    results = []
    for there, transport in ((np.asarray, transports.Local()), (cp.asarray, make())):
        params = {name: there(p) for name, p in ranks.params_of("views, clipped").items()}
        opt = gpuadam.ShardedAdam(params, transport, lr=0.1, bucket_bytes=40_000)
        for step in (1, 2, 3):
            grads = ranks.grads_of("views, clipped", step, 0, 1)
            opt.step({name: there(grad) for name, grad in grads.items()}, **options)
        results.append(ranks.digest(*map(opt._kernels.to_host, params.values()), *opt.gathered("m").values()))
    assert results[0] == results[1]
