"""meta.json: what a folder of prepared shards says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jepa_dist.errors import UserError

META_NAME = "meta.json"


def read_meta(place: str | Path) -> dict[str, Any] | None:
    """The meta.json of a prepared folder, or None where there is none (shards from elsewhere).

    Args:
        place: The folder, or a glob of shards in it.

    Raises:
        UserError: the file is there but damaged.
    """
    path = Path(place).expanduser()
    path = (path if path.is_dir() else path.parent) / META_NAME
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        meta = None
    if not isinstance(meta, dict) or not {"tokenizer", "vocab_size", "shards"} <= meta.keys():
        raise UserError(
            f"{path}: damaged; remove {path.parent} and prepare it again "
            "(python -m jepa_dist.data.prepare)"
        )
    return meta
