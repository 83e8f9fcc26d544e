"""Upload of an exported folder to the Hugging Face hub, on request alone."""

from __future__ import annotations

from pathlib import Path

from lightning_sft.types import InputError


def check_repository(repository: str) -> None:
    """Refuse a repository that cannot be written to, before anything is exported.

    Args:
        repository: Name on the hub, as ``owner/name``.

    Raises:
        InputError: When it is no such name, or nobody is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # loaded when it is asked for

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"push={repository!r} is no name of a repository: {error} Expected owner/name.") from None
    if get_token() is None:
        raise InputError("push needs access to the hub. Log in with hf auth login, or set HF_TOKEN.")


def push(folder: Path, repository: str) -> str:
    """Upload a folder; a repository that does not exist is created, private.

    Args:
        folder: Exported folder.
        repository: Name on the hub, as ``owner/name``.

    Returns:
        Address of the upload.

    Raises:
        InputError: When the hub refuses it; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"{folder} is exported, but cannot be uploaded to {repository}: {error}") from error
