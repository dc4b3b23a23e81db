"""Quantize a model, write it for llama.cpp, prove the files, and look at what was written.

python examples/export_and_prove.py OUT [MODEL]
"""

import sys
from pathlib import Path

from vlmq_export import Recipe, VlmqError, export, inspect


def main(out: str, model: str | None = None) -> int:
    """Returns an exit code: 0 where every check passed."""
    recipe = Recipe(model=model, format=["gguf"], bits=4, samples=32, out=Path(out))
    try:
        result = export(recipe, progress=show)
    except VlmqError as e:
        print(f"refused: {e}")
        return e.exit_code
    for file in sorted((result.out / "gguf").glob("*.gguf")):
        found = inspect(file)
        print(f"{file.name}: {found.bits_per_weight:.2f} bits a quantized weight")
    print("verified" if result.verified else "not verified")
    return 0 if result.verified else 1


def show(stage: str, done: int, total: int) -> None:
    """Say when a stage is done."""
    if done == total:
        print(f"{stage}: {total}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
