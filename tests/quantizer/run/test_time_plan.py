"""The plan of time: known figures on a machine that is made up, and what grows with what.

`tools/checks/time_plan.py` holds the plan beside real runs.
"""

import dataclasses

import pytest
import torch

from tests.quantizer.run.test_memory_plan import QWEN_3B
from vlmq_export import Recipe
from vlmq_export.errors import CalibrationError
from vlmq_export.pipeline import dry_run, run
from vlmq_export.planning.run_time import spoken
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.run.machine import Machine, at, measured
from vlmq_export.quantizer.run.time_plan import Tried, choosing_seconds, plan_seconds
from vlmq_export.quantizer.run.work import Linears
from vlmq_export.quantizer.samples.sample import Length, Lengths

FREE = {1: 1e-30}  # a table of what costs nothing
QUICK = Machine(
    products={1: 1e30},
    factors={1: 1e30},
    passes=FREE,
    call=0.0,
    columns=FREE,
    sweeps=FREE,
    fits={"Q4_K": 0.0},
)
AVERAGE = Machine(
    products={32: 5e10, 2048: 2e11},
    factors={128: 5e9, 2048: 2e10},
    passes={2**14: 5e-10, 2**24: 2e-9},
    call=1e-6,
    columns={64: 4e-7, 16384: 3e-8},
    sweeps={64: 8e-7, 8192: 5e-8},
    fits={"Q4_K": 1e-6},
)
LENGTHS = Lengths((Length(512, 256),) * 64)


def layers(count, kind=""):
    """The groups of so many layers of the 3B."""
    groups, rest = [], list(QWEN_3B.linears)
    for size in QWEN_3B.groups:
        own, rest = rest[:size], rest[size:]
        groups.append(Linears(own[0][1], tuple(r for r, _ in own), (kind,) * size))
    return [groups] * count


def phases(machine=AVERAGE, lengths=LENGTHS, count=4, kind="", outside=None, **config):
    shapes = dataclasses.replace(QWEN_3B, layers=count)
    given = QuantConfig(**config)
    return plan_seconds(shapes, layers(count, kind), outside or {}, given, lengths, machine)


def test_products_are_counted_in_operations():
    """On a machine whose products alone take time, 1 FLOP/s: the walk of `gptq` by hand."""
    slow = dataclasses.replace(QUICK, products={1: 1.0})
    found = phases(slow, count=1, method="gptq")
    tokens, twice = 64 * 512, QWEN_3B.linears[4:6]
    weights = QWEN_3B.layer + sum(r * c for r, c in twice)
    scores = 2 * 2 * 64 * 512**2 * 2048  # queries by keys, and weights by values
    assert found["walk"] == pytest.approx(2 * tokens * weights + scores, rel=1e-6)
    band = {c: 0.5 + 512 / c for c in (2048, 11008)}
    sums = 3 * 2048**2 * band[2048] + 11008**2 * band[11008]  # q k v share an A; gate and up too
    assert found["statistics"] == pytest.approx(2 * tokens * sums, rel=1e-6)
    losses = sum(3 * 2 * r * c * c for r, c in QWEN_3B.linears)
    assert found["metrics"] == pytest.approx(losses, rel=1e-6)


