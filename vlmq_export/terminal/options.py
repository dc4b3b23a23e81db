"""The options of the command, one type each: what typer parses, and what the help says.

The names of the recipe's keys are the names of the options. What is not given on the command line
is None, so that a recipe file can say it. Defaults therefore stand in the help texts. The first
option of a section names the panel of the help that they stand in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmq_export.recipes.choices import CHOICES


def _option(
    text: str, *flags: str, choices: str = "", panel: str | None = None, several: bool = False
) -> Any:
    """An option that may be left out.

    choices: the recipe's key that names its values.
    panel: title of the panel that begins with it.
    several: whether it takes a list with commas.
    """
    if not choices:
        return typer.Option(*flags, help=text, show_default=False, rich_help_panel=panel)
    known = CHOICES[choices]

    def parse(value: str) -> str:
        for one in value.split(",") if several else [value]:
            if one.strip() not in known:
                named = ", ".join(map(repr, known))
                raise typer.BadParameter(f"{one.strip()!r} is not one of {named}.")
        return value

    return typer.Option(
        *flags,
        help=text,
        show_default=False,
        parser=parse,
        metavar="NAME",
        autocompletion=lambda: list(known.items()),
        rich_help_panel=panel,
    )


# -- what is quantized, and how --------------------------------------------------------------------
_MODEL = "Model folder, artifact folder or hub id. Default: the bundled reference VLM."
_HOW = "What is quantized, and how"
Model = Annotated[str | None, typer.Argument(help=_MODEL, show_default=False, rich_help_panel=_HOW)]
_FORMATS = "What is written. Repeat it for several, or list them: -f gptq,gguf."
_FORMAT = _option(_FORMATS, "--format", "-f", choices="format", several=True)
Format = Annotated[list[str] | None, _FORMAT]
Bits = Annotated[int | None, _option("2, 3, 4 or 8.  [default: 4]")]
_GROUP_SIZE = "Columns a scale; -1 for one an output channel.  [default: 128 if that fits]"
GroupSize = Annotated[int | None, _option(_GROUP_SIZE)]
_SYM = "Grid without or with zero-points.  [default: asym; 8 bits: sym]"
Sym = Annotated[bool | None, _option(_SYM, "--sym/--asym")]
Method = Annotated[
    str | None, _option("How weights are rounded.  [default: vlmq]", choices="method")
]
_ROTATE = "Hadamard rotations before rounding.  [default: off]"
Rotate = Annotated[str | None, _option(_ROTATE, choices="rotate")]
_SMOOTH = "Input channels scaled where that leaves less error.  [default: on with vlmq]"
Smooth = Annotated[bool | None, _option(_SMOOTH, "--smooth/--no-smooth")]
_HEAD_BITS = (
    "Bits of the output head: 2, 3, 4, 8 or off; not in GPTQ."
    "  [default: 8 for ONNX and GGUF, else off]"
)
HeadBits = Annotated[str | None, _option(_HEAD_BITS)]
_EMBEDDING_BITS = (
    "Bits of the token embedding: 8, 4 or off; in ONNX and GGUF alone."
    "  [default: 8 for ONNX and GGUF, else off]"
)
EmbeddingBits = Annotated[str | None, _option(_EMBEDDING_BITS)]
_VISION_BITS = (
    "Bits of vision tower and projector: 2, 3, 4, 8 or off, and 5 and 6 in GGUF alone; GPTQ has it"
    " in floats."
    "  [default: 8 for ONNX and GGUF, else off]"
)
VisionBits = Annotated[str | None, _option(_VISION_BITS)]
_TUNE = "Steps of gradient descent on a solved layer, kept if held-out samples gain.  [default: 0]"
Tune = Annotated[int | None, _option(_TUNE)]
_ACT_ORDER = "Column order of the solver.  [default: gar]"
ActOrder = Annotated[str | None, _option(_ACT_ORDER, choices="act_order")]

# -- calibration -----------------------------------------------------------------------------------
_CALIBRATION = "Rows about images: JSON, JSONL, parquet or a saved dataset.  [default: bundled]"
CalibrationFile = Annotated[Path | None, _option(_CALIBRATION, panel="Calibration")]
_IMAGE_ROOT = "Folder that image paths of your rows start from.  [default: the file's own]"
ImageRoot = Annotated[Path | None, _option(_IMAGE_ROOT)]
Samples = Annotated[int | None, _option("Calibration rows.  [default: 512]")]
_SEQ_LEN = "Tokens of a sample, at most.  [default: the paper's, 512]"
SeqLen = Annotated[int | None, _option(_SEQ_LEN)]
_LONG_IMAGES = "Scale images down to that length, or drop their sample.  [default: scale]"
LongImages = Annotated[str | None, _option(_LONG_IMAGES, choices="long_images")]
_SEED = "Draws the samples where the file has more rows.  [default: 0]"
Seed = Annotated[int | None, _option(_SEED)]
_SKIP_BAD_ROWS = "Leave bad rows out, up to this share of a file: 0.05.  [default: 0]"
SkipBadRows = Annotated[float | None, _option(_SKIP_BAD_ROWS)]

# -- the proof -------------------------------------------------------------------------------------
_VERIFY = "Prove the files in their runtimes.  [default: verify]"
Verify = Annotated[bool | None, _option(_VERIFY, "--verify/--no-verify", panel="Proof")]
_VERIFY_DATA = "Held-out rows for the checks.  [default: those that calibration leaves, or bundled]"
VerifyData = Annotated[Path | None, _option(_VERIFY_DATA)]

# -- the run ---------------------------------------------------------------------------------------
_DEVICE = "Where to quantize.  [default: auto]"
Device = Annotated[str | None, _option(_DEVICE, choices="device", panel="The run")]
_MAX_MEMORY = "GB of host memory to stay within.  [default: what is free]"
MaxMemory = Annotated[float | None, _option(_MAX_MEMORY)]
RecipePath = Annotated[Path | None, _option("YAML with the same keys; flags win.")]
Out = Annotated[Path | None, _option("Output folder.  [default: named after model and recipe]")]
_OVERWRITE = typer.Option("--overwrite", help="Replace an output folder of ours.")
Overwrite = Annotated[bool, _OVERWRITE]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")]
_PUSH = "ORG/NAME to upload the verified folder to, without artifact/; a new repository is private."
PushToHub = Annotated[str | None, typer.Option("--push-to-hub", help=_PUSH, show_default=False)]
_DRY_RUN = typer.Option("--dry-run", help="Show sizes, memory, time and refusals; read no weight.")
DryRun = Annotated[bool, _DRY_RUN]
AsJson = Annotated[bool, typer.Option("--json", help="Result as JSON on stdout, log on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="More log.")]

# -- GPTQ ------------------------------------------------------------------------------------------
_GPTQ_VERSION = "How zero-points are stored.  [default: v1]"
GptqVersion = Annotated[str | None, _option(_GPTQ_VERSION, choices="gptq_version", panel="GPTQ")]
_GPTQ_NAMES = "Tensor names.  [default: hub]"
GptqNames = Annotated[str | None, _option(_GPTQ_NAMES, choices="gptq_names")]

# -- ONNX ------------------------------------------------------------------------------------------
_LEVEL = "MatMulNBits attribute: 0 exact, 4 int8 activations.  [default: 0]"
AccuracyLevel = Annotated[int | None, _option(_LEVEL, panel="ONNX")]
_GRAPH = "Operators of the text model.  [default: fused]"
OnnxGraph = Annotated[str | None, _option(_GRAPH, choices="onnx_graph")]
_DTYPE = "Activations, cache and float weights of ONNX.  [default: float32]"
OnnxDtype = Annotated[str | None, _option(_DTYPE, choices="onnx_dtype")]
_PROVIDER = "Where the ONNX package runs.  [default: cpu]"
OnnxProvider = Annotated[str | None, _option(_PROVIDER, choices="onnx_provider")]

# -- GGUF ------------------------------------------------------------------------------------------
_GGUF_TYPE = "Solve on llama.cpp's own types: IQ2_XXS … IQ4_XS, Q2_K … Q4_K_M, Q8_0; GGUF only."
GgufType = Annotated[str | None, _option(_GGUF_TYPE, panel="GGUF")]
_TARGET_BPW = "Types by measured cost, to so many bits per weight; with other formats 2 to 8 bits."
TargetBpw = Annotated[float | None, _option(_TARGET_BPW)]
_TARGET_SIZE = "The same, to so many GB (10^9 bytes) of the files; of GGUF, model and mmproj."
TargetSize = Annotated[float | None, _option(_TARGET_SIZE)]
_TENSOR_TYPE = "REGEX=TYPE on GGUF tensor names, over the mix; repeat."
TensorType = Annotated[list[str] | None, _option(_TENSOR_TYPE)]
_IMATRIX = "Also write imatrix.gguf, from the calibration images, for stock llama-quantize."
EmitImatrix = Annotated[bool | None, _option(_IMATRIX, "--emit-imatrix")]
_CLASS_ROW = "Where InternVL's GGUF has the class token's position.  [default: last]"
ClassRow = Annotated[str | None, _option(_CLASS_ROW, choices="class_row")]
_MMPROJ = "Type of GGUF vision weights.  [default: f16]"
Mmproj = Annotated[str | None, _option(_MMPROJ, choices="mmproj")]
_SPLIT = "Split the GGUF text model into files of this size, as 2G or 500M.  [default: one file]"
SplitMaxSize = Annotated[str | None, _option(_SPLIT)]

# -- eval ------------------------------------------------------------------------------------------
_TASK = "Benchmark: papers (the eight), chartqa, docvqa_val, …; repeat, or list with commas."
Tasks = Annotated[list[str] | None, _option(_TASK, "--task", "--tasks")]
_ON = "What is asked: artifact, or a format.  [default: every format of the run]"
On = Annotated[list[str] | None, _option(_ON, "--on")]
Baseline = Annotated[bool, typer.Option("--baseline", help="Ask the source in full precision too.")]
_DATA = "Folder with a folder of rows for each benchmark.  [default: the hub]"
DataFolder = Annotated[Path | None, _option(_DATA, "--data")]
Limit = Annotated[int | None, _option("Questions of each benchmark.  [default: all]")]
_ASKED_ON = "Where source and artifact run.  [default: auto]"
AskedOn = Annotated[str | None, _option(_ASKED_ON, "--device", choices="device")]

# -- verify and inspect ----------------------------------------------------------------------------
OutFolder = Annotated[Path, typer.Argument(help="Output folder of an earlier run.")]
_AGAIN = "Held-out rows.  [default: those of the run]"
VerifyDataAgain = Annotated[Path | None, _option(_AGAIN)]
_IMAGE_ROOT_AGAIN = "Folder that image paths start from."
ImageRootAgain = Annotated[Path | None, _option(_IMAGE_ROOT_AGAIN)]
_PATH = "An artifact, an exported folder, or one of its files."
InspectPath = Annotated[Path, typer.Argument(help=_PATH)]
