"""Networks written as ONNX answer in onnxruntime what they answer in JAX, for every batch size."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax

import prune_jax as pj
from prune_jax.errors import PruneError, UserMistake
from prune_jax.export import WRITERS
from prune_jax.models import build
from tests.plain import TRAIN, run_plain, tiny
from tests.test_models import CASES
from tests.zoo import ZOO, Make

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from prune_jax.export.onnx import OPSET, to_onnx  # noqa: E402
from tests.sparing import sparing  # noqa: E402

BATCHES = (1, 64)  # none of them one of those that are traced
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile soon


def load(data):
    onnx.checker.check_model(data, full_check=True)
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def answers(session, *inputs):
    named = {taken.name: np.asarray(x) for taken, x in zip(session.get_inputs(), inputs, strict=True)}
    return session.run(None, named)


def ops(data):
    return [node.op_type for node in onnx.load_from_string(data).graph.node]


def check(forward, *shapes, draw=None, tolerance=1e-5):
    """Writes a function, and compares it on batches of numbers for inputs of these shapes; answers the bytes."""
    inputs = [s if hasattr(s, "dtype") else jax.ShapeDtypeStruct((1, *s), jnp.float32) for s in shapes]
    data = to_onnx(forward, inputs)
    session, rng = load(data), np.random.default_rng(0)
    for size in BATCHES:
        xs = draw(rng, size) if draw else [rng.normal(size=(size, *x.shape[1:])).astype(np.float32) for x in inputs]
        expected, found = jax.tree.leaves(jax.jit(forward, compiler_options=FAST)(*xs)), answers(session, *xs)
        for one, other in zip(found, expected, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.nanmax(np.abs(other)))
    return data


def model_of(case):
    """A model's resting forward function with biases, scales and statistics that are not 0 and 1."""
    kind, args, inputs = CASES[case]
    network = build(kind, args, inputs=inputs, outputs=3)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params, state = Make().like(shapes.params), Make(1).like(shapes.state)

    def forward(*xs):
        return network.apply(params, state, xs, train=False, key=None)[0]

    def draw(rng, size):
        kinds = {1: partial(rng.integers, 1, 7), 2: partial(rng.integers, 0, 5)}  # lengths, tokens
        makers = [kinds[len(x.shape)] if x.dtype == jnp.int32 else rng.normal for x in inputs]
        return [make(size=(size, *x.shape[1:])).astype(x.dtype) for make, x in zip(makers, inputs, strict=True)]

    return forward, inputs, draw


MODELS = [case for case in CASES if "function" not in case and "instance" not in case]


@pytest.mark.parametrize("case", sparing(MODELS, ["resnet", "transformer"]))
def test_every_model_answers_the_same(case):
    forward, inputs, draw = model_of(case)
    data = check(forward, *inputs, draw=draw)
    model = onnx.load_from_string(data)
    assert [entry.version for entry in model.opset_import] == [OPSET]
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [value.name for value in model.graph.input] == ["x", "lengths"][: len(inputs)]
    assert [value.name for value in model.graph.output] == ["outputs"]
    assert data == to_onnx(forward, inputs)


def test_dense_layers_are_single_nodes_with_biases():
    forward, inputs, _ = model_of("mlp")
    data = to_onnx(forward, inputs)
    assert ops(data) == ["Reshape", "Gemm", "Max", "Gemm", "Max", "Gemm", "Identity"]
    gemms = [node for node in onnx.load_from_string(data).graph.node if node.op_type == "Gemm"]
    assert all(len(node.input) == 3 and node.attribute[0].name == "transB" for node in gemms)


def test_weights_are_stored_once_and_nothing_else():
    forward, inputs, _ = model_of("gru")
    arrays = onnx.load_from_string(to_onnx(forward, inputs)).graph.initializer
    floats = sum(np.prod(a.dims) for a in arrays if a.data_type == onnx.TensorProto.FLOAT and len(a.dims) > 1)
    assert floats <= 8 * 3 * (3 + 8) + 6 * 8 + 8 * 3 + 4 * 8 * 3
    assert "Scan" in ops(to_onnx(forward, inputs))


