"""Checkpoints: an optimizer's state in safetensors files that survive a crash and that any safetensors reader can open.

| | save | load |
|---|---|---|
| one process: a file | `opt.save(path)` | `opt = gpuadam.load(path, params)` |
| state elsewhere: a file | `opt.save(path)`, of an `OffloadAdam` | `opt = gpuadam.load_offload(path, params, state=folder)` |
| many ranks: a folder | `opt.save(folder)`, of a `ShardedAdam` | `opt = gpuadam.load_sharded(folder, params, transport)` |

`save` writes the state by name, the hyperparameters and the step counts. `load` makes the optimizer again, and training
continues bit for bit, on any backend. With `with_params=True`, for both, the parameters are saved and restored too. Where they
are in a file and `load` is not told whether to restore them, it warns:

>>> import numpy as np, gpuadam, pathlib, tempfile
>>> path = pathlib.Path(tempfile.mkdtemp()) / "adam.safetensors"
>>> w, grad = np.ones(3, "float32"), np.array([1.0, -1.0, 0.5], "float32")
>>> opt = gpuadam.AdamW({"w": w}, lr=0.1, state_dtype="bfloat16")
>>> opt.step({"w": grad})
>>> opt.save(path, with_params=True)
>>> again = {"w": np.zeros(3, "float32")}
>>> opt_again = gpuadam.load(path, again, with_params=True)
>>> for one, params in ((opt, {"w": w}), (opt_again, again)):
...     one.step({"w": grad})
>>> bool((again["w"] == w).all()), opt_again.steps
(True, 2)

* The file is the new one or the old one, whatever is killed and however full the disk is.
* Every changed byte is noticed.
* Names, shapes or dtypes that differ are refused, and `names={"old": "new"}` says which are new names. So is a checkpoint that
  is damaged or incomplete.
  `gpuadam.CheckpointError` is raised before anything of the caller's has changed.
* Saving and loading use a few MB of memory beside the state.
* `gpuadam.load(path, params, state_dtype="8bit")` converts the moments: `gpuadam.guide.narrow_numbers`.
* `gpuadam.load` and `gpuadam.load_offload` read each other's files, and a folder that many ranks wrote. `gpuadam.load_sharded`
  also takes a file, or a folder that another number of ranks wrote: `gpuadam.sharded`.

`gpuadam.foreign_state` takes over the state of other libraries' Adam and gives it back, exactly: `from_torch`, `from_optax`,
`to_torch`, `to_optax`. Checkpoints of a program that uses `gpuadam.torch` are torch's: `gpuadam.guide.pytorch`.

**Shown:** k steps, save, load and k steps have the bits of 2k steps, in twelve forms of state. Fifty processes are killed in
the middle of saves; files are truncated at every byte; 10,000 bytes are changed one at a time, and 10,000 files in other ways,
half of them with checksums made right; the disk is full; two jobs save into one folder.

## A file

Its tensors are named by parameter and kind of state. They are in C order, little-endian, and have the parameter's shape. The
scales of 8-bit state have one dimension instead, with one element for each 32 neighbours of the parameter. Complex numbers
are two, in a last dimension. Where several numbers share a v, as of `complex="joint"`, `w.v` and `w.max_v` lack that dimension.

| tensor | dtype | holds |
| --- | --- | --- |
| `w.m`, `w.v`, `w.max_v` | F32, F64, BF16 or, the codes of 8-bit state, U8 | the moments; `max_v` with `amsgrad` |
| `w.m_scale`, `w.v_scale` | F32 | the scales of 8-bit state |
| `w.remainder` | I16 | the low half of a bfloat16 parameter's exact value, with `master="remainder"` |
| `w.ema` | F32 or F64 | the running mean, with `ema_decay` |
| `w.param` | F64, F32, F16 or BF16 | the parameter itself, if the file was saved `with_params`; always a float32 master |

The metadata are strings. Those marked JSON are JSON in a string.

| key | value |
| --- | --- |
| `header_crc32` | the checksum of the header |
| `format`, `version` | `gpuadam.optimizer`, `1` |
| `class` | `Adam`, `AdamW`, `NAdam`, ...; many ranks also write `NAdamW` and the like: decoupled decay |
| `gpuadam` | the version of gpuadam that wrote the file |
| `options` | JSON: the options of the constructor, as `Options.saved` of `gpuadam/options.py` returns them |
| `groups` | JSON: a list of `{"names": [...], "lr": ..., "betas": ..., ...}`; lr is null if it was a callable |
| `steps` | JSON: how many steps were taken, without those that were left out |
| `params` | JSON: name -> `{"step", "dtype", "shape"}` |
| `copies` | JSON: the names of the parameters that had a copy (`param_copies`); the copies are not saved |
| `crc32` | JSON: name -> the checksums of a tensor |

A checksum is a CRC-32 in eight hexadecimal digits. A tensor has one for each MiB of its bytes, in a row. That of the header
is computed with zeros in its own place, which is always the first of the file's metadata. So every changed byte is noticed,
and parts of a tensor can be read and known to be right.

A file is written beside its place, flushed to the disk and renamed: whatever happens, it is the new one or the old one, whose
mode the new one keeps. A killed save leaves `.gpuadam-(16 digits).tmp`, which nothing reads.

## A folder

| file | holds |
| --- | --- |
| `index.safetensors` | the metadata, without tensors, and the names of the parts |
| `part-0-of-4-(16 digits).safetensors`, ... | the arrays, or parts of arrays, that each rank owned |
| `.gpuadam-lock` | nothing; it is locked by the job that saves into the folder |

The index has two keys more. A part has the metadata `format` (`gpuadam.optimizer.part`) and `version` alone, with the
checksums.

| key | value |
| --- | --- |
| `reduction` | `mean` or `sum`, as in `ShardedAdam` |
| `parts` | JSON: a list of `{"file", "n_bytes", "crc32"}`; crc32 is the checksum of the part's header |

The tensors of a part are pieces of one dimension: `w[4096:8192].m` has elements 4096 to 8191 of `w.m`, in C order. The
scales of 8-bit state, too, are named by the elements of the parameter that they belong to. So any number of ranks can read
what another number wrote.

Every rank first writes a part under a new name. Then the index replaces the old one in one step, and the old parts are
deleted. The next save deletes parts of a save that was killed. Meanwhile the lock is held, and a save of another job into
the same folder is refused.

## The files of this package

`safetensors` reads and writes the format in pieces. `regular_file` opens and locks files, and `atomic_file` replaces a file
whole or not at all. `format` has the metadata, `tensors` the arrays of an optimizer as tensors. `saving` writes the checkpoint
of an `Adam`. `stored` has the arrays of a checkpoint that is open, `converting` reads moments of another format, and `loading`
makes an `Adam` of them. Many ranks' checkpoints are in `gpuadam/sharded/saving.py` and `gpuadam/sharded/loading.py`.
"""

from .safetensors import CheckpointError

__all__ = ["CheckpointError"]
