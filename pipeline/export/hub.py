"""Exports on the Hugging Face hub, with the user's own login."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import UserError, reason
from pipeline.files import foreign_faults

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
COMPILED = "__pycache__"  # what Python left there when the example ran


def files_of(folder: Path) -> list[Path]:
    """The files of an export; UserError where a folder is none."""
    for name in ("README.md", "config.json"):
        if not (folder / name).is_file():
            raise UserError(folder, f"no {name} in it, so this is no export", "write one with `terraalign export`")
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != COMPILED)


def why_not(repo: str) -> str | None:
    """What keeps an upload to a repository from starting, or None.

    Raises UserError for a name that is none, and when the hub knows nobody by this login.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not REPOSITORY.fullmatch(repo):
        raise UserError(repo, "no name of a repository", "name it as user/model")
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if get_token() is None:
        return "nobody is logged in (run `hf auth login`)"
    try:
        HfApi().whoami()
    except HfHubHTTPError as error:
        raise UserError("the hub refuses the login", reason(error), "run `hf auth login` again") from None
    except Exception as error:  # of whatever library carries it: no network, no such host, no answer
        return f"{constants.ENDPOINT} cannot be reached ({reason(error)})"
    return None


def push(repo: str, folder: Path, private: bool) -> str:
    """Upload an export, making the repository where there is none; returns its address. UserError when that fails."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="terraalign")
    with foreign_faults(lambda text: UserError(repo, text, "see `hf auth whoami`, and run the same command again")):
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            ignore_patterns=f"*{COMPILED}*",
            commit_message="Export of TerraAlign",
        )
    return str(made)
