"""State of another format: checkpoints, state_dicts and other libraries' state, converted where that is asked for."""

import copy

import libraries
import narrow_model as model
import numpy as np
import pytest
from checkpoint_files import sealed, taken_apart
from thread_ranks import all_well, on_ranks

import gpuadam
from gpuadam import foreign_state, state_conversion
from gpuadam.checkpoint import CheckpointError
from gpuadam.kernels import state_formats

SHAPES = {"w": (33, 70), "b": (5,), "e": (0, 3), "s": ()}
FORMATS = ("float32", "float64", "bfloat16", "8bit")


def arrays(seed=0, dtype="f4"):
    rng = np.random.default_rng(seed)
    return {name: np.array(rng.standard_normal(shape)).astype(dtype) for name, shape in SHAPES.items()}


def trained(state_dtype=None, make=gpuadam.AdamW, **options):
    params = arrays()
    opt = make(params, lr=0.01, state_dtype=state_dtype, **options)
    for step in range(3):
        opt.step(arrays(10 + step) | ({"b": None} if step == 1 else {}))
    return opt, params


def floats(opt, name):
    """m, v and max_v of a parameter as a step reads them."""
    state, found = opt.state[name], {}
    for key in ("m", "v", "max_v"):
        if key in state:
            array = state[key].reshape(-1)
            format = "bfloat16" if array.dtype == np.uint16 else array.dtype.name
            found[key] = state_formats.decoded(array, format, key, state.get(f"{key}_scale")).reshape(state[key].shape)
    return found


def expected_of(source, name, state_dtype):
    """What a conversion of a parameter's moments must give: key -> array."""
    values = floats(source, name)
    if state_dtype == "8bit":
        flat = {key: x.reshape(-1).astype("f4") for key, x in values.items()}
        codes = state_formats.in_8_bits(flat["m"], flat["v"])
        return {key: x.reshape(values[key].shape) if key in values else x for key, x in codes.items()}
    return {key: state_formats.encoded(x, state_dtype) for key, x in values.items()}


def assert_converted(opt, source, state_dtype):
    assert opt.options.state_dtype == state_dtype and opt.steps == source.steps
    for name in SHAPES:
        expected = expected_of(source, name, state_dtype)
        assert set(opt.state[name]) == {"step", *expected} and opt.state[name]["step"] == source.state[name]["step"]
        for key, array in expected.items():
            assert model.different(opt.state[name][key], array) == 0, (name, key)


def content(opt):
    return {n: {k: x if type(x) is int else x.tobytes() for k, x in s.items()} for n, s in opt.state.items()}


@pytest.mark.parametrize("before", FORMATS)
@pytest.mark.parametrize("after", FORMATS)
def test_a_checkpoint_is_loaded_with_state_of_another_format(before, after, tmp_path):
    source, params = trained(before)
    source.save(tmp_path / "a")
    opt = gpuadam.load(tmp_path / "a", params, state_dtype=after)
    if before == after:
        assert content(opt) == content(source)
    else:
        assert_converted(opt, source, after)
    opt.step(arrays(20))


@pytest.mark.parametrize("piece", [96, 96 << 12])
def test_pieces_of_any_size_give_the_same(piece, tmp_path, monkeypatch):
    source, params = trained()
    source.save(tmp_path / "a")
    monkeypatch.setattr(state_conversion, "PIECE", piece)
    assert_converted(gpuadam.load(tmp_path / "a", params, state_dtype="8bit"), source, "8bit")
    opt = gpuadam.AdamW(arrays(), state_dtype="8bit")
    opt.load_state_dict(source.state_dict(), convert=True)
    assert_converted(opt, source, "8bit")


