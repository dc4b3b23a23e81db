"""What is shipped: one package and nothing beside it."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and a source archive, built from a copy of what git tracks."""
    folder = tmp_path_factory.mktemp("built")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    source = folder / "source"
    for name in filter(None, listed):
        file = ROOT / name.decode()
        if not file.exists():
            continue  # deleted, and not committed yet
        copy = source / name.decode()
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink():
            copy.symlink_to(file.readlink())
        else:
            copy.write_bytes(file.read_bytes())
    for kind in ("sdist", "wheel"):
        code = f"import setuptools.build_meta as b; b.build_{kind}({str(folder)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    return folder


def names(built: Path) -> set[str]:
    (wheel,) = built.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_one_package(built):
    tops = {name.split("/")[0] for name in names(built)}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"vlmq_export"}


def test_every_module_is_in_the_wheel_once(built):
    """The two folders that are linked are shipped as files, and under the package alone."""
    wanted = {
        f"vlmq_export/{part}{p.relative_to(ROOT / top).as_posix()}"
        for top, part in (("vlmq_export", ""), ("quantizer", "quantizer/"), ("formats", "formats/"))
        for p in (ROOT / top).rglob("*.py")
        if not any(parent.is_symlink() for parent in p.parents)
    }
    assert {name for name in names(built) if name.endswith(".py")} == wanted


def test_data_comes_along(built):
    found = names(built)
    for name in (
        "py.typed",
        "reference_vlm/model.safetensors",
        "reference_vlm/data/calibration.json",
        "report/templates/report.html.j2",
    ):
        assert f"vlmq_export/{name}" in found, name


def test_the_source_archive_builds_the_same_wheel(built, tmp_path):
    """A link in an archive would be followed out of it, or lost."""
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        assert not [m.name for m in file.getmembers() if m.issym() or m.islnk()]
        file.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, check=True)
    assert names(tmp_path) == names(built)