ROWS = ("everything_is_six", "einsum_in_odd_orders", "convolution_3d", "pixel_shuffle", "summed_along_the_batch",
        "fori_loop", "bidirectional_simple_cells_of_linen", "mixture_of_experts", "uneven_split", "unstacked",
        "vision_transformer_with_class_token", "rotary_positions_in_pairs")  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_networks_of_users(name):
    row = ZOO[name]
    apply, params, inputs = row.build(Make(), row.batch)
    check(lambda *x: apply(params, *x), *inputs, draw=lambda rng, size: row.build(Make(size), size)[2])


REFUSED = {
    "a_gradient_by_the_input": "select_and_scatter_add", "associative_scan": "pad between",
    "fourier_transformed_channels": "fft", "one_channel_is_set": "scatter", "one_place_is_set": "scatter",
    "sorted_channels": "sort", "rope_by_complex_numbers": "complex", "complex_kernels": "complex",
    "s5_with_complex_state": "complex|pad between", "moe_top2_dense_dispatch": "top_k", "min_gru": "cumlogsumexp",
    "stylegan_modulated_convolution": "reshape in another order", "scatter_adds_to_sigmoids": "scatter-add",
    "ragged_experts": "sort", "experts_looked_up_for_each_row": "scatter-add", "the_largest_channels": "top_k",
}  # fmt: skip
ELSEWHERE = {
    "mixed_precision": "the runtime has no bfloat16",
    "gru_of_nnx": "traced once",
    "lstm_of_nnx": "traced once",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in {*ROWS, *ELSEWHERE}])
def test_the_zoo(name):
    row = ZOO[name]
    apply, params, inputs = row.build(Make(), row.batch)
    if row.other is None or any(np.ndim(x) == 0 or len(x) != row.batch for x in inputs):
        pytest.skip("has no batch")
    if name in REFUSED:
        with pytest.raises(PruneError, match=REFUSED[name]):
            to_onnx(lambda *x: apply(params, *x), inputs)
        return
    check(lambda *x: apply(params, *x), *inputs, draw=lambda rng, size: row.build(Make(size), size)[2])


@pytest.mark.parametrize("name", ["residual", "cnn_flattened", "attention_with_flat_kernels"])
def test_a_compact_network(name):
    row = ZOO[name]
    apply, params, inputs = row.build(Make(), row.batch)
    net = pj.trace(apply, params, *inputs)
    small = net.compact({group.name: range(group.size // 2) for group in net.groups.values()}, params)
    data = check(
        lambda *x: small.apply(small.params, *x), *inputs, draw=lambda rng, size: row.build(Make(size), size)[2]
    )
    assert len(data) < len(to_onnx(lambda *x: apply(params, *x), inputs))


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: linen.avg_pool(x, (3, 3), strides=(2, 2), padding="SAME"),
        lambda x: linen.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False),
        lambda x: linen.max_pool(x, (2, 3), strides=(1, 2), padding="SAME"),
        lambda x: lax.conv_transpose(x, Make()(3, 3, 2, 5), (2, 2), "SAME"),
        lambda x: lax.conv_transpose(x, Make()(2, 2, 2, 5), (2, 2), "VALID"),
        lambda x: lax.conv_general_dilated(
            x, Make()(3, 3, 1, 4), (2, 1), ((0, 1), (2, 1)), rhs_dilation=(1, 2), feature_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ),
        lambda x: jnp.flip(jnp.pad(x, ((0, 0), (1, 0), (0, 2), (0, 0)), constant_values=3), 1)[:, ::2, 1:-1],
        lambda x: jnp.cumsum(x, 1) + jnp.argmax(x, -1)[..., None] + jnp.min(x, (1, 2), keepdims=True),
        lambda x: jnp.where(jnp.isfinite(x) & (x > 0), jnp.expm1(x), jnp.log1p(jnp.abs(x))),
        lambda x: jnp.round(3 * x) + jnp.fmod(x, 0.3) + jax.nn.softplus(x) + jax.nn.gelu(x, approximate=False) + x**3,
        lambda x: jnp.any(x > 2, -1) ^ jnp.all(x > -1, -1),
        lambda x: jnp.arange(x.shape[0])[:, None] + jnp.zeros((x.shape[0], 2)),
        lambda x: (x - x.mean(0, keepdims=True), x.reshape(-1, 2).sum(1)),
        lambda x: lax.dynamic_slice_in_dim(x, jnp.argmax(x[0, :, 0, 0]), 3, 1),
    ],
)  # fmt: skip
def test_layers(layer):
    check(layer, (6, 5, 2))


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_places_outside_of_a_table_read_what_jax_reads(mode):
    table = Make()(4, 3)
    spec = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    data = check(
        lambda ids: jnp.take(table, ids, axis=0, mode=mode),
        spec,
        draw=lambda rng, size: [rng.integers(-7, 9, (size, 2)).astype(np.int32)],
    )
    assert "Gather" in ops(data)


