"""llama.cpp's block types as grids.

Their bytes and what they decode to are held against gguf-py and libggml, the fit against ggml's.
"""

import ctypes
import shutil
from itertools import cycle
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlmq_export.bundled import REFERENCE_VLM
from vlmq_export.errors import ArtifactError
from vlmq_export.formats.gguf.runtime.llama import library_path
from vlmq_export.formats.gguf.types.decode import decode
from vlmq_export.formats.gguf.types.exact import pack_linear
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.artifact.manifest import layer_file
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids import block_fit
from vlmq_export.quantizer.grids.block_fit import fit_blocks
from vlmq_export.quantizer.grids.blocks import GRIDS, BlockGrid, Params, _places
from vlmq_export.quantizer.grids.lattices import Lattice
from vlmq_export.quantizer.grids.linears import BlockLinear
from vlmq_export.quantizer.grids.solutions import BlockSolution
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.solver.block_loop import solve_blocks
from vlmq_export.quantizer.solver.hessian import Hessian, prepare, weighted_loss
from vlmq_export.quantizer.solver.nearest import nearest_in_blocks
from vlmq_export.quantizer.solver.points import best_points


def library() -> ctypes.CDLL:
    """libggml."""
    return ctypes.CDLL(str(library_path()))


def round_to_grid(weights: torch.Tensor, grid: BlockGrid, importance: torch.Tensor) -> BlockLinear:
    """Weights [out, in] rounded to nearest. `importance` is [in]."""
    params = fit_blocks(grid, weights, importance)
    scale, minimum = (p.repeat_interleave(grid.sub_block, 1) for p in params.decoded())
    codes = grid.codes(grid.round(weights, scale, minimum, importance))
    return BlockLinear("x", BlockSolution(grid, codes, params), None)


