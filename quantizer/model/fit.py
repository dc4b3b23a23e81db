"""Whether the tensors of a checkpoint are those of the model that its config.json describes.

Names and shapes stand in the headers of the files, so that this is known before any weight is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

Shape = tuple[int, ...]
_COPY = "copy config.json and all shards from one and the same model"


def misfit(
    found: Mapping[str, Shape],  # of every tensor of the checkpoint, by hub name
    expected: Mapping[str, Shape],  # of every parameter of the model, by hub name
    *,
    head: str,  # hub name of the output matrix
    tied: Collection[str],  # parameters that another one stands for, and that may be missing
) -> str:
    """What does not fit, and what would mend it, in one line; empty if everything fits.

    A tensor that is missing is told from one that the model does not have.
    """
    missing = [name for name in expected if name not in found and name not in tied]
    extra = [name for name in found if name not in expected]
    problems = []
    if missing == [head]:
        problems.append(
            f"the output matrix {head} is missing, and config.json does not make it the embedding;"
            " copy its shard from the original model, or set tie_word_embeddings to true in"
            " config.json if the two are one matrix"
        )
    elif missing:
        problems.append(f"{_counted(missing)} missing that config.json asks for; {_COPY}")
    if extra:
        problems.append(f"{_counted(extra)} not of the model in config.json; {_COPY}")
    for name in expected:
        if not problems and name in found and found[name] != expected[name]:
            problems.append(
                f"{name} has shape {list(found[name])} where config.json asks for"
                f" {list(expected[name])}; {_COPY}"
            )
    return "; ".join(problems)


def _counted(names: Sequence[str]) -> str:
    """How many these are, by the name of the first, with a verb."""
    if len(names) == 1:
        return f"tensor {names[0]} is"
    return f"{len(names)} tensors, first {min(names)}, are"
