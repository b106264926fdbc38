"""How fast a step is: measured on a CPU; not yet on a GPU.

A float32 step of Adam reads param, grad, m and v and writes param, m and v: 28 bytes an element. The memory is the limit. So
the measure is a kernel that moves the same bytes of the same arrays and computes next to nothing (`kernels/limit.py`), in
the same run.

    python -m gpuadam bench --forms all --sizes 2e7
    python -m gpuadam bench --forms "float32,8-bit state,NAdam"

These commands measure your machine: GB/s, bytes an element, and percent of the limit of each form.

The figures are of six virtual machines with two cores:

| here | processor | measured | folder of `benchmarks/results` |
|---|---|---|---|
| Zen 3 | an AMD EPYC that LLVM calls znver3 | 2026-11-30; arrays in the caches 2026-11-29 | `amd-epyc-2-cores` |
| Zen 4 | an AMD EPYC that LLVM calls znver4 | 2026-11-29; narrow numbers 2026-11-30 | `amd-epyc-znver4-2-cores` |
| Zen 5 | an AMD EPYC that LLVM calls znver5 | 2026-11-29 | `amd-epyc-znver5-2-cores` |
| Emerald Rapids | an Intel Xeon that LLVM calls emeraldrapids | 2026-11-30 | `intel-xeon-emeraldrapids-2-cores` |
| Sapphire Rapids | an Intel Xeon that LLVM calls rocketlake | 2026-12-01 | `intel-xeon-rocketlake-2-cores` |
| Granite Rapids | an Intel Xeon that LLVM calls rocketlake | 2026-12-01 | `intel-xeon-graniterapids-2-cores` |

Two virtual machines give another model's number. Their instructions and their caches, of 105 and 480 MB, tell what they are.
All but Zen 3 have vectors of 512 bits. At 20 million elements the memory moves 42 GB/s on Zen 3, 48 on Sapphire Rapids, 54 on
Emerald Rapids, 59 on Granite Rapids, and 97 on Zen 5. On Zen 4 it moves 54, and moved 93 on the machine that measured narrow
numbers. The figures of Emerald Rapids are from before compiled code started the threads of large steps, and those of Zen 4 and
Zen 5 from before it compared torch's tensors. All but those of Granite Rapids are from before arrays began at different places
in 4 KB, from which all that take given memory gain, and before loops asked for memory line by line. All: torch 2.13.0+cpu, jax
0.10.2, optax 0.2.8, numba 0.68.1.

**Compare within a table only.** Machines of one name are shared and differ, and so do two runs: the same step took up to 1.7
times as long. All contenders that take given memory have the same arrays, from 10 million elements on. They take turns, in a new
order each round, so each finds the caches as the others left them. The rows of the tables of CPU times, with quantiles, are in
`benchmarks/results`, but for times of earlier code. `benchmarks/README.md` says how they were measured, and README.md has the
table of one array.

## Many arrays, and small ones

Milliseconds of a step of gpuadam, and in parentheses what share that is of the time of torch fused:

| | Granite Rapids | Sapphire Rapids | Emerald Rapids | Zen 4 | Zen 3 |
|---|---:|---:|---:|---:|---:|
| one array of 20 million elements, `Adam.step` | 9.5 (0.93) | 11.5 (0.81) | 10.9 (0.86) | | 14.0 (0.99) |
| GPT-2 small: 148 arrays, 124 million elements, `Adam.step` | 65 (0.95) | 69 (0.80) | 67 (0.86) | 66 (0.99) | 86 (1.03) |
| the same elements in one flat array | 65 | 77 | 66 | 69 | 81 |
| 1,000 arrays of 1,000 elements, `Adam.step` | 1.2 (0.12) | 1.2 (0.09) | 1.5 (0.17) | 2.0 (0.21) | 1.4 (0.14) |
| the same by `gpuadam.torch.Adam` | 4.5 (0.43) | 5.2 (0.40) | 4.3 (0.49) | | 5.0 (0.52) |
| the whole step of mixed precision over GPT-2 small | 85 (0.42) | 110 (0.42) | 99 (0.42) | | 115 (0.53) |

A step takes no memory beyond its state. torch fused takes none either, and torch foreach 400 MB for 100 million elements
(`benchmarks/memory.py` on Zen 3).

**Calls.** A step that is as the last one, but for its number, the learning rate and the gradients, is checked and made in one
compiled call; several groups are compared one by one, and then updated. Microseconds of a call on 1,000 elements,
Granite Rapids:

| | warm caches | in turn with the others |
|---|---:|---:|
| `gpuadam.adam_step` | 2.1 | 10 |
| `gpuadam.Adam.step` | 3.5 | 14 |
| its kernel alone | 1.8 | 15 |
| Adam by hand in plain NumPy | 7.3 | 24 |
| `gpuadam.torch.Adam` | 20 | 62 |
| torch fused | 31 | 64 |
| `optax.adam` under `jax.jit` | 35 | 103 |

In turn with others the time of the kernel alone, which Python launches, varies most: 8.4 at p20 and 22 at p80, where `adam_step`
took 8.0 and 11.

From 65,536 elements on the call also starts the threads, and lets Python's lock go meanwhile. While Python started them, it
took longer for that than the threads took for 100,000 elements. The table has microseconds, in turn with the others, on Zen 3.
Its columns are two runs, before and after that change, and the kernel took the same time in both. The rows in
`benchmarks/results` are of a third, later run, in which all contenders took 1.15 to 1.35 times as long:

| 100,000 elements | started by Python | by the call |
|---|---:|---:|
| `gpuadam.adam_step` | 207 | 68 |
| `gpuadam.Adam.step` | 135 | 70 |
| its kernel alone | 57 | 57 |
| `gpuadam.torch.Adam` | 271 | 188 |
| torch fused | 214 | 184 |

**Many arrays** are compared with each other, because none that is written may share memory with another: half of the time that
a step of 1,000 took to begin. Where each lies as it did at the last step, this is known. Zen 3, 1,000 arrays: 1.87 ms before,
and 1.37 now.

Two thirds of the time of `gpuadam.torch.Adam` are torch's, which wraps the step of every optimizer. Compiled code asks torch
about each tensor by DLPack's functions for C (torch 2.13 has them), in 60 ns. Python needs 460 for the same: with a torch that
lacks them `gpuadam.torch.Adam` took 1.3 of the time of torch fused for one tensor.

**The first step** of a process, from after `import numpy` on, the import of gpuadam and Numba included
(`benchmarks/first_call.py`):

| | Granite Rapids | Sapphire Rapids | Emerald Rapids | Zen 4 | Zen 3 |
|---|---:|---:|---:|---:|---:|
| `import gpuadam` alone | 20 ms | 29 ms | 22 ms | 21 ms | 31 ms |
| import and first `adam_step`, warm compile cache | 0.24 s | 0.32 s | 0.25 s | 0.27 s | 0.36 s |
| the same, cold compile cache | 1.3 s | 1.9 s | 1.6 s | 1.6 s | 2.0 s |
| import of torch and its first fused step | 1.8 s | 2.4 s | 1.9 s | 2.1 s | 2.9 s |

**Arrays in the caches** are bound by the processor's arithmetic. `benchmarks/in_caches.py` leaves out parts of the step. With
the limit at 1, a step of 100,000 elements:

| | the step | without its division | without its root | without both |
|---|---:|---:|---:|---:|
| Granite Rapids, float32 | 1.50 | 1.08 | 1.05 | 1.05 |
| Granite Rapids, float64 | 2.54 | 1.68 | 1.27 | 1.27 |
| Emerald Rapids, float32 | 1.54 | 1.12 | 1.08 | 1.06 |
| Emerald Rapids, float64 | 2.67 | 1.75 | 1.30 | 1.18 |
| Emerald Rapids, bfloat16 state | 1.51 | 1.39 | 1.35 | 1.29 |
| Emerald Rapids, 8-bit state | 1.84 | 1.75 | 1.72 | 1.67 |
| Zen 4, float32 | 1.36 | 1.14 | 1.09 | 1.06 |
| Zen 3, float32 | 1.31 | 1.23 | 1.19 | 1.14 |

The unit that divides and takes roots, which rounds each number exactly, is nearly all of what is above the limit in float32
and float64. A division by Newton's iteration and fma, without this unit, took 1.6 times as long on Zen 3. The rest of narrow
forms are conversions and random bits.

**Asking for memory ahead.** While Emerald Rapids divides and takes roots it asks for few of the elements that follow. A loop
that prefetches those 512 ahead takes 0.89 of the time of one that does not, at 20 and at 100 million elements, and with
bfloat16 parameters and gradients 0.76; on Sapphire Rapids 0.93, on Granite Rapids 0.95, and with bfloat16 state 0.68. So loops
prefetch there, where a thread's arrays do not fit in its cache. 128 to 1,024 elements ahead are within 2 % in float32. A
prefetch that asks to write was 3 % slower than one that asks to read.

How much is asked for at once matters, too. Loops asked for the next 64 elements of all four arrays at once, in float32 16 cache
lines. Those of float32 and float64 now ask for one line of each array at a time. On Granite Rapids this takes 0.96 of the time,
and the step is as fast as its limit. Others still ask for 64 elements. Where arrays differ in the size of their elements, some
lines would be asked for several times, which took 1.13 with bfloat16 state and 1.75 with complex numbers.

On Zen 3, 4 and 5 prefetches to write, of 64 elements at once, took 1.00 to 1.2 of the time of none. Those to read took 0.98 to
1.05 in float32 on Zen 3, 1.0 to 1.15 with bfloat16, and 0.95 to 1.07 in sums of squares. So there are none on AMD's processors.

**Vectors of 512 bits.** On Emerald Rapids LLVM takes 256, unless it is asked. With 512 a step with bfloat16 state takes 0.85 of
the time (0.89 on Granite Rapids), one with 8-bit state 0.89 (both 0.87 on Sapphire Rapids, with prefetches), and with float16
parameters and gradients, which integers converted then, 0.77. float32 and float64 gain at most 1 % in memory, and float32 loses
2 to 3 % in the caches, so both are left at 256 (`kernels/processor.py`).

## Narrow numbers

Narrow numbers save memory everywhere. They save time where the memory is the limit. Where it is quick, or the processor slow,
conversions and random bits take longer than the bytes. 20 million elements, measured in turn, times float32's:

| form | bytes an element | Granite Rapids | Sapphire Rapids | Emerald Rapids | Zen 5 | Zen 4 | Zen 3 |
|---|---:|---:|---:|---:|---:|---:|---:|
| float32 | 28 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |
| bfloat16 parameters and gradients | 22 | 0.81 | 0.79 | 0.77 | 0.79 | 0.87 | 0.83 |
| float16 parameters and gradients | 22 | 0.84 | 0.75 | | | | 0.85 |
| bfloat16 parameters with a remainder, bfloat16 gradients | 26 | 0.96 | 0.83 | 0.89 | 0.94 | 1.04 | 0.90 |
| bfloat16 state | 20 | 0.76 | 0.77 | 0.79 | 0.73 | 0.96 | 0.89 |
| all bfloat16, rounded randomly | 14 | 0.69 | 0.94 | 0.74 | 0.51 | 1.03 | 1.16 |
| 8-bit state | 16.5 | 1.20 | 1.39 | 1.10 | 0.80 | 1.48 | 1.31 |
| AMSGrad | 36 | 1.31 | 1.15 | 1.25 | 1.29 | 1.29 | 1.09 |
| NAdam, RAdam, AdaMax | 28 | 1.00 to 1.03 | 0.91 to 0.97 | 0.99 to 1.00 | 0.99 to 1.00 | 1.00 to 1.01 | 0.99 to 1.13 |

On Zen 3 other work disturbed float32, by which its column is divided, float16, NAdam and AdaMax: their p80 is more than 1.5 times
their p20. float16 has no figure where it was measured before processors converted it (F16C).

**8-bit state** is bound by its arithmetic. Eight groups are updated before the first is encoded: when each was encoded at
once, the processor waited for the largest number of each. In the caches of Emerald Rapids an element takes a thread 1.19 ns, and
one of float32 0.65 (`benchmarks/in_caches.py`, 100,000 elements over two threads).

## The whole step

Unscaling, check, clipping, update and zeros of 20 million elements take 13.6 ms on Granite Rapids and 16.4 ms on Zen 3. That is
0.42 and 0.51 of the time of torch's `unscale_`, `clip_grad_norm_`, fused step and `zero_grad`.

## State in files, and many ranks

A step with 8 GB of state in files takes 1.01 to 1.10 times as long as moving the same bytes without arithmetic. State that
fits in the budget stays in memory, and a step then takes 0.7 of the time: `gpuadam.offload`. MPI's ranks on two cores share one
memory, so there is little to gain: `gpuadam.sharded` has the times.

## What is expected of a GPU

No time on a GPU has been measured. What the machine code says needs no GPU. A memory is busy while enough bytes are in
flight: on each multiprocessor 16 KiB on an A100, 32 on an H100, 48 on an H200, 64 on a B200 and 128 on Rubin. NVIDIA tunes
the transforms of its library CUB for these numbers (`cc_to_min_bytes_in_flight`), and they reach 91 to 94 % of the data
sheet's bandwidth. A latency and a bandwidth alone would ask for less: 18 KiB on an H100.

A kernel has in flight what its resident threads load before they use the first number. The float32 kernel of one array takes
40 registers, so 1,536 threads fit on a multiprocessor, and each loads 64 bytes: 96 KiB. Where one vector of each array is too
little, a thread takes several, all of which it loads first (`kernels/gpu_in_flight.py`). That is so on a B200 for arrays that
have a change in the place of the parameter's update, and for all bfloat16; on an H100 and later for 8-bit state in CuPy; and
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

On Rubin 8-bit state falls short, by 38 % in CuPy and 45 % in Numba. So do all bfloat16 and `change` in Numba, by a quarter
and by 6 %. The script names what is short.

The host's time of a step on a GPU is that of Python and of the libraries. `benchmarks/host_time.py` measures it beside bare
launches, on a GPU, and without one over a driver that answers in no time. Over this one, in microseconds (p20, Emerald Rapids):

| | CuPy | Numba |
|---|---:|---:|
| a bare launch: an ElementwiseKernel, a Numba kernel | 6.7 | 50 |
| `adam_step` | 14 | 21 |
| `Adam.step`, one array | 18 | 19 |
| the same with `max_norm` | 150 | 240 |
| `Adam.step`, 148 arrays | 73 | 140 |
| the same with `max_norm` | 240 | 390 |
| the same of a capturable optimizer, with a scale on the device, `max_norm` and `check_finite` | 250 | 480 |
| `global_norm` of 148 arrays | 500 | 710 |
| 148 bare launches | 1,000 | 7,200 |

The steps are as the ones before them: with the same arrays, or gradients that lie where the last ones did, and the same options
but for the numbers of lr and grad_scale. Others take the long way, which is some 3 ms for 148 arrays with `max_norm`. Always long
are steps with `norms=True`, `change=`, `lr_scale=`, `where=`, `stream=`, copies of the parameters, or a `norm` or `found_inf`
that is a number.

These are of a program with one thread of Python. With others, as in a notebook, the libraries make the launches of a repeated
step: CuPy needs 5 microseconds more for each, Numba 40.
"""
