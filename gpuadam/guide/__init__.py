"""The guide: one page a subject. Each module here holds a page and no code; pytest runs the examples.

| page | subject |
|---|---|
| `gpuadam.guide.arrays_and_groups` | which arrays, backends and streams; groups, schedules, weight decay |
| `gpuadam.guide.narrow_numbers` | bfloat16, float16 and 8-bit state; remainders; random rounding |
| `gpuadam.guide.whole_step` | unscaling, clipping, leaving a step out, running means, CUDA graphs |
| `gpuadam.guide.array_programs` | complex numbers, vectors, bounds, parts of arrays, rates of rows, the change alone |
| `gpuadam.guide.own_kernels` | the update in a kernel of your own, beside the gradient |
| `gpuadam.guide.bring_your_adam` | which call gives the numbers of the Adam that a program has |
| `gpuadam.guide.options` | which options go together |
| `gpuadam.guide.pytorch` | the drop-in for `torch.optim`; tensors of torch and arrays of JAX |
| `gpuadam.guide.memory_pages` | pages of 2 MB on a CPU: what they change, and how to have them |
| `gpuadam.guide.how_exact` | the arithmetic, its evidence, its limits |
| `gpuadam.guide.how_fast` | what has been measured, and on which machine |
| `gpuadam.guide.examples` | nine short programs |

A subject that has a folder of code has its page there: `gpuadam.checkpoint`, `gpuadam.sharded` (many ranks),
`gpuadam.offload`, `gpuadam.planning`, `gpuadam.testing`.
"""
