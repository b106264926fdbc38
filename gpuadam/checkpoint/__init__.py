"""Checkpoints: an optimizer's state in safetensors files that survive a crash and that any safetensors reader can open.

    opt.save("adam.safetensors", with_params=True)                       one process: a file
    opt = gpuadam.load("adam.safetensors", params, with_params=True)

    opt.save("checkpoint", with_params=True)                             many ranks, a `ShardedAdam`: a folder
    opt = gpuadam.load_sharded("checkpoint", params, transport, with_params=True)

Training goes on bit for bit, on any backend. `gpuadam.load` also takes a folder that many ranks wrote, and `load_sharded` a file,
or a folder that another number of ranks wrote. A checkpoint that is damaged, incomplete or does not fit the parameters raises
CheckpointError before anything of the caller's has changed. Saving and loading take a few MB of memory beside the state.


# A file

Its tensors are named by parameter and kind of state. They are in C order, little-endian, and have the parameter's shape. The
scales of 8-bit state have one dimension instead, with one element for each 32 neighbours of the parameter.

| tensor | dtype | holds |
| --- | --- | --- |
| `w.m`, `w.v`, `w.max_v` | F32, F64, BF16 or, the codes of 8-bit state, U8 | the moments; `max_v` with `amsgrad` |
| `w.m_scale`, `w.v_scale` | F32 | the scales of 8-bit state |
| `w.remainder` | I16 | the low half of a bfloat16 parameter's exact value, with `master="remainder"` |
| `w.ema` | F32 or F64 | the running mean, with `ema_decay` |
| `w.param` | F64, F32, F16 or BF16 | the parameter itself, if the file was saved `with_params` |

The metadata are strings. Those marked JSON are JSON in a string.

| key | value |
| --- | --- |
| `header_crc32` | the checksum of the header |
| `format`, `version` | `gpuadam.optimizer`, `1` |
| `class` | `Adam`, `AdamW`, `NAdam`, ...; many ranks also write `NAdamW` and the like: decoupled decay |
| `gpuadam` | the version of gpuadam that wrote the file |
| `options` | JSON: the options of the constructor, as `Adam.options` |
| `groups` | JSON: a list of `{"names": [...], "lr": ..., "betas": ..., ...}`; lr is null if it was a callable |
| `steps` | JSON: how many calls of `step` there were |
| `params` | JSON: name -> `{"step", "dtype", "shape"}` |
| `copies` | JSON: the names of the parameters that had a copy (`param_copies`); the copies are not saved |
| `crc32` | JSON: name -> the checksums of a tensor |

A checksum is a CRC-32 in eight hexadecimal digits. A tensor has one for each MiB of its bytes, in a row. That of the header is
computed with zeros in its own place, which is always the first of the file's metadata. So every changed byte is noticed, and
parts of a tensor can be read and known to be right.

A file is written beside its place, flushed to the disk and renamed: whatever happens, it is the new one or the old one. A killed
save leaves `.gpuadam-(16 digits).tmp`, which nothing reads.


# A folder

    index.safetensors                   the metadata, without tensors, and the names of the parts
    part-0-of-4-(16 digits).safetensors, ...    the arrays, or parts of arrays, that each rank owned

The index has two keys more. A part has the metadata `format` (`gpuadam.optimizer.part`) and `version` alone, with the checksums.

| key | value |
| --- | --- |
| `reduction` | `mean` or `sum`, as in `ShardedAdam` |
| `parts` | JSON: a list of `{"file", "n_bytes", "crc32"}`; crc32 is the checksum of the part's header |

The tensors of a part are pieces of one dimension: `w[4096:8192].m` has elements 4096 to 8191 of `w.m`, in C order. The scales of
8-bit state, too, are named by the elements of the parameter that they belong to. So any number of ranks can read what another
number wrote.

Every rank first writes a part under a new name. Then the index replaces the old one in one step, and the old parts are deleted.
The next save deletes parts of a save that was killed.
"""

from .safetensors import CheckpointError

__all__ = ["CheckpointError"]
