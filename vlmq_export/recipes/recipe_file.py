"""Recipes as YAML files. A recipe may come from anybody, and so its reader has limits."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vlmq_export.errors import UsageError
from vlmq_export.recipes.recipe import Recipe

RECIPE_FILE = "recipe.yaml"
MAX_RECIPE_BYTES = 2**16  # a recipe has some 40 keys of one line each
_MAX_BRACKETS = 64  # the parser's time grows with the square of the depth
_MAX_DEPTH = 8


class _RecipeLoader(yaml.SafeLoader):
    """Plain values, no aliases and no key twice.

    An alias can spell a billion items in one line. Of two equal keys one would be lost.
    """

    depth = 0  # of the node in hand

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*) are not allowed in a recipe")
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.YAMLError("nested too deeply for a recipe")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode)]
        if twice := [k for i, k in enumerate(keys) if k in keys[:i]]:
            raise yaml.YAMLError(f"key {twice[0]} appears twice")
        return super().construct_mapping(node, deep)


def load_recipe(path: Path | None, flags: dict[str, Any]) -> Recipe:
    """The keys of the recipe file, overlaid with the flags that were given.

    Raises UsageError with one line.
    """
    values = {} if path is None else _values(path)
    try:
        return Recipe.model_validate(values | flags)
    except ValidationError as e:
        raise UsageError(_complaint(e, path, values, flags)) from None


def _complaint(
    error: ValidationError, path: Path | None, values: dict[str, Any], flags: dict[str, Any]
) -> str:
    """The first thing that is wrong, and whether it is the file's: `values` are what it says."""
    said = error.errors()[0]
    message = said["msg"].removeprefix("Value error, ")
    # The place in a list (format.0) says nothing to someone who wrote a flag.
    key = str(said["loc"][0]) if said["loc"] else ""
    if key in flags or (key and path is None):
        return f"--{key.replace('_', '-')}: {message}"
    if key:
        return f"--recipe {path}: {key}: {message}"
    if path is None or message in _messages(flags):
        return message
    if message in _messages(values):
        return f"--recipe {path}: {message}"
    return f"{message} (the flags together with --recipe {path})"


def _messages(values: dict[str, Any]) -> list[str]:
    """What is wrong with these values alone."""
    try:
        Recipe.model_validate(values)
        return []
    except ValidationError as e:
        return [error["msg"].removeprefix("Value error, ") for error in e.errors()]


def placed(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, which names the same files in any working directory.

    The recipe in an output folder is read again by `verify` and `--resume`.
    """
    keys = ("calibration", "image_root", "verify_data")
    paths = {key: path.absolute() for key in keys if (path := getattr(recipe, key)) is not None}
    if recipe.model is not None and (folder := Path(recipe.model).expanduser()).is_dir():
        paths["model"] = str(folder.absolute())  # and not a hub id
    return recipe.model_copy(update=paths)


def _values(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe file. All keys are known."""
    try:
        values = yaml.load(_recipe_text(path), _RecipeLoader) or {}
    except OSError as e:
        raise UsageError(f"--recipe {path}: {e.strerror or e}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # PyYAML itself raises ValueError
        raise UsageError(f"--recipe {path}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(
            f"--recipe {path}: keys and values are expected, got a {type(values).__name__}"
        )
    values = {str(k).replace("-", "_"): v for k, v in values.items()}
    known = Recipe.model_fields
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise UsageError(f"--recipe {path}: unknown key {key}; {hint}")
    return values


def _recipe_text(path: Path) -> str:
    """The text of a recipe file. Raises ValueError for one that is too large to be a recipe."""
    with path.open("rb") as f:
        raw = f.read(MAX_RECIPE_BYTES + 1)
    if len(raw) > MAX_RECIPE_BYTES:
        raise ValueError(f"over {MAX_RECIPE_BYTES} bytes")
    if raw.count(b"[") + raw.count(b"{") > _MAX_BRACKETS:
        raise ValueError("too many brackets for a recipe")
    return raw.decode("utf-8-sig")
