"""Coverage-guided fuzzing of one reader with atheris.

    python -m tests.hostile.attacks.fuzz TARGET [libFuzzer options]

It is not part of the suite, because atheris is no requirement of the project. See README.md in this
folder.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
import warnings
from pathlib import Path


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["vlmq_export", "tests.hostile.attacks"]):
        from tests.hostile.attacks.mutations import mutate
        from tests.hostile.attacks.targets import TARGETS
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    name, *options = sys.argv[1:]
    target, folder = TARGETS[name], Path(tempfile.mkdtemp(prefix="vlmq-fuzz-")) / "it"
    good = target.seed(folder)

    def one(data: bytes) -> None:
        target.attack(folder, data)

    def mutator(data: bytes, most: int, number: int) -> bytes:
        """Half of the mutations are ours, which know the formats; the others are libFuzzer's."""
        if number % 2:
            return mutate(bytes(data) or good, random.Random(number))[:most]
        return atheris.Mutate(data, most)

    corpus = Path(tempfile.mkdtemp(prefix="vlmq-corpus-"))
    (corpus / "seed").write_bytes(good)
    known = Path(__file__).parent / "corpus" / name
    folders = [str(corpus), *([str(known)] if known.is_dir() else [])]
    limits = [f"-max_len={max(4096, 2 * len(good))}", "-rss_limit_mb=2048", "-timeout=5"]
    arguments = [sys.argv[0], *limits, *options, *folders]
    atheris.Setup(arguments, one, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