def test_what_memory_keeps_of_an_mlp_is_not_made_twice():
    """On the same machine: gate and up once with room for all they make, half as often for half."""
    slow = dataclasses.replace(QUICK, products={1: 1.0})
    every = 4 * 64 * 512 * 11008

    def walk(room):
        config = QuantConfig(method="gptq")
        given = QWEN_3B, layers(1), {}, config, LENGTHS, slow
        return plan_seconds(*given, room)["walk"]

    again = sum(2 * 64 * 512 * rows * columns for rows, columns in QWEN_3B.linears[4:6])
    assert walk(0) - walk(every) == pytest.approx(again, rel=1e-6)
    assert walk(0) - walk(every // 2) == pytest.approx(again / 2, rel=1e-6)
    assert walk(2 * every) == walk(every)


def test_a_linear_attention_goes_through_a_sample_chunk_by_chunk():
    """On the same machine: the walk by hand. It does not grow with the length of the samples."""
    slow = dataclasses.replace(QUICK, products={1: 1.0})
    shapes = dataclasses.replace(QWEN_3B, layers=1, recurrent_heads=16, recurrent_width=128)
    ((first, second, *mlp),) = layers(1)
    mixing = [dataclasses.replace(group, recurrent=True) for group in (first, second)]
    tokens, twice = 64 * 512, QWEN_3B.linears[4:6]

    def walk(lengths):
        config = QuantConfig(method="gptq")
        return plan_seconds(shapes, [[*mixing, *mlp]], {}, config, lengths, slow)["walk"]

    chunk = 2 * 16 * (5 * 64 * 64 * 128 + 3 * 64 * 128 * 128)
    weights = QWEN_3B.layer + sum(r * c for r, c in twice)
    by_hand = 2 * tokens * weights + tokens / 64 * chunk
    assert walk(LENGTHS) == pytest.approx(by_hand, rel=1e-6)
    assert walk(Lengths((Length(2048, 256),) * 16)) == pytest.approx(by_hand, rel=1e-6)


EXPERTS = [
    Linears(2048, (768, 768), ("",) * 2, routed=True),
    Linears(768, (2048,), ("",), routed=True),
]


def sparse(tokens, **config):
    """Phases of one layer of 8 experts, of which a token takes 2, on the same machine."""
    slow = dataclasses.replace(QUICK, products={1: 1.0})
    (groups,) = layers(1)
    shapes = dataclasses.replace(QWEN_3B, layers=1, experts=8, taken=2)
    lengths = Lengths((Length(512, 256),) * (tokens // 512))
    return plan_seconds(
        shapes, [[*groups[:2], *8 * EXPERTS]], {}, QuantConfig(**config), lengths, slow
    )


def test_an_expert_is_given_a_share_of_the_tokens_and_all_where_few_come():
    """Its first linears are gone through twice: once more to what its last one is given."""
    attention, first, last = QWEN_3B.linears[:4], 2 * 2048 * 768, 2048 * 768
    dense = sum(rows * columns for rows, columns in attention)
    band = {c: 0.5 + 512 / c for c in (768, 2048)}
    own = 2048**2 * band[2048] + 768**2 * min(1, band[768])
    for tokens, summed in ((32768, 8192), (4096, 4096)):  # 1024 of 4096 would be too few
        found = sparse(tokens, method="gptq")
        scores = 2 * 2 * tokens * 512 * 2048
        walk = 2 * tokens * dense + scores + 8 * 2 * (tokens / 4 * (first + last) + summed * first)
        assert found["walk"] == pytest.approx(walk, rel=1e-6)
        statistics = 2 * tokens * 2 * 2048**2 * band[2048] + 8 * 2 * summed * own
        assert found["statistics"] == pytest.approx(statistics, rel=1e-6)
    backward = sparse(32768, method="vlmq")["importance"]
    backward -= phases(QUICK, count=1, method="vlmq")["importance"]
    products = 3 * 2 * (32768 * dense + 8 * 8192 * (first + last))
    assert backward == pytest.approx(products + (2 + 2.5) * 2 * 2 * 32768 * 512 * 2048, rel=1e-6)


def test_a_tower_is_walked_and_solved_on_patches():
    """On the same machine: a tower of one linear, by `gptq`, and the plan without it unchanged."""
    slow = dataclasses.replace(QUICK, products={1: 1.0})
    shapes = dataclasses.replace(QWEN_3B, layers=1, tower=((1280, 1280),))
    config = QuantConfig(method="gptq", vision_bits=8)
    found = plan_seconds(shapes, layers(1), {}, config, LENGTHS, slow)
    patches = 32 * 256 * QWEN_3B.patches  # of 64 samples half: six rows for each input
    solve = 2 * patches * 1280**2 * (0.5 + 512 / 1280) + 3 * 2 * 1280**3
    walk = 3 * 2 * patches * QWEN_3B.prefix
    # The products within the column loop are the rest.
    tower = found.pop("tower")
    assert tower == pytest.approx(solve + walk, abs=2e9)
    assert found == phases(slow, count=1, method="gptq")
    # Of more images it takes no more, and for a projector with four times the inputs 80.
    many = Lengths(LENGTHS.each * 8)
    assert plan_seconds(shapes, layers(1), {}, config, many, slow)["tower"] == tower
    wide = dataclasses.replace(shapes, tower=((1280, 1280), (2048, 5120)))
    found = plan_seconds(wide, layers(1), {}, config, many, slow)["tower"]
    assert found - 80 / 32 * walk < 80 / 32 * solve * (1 + 4**2)
    assert found > 80 / 32 * walk


def test_the_factorization_is_counted_once_for_linears_that_share_an_input():
    slow = dataclasses.replace(QUICK, factors={1: 1.0})
    one = phases(slow, count=1, method="gptq")["factorization"]
    assert one == pytest.approx((3 * 2048**3 + 11008**3) / 3)
    weighed = phases(slow, count=1, method="vlmq-gptq")["factorization"]
    assert weighed - one == pytest.approx(2 * 2048**3 / 3)  # q, k and v have one each


# The plan says nothing of methods that scale.
@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].scaling])
def test_time_grows_with_layers_and_samples(method):
    more = Lengths(LENGTHS.each * 2)
    longer = Lengths((Length(1024, 512),) * 64)
    base, deep, many, long = (
        sum(phases(method=method, **change).values())
        for change in ({}, {"count": 8}, {"lengths": more}, {"lengths": longer})
    )
    assert base < deep <= 2.5 * base
    assert base <= many <= long <= 4.5 * base
    if METHODS[method].calibrated:
        assert many < long


