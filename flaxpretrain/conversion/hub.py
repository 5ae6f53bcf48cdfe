"""The Hugging Face hub: models down, models up, with one clear line where it fails.

The token comes from where huggingface_hub keeps it (`hf auth login`, HF_TOKEN); it is never read,
printed or written here. Nothing that is downloaded is executed.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  httpx's or httpx2's
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from flaxpretrain.conversion.folders import CONFIG_FILE, GENERATION_FILE, TOKENIZER_FILES
from flaxpretrain.conversion.tensors import INDEX_SUFFIX, PICKLED, SAFETENSORS
from flaxpretrain.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")


def is_hub_id(source: str) -> bool:
    """Whether `source` is spelled as `name`, `owner/name`, or one of them with `@revision`."""
    return _HUB_ID.fullmatch(source) is not None


def download(source: str) -> Path:
    """The folder of a hub model's configuration, tokenizer and weights; safetensors if it can.

    Raises:
        UserError: no such model, no access, no network.
    """
    name, _, revision = source.partition("@")
    small = [CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES]
    safe = [SAFETENSORS, SAFETENSORS + INDEX_SUFFIX, "model-*.safetensors"]
    pickled = [PICKLED, PICKLED + INDEX_SUFFIX, "pytorch_model-*.bin"]
    with _one_line(f"there is no folder {source}; downloading {source}"):
        folder = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=[*small, *safe])
        )
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, revision=revision or None, allow_patterns=[*small, *pickled])
    return folder


def push(folder: Path, repository: str, *, private: bool = True, message: str) -> str:
    """Uploads a folder as a model, making the repository if it is not there.

    Returns:
        The address of the model.

    Raises:
        UserError: no token, no permission, no network.
    """
    api = HfApi()
    with _one_line(f"pushing to {repository}"):
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=made.repo_id, commit_message=message, repo_type="model"
        )
    return str(made)


@contextlib.contextmanager
def _one_line(doing: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into a UserError that says what to do."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(f"{doing}: no token found; run `hf auth login` or set HF_TOKEN") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise UserError(
            f"{doing}: {constants.ENDPOINT} cannot be reached, and it is not in the local cache "
            "(HF_HUB_OFFLINE forbids the network where it is set)"
        ) from error
    except GatedRepoError as error:
        raise UserError(
            f"{doing}: access must be granted first; ask for it on the model's page and log in"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{doing}: the hub knows no such model or revision, or it is private and the token "
            "does not open it; expected an existing folder, or a hub id such as owner/name"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"{doing}: {_reason(error)}") from error
    except HTTPError as error:
        raise UserError(
            f"{doing}: {constants.ENDPOINT} cannot be reached ({error}); look at the network"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a card that the hub refuses
        raise UserError(f"{doing}: {' '.join(str(error).split())}") from error


def _reason(error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return "the hub wants a valid token; run `hf auth login` or set HF_TOKEN"
    if status == 403:
        return "the token does not allow it; it needs write access to that repository"
    return str(error.server_message or error).strip().splitlines()[0]
