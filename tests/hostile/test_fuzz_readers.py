"""Every reader on damaged files: it gives a result or raises a VlmqError of one line.

Nothing else may happen, and time and memory are bounded. tests/hostile/attacks/README.md says how
to run this for hours, and where the inputs that it finds are kept.
"""

from __future__ import annotations

import random
import resource
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile.attacks.mutations import mutate
from tests.hostile.attacks.targets import TARGETS

CORPUS = Path(__file__).parent / "attacks" / "corpus"
SECONDS = 2.0  # of processor time for one input; the slowest that is known takes 0.5
GROWTH = 256  # MiB of resident memory that all inputs of one target may add
# Pillow and numpy warn when they compute with damaged values.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """get(target) → its folder of good files, made once."""
    root = tmp_path_factory.mktemp("targets")
    return lambda name: root / name / "it"


def bounded(name: str, place: Path, data: bytes) -> str:
    """`Target.attack`, in bounded time."""
    start = time.process_time()
    with warnings.catch_warnings(action="ignore"):
        said = TARGETS[name].attack(place, data)
    assert time.process_time() - start < SECONDS * TARGETS[name].cost
    return said


def seed(name: str, place: Path) -> bytes:
    """The good file of a target. The files around it are laid out in `place`."""
    place.parent.mkdir(exist_ok=True)
    return TARGETS[name].seed(place)


@pytest.mark.parametrize("name", TARGETS)
def test_the_seed_is_read_without_a_word(name, tmp_path):
    place = tmp_path / "it"
    assert TARGETS[name].attack(place, seed(name, place)) == ""


KNOWN = sorted(f for f in CORPUS.rglob("*") if f.is_file())


@pytest.mark.parametrize("file", KNOWN, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_what_once_broke_a_reader(file, folder):
    """On each of these inputs a reader raised another exception, or did not return."""
    name = file.parent.name
    seed(name, folder(name))
    bounded(name, folder(name), file.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_damage(name, folder):
    _fuzz(name, folder(name), 50)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_much_damage(name, folder):
    _fuzz(name, folder(name), 2000)


def _fuzz(name: str, place: Path, examples: int) -> None:
    good = seed(name, place)
    bounded(name, place, good)  # so that modules are imported before memory is measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=examples // TARGETS[name].cost,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1))
    def attack(number: int) -> None:
        bounded(name, place, mutate(good, random.Random(number)))

    attack()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH * 1024
