"""``--config FILE.yaml``: flags, written down."""

from pathlib import Path
from typing import Any

import typer

__all__ = ["read_config"]


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes what the file says the defaults of the command, so that flags win."""
    if path is not None:
        context.default_map = {**(context.default_map or {}), **_defaults(context, path)}
    return path


def _defaults(context: typer.Context, path: Path) -> dict[str, Any]:
    # The argument may be in the file too, under its name.
    known = {name: one for one in context.command.params for name in _names(one)}
    found: dict[str, Any] = {}
    for key, value in _read(path).items():
        parameter = known.get(str(key).replace("_", "-"))
        if parameter is None or parameter.name in ("config", "help"):
            raise typer.BadParameter(f"{path} has {key!r}, which is no flag of this command")
        if getattr(parameter, "multiple", False) and not isinstance(value, list):
            value = [value]
        found[parameter.name] = value
    return found


def _names(parameter: Any) -> list[str]:
    flags = [flag.removeprefix("--") for flag in parameter.opts if flag.startswith("--")]
    return flags or [str(parameter.name)]


def _read(path: Path) -> dict[object, Any]:
    import yaml  # only who has such a file waits for it

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict | None):
        raise typer.BadParameter(f"{path} must map flags to values")
    return found or {}
