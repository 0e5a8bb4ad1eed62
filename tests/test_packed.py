"""Sparse arrays in little room: what comes back is what went in, to the bit, and what is no such file is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax.checkpoints import Store
from prune_jax.errors import DamagedArtifactError, PruneError
from prune_jax.export import WRITERS, load_packed
from prune_jax.export.packed import to_packed
from prune_jax.export.tensors import load_safetensors, to_safetensors
from tests.plain import PRUNE, TRAIN, arrays, run_plain, same_bytes, tiny

DTYPES = ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "int32", "int8", "uint16", "bool", "complex64")


def sparse(shape, dtype="float32", density=0.1, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 100, size=shape) if dtype != "bool" else np.ones(shape)
    return np.where(rng.random(shape) < density, values, 0).astype(jnp.dtype(dtype))


def given():
    """A sparse array that has all that a file could lose."""
    odd = sparse((37, 29))
    odd.flat[[0, 1, 2, 1072]] = -0.0, np.nan, np.inf, 1e-45
    return {"layer/kernel": odd, "layer/bias": np.arange(29, dtype=np.float32), "step": np.array(7, np.int32)}


def again(found):
    """What comes back, in the order of what went in."""
    back = load_packed(to_packed(found))
    assert sorted(back) == sorted(found)
    return {path: back[path] for path in found}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_every_type_comes_back_to_the_bit(dtype, density):
    found = {
        "matrix": sparse((61, 43), dtype, density),
        "tensor": sparse((3, 3, 17, 19), dtype, density),
        "few": sparse((3,), dtype, density),
        "scalar": sparse((), dtype, density),
        "empty": sparse((0, 4), dtype),
        "swapped": sparse((50, 70), dtype, density).T,
    }
    same_bytes(again(found), found)
    if density == 0.0:
        assert len(to_packed(found)) < 0.5 * sum(array.nbytes for array in found.values())


def test_what_is_not_bitwise_zero_is_a_value():
    found = given()
    same_bytes(again(found), found)
    tensors, _ = load_safetensors(to_packed(found))
    assert set(tensors) == {"mask/layer/kernel", "values/layer/kernel", "whole/layer/bias", "whole/step"}
    kernel = found["layer/kernel"]
    assert tensors["values/layer/kernel"].size == np.count_nonzero(kernel) + 1  # -0.0 counts as 0 for numpy
    bits = np.unpackbits(tensors["mask/layer/kernel"])[: kernel.size].reshape(kernel.shape)
    np.testing.assert_array_equal(bits, (kernel != 0) | np.signbit(kernel))


@pytest.mark.parametrize("density", [0.0, 0.5, 0.9, 0.96, 1.0])
@pytest.mark.parametrize("size", [1, 40, 300, 5000])
def test_an_array_is_packed_only_where_it_gains(size, density):
    found = {"a/kernel": sparse((size,), density=density)}
    assert len(to_packed(found)) <= len(to_safetensors(found)) + 100  # of metadata


def broken(change):
    """A packed file whose tensors or metadata were changed."""
    tensors, metadata = load_safetensors(to_packed(given()))
    metadata["shapes"] = json.loads(metadata["shapes"])
    change(tensors, metadata)
    shapes = metadata.get("shapes")
    return to_safetensors(tensors, metadata | ({} if isinstance(shapes, str) else {"shapes": json.dumps(shapes)}))


MASK, VALUES = "mask/layer/kernel", "values/layer/kernel"
BROKEN = {
    "not packed": (lambda t, m: m.pop("format"), "it is not packed"),
    "newer": (lambda t, m: m.update(version="2"), "it is packed as version 2, and 1 is read here"),
    "no shapes": (lambda t, m: m.update(shapes="["), "its metadata hold no shapes"),
    "shapes of another kind": (lambda t, m: m.update(shapes=[3]), "its metadata hold no shapes"),
    "deep": (lambda t, m: m.update(shapes="[" * 100_000), "its metadata hold no shapes"),
    "no shape": (lambda t, m: m["shapes"].update({"layer/kernel": None}), "layer/kernel has no shape"),
    "negative": (lambda t, m: m["shapes"].update({"layer/kernel": [-37, -29]}), "layer/kernel has no shape"),
    "true": (lambda t, m: m["shapes"].update({"layer/kernel": [True, 1073]}), "layer/kernel has no shape"),
    "many axes": (lambda t, m: m["shapes"].update({"layer/kernel": [1] * 70}), "layer/kernel has no shape"),
    "huge": (
        lambda t, m: m["shapes"].update({"layer/kernel": [10**15, 10**15]}),
        r"layer/kernel \[1000000000000000, 1000000000000000\] needs 125000000000000000000000000000 bytes of bits, "
        r"and uint8 \[135\] are there",
    ),
    "a little larger": (lambda t, m: m["shapes"].update({"layer/kernel": [1081]}), r"needs 136 bytes of bits"),
    "bits of another type": (lambda t, m: t.update({MASK: t[MASK].astype(np.int8)}), r"and int8 \[135\] are there"),
    "bits beyond": (lambda t, m: t.update({MASK: t[MASK] | np.uint8(1)}), "bits set of 1073, and values"),
    "a value less": (lambda t, m: t.update({VALUES: t[VALUES][1:]}), "bits set of 1073, and values"),
    "no bits": (lambda t, m: t.pop(MASK), "mask/layer/kernel is missing"),
    "no values": (lambda t, m: t.pop(VALUES), "values/layer/kernel is missing"),
    "no array of a shape": (lambda t, m: m["shapes"].update(other=[3]), "mask/other is missing"),
    "no shape of an array": (lambda t, m: m["shapes"].pop("layer/kernel"), "mask/layer/kernel has no place in it"),
    "twice": (
        lambda t, m: t.update({"whole/layer/kernel": t[VALUES]}),
        "whole/layer/kernel has no place in it",
    ),
    "something else": (lambda t, m: t.update(other=t[MASK]), "other has no place in it"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_whose_parts_do_not_fit_is_refused(how):
    change, message = BROKEN[how]
    with pytest.raises(DamagedArtifactError, match=r"^the file of arrays cannot be read: .*" + message):
        load_packed(broken(change))


def test_no_byte_can_be_changed_to_anything_but_arrays_or_a_refusal():
    whole = to_packed(given())
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in range(header):
        for byte in (0, 0x22, 0x39, 0xFF):
            data = whole[:place] + bytes([byte]) + whole[place + 1 :]
            try:
                found = load_packed(data)
            except DamagedArtifactError:
                continue
            assert sum(array.nbytes for array in found.values()) <= 64 * len(data)
    for length in (0, 7, 8, header - 1, header, len(whole) - 1):
        with pytest.raises(DamagedArtifactError):
            load_packed(whole[:length])


def test_a_type_that_the_format_does_not_know_is_named():
    with pytest.raises(PruneError, match="layer/kernel is complex128, which safetensors cannot hold"):
        to_packed({"layer/kernel": np.zeros((3, 3), np.complex128)})


@pytest.mark.parametrize("name", ["safetensors", "packed"])
def test_a_network_of_half_precision_is_written(name):
    variables = {"params": {"kernel": sparse((40, 40), "bfloat16")}, "state": {}}
    assert WRITERS[name](None, variables, ()).facts["bytes"] > 0


@pytest.mark.slow
def test_a_tenth_of_lenet_takes_a_bit_a_weight_and_a_tenth_of_the_values(tmp_path):
    store, density = Store(tmp_path), 0.1
    stages = {
        "train": {**TRAIN, "steps": 1},
        "prune": {**PRUNE, "target": {"sparsity": 1 - density}},
        "export": {"kind": "export", "formats": ["safetensors", "packed"]},
    }
    raw = {**tiny(model={"kind": "mlp"}, **stages), "data": {"source": "mnist5k"}}
    _, results = run_plain(raw, store)
    whole, found = results["export"].metrics["safetensors"], results["export"].metrics["packed"]
    weights = 784 * 300 + 300 * 100 + 100 * 10
    biases, header = 4 * (300 + 100 + 10), 1500
    bound = weights * (1 + density * 32) / 8 + biases + header
    assert found["bytes"] <= bound
    assert bound < 0.14 * whole["bytes"]
    assert found["bytes_dense"] == 4 * weights + biases
    assert found["ratio"] == pytest.approx(found["bytes_dense"] / found["bytes"], abs=1e-3)
    data = (store.path(results["export"].ref) / "model.packed.safetensors").read_bytes()
    expected = {path: a for path, a in arrays(store, results["prune"]).items() if path.startswith("params/")}
    same_bytes(dict(sorted(load_packed(data).items())), dict(sorted(expected.items())))