def test_no_size_is_taken_for_the_batch_because_it_is_as_large():
    params = [Make()(7, 11), Make()(11, 7)]
    check(lambda x: (x @ params[0]).reshape(x.shape[0], 11) @ params[1] + jnp.ones((1, 7)), (7,))
    check(lambda x: x.reshape(x.shape[0] * 7, 11).sum(1).reshape(-1, 7), (7, 11))


def test_what_has_no_translation_is_refused_by_name():
    with pytest.raises(PruneError) as caught:
        to_onnx(lambda x: jnp.sort(x), [jax.ShapeDtypeStruct((1, 4), jnp.float32)])
    assert str(caught.value) == (
        "the primitive 'sort' has no translation to ONNX. Export the network as StableHLO: `formats: [stablehlo]`."
    )


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (lambda x: jnp.concatenate([x, x[:1]]), "a size of the network is 8 for a batch of 7 and 12 for one of 11"),
        (lambda x: x * np.arange(len(x))[:, None], "an array in the network follows the batch"),
        (lambda x: x + 1 if len(x) == 7 else x, "computes otherwise for other batch sizes"),
        (lambda x: lax.scan(lambda c, r: (c + r, c), jnp.zeros(4), x)[1], "`length` that follows the batch"),
    ],
)
def test_what_cannot_follow_the_batch_is_refused(forward, text):
    with pytest.raises(PruneError, match="StableHLO") as caught:
        to_onnx(forward, [jax.ShapeDtypeStruct((1, 4), jnp.float32)])
    assert text in str(caught.value)


def test_what_the_runtime_does_not_run_is_refused():
    sample = [np.ones((1, 4), np.float32)]
    with pytest.raises(PruneError, match=r"^the ONNX program does not run \(.*StableHLO"):
        WRITERS["onnx"](lambda x: x.astype(jnp.bfloat16) @ jnp.ones((4, 2), jnp.bfloat16), {}, sample)


@pytest.mark.parametrize("wrong", [lambda x: x.at[:, 0].add(jnp.nan), lambda x: x * jnp.nan])
def test_what_is_not_a_number_is_not_taken_for_equal(wrong):
    with pytest.raises(PruneError, match="StableHLO"):
        WRITERS["onnx"](wrong, {}, [np.ones((1, 4), np.float32)])


EXPORT = {"kind": "export", "formats": ["onnx"]}


def test_a_recipe_exports_onnx(store):
    data, model = "series", {"kind": "rnn", "width": 4}
    prune = {"kind": "prune", "criterion": "magnitude", "granularity": "group", "target": {"sparsity": 0.5}}
    stages = {"train": {**TRAIN, "steps": 2}, "prune": prune, "compact": {"kind": "compact"}, "export": EXPORT}
    _, results = run_plain(tiny(data, model=model, **stages), store)
    facts = results["export"].metrics["onnx"]
    written = (store.path(results["export"].ref) / "model.onnx").read_bytes()
    assert facts["bytes"] == len(written)
    assert facts["opset"] == 18
    assert 0 <= facts["largest_difference"] <= 1e-4
    x, lengths = np.ones((5, 5, 2), np.float32), np.arange(1, 6, dtype=np.int32)
    assert answers(load(written), x, lengths)[0].shape == (5, 2)


@pytest.mark.parametrize("gone", [("onnx", "onnxruntime"), ("onnxruntime",)])
def test_a_recipe_is_refused_before_anything_is_written_where_packages_are_missing(store, monkeypatch, gone):
    for package in gone:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserMistake) as caught:
        run_plain(tiny(train=TRAIN, export=EXPORT), store)
    assert str(caught.value) == (
        f"tiny: stages.export.formats = ['onnx']: onnx needs what is not installed: {', '.join(gone)}. "
        "Run `pip install 'prune-jax[onnx]'`, or leave the format out"
    )
    assert not [path for path in Path(store.root).rglob("*") if path.is_file()]
