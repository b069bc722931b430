"""From what a user calls a model to the local files that hold it."""

import re
from difflib import get_close_matches
from pathlib import Path

from nanoflow_compiler.errors import ModelLoadError
from nanoflow_compiler.models.alias import ALIASES, resolve_alias
from nanoflow_compiler.models.published import catalog_config, catalog_names

__all__ = ["resolve_model"]

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
CONFIG_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
WEIGHT_PATTERNS = ("*.safetensors",)


def resolve_model(name: str | Path, *, weights: bool = True) -> Path:
    """The directory with ``config.json`` and weights, or the ``.gguf`` file, of ``name``.

    ``name`` is a path, an alias, or a hub id, tried in this order. ``weights=False`` leaves the
    weights of a hub model on the hub.
    """
    path = Path(name).expanduser()
    if path.exists():
        return _local(path)
    text = str(name)
    if text in ALIASES:
        return resolve_alias(text)
    if text in catalog_names():
        raise ModelLoadError(
            f"{text} is in the catalog as a configuration without weights: "
            f'pass load_format="dummy" for random ones{_or_hub_id(text)}'
        )
    if not HUB_ID.fullmatch(text) or text.endswith(".gguf"):
        raise ModelLoadError(f"{text}: no such file or directory; check the path")
    return _download(text, weights=weights)


def _or_hub_id(name: str) -> str:
    hub_id = catalog_config(name).get("_name_or_path")
    return f", or the hub id {hub_id}" if hub_id else ""


def _local(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(
                f"{path} is a file, but not .gguf; pass the directory that holds it"
            )
        return path
    if (path / "config.json").is_file():
        return path
    match sorted(path.glob("*.gguf")):
        case []:
            raise ModelLoadError(
                f"{path} has neither a config.json nor a .gguf file; pass the directory of a model"
            )
        case [only]:
            return only
        case several:
            listed = ", ".join(file.name for file in several)
            raise ModelLoadError(f"{path} holds several models; pass the path of one of: {listed}")


def _download(hub_id: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    patterns = [*CONFIG_PATTERNS, *(WEIGHT_PATTERNS if weights else ())]
    try:
        folder = snapshot_download(hub_id, allow_patterns=patterns)
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{hub_id} is gated on the hub; accept its terms there, then run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(f"the hub has no model {hub_id}; {_hint(hub_id)}") from error
    except (OSError, ValueError) as error:  # no network, no such revision, refused, disk full
        raise ModelLoadError(
            f"cannot fetch {hub_id} from the hub ({_cause(error)}); {_hint(hub_id)}, "
            "or pass the path of a directory that holds the model"
        ) from error
    return _local(Path(folder))


def _hint(name: str) -> str:
    known = [*ALIASES, *catalog_names()]
    if near := get_close_matches(name, known, n=1):
        return f"did you mean {near[0]}?"
    return f"check the name and the network; names that need neither: {', '.join(ALIASES)}"


def _cause(error: Exception) -> str:
    """The first line: the rest is advice that fits other programs."""
    return next(iter(str(error).splitlines()), type(error).__name__)
