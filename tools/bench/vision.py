"""What a quantized vision tower or embedding costs, alone and under a quantized decoder.

    python -m tools.bench.vision build/reference-smolvlm --bits 8,4 --samples 128 --rows 128
    python -m tools.bench.vision build/reference-smolvlm --bits 6,5,4,3 --blocks

A row is a width of the tower, by the solver or rounded to nearest, or a width of the embedding,
which is always rounded to nearest. With `--blocks` the tower is on the block types of GGUF that
`--vision-bits` gives it there. A row has figures of three models:

1. nothing else is quantized;
2. the decoder is quantized too, and was calibrated on what this tower or embedding shows it, as
   `--vision-bits` and `--embedding-bits` do;
3. the same, but the decoder was calibrated on what the source's tower shows it.

Of each there are the KL divergence to the source at the answers, in thousandths of a nat, and the
share of answers that are right token by token. That is what a greedy answer would be.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from vlmq_export.bundled import CALIBRATION, HELDOUT, REFERENCE_VLM
from vlmq_export.formats.proof.decoded import DecodedCheckpoint
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.config import EMBEDDING_TYPES, VISION_TYPES, QuantConfig
from vlmq_export.quantizer.grids.linears import Linear
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.methods import method_named
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import StreamedModel, WeightFiles
from vlmq_export.quantizer.run.outer import solve_outer
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.run.side_by_side import answer_distances
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.vision import stage

CPU = torch.device("cpu")


class Outcome(NamedTuple):
    """What a quantized model makes of the held-out rows."""

    kl: float  # to the source at the answers' tokens, in thousandths of a nat
    exact: float  # share of the answers whose every token is the expected one


@dataclass(frozen=True)
class Bench:
    """A model with its samples."""

    checkpoint: Checkpoint
    samples: list[Sample]  # of calibration
    heldout: list[Sample]
    config: QuantConfig  # of the decoder

    def tower(self, **tower: Any) -> list[Linear]:
        """The quantized linears of the tower. tower: what the recipe says of it."""
        job = Job.of(self.checkpoint.architecture, replace(self.config, **tower))
        names, model = stage.tower_names(self.checkpoint), StreamedModel(self.checkpoint, CPU)
        solved = stage.solved_tower(model, names, self.samples, job, Shelf(CPU))
        return [linear for linear, _ in solved]

    def alone(self, quantized: Sequence[Linear]) -> Outcome:
        """What these cost where the rest stays as it is."""
        return self.outcome(_With(self.checkpoint, quantized))

    def embedding(self, bits: int) -> list[Linear]:
        """The quantized embedding. A tied output matrix is the same."""
        job = Job.of(self.checkpoint.architecture, replace(self.config, embedding_bits=bits))
        with tempfile.TemporaryDirectory() as folder:
            return solve_outer(self.checkpoint, job, Path(folder), CPU)

    def with_decoder(self, before: Sequence[Linear] = (), **outside: Any) -> Outcome:
        """What it costs that the decoder is quantized, and what `outside` names of the recipe.

        before: linears of a quantized tower that the decoder was not calibrated on.
        """
        config = replace(self.config, **outside)
        given = {"name": "m", "calibration": {}, "device": "cpu"}
        with tempfile.TemporaryDirectory() as folder:
            artifact = Path(folder) / "a"
            quantize(self.checkpoint, list(self.samples), config, artifact, **given)
            decoded = DecodedCheckpoint(Weights(artifact), artifact / "source")
            return self.outcome(_With(decoded, before))

    def outcome(self, other: WeightFiles) -> Outcome:
        """Another model's answers to the held-out rows, beside the source's."""
        source, found = StreamedModel(self.checkpoint, CPU), StreamedModel(other, CPU)
        each = answer_distances(source, found, self.heldout)
        right = [
            torch.equal(distance.best, sample.input_ids[sample.answer])
            for distance, sample in zip(each, self.heldout)
        ]
        kl = torch.cat([distance.kl for distance in each]).mean()
        return Outcome(1000 * float(kl), sum(right) / len(right))


class _With:
    """A `WeightFiles`: another one, some of whose matrices are quantized."""

    def __init__(self, checkpoint: Checkpoint | WeightFiles, quantized: Sequence[Linear]):
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
    decoder: Annotated[bool, typer.Option(help="Whether the decoder is quantized too.")] = True,
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
    heads = ("quantized", "alone", "with a decoder of 4 bits", "not calibrated on this tower")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")

    def row(title: str, parts: Sequence[Linear], tower: bool = False, **config: Any) -> None:
        found = [bench.alone(parts)]
        if decoder:
            found.append(bench.with_decoder(**config))
            found += [bench.with_decoder(parts)] if tower else []
        cells = [f"{kl:.3g}, {exact:.3f}" for kl, exact in found]
        print(f"| {title} | {' | '.join(cells)} |", flush=True)

    row("nothing else", ())
    for width in (int(width) for width in bits.split(",")):
        kind = VISION_TYPES.get(width, ("",))[0] if blocks else ""
        tower, said = {"vision_bits": width, "vision_type": kind}, kind or f"{width} bits"
        row(f"tower, {said}, solved", bench.tower(**tower), tower=True, **tower)
        with nearest():
            row(f"tower, {said}, to nearest", bench.tower(**tower), **tower)
        if width in EMBEDDING_TYPES and not blocks:
            table = bench.embedding(width)
            row(f"embedding, {width} bits", table, embedding_bits=width)


if __name__ == "__main__":
    typer.run(main)