def test_what_is_no_moment_stays_as_it_is(tmp_path):
    ml_dtypes = libraries.imported("ml_dtypes")
    params = arrays(dtype=ml_dtypes.bfloat16)
    source = gpuadam.Adam(params, master="remainder", ema_decay=0.9, amsgrad=True)
    source.step(arrays(1))
    source.save(tmp_path / "a", with_params=True)
    zeros = {name: np.zeros_like(p) for name, p in params.items()}
    opt = gpuadam.load(tmp_path / "a", zeros, state_dtype="bfloat16", with_params=True)
    for name, param in params.items():
        assert zeros[name].tobytes() == param.tobytes()
        for key in ("remainder", "ema"):
            assert opt.state[name][key].tobytes() == source.state[name][key].tobytes()
    for key, array in expected_of(source, "w", "bfloat16").items():
        assert (opt.state["w"][key] == array).all()


@pytest.mark.parametrize("complex, components", [("joint", 1), ("parts", 1), (None, 3)])
def test_numbers_that_share_a_v_are_converted(complex, components, tmp_path):
    w = np.ones((40, 3), "c8" if complex else "f4")
    opt = gpuadam.Adam({"w": w}, complex=complex, components=components)
    opt.step({"w": np.arange(120).reshape(40, 3).astype(w.dtype)})
    opt.save(tmp_path / "a")
    again = gpuadam.load(tmp_path / "a", {"w": w}, state_dtype="bfloat16")
    for key in ("m", "v"):
        assert (again.state["w"][key] == state_formats.encoded(opt.state["w"][key], "bfloat16")).all()


def test_order_matters_only_where_both_states_are_rounded_randomly(tmp_path):
    for before, refused in (("float32", False), ("bfloat16", True)):
        source, params = trained(before)
        source.save(tmp_path / before)
        other = dict(reversed(params.items()))
        if refused:
            with pytest.raises(CheckpointError, match="another order"):
                gpuadam.load(tmp_path / before, other, state_dtype="8bit")
        else:
            assert_converted(gpuadam.load(tmp_path / before, other, state_dtype="8bit"), source, "8bit")


