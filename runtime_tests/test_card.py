"""The code blocks of a model card, copied from it and run against the exported files.

The image is a JPEG as a user has one. torchvision is not among the pinned packages, and
transformers wants it for videos alone: that part of its processors stays away. Each block of Python
runs as it stands. llama.cpp's programs are not built here: their options are looked up in the
library of the same build, which also answers as the server that the last block asks.
"""

import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from transformers import AutoProcessor
from transformers.models import pixtral
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.models.pixtral import image_processing_pil_pixtral as with_pillow
from transformers.processing_utils import ProcessorMixin

from tools.reference_vlm.tiny_families import PIXTRAL
from vlmq_export import Recipe, export, formats
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.proving.parity import required_runtimes

WITHOUT_TORCHVISION = """
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.processing_utils import ProcessorMixin

_checked = ProcessorMixin.check_argument_for_proper_class
AutoVideoProcessor.from_pretrained = classmethod(lambda cls, *args, **kwargs: None)
ProcessorMixin.check_argument_for_proper_class = lambda self, name, value: (
    None if name == "video_processor" else _checked(self, name, value)
)
"""

# Mistral 3's processor asks for torchvision by name. Its image part with Pillow needs none.
PIXTRAL_WITHOUT_TORCHVISION = """
import sys
from transformers.models import pixtral
from transformers.models.pixtral import image_processing_pil_pixtral as with_pillow

sys.modules["transformers.models.pixtral.image_processing_pixtral"] = with_pillow
from transformers.models.pixtral.processing_pixtral import PixtralProcessor

pixtral.PixtralProcessor = PixtralProcessor
"""


def photo() -> Image.Image:
    """A red disc on a light ground, in a size that every processor changes."""
    image = Image.new("RGB", (640, 427), (200, 220, 240))
    ImageDraw.Draw(image).ellipse((200, 100, 420, 320), fill=(220, 30, 30))
    return image


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "out"
    written = [name for name in formats.NAMES if name in required_runtimes()]
    asked = {"format": written, "method": "rtn", "gptq_names": "module", "verify": False}
    export(Recipe(out=folder, **asked))
    photo().save(folder / "photo.jpg", quality=90)
    return folder


