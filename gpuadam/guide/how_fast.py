"""How fast a step is: measured on a CPU; not yet on a GPU.

A float32 step of Adam reads param, grad, m and v and writes param, m and v: 28 bytes an element. The memory is the limit. So
the measure is a kernel that moves the same bytes of the same arrays and computes next to nothing (`kernels/limit.py`), in
the same run.

    python -m gpuadam bench --forms all --sizes 2e7
    python -m gpuadam bench --forms "float32,8-bit state,NAdam"

These commands measure your machine: GB/s, bytes an element, and percent of the limit of each form.

The figures are of two virtual machines with two cores. "AVX2": an AMD EPYC of 2026-11-23, with torch 2.13.0+cpu, jax 0.10.2,
optax 0.2.8 and deepspeed 0.19.8. "AVX-512": an AMD EPYC that LLVM calls znver4, of 2026-11-29 and 30. Both with numba 0.68.1.
Runs on these shared machines differ by some 5 %. Where the host has put an allocation of 100 million elements changes a step
on it by half, whoever makes the step; so all contenders that can have the same large arrays. All take turns, in a new order
each round, so each finds the caches as the others left them. Every row with its quantiles is in `benchmarks/results`, by
machine; `benchmarks/README.md` says how it was measured, and README.md has the table of one array.

Rows of a third machine are there too, an AMD EPYC that LLVM calls znver5, of 2026-11-29. Its memory is about as fast as that
of znver4. At 20 million elements nearly every form takes the time of its limit there: all bfloat16 0.51 of float32's time,
bfloat16 state 0.73, and 8-bit state 0.80, which is 1.28 of its limit's. 1,000 arrays of 1,000 elements take 0.13 of the time
of torch fused; one tensor in warm caches takes `gpuadam.torch.Adam` 1.10 of it, 148 tensors 0.96, and 1,000 0.75.

## Many arrays, and small ones

| | gpuadam | torch fused | ratio |
|---|---:|---:|---:|
| AVX-512: GPT-2 small: 148 arrays, 124 million elements, `Adam.step` | 66 ms (one flat array: 69) | 67 ms | 0.99 |
| AVX-512: 1,000 arrays of 1,000 elements, `Adam.step` | 2.0 ms | 9.7 ms | 0.21 |
| AVX2: memory of a step beyond its state, 100 million elements | 0 MB | 0 MB (foreach: 400 MB) | |

**Calls.** A step that is as the last one, but for its number, the learning rate and the gradients, is checked and made in one
compiled call; several groups are compared one by one, and then updated. Microseconds of a call on 1,000 elements, AVX-512:

| | warm caches | in turn with the others |
|---|---:|---:|
| `gpuadam.adam_step` | 2.2 | 7.6 |
| `gpuadam.Adam.step` | 3.5 | 12 |
| its kernel alone | 1.1 | 4.3 |
| Adam by hand in plain NumPy | 8.7 | 22 |
| `gpuadam.torch.Adam` | 30 | 71 |
| torch fused | 32 | 65 |
| `optax.adam` under `jax.jit` | 17 | 66 |

`gpuadam.torch.Adam` takes 0.96 of the time of torch fused for one tensor in warm caches, and 1.1 among ten others, whose turns
leave none of its code in the caches; it takes 0.5 for 148 tensors, and 0.6 to 0.7 for 1,000. Most of it is spent on asking torch
about its tensors.

**The first step** of a process takes 0.27 s with a warm compile cache and 1.6 s with a cold one, `import gpuadam` and Numba's own
import included, where `import torch` and its first step take 2.1 s. `import gpuadam` takes 21 ms, 0.4 of what `import numpy`
takes.

**Arrays in the caches** are bound by the processor's arithmetic. `benchmarks/in_caches.py` leaves out parts of the step. With the
limit at 1, a step of 100,000 elements takes on AVX-512 1.36, without its division 1.14, without its square root 1.09, and without
both 1.06: the unit that divides and takes roots, which rounds each number exactly, is nearly all of what is above the limit. On
AVX2 it is half of that, 1.31, 1.23, 1.19 and 1.14; the other half are some twenty other operations. A division by Newton's
iteration and fma, without the divider, took 1.6 times as long there.

**Asking for memory ahead.** Loops that ask for elements 128 to 2,048 ahead were no faster on AMD's processors, of either kind:
1.00 to 1.2 times the time of a loop that does not ask. On an Intel Xeon with AVX-512 such a loop, in C, took 0.93.

## Narrow numbers

Narrow numbers save memory everywhere. They save time where the memory is the limit. Where it is quick, or the processor slow,
conversions and random bits take longer than the bytes. 20 million elements, measured in turn, times float32's:

| form | bytes an element | AVX-512 | AVX2 |
|---|---:|---:|---:|
| float32 | 28 | 1.00 | 1.00 |
| bfloat16 parameters and gradients | 22 | 0.87 | 1.04 |
| bfloat16 parameters with a remainder, bfloat16 gradients | 26 | 1.04 | 1.10 |
| bfloat16 state | 20 | 0.96 | 1.36 |
| all bfloat16, rounded randomly | 14 | 1.03 | 1.66 |
| 8-bit state | 16.5 | 1.48 | 2.51, of an earlier loop |
| AMSGrad | 36 | 1.29 | 1.27 |
| NAdam, RAdam, AdaMax | 28 | 1.00 to 1.01 | 0.96 to 0.99 |

**8-bit state** is bound by its arithmetic. In the caches, on AVX-512, an element takes a thread 0.87 ns, and one of float32
0.31. Eight groups are updated before the first is encoded: when each was encoded at once, the processor waited for the largest
number of each, and an element took 1.08 ns. With vectors of 256 bits, on the same processor, it took 1.34 then and takes 1.09
now. A loop that encodes a group while it updates the next one took 0.93 to 1.00.

## The whole step

AVX2: unscaling, check, clipping, update and zeros take 12.8 ms for 20 million elements, and 98 ms for GPT-2 small's 148 arrays.
That is 0.55 and 0.59 of the time of torch's `unscale_`, `clip_grad_norm_`, fused step and `zero_grad`.

## State in files, and many ranks

AVX2: a step with 8 GB of state in files takes 1.95 s, 1.22 times as long as moving the same bytes without arithmetic. AVX-512:
with 2 GB of state in the system's cache it takes 1.04 times as long, and half of that time if all of it fits in the budget:
`gpuadam.offload` has more. MPI's ranks on two cores share one memory, so nothing can become faster: `gpuadam.sharded` has the
times.

## What is expected of a GPU

No time on a GPU has been measured. What the machine code says needs no GPU. A memory is busy while enough bytes are in
flight: on each multiprocessor 16 KiB on an A100, 32 on an H100, 48 on an H200, 64 on a B200 and 128 on Rubin. NVIDIA tunes
the transforms of its library CUB for these numbers (`cc_to_min_bytes_in_flight`), and they reach 91 to 94 % of the data
sheet's bandwidth. A latency and a bandwidth alone would ask for less: 18 KiB on an H100.

A kernel has in flight what its resident threads load before they use the first number. The float32 kernel of one array takes
40 registers, so 1,536 threads fit on a multiprocessor, and each loads 64 bytes: 96 KiB. Where one vector of each array is too
little, a thread takes several, all of which it loads first (`kernels/gpu_in_flight.py`). That is so on a B200 for arrays that
have a change in the place of the parameter's update, and for bfloat16 alone; on an H100 and later for 8-bit state in CuPy; and
on Rubin, whose multiprocessors hold 1,024 threads, for nearly all.

    python benchmarks/in_flight.py --arch sm_90,sm_100,sm_107       # every form: registers, threads, bytes, what is needed
    benchmarks/gpu.sh OUTDIR launch_shapes                          # on a GPU: the time of one, two and four vectors a thread

| float32, CuPy | registers | threads | vectors, bytes of each thread | KiB in flight | needed |
|---|---:|---:|---:|---:|---:|
| H200 (sm_90), one array | 40 | 1,536 | 1, 64 | 96 | 48 |
| H200 (sm_90), many arrays | 61 | 1,024 | 1, 64 | 64 | 48 |
| B200 (sm_100), one array | 40 | 1,536 | 1, 64 | 96 | 64 |
| B200 (sm_100), many arrays | 53 | 1,152 | 1, 64 | 72 | 64 |
| Rubin (sm_107), one array | 94 | 640 | 4, 256 | 160 | 128 |
| Rubin (sm_107), many arrays | 96 | 640 | 4, 256 | 160 | 128 |
| 8-bit state, H200 | 121 | 512 | 2, 160 | 80 | 48 |
| 8-bit state, B200 | 121 | 512 | 2, 160 | 80 | 64 |
| 8-bit state, Rubin | 120 | 512 | 2, 160 | **80** | 128 |

On Rubin 8-bit state falls short, by 38 % in CuPy and 45 % in Numba. So do bfloat16 alone and `change` in Numba, by a quarter and
by a tenth. The script names what is short.

The host's time of a step on a GPU is that of Python and of the libraries. `benchmarks/host_time.py` measures it beside bare
launches, on a GPU, and without one over a driver that answers in no time. Over this one, in microseconds (p20, AVX-512):

| | CuPy | Numba |
|---|---:|---:|
| a bare launch: an ElementwiseKernel, a Numba kernel | 4.7 | 35 |
| `adam_step` | 9.2 | 15 |
| `Adam.step`, one array | 10 | 12 |
| `Adam.step`, 148 arrays | 33 | 130 |
| 148 bare launches | 700 | 5,700 |

These are of a program with one thread of Python. With others, as in a notebook, the libraries make the launches of a repeated
step: CuPy needs 5 microseconds more for each, Numba 40.
"""