def random_points(lattice: Lattice, rng, rows: int, columns: int) -> np.ndarray:
    """Random codes that a lattice holds, uint8 [rows, columns]."""
    grid, top = lattice.grid(torch.device("cpu")).numpy(), len(lattice.magnitudes)
    places = grid[rng.integers(0, len(grid), (rows, columns // lattice.columns))]
    negative = rng.integers(0, 2, (rows, columns // 8, 8))
    if lattice.even:
        negative[..., 7] = negative[..., :7].sum(-1) % 2
    places, negative = places.reshape(rows, columns), negative.reshape(rows, columns)
    return np.where(negative, top - 1 - places, top + places).astype(np.uint8)


def random_linear(name: str, seed: int, *, extreme: bool) -> BlockLinear:
    """Random codes and parameters. With `extreme` the parameters reach to the type's limits."""
    grid, rng = GRIDS[name], np.random.default_rng(seed)
    rows, columns = 3, 512
    blocks, subs = columns // grid.block, columns // grid.sub_block
    low, high = grid.scale_limits

    def half() -> torch.Tensor:
        """Finite float16 values of either sign, [rows, blocks]."""
        least, end = (0, 0x7C00) if extreme else (0x1000, 0x3000)
        bits = rng.integers(least, end, (rows, blocks))
        bits |= rng.integers(0, 2, bits.shape) << 15
        return torch.from_numpy(bits.astype(np.uint16).view(np.float16))

    def whole(a: int, b: int) -> torch.Tensor:
        """Whole numbers from a to b, [rows, sub-blocks]."""
        if extreme:
            values = rng.choice([a, b], (rows, subs))
        else:
            values = rng.integers(a, b, (rows, subs), endpoint=True)
        # On a lattice all are odd.
        return torch.from_numpy(values.astype(np.int16)) | (grid.scale_step - 1)

    minimum = ()
    if grid.affine:
        ones = torch.ones(rows, subs, dtype=torch.int16)
        minimum = half(), whole(0, high) if high > 1 else ones
    if grid.lattice is None:
        codes = rng.integers(0, grid.top, (rows, columns), endpoint=True).astype(np.uint8)
    else:
        codes = random_points(grid.lattice, rng, rows, columns)
    params = Params(half(), whole(low, high), *minimum)
    return BlockLinear("x", BlockSolution(grid, torch.from_numpy(codes), params), None)


def by_libggml(raw: np.ndarray, name: str, shape: tuple[int, int]) -> np.ndarray:
    """The bytes of a matrix, decoded by libggml."""
    function = getattr(library(), f"dequantize_row_{name.lower().replace('_k', '_K')}")
    out = np.empty(shape, np.float32)
    function(
        ctypes.c_void_p(raw.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size)
    )
    return out


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("extreme", [False, True])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_reader_decodes_the_bytes_alike(name, extreme, seed):
    linear = random_linear(name, seed, extreme=extreme)
    raw, want = pack_linear(linear, name), linear.decode().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        readers = {
            "ours": decode(raw.reshape(-1), TYPES[name], want.shape),
            "libggml": by_libggml(raw, name, want.shape),
        }
        if name != "Q2_0":  # gguf-py 0.19 does not know it
            readers["gguf-py"] = gguf.dequantize(raw, gguf.GGMLQuantizationType(TYPES[name].id))
    for who, got in readers.items():
        assert np.array_equal(got, want, equal_nan=True), who


def peer(weights: torch.Tensor, name: str, importance: torch.Tensor) -> torch.Tensor:
    """ggml's own fit, decoded, with these column weights [in] as its importance matrix."""
    t, (rows, columns) = TYPES[name], weights.shape
    source, weight = weights.numpy().copy(), importance.numpy().copy()
    raw = np.zeros((rows, t.row_bytes(columns)), np.uint8)
    quantize_chunk = library().ggml_quantize_chunk
    quantize_chunk.restype = ctypes.c_size_t
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (source, raw, weight)]
    counts = [ctypes.c_int64(n) for n in (0, rows, columns)]
    written = quantize_chunk(ctypes.c_int(t.id), *pointers[:2], *counts, pointers[2])
    assert written == raw.nbytes
    return torch.from_numpy(decode(raw.reshape(-1), t, (rows, columns)))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("tail", ["normal", "heavy", "positive"])
def test_the_fit_is_no_worse_than_ggmls_own(name, tail):
    draw = torch.Generator().manual_seed(7)
    weights = torch.randn(64, 512, generator=draw) * 0.02
    if tail == "heavy":
        weights = weights * torch.randn(64, 512, generator=draw).abs() ** 2
    if tail == "positive":
        weights = weights.abs() + 0.01
    importance = torch.randn(512, generator=draw).exp()

    def error(found: torch.Tensor) -> float:
        return float(((found - weights).square() * importance).sum())

    ours = round_to_grid(weights, GRIDS[name], importance)
    assert error(ours.decode()) <= 1.002 * error(peer(weights, name, importance))


@pytest.mark.parametrize("name", GRIDS)
def test_bits_per_weight_are_those_of_the_type(name):
    assert GRIDS[name].bits_per_weight == TYPES[name].bits_per_weight


@pytest.mark.parametrize("name", GRIDS)
def test_weights_on_the_grid_come_back(name):
    """What the type can hold exactly is found again, up to the rounding of a new fit."""
    weights = random_linear(name, 3, extreme=False).decode()
    again = round_to_grid(weights, GRIDS[name], torch.ones(weights.shape[1])).decode()
    assert (again - weights).norm() <= (0.02 if GRIDS[name].bits > 2 else 0.06) * weights.norm()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("value", [0.0, 3e-8, 70000.0])
def test_constant_blocks_stay_finite(name, value):
    weights = torch.full((2, 512), value)
    weights[1] *= -1
    found = round_to_grid(weights, GRIDS[name], torch.ones(512)).decode()
    assert torch.isfinite(found).all()
    if value == 0:
        assert (found == 0).all()


# --- the solver on these grids --------------------------------------------------------------------


def problem(columns: int, rows: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, columns] and a Hessian of correlated, unequal inputs."""
    draw = torch.Generator().manual_seed(columns)
    x = torch.randn(3 * columns, columns, generator=draw)
    x = x @ torch.randn(columns, columns, generator=draw) / columns**0.5
    x = x * torch.randn(columns, generator=draw).mul(0.7).exp()
    return torch.randn(rows, columns, generator=draw) * 0.02, x.T @ x


def brain_surgeon_on_blocks(
    weights: torch.Tensor, hessian: Hessian, grid: BlockGrid
) -> torch.Tensor:
    """Decoded weights [rows, columns] by Optimal Brain Quantization, in float64.

    The inverse of the remaining Hessian is computed anew at every column.
    """
    order, n = hessian.order.numpy(), weights.shape[1]
    a = hessian.matrix.double().numpy()[np.ix_(order, order)]
    a = a + hessian.damp * np.diag(a).mean() * np.eye(n)
    w, found = weights.double().numpy()[:, order].copy(), np.zeros(weights.shape, np.float32)
    # What an error in column q costs once the later columns made up for it: 1 / (A_≥q)⁻¹_qq.
    costs = np.array([1 / np.linalg.inv(a[q:, q:])[0, 0] for q in range(n)])
    step = grid.together
    for q in range(0, n, step):
        if q % grid.block == 0:
            span = order[q : q + grid.block]
            natural = span.argsort()
            now = np.ascontiguousarray(w[:, q : q + grid.block][:, natural])
            cost = torch.from_numpy(costs[q : q + grid.block][natural]).float()
            scale, minimum = fit_blocks(grid, torch.from_numpy(now).float(), cost).decoded()
        sub = (order[q] - span.min()) // grid.sub_block
        wanted = torch.from_numpy(w[:, q : q + step]).float()
        inverse = np.linalg.inv(a[q:, q:])
        cost = np.linalg.inv(inverse[:step, :step])  # of errors here, with later columns free
        if step == 1:
            here = scale[:, sub, None], minimum[:, sub, None]
            chosen = grid.decode(grid.encode(wanted, *here), *here)
        else:
            cost_here = torch.from_numpy(cost).float()
            _, chosen = best_points(grid.lattice, wanted, scale[:, sub], cost_here)
        w[:, q:] -= (w[:, q : q + step] - chosen.numpy()) @ cost @ inverse[:step]
        found[:, order[q : q + step]] = chosen
    return torch.from_numpy(found)


# Of each kind of grid one in either order; the others, and in the other order, in the slow tests.
KINDS = [("Q2_K", "gar"), ("Q6_K", "off"), ("Q4_1", "gar"), ("IQ4_XS", "off"), ("IQ3_S", "gar")]
OTHERS = [
    pytest.param(name, order, marks=pytest.mark.slow)
    for name in ("Q2_K", "Q3_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "IQ4_XS", "IQ3_S", "IQ2_XS")
    for order in ("off", "gar")
    if (name, order) not in KINDS
]


@pytest.mark.parametrize(("name", "act_order"), [*KINDS, *OTHERS])
def test_the_solver_is_optimal_brain_quantization(name, act_order):
    grid = GRIDS[name]
    w, a = problem(512 if grid.block == 256 else 128)
    size = {"group": grid.block, "together": grid.together}
    hessian = prepare(a, a.diagonal(), **size, act_order=act_order, damp=0.01)
    ours = solve_blocks(w, hessian, grid, block=128).decode()
    slow = brain_surgeon_on_blocks(w, hessian, grid)
    # Two ranges may be almost equally good, and then a block may take the other one.
    assert (ours == slow).float().mean() >= 0.99
    assert weighted_loss(ours, w, a) <= 1.001 * weighted_loss(slow, w, a)


@pytest.mark.parametrize("name", GRIDS)
def test_the_solver_beats_rounding(name):
    w, a = problem(512)
    grid = GRIDS[name]
    size = {"group": grid.block, "together": grid.together}
    hessian = prepare(a, a.diagonal(), **size, act_order="gar", damp=0.01)
    solution = solve_blocks(w, hessian, grid, block=128)
    assert not solution.out_of_range()
    solved = solution.decode()
    nearest = nearest_in_blocks(w, GRIDS[name], a.diagonal()).decode()
    assert weighted_loss(solved, w, a) < 0.6 * weighted_loss(nearest, w, a)


def test_a_hopeless_hessian_is_rounded_to_nearest():
    w, a = problem(256)
    hessian = prepare(
        torch.full_like(a, torch.nan), a.diagonal(), group=256, act_order="gar", damp=0.01
    )
    assert hessian.fallback
    solved = solve_blocks(w, hessian, GRIDS["Q4_K"], block=128)
    assert torch.equal(solved.decode(), nearest_in_blocks(w, GRIDS["Q4_K"]).decode())


# --- on disk --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """An artifact of the bundled model that uses every type. Its embedding has one too."""
    checkpoint = Checkpoint(REFERENCE_VLM)
    names = [*checkpoint.architecture.linears, "model.embed_tokens"]
    config = QuantConfig("rtn", gguf_type="Q4_K_M", types=dict(zip(names, cycle(GRIDS))))
    folder = tmp_path_factory.mktemp("mixed") / "artifact"
    quantize(checkpoint, [], config, folder, name="x", calibration={})
    return folder


def test_an_artifact_keeps_every_type_and_two_decoders_agree(mixed):
    artifact, weights = Artifact(mixed), Weights(mixed)
    assert {r.type for r in artifact.records.values()} == set(GRIDS)
    assert "model.embed_tokens.weight" not in artifact.float_names()
    for linear in artifact.linears():
        name, decoded = f"{linear.name}.weight", linear.decode()
        assert np.array_equal(decoded.numpy(), weights.array(name)), name
        source = Checkpoint(REFERENCE_VLM).tensor(name).float()
        # Types of three or four levels, and two bits on a lattice, have errors of .33 to .42.
        bound = 0.45 if linear.type in ("TQ2_0", "Q2_0", "IQ2_XS", "IQ2_XXS") else 0.35
        assert (decoded - source).norm() < bound * source.norm(), linear.type
    assert weights.count == sum(t.numel for t in Checkpoint(REFERENCE_VLM).tensors.values())


def first_of(kind, folder):
    """(name, its layer's file, the tensors in it, their metadata) of the first linear of a type."""
    name = next(r.name for r in Artifact(folder).records.values() if r.type == kind)
    file = folder / layer_file(Artifact(folder).records[name].layer)
    with safe_open(file, framework="pt") as f:
        metadata = f.metadata()
    return name, file, load_file(file), metadata


@pytest.mark.parametrize(
    "part, value", [("codes", 255), ("sub_scales", 127), ("d", float("inf")), ("sub_mins", 255)]
)
def test_a_damaged_artifact_is_named(mixed, tmp_path, part, value):
    folder = shutil.copytree(mixed, tmp_path / "artifact")
    name, file, tensors, metadata = first_of("Q2_K", folder)
    tensors[f"{name}.{part}"].view(-1)[3] = value
    save_file(tensors, file, metadata)
    with pytest.raises(ArtifactError, match=f"{name}: 1 .*damaged"):
        Artifact(folder).linear(name)


def test_codes_that_are_no_point_are_named(mixed, tmp_path):
    folder = shutil.copytree(mixed, tmp_path / "artifact")
    name, file, tensors, metadata = first_of("IQ2_XXS", folder)
    codes = tensors[f"{name}.codes"].view(-1)
    codes[3] = 5 - codes[3]  # another sign: their number is odd now
    save_file(tensors, file, metadata)
    with pytest.raises(ArtifactError, match=f"{name}: 1 groups of codes .*damaged"):
        Artifact(folder).linear(name)


@pytest.mark.parametrize("name", GRIDS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-30, 16), shift=st.floats(-2, 2))
def test_no_block_decodes_to_a_larger_error_than_zeros(name, seed, exponent, shift):
    """At the ends of float16, scales are lost at one end and weights are clipped at the other."""
    grid, draw = GRIDS[name], torch.Generator().manual_seed(seed)
    weights = (torch.randn(4, 512, generator=draw) + shift) * 2.0**exponent
    importance = torch.rand(512, generator=draw) + 0.1
    decoded = round_to_grid(weights, grid, importance).decode()
    error, zeros = (
        (importance.double() * (d.double() - weights.double()) ** 2).view(4, -1, grid.block).sum(-1)
        for d in (decoded, torch.zeros_like(weights))
    )
    assert bool((error <= zeros * (1 + 1e-5)).all())


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_weights_of_a_few_millionths_keep_their_signs(name):
    """The unit of their scales is the smallest float16, and its multiples still tell them apart."""
    weights = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)) * 3e-6
    decoded = round_to_grid(weights, GRIDS[name], torch.ones(512)).decode()
    assert float((decoded - weights).norm() / weights.norm()) < 0.5


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda g: g.name)
def test_rows_are_fitted_in_parts_with_the_same_bytes(monkeypatch, grid):
    weights, importance = torch.randn(37, 512) * torch.rand(37, 1), torch.rand(512) + 0.1
    weights[3] = 0
    whole = fit_blocks(grid, weights, importance)
    monkeypatch.setattr(block_fit, "_CACHED", 5 * 512)
    for a, b in zip(whole.fields(), fit_blocks(grid, weights, importance).fields()):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("kind", sorted(GRIDS))
def test_trials_at_once_choose_what_trials_in_turn_choose(kind, monkeypatch):
    """A GPU tries many ranges at once. Of equal errors the first counts there too."""
    grid = GRIDS[kind]
    weights = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    importance = torch.linspace(0.5, 2, 256)
    in_turn = fit_blocks(grid, weights, importance)

    def at_once(values, _w):
        return (torch.tensor(values).view(len(values), 1, 1, 1, -1),)

    monkeypatch.setattr(block_fit, "_trials", at_once)
    for a, b in zip(in_turn.fields(), fit_blocks(grid, weights, importance).fields()):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("count", [100, 5000])
def test_the_places_among_levels_are_those_of_a_search(count):
    bounds = torch.tensor([-3.5, -1.0, 0.25, 2.0])
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 3
    numbers[:4] = bounds  # a number that is a bound stands below it
    found = _places(numbers.view(4, -1), bounds)
    assert torch.equal(found, torch.bucketize(numbers, bounds).float().view(4, -1))
    assert found.view(-1)[:4].tolist() == [0, 1, 2, 3]