def test_importance_costs_nothing_in_the_first_layer():
    """Nothing is quantized yet: the paper's is 0. That of the answers is asked for there too."""
    assert "importance" not in phases(method="vlmq-paper", count=1)
    for method, less in (("vlmq-paper", 1), ("vlmq", 0)):
        two, three = (phases(method=method, count=n)["importance"] for n in (2, 3))
        assert three == pytest.approx((3 - less) / (2 - less) * two)


def test_ranges_are_solved_as_often_as_they_are_tried():
    slow = dataclasses.replace(QUICK, columns={1: 1.0})
    one, ten, thirty = (
        phases(slow, method=method, bits=bits)["column loop"]
        for method, bits in (("gptq", 4), ("exact-held", 4), ("exact-held", 2))
    )
    assert ten == pytest.approx(10 * one) and thirty == pytest.approx(30 * one)


def test_dampings_are_tried_on_some_rows():
    slow = dataclasses.replace(QUICK, factors={1: 1.0})
    once, more = (phases(slow, method=m)["factorization"] for m in ("exact-held", "exact"))
    assert 3 * once < more - once < 4 * once
    slow = dataclasses.replace(QUICK, columns={1: 1.0})
    once, more = (phases(slow, method=m)["column loop"] for m in ("exact-held", "exact"))
    assert 0 < more - once < once


def test_block_types_are_fitted_for_the_solution_and_for_its_measure():
    slow = dataclasses.replace(QUICK, fits={"Q4_K": 1.0})
    found = phases(
        slow, count=2, method="exact-held", kind="Q4_K", outside={"Q4_K": 7}, types={"x": "Q4_K"}
    )
    assert found["block types"] == 2 * 2 * QWEN_3B.layer and found["embedding"] == 7
    assert "ranges" not in found  # block types have ranges of their own


def test_points_of_a_lattice_are_searched_in_the_loop_and_in_the_descent():
    slow = dataclasses.replace(QUICK, fits={"IQ2_S": 0.0}, points={1: 1.0})
    flags = {"count": 2, "method": "exact-held", "types": {"x": "IQ2_S"}}
    found = phases(slow, kind="IQ2_S", **flags)
    assert found["column loop"] == 2 * QWEN_3B.layer
    assert found["descent"] == 3 * 2 * QWEN_3B.layer  # three sweeps
    found = phases(dataclasses.replace(slow, fits={"Q4_K": 0.0}), kind="Q4_K", **flags)
    assert found["column loop"] < 1e-9


def test_without_samples_only_weights_are_moved():
    found = phases(lengths=Lengths(()), method="rtn")
    assert set(found) == {"metrics", "weights"}


def test_a_share_of_the_rows_stands_for_all():
    quarter = Lengths(LENGTHS.each[:16], share=0.25)
    assert phases(lengths=quarter) == pytest.approx(phases())


def test_a_table_is_read_between_its_sizes_and_level_outside():
    table = {10: 1.0, 1000: 4.0}
    assert at(table, 100) == pytest.approx(2.0)
    assert at(table, 1) == 1.0 and at(table, 10**6) == 4.0


