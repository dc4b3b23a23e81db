"""What a quantized vision tower or embedding costs, alone and under a quantized decoder.

    python -m tools.bench.vision build/reference-smolvlm --bits 8,4 --samples 128 --rows 128
    python -m tools.bench.vision build/reference-smolvlm --bits 6,5,4,3 --blocks

A row is a width of the tower, by the solver or rounded to nearest, or a width of the embedding,
which is always rounded to nearest. With `--blocks` the tower is on the block types of GGUF that
`--vision-bits` gives it there. The first figure is the KL divergence at the answers of a model
of which nothing else is quantized, the second that of a model whose decoder is quantized too, as
`--vision-bits` and `--embedding-bits` do. Both are to the source.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vlmq_export.bundled import CALIBRATION, HELDOUT, REFERENCE_VLM
from vlmq_export.formats.proof.decoded import DecodedCheckpoint
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.config import VISION_TYPES, QuantConfig
from vlmq_export.quantizer.grids.linears import Linear
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.methods import method_named
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import StreamedModel
from vlmq_export.quantizer.run.outer import solve_outer
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.run.side_by_side import answer_distances
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.vision import stage

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Bench:
    """A model with its samples."""

    checkpoint: Checkpoint
    samples: list[Sample]  # of calibration
    heldout: list[Sample]
    config: QuantConfig  # of the decoder

    def tower_alone(self, tower: dict[str, Any]) -> float:
        """KL where the decoder stays as it is. tower: what the recipe says of the tower."""
        job = Job.of(self.checkpoint.architecture, replace(self.config, **tower))
        names, model = stage.tower_names(self.checkpoint), StreamedModel(self.checkpoint, CPU)
        with tempfile.TemporaryDirectory() as folder:
            tower = stage.solve_vision(model, names, self.samples, job, Path(folder), Shelf(CPU))
        return self.distance(StreamedModel(_With(self.checkpoint, tower), CPU))

    def embedding_alone(self, bits: int) -> float:
        """KL where nothing else is quantized. A tied output matrix is the quantized embedding."""
        job = Job.of(self.checkpoint.architecture, replace(self.config, embedding_bits=bits))
        with tempfile.TemporaryDirectory() as folder:
            table = solve_outer(self.checkpoint, job, Path(folder), CPU)
        return self.distance(StreamedModel(_With(self.checkpoint, table), CPU))

    def with_decoder(self, **outside: Any) -> float:
        """KL where the decoder is quantized too, beside what `outside` names of the recipe."""
        config = replace(self.config, **outside)
        given = {"name": "m", "calibration": {}, "device": "cpu"}
        with tempfile.TemporaryDirectory() as folder:
            artifact = Path(folder) / "a"
            quantize(self.checkpoint, list(self.samples), config, artifact, **given)
            decoded = DecodedCheckpoint(Weights(artifact), artifact / "source")
            return self.distance(StreamedModel(decoded, CPU))

    def distance(self, other: StreamedModel) -> float:
        """KL at the held-out answers, in thousandths of a nat."""
        source = StreamedModel(self.checkpoint, CPU)
        each = answer_distances(source, other, self.heldout)
        return 1000 * float(torch.cat([distance.kl for distance in each]).mean())


class _With:
    """A `WeightFiles`: a checkpoint, some of whose matrices are quantized."""

    def __init__(self, checkpoint: Checkpoint, quantized: Sequence[Linear]):
        self._source = checkpoint
        self.path, self.architecture = checkpoint.path, checkpoint.architecture
        self.written_config, self.tensors = checkpoint.written_config, checkpoint.tensors
        self.info = checkpoint.info
        self._quantized = {f"{linear.name}.weight": linear for linear in quantized}

    def tensor(self, name: str, rows: Sequence[int] | None = None) -> torch.Tensor:
        if name not in self._quantized:
            return self._source.tensor(name, rows)
        decoded = self._quantized[name].decode()
        return decoded if rows is None else decoded[list(rows)]


@contextmanager
def nearest() -> Iterator[None]:
    """The tower is rounded to nearest, whatever method the decoder is solved by."""
    own = stage.tower_job
    stage.tower_job = lambda job: replace(own(job), method=method_named("rtn"))
    try:
        yield
    finally:
        stage.tower_job = own


def main(
    model: Annotated[Path, typer.Argument()] = REFERENCE_VLM,
    bits: str = "8,4",
    samples: int = 128,
    rows: int = 128,
    group_size: int = 128,
    decoder: Annotated[bool, typer.Option(help="Whether the second figure is measured.")] = True,
    blocks: Annotated[bool, typer.Option(help="Whether the tower is on block types.")] = False,
) -> None:
    """Print the table."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    preprocessor = Preprocessor(model)
    taken, heldout = (
        [preprocessor.sample(row) for row in read_rows(file)[:count]]
        for file, count in ((CALIBRATION, samples), (HELDOUT, rows))
    )
    bench = Bench(Checkpoint(model), taken, heldout, QuantConfig(group_size=group_size))
    print("| quantized | alone | with a decoder of 4 bits |\n|---|---|---|")

    def row(title: str, alone: float, **config: Any) -> None:
        both = f"{bench.with_decoder(**config):.3g}" if decoder else ""
        print(f"| {title} | {alone:.3g} | {both} |", flush=True)

    widths = [int(width) for width in bits.split(",")]
    row("nothing else", 0.0)
    for width in widths:
        kind = VISION_TYPES.get(width, ("",))[0] if blocks else ""
        tower, said = {"vision_bits": width, "vision_type": kind}, kind or f"{width} bits"
        row(f"tower, {said}, solved", bench.tower_alone(tower), **tower)
        with nearest():
            row(f"tower, {said}, to nearest", bench.tower_alone(tower), **tower)
    for width in () if blocks else sorted({8, 4} & {*widths}, reverse=True):
        row(f"embedding, {width} bits", bench.embedding_alone(width), embedding_bits=width)


if __name__ == "__main__":
    typer.run(main)
