"""Public configurations of the models that we benchmark, for runs with random weights."""

import json
from pathlib import Path
from typing import Any

__all__ = ["CATALOG", "catalog_config", "catalog_names"]

CATALOG = Path(__file__).parent / "catalog"


def catalog_names() -> list[str]:
    """Every name that ``load_decoder(name, load_format="dummy")`` knows."""
    return sorted(path.stem for path in CATALOG.glob("*.json"))


def catalog_config(name: str) -> dict[str, Any]:
    """The ``config.json`` of ``name``; ``_name_or_path`` in it is the hub id, of what is on the hub."""
    config: dict[str, Any] = json.loads((CATALOG / f"{name}.json").read_text())
    return config