REFUSED = {
    "an unknown format": ("adam", "fp8", ValueError, "state_dtype='fp8' must be one of"),
    "8 bits and a maximum": ("amsgrad", "8bit", CheckpointError, "8-bit state has no max_v"),
    "8 bits of AdaMax": ("adamax", "8bit", CheckpointError, "AdaMax's v is a maximum"),
    "8 bits of float64": ("float64", "8bit", CheckpointError, "float64, and 8-bit state"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_optimizer_could_not_have_is_refused(what, tmp_path):
    which, state_dtype, error, match = REFUSED[what]
    params = arrays(dtype="f8" if which == "float64" else "f4")
    make = gpuadam.AdaMax if which == "adamax" else gpuadam.Adam
    make(params, amsgrad=which == "amsgrad").save(tmp_path / "a")
    with pytest.raises(error, match=match):
        gpuadam.load(tmp_path / "a", params, state_dtype=state_dtype)


def test_a_damaged_checkpoint_is_refused_before_parameters_change(tmp_path):
    source, params = trained()
    source.save(tmp_path / "a", with_params=True)
    damaged = bytearray((tmp_path / "a").read_bytes())
    damaged[-40] ^= 1
    (tmp_path / "a").write_bytes(damaged)
    before = {name: p.copy() for name, p in params.items()}
    with pytest.raises(CheckpointError, match="damaged"):
        gpuadam.load(tmp_path / "a", params, state_dtype="8bit", with_params=True)
    assert all((params[name] == before[name]).all() for name in params)


def test_a_checkpoint_of_ranks_is_converted_too(tmp_path):
    source, params = trained()
    source.save(tmp_path / "a")
    transport = gpuadam.transports.Local()
    opt = gpuadam.load_sharded(tmp_path / "a", params, transport, state_dtype="8bit")
    opt.save(tmp_path / "ranks")
    assert_converted(gpuadam.load(tmp_path / "ranks", params), source, "8bit")
    assert_converted(gpuadam.load(tmp_path / "ranks", params, state_dtype="float32"), opt_of(tmp_path, params), "float32")


def opt_of(tmp_path, params):
    return gpuadam.load(tmp_path / "ranks", params)


def test_each_of_three_ranks_converts_its_parts(tmp_path):
    w = np.random.default_rng(0).standard_normal((5, 4001)).astype("f4")
    source = gpuadam.Adam({"w": w.copy()})
    source.step({"w": w})
    source.save(tmp_path / "a")

    def loads(transport):
        opt = gpuadam.load_sharded(tmp_path / "a", {"w": w.copy()}, transport, state_dtype="8bit", bucket_bytes=20_000)
        return {key: opt.gathered(key)["w"] for key in ("m", "v", "m_scale", "v_scale")}

    for found in all_well(on_ranks(3, loads)):
        for key, array in expected_of(source, "w", "8bit").items():
            assert model.different(found[key], array) == 0, key


@pytest.mark.parametrize("complex, components", [("joint", 1), (None, 4)])
def test_ranks_convert_numbers_that_share_a_v(complex, components, tmp_path):
    w = np.random.default_rng(0).standard_normal((8000, 6)).astype("f4")
    w = w.view("c8") if complex else w.reshape(-1, 4)
    source = gpuadam.Adam({"w": w.copy()}, complex=complex, components=components)
    source.step({"w": w})
    source.save(tmp_path / "a")

    def loads(transport):
        params, options = {"w": w.copy()}, {"state_dtype": "bfloat16", "bucket_bytes": 20_000}
        opt = gpuadam.load_sharded(tmp_path / "a", params, transport, **options)
        return {key: opt.gathered(key)["w"] for key in ("m", "v")}

    for found in all_well(on_ranks(3, loads)):
        for key, array in found.items():
            assert (array == state_formats.encoded(source.state["w"][key], "bfloat16")).all(), key


def test_one_array_is_called_params():
    source, opt = gpuadam.Adam(np.ones(3, "f4")), gpuadam.Adam(np.ones(3, "f4"), state_dtype="bfloat16")
    state_dict = copy.deepcopy(source.state_dict())
    with pytest.raises(ValueError, match=r"the loaded [mv] of params has dtype float32"):
        opt.load_state_dict(state_dict)
    state_dict["state"]["0"]["m"] = np.ones(4, "f4")
    with pytest.raises(ValueError, match=r"m of the loaded state of params has shape \(4,\)"):
        opt.load_state_dict(state_dict, convert=True)


def test_a_file_of_state_that_no_optimizer_has_is_refused(tmp_path):
    source, params = trained("8bit")
    source.save(tmp_path / "a")
    header, payload = taken_apart((tmp_path / "a").read_bytes())
    metadata = header["__metadata__"]
    metadata["groups"] = metadata["groups"].replace('"amsgrad": false', '"amsgrad": true')
    (tmp_path / "a").write_bytes(sealed(header, payload))
    with pytest.raises(CheckpointError, match="8-bit state has no max_v"):
        gpuadam.load(tmp_path / "a", params, state_dtype="float32")


# state_dicts


@pytest.mark.parametrize("before", FORMATS)
@pytest.mark.parametrize("after", FORMATS)
def test_a_state_dict_is_converted_where_that_is_said_and_else_refused(before, after):
    source, _ = trained(before)
    opt = gpuadam.AdamW(arrays(), state_dtype=after)
    if before != after:
        untouched = content(opt)
        with pytest.raises(ValueError, match="convert=True"):
            opt.load_state_dict(source.state_dict())
        assert content(opt) == untouched and opt.steps == 0
    opt.load_state_dict(source.state_dict(), convert=True)
    if before == after:
        assert content(opt) == content(source)
    else:
        assert_converted(opt, source, after)


def spoiled(d, name="w", **changes):
    d = copy.deepcopy(d)
    d["state"][name] |= changes
    return d


WRONG = {
    "another shape": (
        lambda d: spoiled(d, v=np.zeros(3, "f4")),
        ValueError,
        r"v of the loaded state of params\['w'\] has shape",
    ),
    "integers": (lambda d: spoiled(d, m=np.zeros((33, 70), "i4")), TypeError, "has dtype int32"),
    "no array": (lambda d: spoiled(d, m=[1.0]), TypeError, "list"),
    "nothing": (lambda d: spoiled(d, m=None), TypeError, "None, not an array"),
    "codes without scales": (lambda d: spoiled(d, m=np.zeros((33, 70), "u1")), ValueError, "can be converted"),
    "a bad rate": (lambda d: d | {"groups": [d["groups"][0] | {"lr": -1.0}]}, ValueError, "lr=-1"),
    "a moment too few": (lambda d: d | {"state": d["state"] | {"w": {"step": 1}}}, ValueError, "the state of 'w' has"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_converted_changes_nothing(what):
    spoil, error, match = WRONG[what]
    source, _ = trained()
    opt = gpuadam.AdamW(arrays(), state_dtype="8bit")
    before = content(opt), dict(opt.groups[0])
    with pytest.raises(error, match=match):
        opt.load_state_dict(spoil(source.state_dict()), convert=True)
    assert (content(opt), opt.groups[0], opt.steps) == (*before, 0)


def test_memory_that_both_have_is_refused():
    memory = np.zeros(2 * 33 * 70, "f4")
    opt = gpuadam.Adam({"w": np.zeros((33, 70), "f4")}, state_dtype="bfloat16")
    opt.state["w"]["m"] = memory.view("u2")[: 33 * 70].reshape(33, 70)
    other = gpuadam.Adam({"w": np.zeros((33, 70), "f4")})
    other.state["w"]["m"] = memory[: 33 * 70].reshape(33, 70)
    with pytest.raises(ValueError, match="share memory"):
        opt.load_state_dict(other.state_dict(), convert=True)


def test_state_in_any_order_of_memory_is_converted(library):
    rng = np.random.default_rng(0)
    w, g = (np.asfortranarray(rng.standard_normal((33, 70)).astype("f4")) for _ in range(2))
    on_host = gpuadam.Adam({"w": w.copy(order="F")})
    on_host.step({"w": g})
    opt = gpuadam.Adam({"w": library.array(w)}, state_dtype="bfloat16")
    opt.load_state_dict(on_host.state_dict(), convert=True)
    expected = expected_of(on_host, "w", "bfloat16")
    for key, array in expected.items():
        assert (library.numpy(opt.state["w"][key]) == array).all()
    back = gpuadam.Adam({"w": w.copy(order="F")})
    back.load_state_dict(opt.state_dict(), convert=True)
    for key, array in expected.items():
        assert (back.state["w"][key] == state_formats.decoded(array, "bfloat16")).all()


def test_an_optimizer_in_files_converts_too(tmp_path):
    source, _ = trained()
    with gpuadam.OffloadAdam(arrays(), decoupled=True, state=tmp_path / "s", state_dtype="8bit") as opt:
        opt.load_state_dict(source.state_dict(), convert=True)
        assert_converted(opt, source, "8bit")
        assert opt.steps == 3
    with gpuadam.OffloadAdam(arrays(), decoupled=True, state=tmp_path / "s", state_dtype="8bit") as opt:
        assert_converted(opt, source, "8bit")


# Other libraries


def test_torchs_state_becomes_8_bits_and_comes_back():
    torch = libraries.imported("torch", reason="torch is not installed")
    source, params = trained(make=gpuadam.Adam)
    theirs = foreign_state.to_torch(source)
    opt = gpuadam.Adam(arrays(), state_dtype="8bit")
    with pytest.raises(ValueError, match="amsgrad and the like"):
        foreign_state.from_torch(opt, theirs, list(SHAPES))
    foreign_state.from_torch(opt, theirs, list(SHAPES), convert=True)
    assert_converted(opt, source, "8bit")
    with pytest.raises(ValueError, match="has no place"):
        foreign_state.to_torch(opt)
    back = foreign_state.to_torch(opt, convert=True)
    for k, name in enumerate(SHAPES):
        for key, theirs_key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            assert (back["state"][k][theirs_key].numpy() == floats(opt, name)[key]).all()
    their_params = [torch.nn.Parameter(torch.from_numpy(p)) for p in params.values()]
    torch.optim.Adam(their_params).load_state_dict(back)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_drop_in_for_torch_loads_float32_checkpoints_as_8_bits_and_back(dtype):
    torch = libraries.imported("torch", reason="torch is not installed")
    import gpuadam.torch

    params = [torch.nn.Parameter(torch.randn(33, 7)), torch.nn.Parameter(torch.randn(5))]
    theirs = torch.optim.Adam(params)
    for p in params:
        p.grad = torch.randn(p.shape)
    theirs.step()
    ours = gpuadam.torch.Adam(params, state_dtype="8bit")
    with pytest.raises(ValueError, match="convert=True"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state
    ours.load_state_dict(theirs.state_dict(), convert=True)
    for p in params:
        m, v = (theirs.state[p][key].numpy().reshape(-1) for key in ("exp_avg", "exp_avg_sq"))
        codes = state_formats.in_8_bits(m, v)
        assert (ours.state[p]["exp_avg_codes"].numpy().reshape(-1) == codes["m"]).all()
        assert (ours.state[p]["exp_avg_sq_scale"].numpy() == codes["v_scale"]).all()
        assert ours.state[p]["step"] == 1
    ours.step()
    again = gpuadam.torch.Adam(params, state_dtype=dtype)
    again.load_state_dict(ours.state_dict(), convert=True)
    assert again.state[params[0]]["exp_avg"].dtype == getattr(torch, dtype)
    again.step()


@pytest.mark.parametrize(
    "before, after, dtype",
    [*(("8bit", None, dtype) for dtype in ("float32", "float64", "bfloat16")), (None, "8bit", "uint8")],
)
def test_the_drop_in_for_torch_refuses_state_whose_names_and_dtypes_are_of_two_formats(before, after, dtype):
    torch = libraries.imported("torch", reason="torch is not installed")
    import gpuadam.torch

    param = torch.nn.Parameter(torch.randn(33, 7))
    param.grad = torch.randn(33, 7)
    source, opt = (gpuadam.torch.Adam([param], state_dtype=state_dtype) for state_dtype in (before, after))
    source.step()
    state_dict = copy.deepcopy(source.state_dict())
    if before == "8bit":
        floats = dict.fromkeys(("exp_avg_codes", "exp_avg_sq_codes"), torch.ones(33, 7, dtype=getattr(torch, dtype)))
        state_dict["state"][0] = {"step": torch.tensor(1.0), **floats}
    else:
        codes = dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.ones(33, 7, dtype=getattr(torch, dtype)))
        state_dict["state"][0] |= {**codes, **dict.fromkeys(("m_scale", "v_scale"), torch.ones(8))}
    with pytest.raises(
        (TypeError, ValueError), match=rf"torch\.{dtype}, not torch\.uint8" if before else "m_scale.*and no other"
    ):
        opt.load_state_dict(state_dict, convert=True)
    assert not opt.state


def test_optaxs_state_becomes_8_bits():
    optax = libraries.imported("optax", reason="optax is not installed")
    params = arrays()
    transformation = optax.adam(1e-3)
    state = transformation.init(params)
    _, state = transformation.update(arrays(1), state, params)
    opt = gpuadam.Adam(arrays(), state_dtype="8bit")
    foreign_state.from_optax(opt, state, convert=True)
    same = gpuadam.Adam(arrays())
    foreign_state.from_optax(same, state)
    assert_converted(opt, same, "8bit")
