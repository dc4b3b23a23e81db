"""How long a vision tower of 8, 6 or 4 bits takes for an image, beside one of 16 bits.

    python -m tools.bench.encode

The towers have random weights of published widths and four blocks: Qwen2.5-VL's (1280 columns, an
MLP of 3420) and SigLIP's (1152, 4304). Each is written with its linears in 16 bits, and with
`--vision-bits` 8, 6 and 4 by `rtn`. GGUF alone has 6 bits: blocks of Q6_K, and 8 bits in rows that
256 does not divide. mtmd and ONNX Runtime encode one image on one thread, the widths in turns. The
figure is the median of the CPU seconds, and its ratio to 16 bits.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from tools.reference_vlm import random_checkpoint
from tools.reference_vlm.tiny_checkpoints import make_tiny
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf.read import find_files
from vlmq_export.formats.gguf.runtime import llama
from vlmq_export.formats.gguf.runtime.prompts import Prompts
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.onnx.proof.runner import OnnxRunner
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import BITS as WIDTHS
from vlmq_export.quantizer.config import VISION_TYPES, QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.rows import read_rows

BITS = (16, 8, 6, 4)
DEPTH = 4  # blocks of a tower
TEXT = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 1024}
QWEN = random_checkpoint.QWEN2_5_VL_3B
SIDE = 384  # of SigLIP's images, in pixels
SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "image_size": SIDE,
}

Encode = Callable[[], float]  # encodes the image once, and returns the CPU seconds


@dataclass(frozen=True)
class Tower:
    """A checkpoint with a tower of published widths."""

    name: str
    make: Callable[[Path], Path]  # writes it into a folder
    side: int  # of the image, in pixels


def _qwen(folder: Path) -> Path:
    vision = QWEN["vision_config"] | {"depth": DEPTH, "fullatt_block_indexes": [DEPTH - 1]}
    vision |= {"out_hidden_size": TEXT["hidden_size"]}
    return random_checkpoint.make(
        folder, published=QWEN | TEXT | {"vision_config": vision}, layers=1
    )


def _siglip(folder: Path) -> Path:
    shape = {"vision_config": SIGLIP, "image_grid_pinpoints": [[SIDE, SIDE]]}
    make_tiny(folder, "llava_onevision", depth=DEPTH, shape=shape)
    file = folder / "preprocessor_config.json"
    own = {"image_grid_pinpoints": [[SIDE, SIDE]], "size": {"height": SIDE, "width": SIDE}}
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | own), "utf-8")
    return folder


TOWERS = (Tower("Qwen2.5-VL", _qwen, 448), Tower("SigLIP", _siglip, SIDE))


def written(source: Path, bits: int, folder: Path) -> Path:
    """The folder of a model whose tower has so many bits, in the formats that hold them."""
    config = QuantConfig(method="rtn", vision_bits=0 if bits == 16 else bits, vision_short=True)
    if bits not in (16, *WIDTHS):
        config = replace(config, vision_type=VISION_TYPES[bits][0])
    given = {"name": "tower", "calibration": {}, "device": "cpu"}
    quantize(Checkpoint(source), [], config, folder / "artifact", **given)
    for name in ("gguf",) if config.vision_type else ("gguf", "onnx"):
        (folder / name).mkdir()
        FORMATS[name].write(Artifact(folder / "artifact"), folder / name, FormatOptions())
    return folder


def in_mtmd(lib: llama.Library, folder: Path, reference: Reference) -> Encode:
    """mtmd's encoder of an mmproj: the seconds of `mtmd_encode_chunk` alone."""
    layout = Layout.of(reference.architecture)
    (prompt,) = reference.prompts
    request = Prompts(reference, layout, folder).mtmd(prompt, "image")
    images = [np.load(folder / name) for name in request["images"]]
    text, mmproj = find_files(folder / "gguf")
    model = llama.Model(lib, str(text))
    context = llama.Context(model, 2048, 1)
    vision = llama.Vision(model, str(mmproj), 1)

    def encode() -> float:
        took, plain = [], lib.mtmd_encode_chunk

        def timed(*given: object) -> int:
            start = time.process_time()
            code = plain(*given)
            took.append(time.process_time() - start)
            return code

        vars(lib)["mtmd_encode_chunk"] = timed
        try:
            context.clear()
            vision.run(context, request["text"], images, every=False)
        finally:
            vars(lib)["mtmd_encode_chunk"] = plain
        return sum(took)

    return encode


def in_onnx(folder: Path, reference: Reference) -> Encode:
    """ONNX Runtime's session of vision.onnx."""
    runner, (prompt,) = OnnxRunner(folder / "onnx", threads=1), reference.prompts
    runner.prompt_features(prompt)

    def encode() -> float:
        start = time.process_time()
        runner.prompt_features(prompt)
        return time.process_time() - start

    return encode


def measured(tower: Tower, scratch: Path, rounds: int) -> dict[str, dict[int, float]]:
    """Runtime → width → median CPU seconds of an image."""
    source = tower.make(scratch / "source")
    pixels = np.random.default_rng(0).integers(0, 256, (tower.side, tower.side, 3), np.uint8)
    Image.fromarray(pixels).save(scratch / "noise.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    row = [{"id": "noise", "image": "noise.png", "conversations": turns}]
    (scratch / "rows.json").write_text(json.dumps(row), "utf-8")
    rows, lib = read_rows(scratch / "rows.json"), llama.load(lambda *_: None)
    ways: dict[tuple[str, int], Encode] = {}
    for bits in BITS:
        folder = written(source, bits, scratch / str(bits))
        reference = Reference(folder / "artifact", rows, seq_len=2048)
        ways["mtmd", bits] = in_mtmd(lib, folder, reference)
        if (folder / "onnx").is_dir():
            ways["ONNX Runtime", bits] = in_onnx(folder, reference)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in ways}
    for _ in range(rounds):
        for key, encode in ways.items():
            times[key].append(encode())
    found: dict[str, dict[int, float]] = {}
    for (runtime, bits), seconds in times.items():
        found.setdefault(runtime, {})[bits] = statistics.median(seconds)
    return found


def main(rounds: int = 9) -> None:
    """Print a line for each tower and runtime."""
    logging.disable(logging.WARNING)
    head = [*(f"{b} bits, ms" for b in BITS), *(f"{b} / {BITS[0]}" for b in BITS[1:])]
    print(f"| Tower | Runtime | {' | '.join(head)} |")
    print("|---|---|" + "---:|" * len(head))
    for tower in TOWERS:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for runtime, by_bits in measured(tower, scratch, rounds).items():
                ms = [f"{1e3 * by_bits[b]:.0f}" if b in by_bits else "" for b in BITS]
                ratios = [
                    f"{by_bits[b] / by_bits[BITS[0]]:.2f}" if b in by_bits else "" for b in BITS[1:]
                ]
                print(f"| {tower.name} | {runtime} | {' | '.join([*ms, *ratios])} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
