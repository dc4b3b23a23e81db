"""The files that a run wrote: their names, sizes, and the command that runs them."""

from __future__ import annotations

import shlex
from pathlib import Path

from vlmq_export.formats.gguf.files.imatrix import IMATRIX
from vlmq_export.formats.model_plan import ModelPlan


def files_of(folder: Path) -> dict[str, int]:
    """Name → bytes of every file in a folder and below it, the largest first."""
    sizes = {
        p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()
    }
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def gptqmodel_loads(model: ModelPlan, names: str) -> bool:
    """Whether a GPTQ folder is for GPTQModel.load: by its names, or because nothing else loads it.

    names: as `--gptq-names` has them.
    """
    return names == "module" or model.architecture.family.sparse


def run_with(
    name: str, out: Path, *, below: str = "", by_gptqmodel: bool = False, by_vllm: bool = True
) -> list[str]:
    """How the files of a format are run, a command or a line of Python each.

    below: the path of the output folder as it shall stand in a command; empty: from inside it.
    by_gptqmodel: a GPTQ folder is for GPTQModel.load.
    by_vllm: vLLM loads the compressed-tensors folder.
    """
    place = f"{below}/{name}" if below else name
    if name == "gptq":
        if by_gptqmodel:
            return [f'GPTQModel.load("{place}")  # Python, gptqmodel']
        loads = f'AutoModelForImageTextToText.from_pretrained("{place}", device_map="auto")'
        return [f"{loads}  # Python, transformers + optimum + gptqmodel"]
    if name == "compressed-tensors":
        if not by_vllm:
            return [f"{place}: in transformers with compressed-tensors, as README.md shows"]
        return [f"vllm serve {shlex.quote(place if below else f'./{name}')}"]
    if name == "onnx":
        if (out / "onnx" / "genai_config.json").is_file():
            return [f'onnxruntime_genai.Model("{place}")  # Python, onnxruntime-genai']
        return [f"{place}: vision.onnx → embedding.onnx → text.onnx in ONNX Runtime, in that order"]
    models = [p.name for p in (out / "gguf").glob("*.gguf") if p.name != IMATRIX]
    files = sorted(models, key=lambda file: (file.startswith("mmproj"), file))
    text, mmproj = (files[0], files[-1]) if files else ("model.gguf", "mmproj.gguf")
    both = f"-m {shlex.quote(f'{place}/{text}')} --mmproj {shlex.quote(f'{place}/{mmproj}')}"
    return [
        f"llama-mtmd-cli {both} --image photo.jpg -p 'What is shown?'",
        f"llama-server {both}",
    ]


def source_bytes(folder: Path | None) -> int | None:
    """Bytes of a source checkpoint's weights, or None where it is not at hand."""
    sizes = [p.stat().st_size for p in folder.glob("*.safetensors")] if folder else []
    return sum(sizes) or None