def blocks(out: Path, title: str) -> list[tuple[str, str]]:
    """(language, code) of every block below a heading of the card."""
    text = (out / "README.md").read_text("utf-8")
    section = re.search(rf"^### {re.escape(title)}$(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
    assert section, f"the card has no heading {title}"
    return re.findall(r"^```(\w+)\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)


def answer(code: str, out: Path, before: str = WITHOUT_TORCHVISION) -> str:
    """The last line that a block of Python prints, run in the folder of the card."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(out.parent / "hf"),
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHDYNAMO_DISABLE": "1",
    }
    command = [sys.executable, "-c", before + code]
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        name not in required_runtimes(), reason=f"{name} not declared present"
    )


@pytest.mark.parametrize(
    ("title", "before"),
    [
        pytest.param("`gptq/` in transformers", WITHOUT_TORCHVISION, marks=needs("gptq")),
        pytest.param(
            "`gptq/` in GPTQModel", WITHOUT_TORCHVISION, marks=[needs("gptq"), pytest.mark.slow]
        ),
        pytest.param(
            "`compressed-tensors/` in transformers",
            WITHOUT_TORCHVISION,
            marks=[needs("compressed-tensors"), pytest.mark.slow],
        ),
        pytest.param("`onnx/` in ONNX Runtime", WITHOUT_TORCHVISION, marks=needs("onnx")),
        pytest.param("`onnx/` in onnxruntime-genai", "", marks=needs("onnx")),
    ],
)
def test_a_block_of_python_sees_the_disc(out, title, before):
    ((language, code),) = blocks(out, title)
    assert language == "python" and answer(code, out, before) == "red"


@pytest.mark.slow
@needs("compressed-tensors")
def test_a_folder_of_several_grids_is_decoded_before_it_is_loaded(tmp_path):
    out = tmp_path / "out"
    given = {"format": ["compressed-tensors"], "method": "rtn", "vision_bits": 8, "verify": False}
    export(Recipe(out=out, **given))
    photo().save(out / "photo.jpg", quality=90)
    ((_, code),) = blocks(out, "`compressed-tensors/` in transformers")
    assert 'convert_checkpoint("compressed-tensors", "decoded", decoder)' in code
    assert answer(code, out) == "red"
    ((_, served),) = blocks(out, "`compressed-tensors/` behind an HTTP address")
    assert "vllm serve" in served and "sglang" not in served


# -- llama.cpp and Ollama --------------------------------------------------------------------------

SERVER = """
import sys
import xllamacpp
text, vision = sys.argv[1:]
asked = xllamacpp.CommonParams()
asked.model.path, asked.mmproj.path = text, vision
asked.hostnames, asked.port, asked.n_ctx, asked.n_parallel = ["127.0.0.1"], 0, 2048, 1
asked.warmup, asked.cpuparams.n_threads = False, 1
server = xllamacpp.Server(asked)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@needs("gguf")
def test_the_options_of_llama_cpps_programs_are_those_of_this_build(out):
    """The library has the table of options that its programs parse."""
    spec = find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None
    (library,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    known = library.read_bytes()
    shell = [code for language, code in blocks(out, "`gguf/` in llama.cpp") if language == "sh"]
    assert [code.split()[0] for code in shell] == ["llama-mtmd-cli", "llama-server"]
    for code in shell:
        options = re.findall(r"(?<=\s)--?[a-z][\w-]*", code)
        assert "--mmproj" in options and "-m" in options
        assert all(b"\0" + option.encode() + b"\0" in known for option in options)
        for file in re.findall(r"\S+\.gguf", code):
            assert (out / file).is_file()


@needs("gguf")
def test_the_question_to_the_server_is_answered(out):
    (client,) = [c for language, c in blocks(out, "`gguf/` in llama.cpp") if language == "python"]
    files = re.findall(r"^FROM ./(.*)$", (out / "gguf" / "Modelfile").read_text(), re.MULTILINE)
    command = [sys.executable, "-c", SERVER, *(str(out / "gguf" / file) for file in files)]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            assert "http://127.0.0.1:8080" in client
            said = answer(client.replace("http://127.0.0.1:8080", address), out, "")
        finally:
            server.kill()
    assert said == "red"


@needs("gguf")
def test_ollama_is_given_both_files_and_the_end_of_an_answer(out):
    lines = (out / "gguf" / "Modelfile").read_text("utf-8").splitlines()
    files = [line.removeprefix("FROM ./") for line in lines if line.startswith("FROM ")]
    assert sorted(files) == sorted(p.name for p in (out / "gguf").glob("*.gguf"))
    assert files[1].startswith("mmproj-")
    assert lines[2:] == ['PARAMETER stop "<|im_end|>"']
    ((_, code),) = blocks(out, "`gguf/` in Ollama")
    assert "-f gguf/Modelfile" in code


# -- other families --------------------------------------------------------------------------------


def reference_answer(out: Path, limit: int) -> str:
    """What transformers answers by its own processor and the decoded weights in float32."""
    reference = Reference(out / "artifact", [])
    processor = AutoProcessor.from_pretrained(out / "onnx")
    image = {"type": "image", "image": Image.open(out / "photo.jpg")}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [image, {"type": "text", "text": "What is shown?"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = reference.model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    end = next((i for i, token in enumerate(new) if token in reference.stop_ids), len(new))
    return processor.decode(new[:end])


@pytest.mark.slow
@needs("onnx")
@pytest.mark.parametrize(
    "arch",
    ["qwen2_vl", "qwen3_vl", "qwen3_5", "llava_onevision", "internvl", "gemma3", "ministral3"],
)
def test_the_block_for_onnx_runtime_answers_as_transformers_does(arch, tiny, tmp_path, monkeypatch):
    """Random models: the same answer needs the same pixels, tiles, positions and cache."""
    out, limit = tmp_path / "out", 12
    export(Recipe(model=str(tiny(arch)), format=["onnx"], method="rtn", verify=False, out=out))
    photo().save(out / "photo.jpg", quality=90)
    ((_, code),) = blocks(out, "`onnx/` in ONNX Runtime")
    before = WITHOUT_TORCHVISION
    if arch in PIXTRAL:
        before += PIXTRAL_WITHOUT_TORCHVISION
        package = pixtral.__name__
        monkeypatch.setitem(sys.modules, f"{package}.image_processing_pixtral", with_pillow)
        processor = import_module(f"{package}.processing_pixtral").PixtralProcessor
        monkeypatch.setattr(pixtral, "PixtralProcessor", processor)
    said = answer(code.replace("len(answer) < 128", f"len(answer) < {limit}"), out, before)
    monkeypatch.setattr(AutoVideoProcessor, "from_pretrained", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        ProcessorMixin, "check_argument_for_proper_class", lambda self, name, value: None
    )
    assert said == reference_answer(out, limit).strip().splitlines()[-1]