def test_the_clock_decides_what_the_machine_is():
    """With a clock that ticks once at each look, every probe takes one second."""
    ticks = iter(range(10**6))
    found = measured(torch.device("cpu"), ["Q4_K"], clock=lambda: float(next(ticks)))
    assert found.products[128] == pytest.approx(2 * 1024 * 128**2 * 32)
    assert found.factors[512] == pytest.approx(512**3 / 3)
    assert found.call == pytest.approx(1 / 200)
    assert set(found.fits) == {"Q4_K"}


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "1 s"),
        (42.4, "42 s"),
        (99.6, "2 min"),
        (720, "12 min"),
        (5999, "1 h 40 min"),
        (12_010, "3 h 20 min"),
        (7200, "2 h"),
        (100 * 3600, "100 h"),
    ],
)
def test_a_time_is_said_in_two_figures(seconds, said):
    assert spoken(seconds) == said


def test_a_dry_run_says_how_long_a_run_takes(monkeypatch):
    monkeypatch.setattr("vlmq_export.planning.run_time._machine", lambda *_: AVERAGE)
    few, many = (dry_run(Recipe(format=["gptq"], samples=n)).time for n in (16, 96))
    assert few is not None and many is not None
    assert few.seconds == pytest.approx(sum(few.phases.values()))
    assert few.seconds < many.seconds
    assert {"read samples", "walk", "column loop", "write"} <= few.phases.keys()
    assert dry_run(Recipe(format=["gptq"], samples=4, method="awq")).time is None


def test_a_long_run_says_it_in_the_log(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("vlmq_export.planning.run_time._machine", lambda *_: AVERAGE)
    recipe = Recipe(format=["gptq"], samples=4, method="gptq", verify=False, out=tmp_path / "o")
    with caplog.at_level("INFO", logger="vlmq_export"):
        run(recipe)
    assert "on this machine" not in caplog.text  # it would take longer to measure than to wait
    monkeypatch.setattr("vlmq_export.planning.run_time._LONG", 0)
    with caplog.at_level("INFO", logger="vlmq_export"):
        run(recipe, overwrite=True)
    assert "quantizing takes about 1 s on this machine" in caplog.text


def test_an_unusable_row_is_refused_by_the_dry_run(tmp_path):
    rows = tmp_path / "rows.json"
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows.write_text(
        '[{"image": "bad.png", "conversations": [{"from": "human", "value": "<image> What?"},'
        ' {"from": "gpt", "value": "This."}]}]'
    )
    recipe = Recipe(format=["gptq"], calibration=rows, verify=False)
    refused = dry_run(recipe)
    assert len(refused.refusals) == 1 and refused.time is None
    assert refused.refusals[0].startswith("1 of 1 samples cannot be used: ")
    with pytest.raises(CalibrationError, match="1 of 1 samples cannot be used: "):
        run(recipe.model_copy(update={"out": tmp_path / "o"}))


def test_the_choice_of_types_is_three_passes_and_a_solve_of_each():
    """On a machine whose products alone take time, and of 64 samples half are solved on."""
    slow = dataclasses.replace(QUICK, products={1: 1.0}, fits={"Q4_0": 0.0})
    tokens, scores = 64 * 512, 2 * 2 * 64 * 512**2 * 2048
    one = dataclasses.replace(QWEN_3B, layers=1, prefix=0)
    tried = [Tried(256, 2048, ("Q4_0",), 3)]
    found = choosing_seconds(one, tried, QuantConfig(), LENGTHS, 256, 4, [], 32, slow)
    passes = 3 * 2 * tokens * QWEN_3B.layer + (2 + 2.5 / 2) * scores
    sums = 2 * tokens / 2 * 2048**2 * (0.5 + 512 / 2048)
    loop = found - passes - 3 * sums
    assert 0 < loop < 3 * 2 * 256 * 2048**2 * 2  # its products, by halves of the columns
    dear, plain = (
        choosing_seconds(
            one, [Tried(256, 2048, (bits,), 1)], QuantConfig(), LENGTHS, 256, 4, [], 32, slow
        )
        for bits in (3, 4)
    )
    assert dear - passes - sums > 5 * (plain - passes - sums) > 0  # ranges and descent
    half = choosing_seconds(one, [], QuantConfig(), LENGTHS, 32, 4, [], 32, slow)
    assert half == pytest.approx(passes / 2, rel=1e-6)
