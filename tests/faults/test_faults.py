"""A run that is killed at any moment, or that runs out of space anywhere.

Nothing that is half-written is taken for whole, and --resume gives the bytes of an undisturbed run.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.faults.harness import VARIES, Fault, contents, run
from tools.reference_vlm.model import make_random_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_random_checkpoint(
        tmp_path_factory.mktemp("faults") / "model", "qwen2_vl", layers=2, depth=3
    )


def recipe_for(model: Path, out: Path, *formats: str) -> dict:
    return {
        "model": str(model),
        "format": list(formats),
        "samples": 3,
        "verify": False,
        "out": str(out),
    }


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """(contents, number of operations) of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, error, operations = run(recipe_for(model, out, "gptq", "gguf"))
    assert code == 0, error
    return contents(out), operations


def check_nothing_is_half_written(out: Path, whole: dict[str, bytes]) -> None:
    """No file under its own name is incomplete, and no folder that counts as finished is.

    The folder of a format counts as finished once it is there, an artifact once it has a manifest.
    """
    found = {
        n: data
        for n, data in contents(out).items()
        if not any(part.startswith(".") for part in Path(n).parts)
    }
    for name, data in found.items():
        # Every run copies source/ again, and nothing reads it before the manifest is there.
        if "/source/" not in name:
            assert data == whole[name], name
    for folder in ("gptq/", "gguf/", *(["artifact/"] if "artifact/manifest.json" in found else [])):
        there = {n for n in found if n.startswith(folder)}
        assert not there or there == {n for n in whole if n.startswith(folder)}, folder


def check_resumes(recipe: dict, whole: dict[str, bytes]) -> None:
    begun = Path(recipe["out"]).exists()  # else there is nothing to resume, and that is an error
    code, error, _ = run(recipe, resume=begun)
    assert code == 0, error
    assert contents(Path(recipe["out"])) == whole


def disturbed(
    fault: Fault, model: Path, out: Path, whole: dict[str, bytes], codes: set[int]
) -> str:
    """Run with `fault`, check the folder, and resume the run.

    Returns the error of the disturbed run. `codes` are the exit codes that it may have.
    """
    recipe = recipe_for(model, out, "gptq", "gguf")
    code, error, _ = run(recipe, fault=fault)
    assert code in codes, (fault, error)
    check_nothing_is_half_written(out, whole)
    check_resumes(recipe, whole)
    return error


def spread(count: int, operations: int) -> list[int]:
    """`count` operations from the first to the last, evenly spread."""
    return sorted({1 + round(i * (operations - 1) / (count - 1)) for i in range(count)})


def test_kill_9_between_operations(model, whole, tmp_path):
    for at in spread(6, whole[1]):
        disturbed(Fault("kill", at), model, tmp_path / f"{at}", whole[0], {-9})


def test_kill_9_where_the_vision_tower_is_quantized_too(model, tmp_path):
    recipe = recipe_for(model, tmp_path / "whole", "gguf") | {"vision_bits": 8}
    code, error, operations = run(recipe)
    assert code == 0, error
    undisturbed = contents(tmp_path / "whole")
    assert "artifact/layer-vision.safetensors" in undisturbed
    for at in spread(4, operations):
        out = tmp_path / f"{at}"
        code, error, _ = run(recipe | {"out": str(out)}, fault=Fault("kill", at))
        assert code == -9, error
        check_nothing_is_half_written(out, undisturbed)
        check_resumes(recipe | {"out": str(out)}, undisturbed)


@pytest.mark.slow
def test_kill_9_before_every_operation(model, whole, tmp_path):
    assert whole[1] >= 40
    for at in range(1, whole[1] + 1):
        disturbed(Fault("kill", at), model, tmp_path / f"{at}", whole[0], {-9})


def test_killed_in_the_middle_of_a_write(model, whole, tmp_path):
    """SIGXFSZ ends the process at this byte of the first file that is longer."""
    for at in (1, 200_000):
        disturbed(Fault("cut", at), model, tmp_path / f"{at}", whole[0], {-25})


