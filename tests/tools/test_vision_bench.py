"""The bench of quantized vision towers measures the tower that it says."""

import torch

from tools.bench.vision import Bench, nearest
from vlmq_export.bundled import CALIBRATION, HELDOUT
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.vision import stage


def test_a_rounded_tower_costs_more_than_a_solved_one_and_more_bits_cost_less(tiny):
    torch.set_num_threads(1)
    folder = tiny("internvl")
    preprocessor, own = Preprocessor(folder), stage.tower_job
    taken, heldout = (
        [preprocessor.sample(row) for row in read_rows(file)[:4]] for file in (CALIBRATION, HELDOUT)
    )
    bench = Bench(Checkpoint(folder), taken, heldout, QuantConfig("exact", group_size=64))
    solved, finer, native = (
        bench.alone(bench.tower(vision_bits=bits, vision_type=kind)).kl
        for bits, kind in ((3, ""), (8, ""), (6, "Q6_K"))
    )
    with nearest():
        rounded = bench.alone(bench.tower(vision_bits=3)).kl
    assert stage.tower_job is own
    assert 0 < finer < native < solved < rounded


def test_an_embedding_of_more_bits_costs_less(tiny):
    folder = tiny("internvl")
    heldout = [Preprocessor(folder).sample(row) for row in read_rows(HELDOUT)[:2]]
    bench = Bench(Checkpoint(folder), [], heldout, QuantConfig("rtn", group_size=64))
    finer, coarser = (bench.alone(bench.embedding(bits)).kl for bits in (8, 4))
    assert 0 < finer < coarser / 10


def test_a_decoder_may_be_quantized_without_its_tower(tiny):
    """What is not quantized costs nothing, and a tower behind which it is not calibrated counts."""
    folder = tiny("internvl")
    preprocessor = Preprocessor(folder)
    taken, heldout = (
        [preprocessor.sample(row) for row in read_rows(file)[:2]] for file in (CALIBRATION, HELDOUT)
    )
    bench = Bench(Checkpoint(folder), taken, heldout, QuantConfig("gptq", group_size=64))
    tower = bench.tower(vision_bits=3)
    source, seen, unseen = (
        bench.alone([]),
        bench.with_decoder(vision_bits=3),
        bench.with_decoder(tower),
    )
    assert source.kl == 0 and 0 <= source.exact <= 1
    assert 0 < bench.with_decoder().kl < unseen.kl != seen.kl
