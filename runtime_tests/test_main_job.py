"""The command from end to end, in three formats and their runtimes.

`verify` must catch one changed value in each format.
"""

import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from runtime_tests.test_gguf import rewrite
from runtime_tests.test_onnx import damage
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.bundled import HELDOUT
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.output import checksums

FORMATS = ("--format", "gptq", "--format", "onnx", "--format", "gguf")
NAMES = ("gptq", "onnx", "gguf")


def command(*args: object) -> subprocess.CompletedProcess:
    """The installed command in a terminal of 80 columns."""
    environment = os.environ | {"COLUMNS": "80", "VLMQ_REQUIRE": "gptq,onnx,gguf"}
    return subprocess.run(
        [sys.executable, "-m", "vlmq_export", *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def assert_proven(out):
    """Every format passed on every level, and two readers compared all weights.

    These readers are ours and the runtime's own. Returns the parity report.
    """
    parity = json.loads((out / "parity.json").read_text())
    wrong = [c for c in parity["checks"] if c["status"] not in ("passed", "info")]
    assert parity["verified"], wrong
    for name in NAMES:
        rows = [c for c in parity["checks"] if c["format"] == name and c["status"] == "passed"]
        assert {c["level"] for c in rows} == {"L1", "L2", "L3"}
        compared = [c["compared"] for c in rows if c["level"] == "L1"]
        assert compared.count(parity["reference"]["weights"]) >= 2, name
    return parity


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The main job on the bundled model, with fewer samples."""
    folder = tmp_path_factory.mktemp("job") / "out"
    done = command(*FORMATS, "--samples", 32, "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    # Commands and the last line with its path are not broken, so that they can be copied.
    said = [line for line in done.stdout.splitlines()[:-1] if not line.startswith("  run: ")]
    assert all(len(line) <= 80 for line in said), said
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The same on a random model of two layers, proven on six rows: for `verify` to read anew."""
    folder = tmp_path_factory.mktemp("small")
    make_random_checkpoint(folder / "model", layers=2, depth=3)
    (folder / "rows.json").write_text(json.dumps(json.loads(HELDOUT.read_text("utf-8"))[:6]))
    rows = ("--verify-data", folder / "rows.json", "--image-root", HELDOUT.parent)
    flags = (*FORMATS, "--samples", 8, *rows, "--out", folder / "out")
    done = command(folder / "model", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


def test_the_bundled_model_is_proven_in_all_three_runtimes(out):
    parity = assert_proven(out)
    assert parity["reference"]["images"] == 32
    shares = [c for c in parity["checks"] if c["format"] == "gguf" and c["unit"] == "share"]
    assert shares and shares[0]["compared"] == 256
    for name in ("artifact", "gptq", "onnx", "gguf", "report.html", "README.md", "recipe.yaml"):
        assert (out / name).exists()
    fidelity = json.loads((out / "fidelity.json").read_text())
    assert fidelity["verdict"] == "close" and fidelity["rows"] == fidelity["answers"] == 32
    assert 0 < fidelity["kl"] < 0.01 and len(fidelity["examples"]) == 6
    report = (out / "report.html").read_text()
    assert report.count("data:image/jpeg") == 6 and "close to the source" in report
    assert checksums.changed_files(out) == []
    assert not list(out.glob(".*"))


def test_verify_finds_the_files_as_they_were(small):
    done = command("verify", small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_proven(small)


@pytest.mark.slow
def test_verify_finds_the_files_of_the_bundled_model_as_they_were(out):
    done = command("verify", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert assert_proven(out)["reference"]["images"] == 32


@pytest.mark.slow
def test_qwen2_vl_is_proven_too(tmp_path):
    make_random_checkpoint(tmp_path / "model", arch="qwen2_vl")
    done = command(tmp_path / "model", *FORMATS, "--samples", 16, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bundled drawn images" in done.stderr
    assert_proven(tmp_path / "out")


def test_an_artifact_exports_to_the_same_bytes_without_data_or_model(out, tmp_path):
    again = tmp_path / "again"
    done = command(out / "artifact", *FORMATS, "--no-verify", "--out", again)
    assert done.returncode == 0, done.stderr
    for name in ("artifact", *NAMES):
        for file in (p for p in (out / name).rglob("*") if p.is_file()):
            assert file.read_bytes() == (again / file.relative_to(out)).read_bytes(), file
    assert "not verified" in done.stdout
    assert "Not verified" in (again / "README.md").read_text()


@pytest.mark.parametrize(
    "part", ["artifact", "gptq", "onnx", "gguf", "gguf/mmproj", "onnx/text.onnx"]
)
def test_inspect_shows_what_is_there(out, part):
    path = next((out / "gguf").glob("mmproj-*")) if part == "gguf/mmproj" else out / part
    done = command("inspect", path, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["tensors"]
    if part != "gguf/mmproj":
        assert 4 < found["bits_per_weight"] < 5.1


# -- changed files: checksums are written anew, so that only decoding can tell ---------------------


def fault_gptq(folder, module, part, rng):
    """One scale by one unit in the last place, or one bit of one word."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = f"{module}.{part}"
    flat = tensors[name].view(-1).numpy()
    at = rng.randrange(flat.size)
    if part == "scales":
        flat[at] = np.nextafter(flat[at], np.float16(np.inf))
    elif part == "g_idx":
        flat[at] = (flat[at] + 1) % (int(flat.max()) + 1)
    else:
        flat.view(np.uint32)[at] ^= np.uint32(1 << rng.randrange(32))
    save_file(tensors, file, metadata={"format": "pt"})


def fault_gguf(folder, module, part, rng):
    """One unit of a block's scale or of its offset, or one bit of its codes.

    A block of Q4_1 is d in float16, m in float16, and 16 bytes of codes.
    """
    kinds = {"q_proj": "attn_q", "down_proj": "ffn_down", "o_proj": "attn_output"}
    _, _, layer, _, kind = module.split(".")
    text, _ = find_files(folder)
    tensor = GGUFFile(text).tensors[f"blk.{layer}.{kinds[kind]}.weight"]
    block = tensor.offset + 20 * rng.randrange(tensor.nbytes // 20)
    data = bytearray(text.read_bytes())
    if part == "qweight":
        data[block + 4 + rng.randrange(16)] ^= 1 << rng.randrange(8)
    else:
        at = block + (0 if part == "scales" else 2)
        data[at : at + 2] = (int.from_bytes(data[at : at + 2], "little") + 1).to_bytes(2, "little")
    text.write_bytes(data)


def fault_onnx(folder, module, part, rng):
    damage(folder, "text", f"{module}.{part}", "ulp" if part == "scales" else "bit", rng)


PLACES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.1.self_attn.o_proj",
)
GPTQ_PART = {"zero_points": "qzeros"}


def faulty_verify(
    out, tmp_path, faults: dict[str, tuple[str, str]], seed: int
) -> subprocess.CompletedProcess:
    """`verify` on a copy with faults: format → (module, its part that is changed)."""
    shutil.copytree(out, tmp_path / "out")
    rng = random.Random(seed)
    for name, (module, part) in faults.items():
        folder = tmp_path / "out" / name
        if name == "gptq":
            fault_gptq(folder, module, GPTQ_PART.get(part, part), rng)
        else:
            {"onnx": fault_onnx, "gguf": fault_gguf}[name](folder, module, part, rng)
    checksums.write_sums(tmp_path / "out")
    return command("verify", tmp_path / "out", "--json")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("turn", [0, slow(1), slow(2)])
def test_verify_catches_one_fault_in_each_format_and_names_it(small, tmp_path, turn):
    """Over three turns every part is changed in every format, each time in another layer."""
    parts = ("scales", "zero_points", "qweight")
    faults = {n: (PLACES[(i + turn) % 3], parts[(2 * i + turn) % 3]) for i, n in enumerate(NAMES)}
    done = faulty_verify(small, tmp_path, faults, turn)
    assert done.returncode == 3, done.stderr
    for name, (module, _) in faults.items():
        rows = failed_rows(done, name)
        assert len(rows) >= 2 and all(f"{module}.weight" in c["worst"] for c in rows), (name, rows)
    assert "Unverified" in (tmp_path / "out" / "README.md").read_text()


def failed_rows(done, name, level="L1"):
    """The failed checks of one format and level, from the output of `verify --json`."""
    checks = json.loads(done.stdout)["parity"]["checks"]
    of_level = [c for c in checks if c["format"] == name and c["level"] == level]
    return [c for c in of_level if c["status"] == "failed"]


@pytest.mark.slow
def test_verify_catches_a_group_index_and_vision_weights(small, tmp_path):
    shutil.copytree(small, tmp_path / "out")
    folder, rng = tmp_path / "out", random.Random(5)
    fault_gptq(folder / "gptq", PLACES[1], "g_idx", rng)
    damage(folder / "onnx", "vision", "visual.blocks.1.attn.qkv.weight", "ulp", rng)
    _, mmproj = find_files(folder / "gguf")
    tensor = GGUFFile(mmproj).tensors["v.blk.2.ffn_down.weight"]
    data = bytearray(mmproj.read_bytes())
    data[tensor.offset + 2 * rng.randrange(tensor.nbytes // 2)] ^= 1  # one ulp of a float16
    mmproj.write_bytes(data)
    checksums.write_sums(folder)
    done = command("verify", folder, "--json")
    assert done.returncode == 3, done.stderr
    named = {
        "gptq": f"{PLACES[1]}.weight",
        "onnx": "visual.blocks.1.attn.qkv.weight",
        "gguf": "v.blk.2.ffn_down.weight",
    }
    for name, tensor_name in named.items():
        rows = failed_rows(done, name)
        assert len(rows) >= 2 and all(tensor_name in c["worst"] for c in rows), (name, rows)


@pytest.mark.slow
def test_verify_catches_a_dropped_bias_and_a_dropped_rope_base(small, tmp_path):
    shutil.copytree(small, tmp_path / "out")
    text, _ = find_files(tmp_path / "out" / "gguf")
    rewrite(text, drop_tensor="blk.1.attn_k.bias", drop_key="qwen2vl.rope.freq_base")
    checksums.write_sums(tmp_path / "out")
    done = command("verify", tmp_path / "out", "--json")
    assert done.returncode == 3, done.stderr
    said = " ".join(c["worst"] for c in failed_rows(done, "gguf"))
    assert "blk.1.attn_k.bias" in said and "rope.freq_base" in said
    assert any("twin" in c["name"] for c in failed_rows(done, "gguf", "L3"))


def test_verify_without_new_checksums_names_the_file(small, tmp_path):
    """Checksums see what no decoder does: a changed file that holds no weight."""
    shutil.copytree(small, tmp_path / "out")
    with (tmp_path / "out" / "gptq" / "generation_config.json").open("a") as f:
        f.write(" ")
    assert checksums.changed_files(tmp_path / "out") == ["gptq/generation_config.json (changed)"]


# -- the report in a browser -----------------------------------------------------------------------


def test_the_report_opens_in_a_browser(out, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        if "browser" in os.environ.get("VLMQ_REQUIRE", ""):
            pytest.fail("VLMQ_REQUIRE declares a browser, chromium is not installed")
        pytest.skip("no chromium here")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path}",
    ]
    command = [browser, *flags, "--dump-dom", (out / "report.html").resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    dom = done.stdout
    parity = json.loads((out / "parity.json").read_text())
    assert "verified: every check passed" in dom
    assert dom.count('class="passed"') == sum(c["status"] == "passed" for c in parity["checks"])
    assert dom.count('class="bar"') == 42  # one for each linear
