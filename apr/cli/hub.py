"""Models of the Hugging Face hub, by the huggingface_hub package: only the files that apr reads are downloaded."""

import re
import sys
from pathlib import Path

from apr.errors import ConfigError, NotFoundError, UnavailableError, one_line
from apr.files import os_error
from apr.formats.hf_folder import CONFIG, INDEX
from apr.formats.source import ASSETS

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# Not *.safetensors: some makers put the same weights there a second time under another name.
PATTERNS = [CONFIG, INDEX, "model*.safetensors", *ASSETS]


def looks_like_a_name(source: str) -> bool:
    """Whether this could be OWNER/NAME of the hub."""
    return NAME.fullmatch(source) is not None and not source.endswith((".apr", ".gguf", ".safetensors"))


def download(name: str, revision: str | None) -> Path:
    """The folder of a model in the hub's cache, downloaded if it is not there yet.

    Raises UnavailableError (package not installed, gated, no network), NotFoundError, ConfigError for a name that the
    hub cannot have, StorageError.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise UnavailableError(name, "the 'hub' extra for models of the hub", "no huggingface_hub",
                               "pip install 'apr[hub]'") from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    where = name if revision is None else f"{name} at revision {revision}"
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except errors.GatedRepoError:  # before its parent class
        raise UnavailableError(where, "a model that you may download", "one whose owner asks for consent first",
                               f"accept the terms at https://huggingface.co/{name}, then run 'hf auth login'") from None
    except errors.RevisionNotFoundError:
        raise NotFoundError(where, "a revision of this model", "none of this name", "check --revision") from None
    except errors.RepositoryNotFoundError:
        raise NotFoundError(where, "a path here, or a model of the hub", "neither",
                            "check the name; for a private model run 'hf auth login' first") from None
    except errors.HFValidationError as e:
        raise ConfigError(where, "OWNER/NAME of a model", _first(e), "check the name") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as e:
        raise _unreachable(where, e) from None
    except OSError as e:
        raise os_error(where, e) from e
    except Exception as e:  # the HTTP library's own, which differs from version to version
        raise _unreachable(where, e) from None


def _unreachable(where: str, error: Exception) -> UnavailableError:
    return UnavailableError(where, "a connection to the hub", f"{type(error).__name__}: {_first(error)}",
                            "check the network and HF_HUB_OFFLINE, or give a folder that is here")


def _first(error: Exception) -> str:
    return one_line((str(error).strip() or "no reason given").splitlines()[0], 200)
