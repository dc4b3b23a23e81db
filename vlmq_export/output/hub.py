"""Puts an output folder on a model hub. What can be refused early is asked first.

The hub is huggingface_hub's: HF_ENDPOINT and the token of `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmq_export.errors import FormatError, UsageError, one_line
from vlmq_export.formats.contract import FORMATS
from vlmq_export.recipes.recipe import Recipe

# What is uploaded beside the folders of the formats. artifact/ is as large as all of them, and no
# runtime reads it. recipe.yaml names folders of whoever ran it: the card has the recipe without.
# report.html and fidelity.json show held-out rows of the user, with photographs and answers.
PAGES = ("README.md", "parity.json", "SHA256SUMS")


def refuse_push(repository: str, recipe: Recipe) -> None:
    """Raises UsageError where nothing could be uploaded after the run.

    That is a name that the hub does not take, a run whose files will not be verified, and a token
    that is missing or that the hub does not know.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    flag = f"--push-to-hub {repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError as e:
        raise UsageError(f"{flag}: {one_line(e)}") from None
    if not recipe.verify:
        raise UsageError(f"{flag} uploads files that are verified; leave out --no-verify")
    for name in recipe.format:
        if lacking := FORMATS[name].missing():
            raise UsageError(
                f"{flag} uploads files that are verified, and {lacking} is not installed;"
                f" pip install 'vlmq-export[{name}]'"
            )
    if get_token() is None:
        raise UsageError(f"{flag}: no token; run `hf auth login`, or set HF_TOKEN")
    try:
        HfApi().whoami()
    except Exception as e:  # the network's errors are of many libraries
        raise UsageError(f"{flag}: the hub does not take the token ({_first_line(e)})") from None


def push(out: Path, repository: str, formats: Sequence[str]) -> str:
    """Upload the files of these formats and the pages about them. Returns the commit's address.

    A repository that is not there yet is made, and is private: its owner can publish it, and
    nothing can be called back that was public. One that is there stays as it is.

    Raises FormatError where the hub refuses; the files stay where they are.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=out,
            commit_message="vlmq-export: verified files",
            allow_patterns=[*PAGES, *(f"{name}/*" for name in formats)],
        )
    except Exception as e:  # as above
        raise FormatError(
            f"{out} is verified, and was not uploaded to {repository} ({_first_line(e)});"
            " --resume with the same options tries again"
        ) from None
    return commit.commit_url


def _first_line(error: Exception) -> str:
    """The first line of a library's message that says anything."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
