"""Pages of memory: why large arrays on a CPU want pages of 2 MB, and how to have them.

A processor remembers where some thousand pages of memory lie. With pages of 4 KB that is a few megabytes; a step over large
arrays then looks each page up in tables, in a virtual machine in two of them. On Emerald Rapids of `gpuadam.guide.how_fast` a
step over arrays on small pages took twice as long as on pages of 2 MB, "huge pages". On AMD's it made less difference.
`benchmarks/pages.py` measures it on your machine. All of this is about Linux and the CPU: a GPU has large pages in any case.

## What gpuadam does

Memory that gpuadam allocates asks for huge pages, from 4 MB on, and lies on whole ones: the state of an optimizer, the buffers of
`gpuadam.flatten` and `gpuadam.ShardedAdam`, and the state of `gpuadam.OffloadAdam` in memory. What the system did not give
at once is moved to huge pages (MADV_COLLAPSE, Linux 6.1). The numbers are the same on any pages.

The state of a group is one allocation for each dtype: first m of all its parameters, then v. So the moments of a thousand
small arrays lie on huge pages, too. It is touched when the optimizer is made, which takes some 0.15 s for 1 GB; the first
step is faster by as much. When a parameter is removed or replaced, the huge pages that its moments have to themselves go back
to the system; the rest goes with the last array of the group.

**Places in 128 MB.** A step goes through param, grad, m and v side by side. On Zen 3 it took 1.6 to 2.0 times as long where
these began at multiples of 128 MB, and 3.1 to 4.5 times at multiples of 256 MB, as if all were in the same banks of memory.
With 16 KB more between them nothing was lost. So gpuadam's arrays begin at different places. Those of NumPy, of 2^26 float32
for instance, are 256 MB and 4 KB apart: that took 1.2 to 1.35 times as long. `benchmarks/pages.py` has a table of it.

**Places in 4 KB.** Large arrays of NumPy begin 16 bytes behind a page's first byte, from 32 MB on and as a rule also below,
and those of torch 64. So a step comes to the end of a small page in param, grad, m and v at once. On Granite Rapids a step
over such arrays took 1.03 to 1.05 times as long as one over four that begin 1 KB farther each, on huge pages too. The moments
of a group and the buffers of `gpuadam.flatten` begin at different ones of eight places. The moments of `gpuadam.torch` begin
where torch's arrays do.

## What to do

Parameters and gradients are yours, and as large as both moments.

1. See what the system gives: `python -m gpuadam doctor` says it in a line, `python -m gpuadam bench` has a column "% huge".
   The setting is in `/sys/kernel/mm/transparent_hugepage/enabled`. With `madvise`, the default of many systems, memory has to
   ask. With `always` it need not. With `never` only memory that is moved afterwards gets them, as gpuadam's is. As root:
   `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`.
2. Put many arrays into one buffer with `gpuadam.flatten`: its parameters and gradients, views in the shapes of your arrays,
   lie on huge pages whole, and do not begin at the same place in 128 MB or in 4 KB.
3. NumPy asks for huge pages for arrays of 4 MB and more. They begin anywhere, and huge pages only at multiples of 2 MB, so an
   array of 9 MB has 6 to 8 MB on huge pages, and smaller arrays have none. One large array loses little.
4. torch's arrays do not ask. `gpuadam.torch` asks for them for its moments, as far as whole ones lie in each. For parameters and
   gradients, with `madvise`, run it with `THP_MEM_ALLOC_ENABLE=1`, or make its tensors over such a buffer:
   `torch.from_numpy(flat.params["w"])`.

>>> import numpy as np, gpuadam
>>> layers = {f"w{k}": np.ones((768, 768), "float32") for k in range(4)}
>>> flat = gpuadam.flatten(layers)
>>> flat.grad.nbytes >= 4 << 20
True

A container that limits memory counts a huge page whole, so each allocation may count up to 2 MB more than its bytes.
"""
