"""How fast a step is: measured on a CPU; not yet on a GPU.

A float32 step of Adam reads param, grad, m and v and writes param, m and v: 28 bytes an element. The memory is the limit. So
the measure is a kernel that moves the same bytes of the same arrays and computes next to nothing (`kernels/limit.py`), in
the same run.

    python -m gpuadam bench --forms all --sizes 2e7
    python -m gpuadam bench --forms "float32,8-bit state,NAdam"

These commands measure your machine: GB/s, bytes an element, and percent of the limit of each form.

All figures below were measured on a 2-core AMD EPYC (AVX2) virtual machine on 2026-11-23, with numba 0.68.1, torch
2.13.0+cpu, jax 0.10.2, optax 0.2.8 and deepspeed 0.19.8. Runs on this shared machine differ by some 5 %, and short ones of
100 million elements by more. README.md has the table of one large array. There the kernel takes 0.95 to 1.06 times the
limit's time. All contenders take turns, in a new order each round, so each finds the caches as the others left them. Every
row with its quantiles is in `benchmarks/results`; `benchmarks/README.md` says how it was measured.

## Many arrays, and small ones

| | gpuadam | torch fused | ratio |
|---|---:|---:|---:|
| GPT-2 small: 148 arrays, 124 million elements, `Adam.step` | 72 ms (one flat array: 72) | 75 ms | 0.95 |
| 1,000 arrays of 1,000 elements, `Adam.step` | 2.8 ms | 12.0 ms | 0.24 |
| 1,000 elements, warm caches: `adam_step` | 11 us | 53 us | 0.21 |
| 1,000 elements, warm caches: `Adam.step` | 14 us | 53 us | 0.27 |
| 1,000,000 elements, warm caches: `adam_step` | 0.33 ms (its limit: 0.19) | 0.45 ms | 0.74 |
| first step of a process, cold and warm compile cache | 2.8 s, 0.52 s | 2.6 s (import torch) | |
| `import gpuadam`, beyond NumPy | 27 ms | | |
| memory of a step beyond its state, 100 million elements | 0 MB | 0 MB (foreach: 400 MB) | |

Arrays that fit in the caches are bound by the processor's dividers: a step has one division and one square root an element,
each rounded exactly. A division by Newton's iteration and fma, without the divider, takes 1.6 times as long on this machine.

## Narrow numbers

Narrow numbers save memory everywhere. They save time where the memory is the limit. On these two cores, whose memory was
quick that day, conversions and random bits take longer than the bytes. 20 million elements, measured in turn, times
float32's:

| form | bytes an element | time |
|---|---:|---:|
| float32 | 28 | 1.00 |
| bfloat16 parameters and gradients | 22 | 1.04 |
| bfloat16 parameters with a remainder, bfloat16 gradients | 26 | 1.10 |
| bfloat16 state | 20 | 1.36 |
| all bfloat16, rounded randomly | 14 | 1.66 |
| 8-bit state | 16.5 | 2.51 |
| AMSGrad | 36 | 1.27 |
| NAdam, RAdam, AdaMax | 28 | 0.96 to 0.99 |

## The whole step

Unscaling, check, clipping, update and zeros take 12.8 ms for 20 million elements, and 98 ms for GPT-2 small's 148 arrays.
That is 0.55 and 0.59 of the time of torch's `unscale_`, `clip_grad_norm_`, fused step and `zero_grad`.

## State in files, and many ranks

A step with 8 GB of state in files takes 1.95 s, 1.22 times as long as moving the same bytes without arithmetic:
`gpuadam.offload` has more. MPI's ranks on these two cores share one memory, so nothing can become faster:
`gpuadam.sharded` has the times.

## What is expected of a GPU

No time on a GPU has been measured. `benchmarks/launch_shapes.py` reads the machine code, which needs no GPU. For sm_90 the
kernel takes 39 registers, so 1,536 threads fit on a multiprocessor and have 96 KiB of loads on their way. An H100's memory,
at 3.35 TB/s (its data sheet) and a latency of some 700 ns, needs 18 KiB on each of 132 multiprocessors: a fifth of what the
kernel has, whatever the block size. So two or four vectors a thread (56 and 88 registers; 144 and 160 KiB) gain nothing, and
a grid-stride loop costs 6 registers and a branch. What is left are the DRAM's read/write turnaround, which all shapes share,
and the last wave of blocks. `benchmarks/gpu.sh OUTDIR launch_shapes` measures the variants in turn on the same arrays.
"""
