"""Nine short programs, each one file of less than 120 lines in `gpuadam/examples`.

    pip install "gpuadam[examples]"
    python -m gpuadam.examples digits

| name | what it does | arrays |
|---|---|---|
| `digits` | learns to read handwritten digits: a network in plain array code | NumPy, CuPy |
| `gaussians` | splits and prunes Gaussians that fit a photograph: 33.6 to 34.0 dB; without: 31.0 dB | NumPy, CuPy |
| `tomography` | reconstructs a slice from 30 noisy projections: error 9.5 %; filtered back-projection has 40.8 % | NumPy, CuPy |
| `line_scan` | sharpens a photograph while it is read: error 1.3 %; 2.3 % if rows that are done move on | NumPy, CuPy |
| `ptychography` | finds a complex object and beam from diffraction patterns: error 1.3 %; ePIE has 4.3 % | NumPy, CuPy |
| `photons` | clears a photograph of few photons, gradient and update in one kernel: 12.9 dB, then 25.2 dB | NumPy, CuPy |
| `thomson` | spreads charges over a sphere, with a Numba CUDA kernel of its own | Numba, NumPy |
| `torch_digits` | trains a PyTorch model, with one line changed | PyTorch |
| `sharded_digits` | trains over many ranks, and continues from a checkpoint with any other number of ranks | NumPy |

`torch_digits` needs the extra `torch` too, and `sharded_digits` the extra `mpi`.

`gaussians`, `tomography`, `line_scan`, `ptychography`, `photons` and `thomson` write a picture, NAME.png, into the current
folder; `--plot FILE` names another. `sharded_digits` saves into the folder `digits.checkpoint` there, and a second run continues
from it: remove it, or give `--checkpoint FOLDER`, to begin anew.

On a GPU: `--arrays cupy`; `thomson` takes a GPU by itself; `torch_digits --device cuda`.
"""
