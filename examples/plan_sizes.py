"""How large would a model become? Sizes of every format at several widths, from headers alone.

python examples/plan_sizes.py [MODEL]
"""

import sys

from vlmq_export import Recipe, plan

FORMATS = ["gptq", "compressed-tensors", "onnx", "gguf"]


def main(model: str | None = None) -> None:
    """Print a line for each width, with megabytes or the reason why a format is not possible."""
    for bits in (2, 3, 4, 8):
        planned = plan(Recipe(model=model, format=FORMATS, bits=bits))
        sizes = {
            name: "refused" if found.refusals else f"{found.size_bytes / 1e6:.1f} MB"
            for name, found in planned.formats.items()
        }
        print(f"{bits} bits:", ", ".join(f"{name} {size}" for name, size in sizes.items()))


if __name__ == "__main__":
    main(*sys.argv[1:2])
