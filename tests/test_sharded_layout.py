"""Which rank owns what, and the norm of what many ranks own."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from thread_ranks import all_well, on_ranks

import gpuadam
from gpuadam.kernels import cpu_threads
from gpuadam.sharded.layout import CELL, Layout
from gpuadam.sharded.norm import ShardedNorm

SIZES = [0, 1, 7, 4095, 4096, 4097, 15_000, 0, 20_011, 33, 64, 4000, 100]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("bucket_cells", [0, 1, 5, 1000])
def test_the_ranks_own_every_element_once(n, bucket_cells):
    layout = Layout(SIZES, n, bucket_cells)
    owners = [np.zeros(size, int) for size in SIZES]
    in_buffer = np.zeros(layout.size, int)
    for rank, bucket in itertools.product(range(n), layout.buckets):
        for shard in layout.shards(bucket, rank):
            owners[shard.parameter][shard.start : shard.stop] += 1
            in_buffer[shard.place] += 1
            first, last = bucket.part_of(rank)
            assert first <= shard.place.start < shard.place.stop <= last
            assert shard.place.start == layout.starts[shard.parameter] + shard.start
            assert shard.place.stop == layout.starts[shard.parameter] + shard.stop
    assert all((owner == 1).all() for owner in owners) and in_buffer.max() == 1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 64])
def test_a_parameter_is_cut_at_multiples_of_a_cell_and_lies_at_the_same_place_for_any_number_of_ranks(n):
    layout = Layout(SIZES, n, 3)
    assert layout.starts == Layout(SIZES, 1, 1000).starts and all(start % 32 == 0 for start in layout.starts)
    for rank, bucket in itertools.product(range(n), layout.buckets):
        for shard in layout.shards(bucket, rank):
            assert shard.start % CELL == 0 and (shard.stop % CELL == 0 or shard.stop == SIZES[shard.parameter])


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_each_rank_has_as_many_elements_and_less_than_a_cell_for_each_is_added_at_the_end(n):
    layout = Layout(SIZES, n, 4)
    end = layout.starts[-1] + SIZES[-1]
    assert all(bucket.part * n == bucket.stop - bucket.start for bucket in layout.buckets)
    assert end <= layout.size < end + (n + 1) * CELL
    assert sum(bucket.part for bucket in layout.buckets) * n == layout.size


def test_a_bucket_has_about_as_many_bytes_as_asked():
    layout = Layout([10 * CELL], ranks=2, bucket_cells=4)
    assert [bucket.part // CELL for bucket in layout.buckets] == [2, 2, 1]


def test_parameters_without_elements_have_no_buckets():
    assert (Layout([0, 0], 4, 8).size, Layout([0, 0], 4, 8).buckets) == (0, [])


@pytest.mark.parametrize(
    "n, sizes",
    [*((n, SIZES) for n in (1, 2, 3, 8)), (3, [3]), (2, [4096]), (2, [0]), (3, [4097 * CELL])],  # the last: three levels
    ids=str,
)
def test_the_sums_of_all_ranks_make_the_norm_of_one(monkeypatch, n, sizes):
    monkeypatch.setattr(cpu_threads, "n_threads", lambda: 1)  # whose loop is on disk already
    some = np.random.default_rng(n).standard_normal(40_009).astype("f4")
    arrays = [np.resize(some, size) for size in sizes]
    layout = Layout(sizes, n, 3)

    def of_rank(transport):
        owned = [shard for bucket in layout.buckets for shard in layout.shards(bucket, transport.rank)]
        parts = [(s, arrays[s.parameter][s.start : s.stop]) for s in owned]
        shards = [SimpleNamespace(number=s.parameter, start=s.start, stop=s.stop, sums=part) for s, part in parts]
        return ShardedNorm(gpuadam.backends.load("numba-cpu"), shards, transport).norm(sizes)

    assert all_well(on_ranks(n, of_rank)) == [gpuadam.global_norm(arrays)] * n