@pytest.mark.slow
def test_killed_in_the_middle_of_every_larger_file(model, whole, tmp_path):
    sizes = sorted({len(data) for data in whole[0].values() if len(data) > 1000})
    for at in [size - 1 for size in sizes] + [size // 2 for size in sizes]:
        disturbed(Fault("cut", at), model, tmp_path / f"{at}", whole[0], {-25})


def one_line_with_advice(error: str) -> bool:
    lines = error.strip().splitlines()
    # numpy does not give the system's own message.
    said = "No space left" in error or "free space" in error
    return len(lines) == 1 and lines[0].startswith("error: ") and said


def test_no_space_at_an_operation(model, whole, tmp_path):
    for at in spread(5, whole[1]):
        error = disturbed(Fault("full", at), model, tmp_path / f"{at}", whole[0], {1, 2})
        assert one_line_with_advice(error)


@pytest.mark.slow
def test_no_space_at_every_operation(model, whole, tmp_path):
    quiet = 0  # operations that only tidy up may fail without a word
    for at in range(1, whole[1] + 1):
        error = disturbed(Fault("full", at), model, tmp_path / f"{at}", whole[0], {0, 1, 2})
        assert error == "" or one_line_with_advice(error), (at, error)
        quiet += error == ""
    assert quiet < whole[1] / 4


@pytest.fixture
def small_disk(tmp_path):
    """resize(bytes): a tmpfs of that size, which keeps its files."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(size: int) -> Path:
        if os.path.ismount(disk):
            options = ["-o", f"remount,size={size}"]
        else:
            options = ["-t", "tmpfs", "-o", f"size={size}"]
        subprocess.run(["mount", *options, "tmpfs", str(disk)], check=True, capture_output=True)
        return disk

    yield resize
    if os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)


def may_mount() -> bool:
    if os.geteuid() != 0:
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def exhausted(
    model: Path, small_disk, formats: tuple[str, ...], sizes: list[int], whole: dict[str, bytes]
) -> set[str]:
    """The files whose writing failed on disks of these sizes.

    Each run is resumed once there is room.
    """
    failed = set()
    for size in sizes:
        disk = small_disk(size)
        recipe = recipe_for(model, disk / f"{size}", *formats)
        code, error, _ = run(recipe)
        assert code == 1, (size, error)
        assert one_line_with_advice(error), (size, error)
        failed.add(error.removeprefix(f"error: {disk}/{size}/").split(": ")[0])
        small_disk(64 * 2**20)
        check_resumes(recipe, whole)
        subprocess.run(["rm", "-rf", str(disk / f"{size}")], check=True)
    return failed


@pytest.mark.skipif(
    not may_mount(), reason="mounting a tmpfs takes root; the injected failures above take nothing"
)
def test_a_full_disk_at_each_writer(model, whole, small_disk):
    total = sum(len(data) for data in whole[0].values())
    sizes = [4096 * (total * part // 100 // 4096) for part in (1, 20, 45, 75)]
    failed = exhausted(model, small_disk, ("gptq", "gguf"), sizes, whole[0])
    assert len(failed) >= 3, failed


@pytest.mark.slow
@pytest.mark.skipif(
    not may_mount(), reason="mounting a tmpfs takes root; the injected failures above take nothing"
)
def test_a_full_disk_at_every_writer_of_every_format(model, small_disk, tmp_path):
    formats = ("gptq", "onnx", "gguf")
    code, error, _ = run(recipe_for(model, tmp_path / "out", *formats))
    assert code == 0, error
    whole = contents(tmp_path / "out")
    ends, total = [], 0  # sizes of a disk that is full one page before the end of each file
    for name in sorted(whole, key=lambda n: (tmp_path / "out" / n).stat().st_mtime_ns):
        total += -(-max(1, (tmp_path / "out" / name).stat().st_size) // 4096) * 4096
        ends.append(total - 4096)
    failed = exhausted(model, small_disk, formats, sorted({max(4096, end) for end in ends}), whole)
    for writer in ("float-00001", "layer-00000", "layer-00001", "gptq", "onnx", "gguf"):
        assert any(writer in name for name in failed), (writer, failed)


def test_names_that_vary_are_written(whole):
    assert {Path(n).name for n in whole[0]} >= VARIES
