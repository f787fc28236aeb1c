"""meta.json: description of a folder of prepared shards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from jepa_dist.errors import UserError, invalid_fields
from jepa_dist.files import read_bytes

META_NAME = "meta.json"
_MOST_BYTES = 1 << 26


def _bare(name: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise ValueError("expected the bare name of a file in this folder")
    return name


Count = Annotated[int, Field(ge=0)]


class Meta(BaseModel):
    """Contents of meta.json: settings and results of ``prepare``.

    Only the first three fields are required, for shards from elsewhere.
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    tokenizer: str
    """Identity of the tokenizer (``Tokenizer.name``)."""
    vocab_size: int = Field(ge=1, le=2**24)
    shards: dict[Annotated[str, AfterValidator(_bare)], Count]
    """Tokens of each shard, by the name of its file in this folder."""
    bos_id: int | None = Field(default=None, ge=0)
    """Id that begins every document."""
    source: str | list[str] | None = None
    """Input: paths, or the name of the default corpus."""
    listing: dict[str, Any] | None = None
    """Number, bytes and digest of names and sizes of the input files."""
    content: str | None = None
    """Digest of the input text; folders of earlier versions have none."""
    field: str | None = None
    template: str | None = None
    separator: str | None = None
    val_fraction: float | None = None
    split_by: str | None = None
    """``text`` if the split of a document depends on its text; None: on the named validation files,
    or on the file's name and the document's offset."""
    shard_tokens: int | None = None
    shuffle: int | None = None
    """Seed of the order of the training documents; None: that of the input."""
    deduplicate: bool | None = None
    """Whether duplicates were dropped; missing in folders of earlier versions, which keep them."""
    duplicates: dict[str, Count] | None = None
    """Numbers of dropped documents: equal to an ``earlier`` one, or training documents equal to
    one of ``validation``."""
    documents: dict[str, Count] = Field(default_factory=dict)
    """Documents of each split."""
    tokens: dict[str, Count] = Field(default_factory=dict)
    """Tokens of each split."""
    text_bytes: dict[str, Count] = Field(default_factory=dict)
    """Bytes of text of each split."""
    counted_bytes: dict[str, Count] = Field(default_factory=dict)
    """Bytes of text that the tokens encode; less than the text if the tokenizer loses any."""
    tokenizer_note: str | None = None
    """Description of what the tokenizer loses (``Tokenizer.note``)."""

    @model_validator(mode="after")
    def _bos_is_a_token(self) -> Self:
        if self.bos_id is not None and self.bos_id >= self.vocab_size:
            raise ValueError(f"bos_id {self.bos_id} is not below vocab_size {self.vocab_size}")
        return self


def read_meta(folder: Path) -> Meta | None:
    """Return the meta.json of a folder, or None if there is none (shards from elsewhere).

    Raises:
        UserError: the file is there but damaged, or names a shard outside the folder.
    """
    path = folder / META_NAME
    try:
        meta = Meta.model_validate_json(read_bytes(path, _MOST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from None
    except ValidationError as error:
        raise _damaged(path, invalid_fields(error)[0]) from None
    inside = folder.resolve()
    for name in meta.shards:
        if (folder / name).resolve().parent != inside:
            raise _damaged(path, f"shards: {name!r} is a link to outside this folder")
    return meta


def metas_beside(shards: Iterable[Path]) -> dict[Path, Meta]:
    """Return each meta.json in the folders of these shards, by its path.

    Raises:
        UserError: as ``read_meta``.
    """
    found = {folder / META_NAME: read_meta(folder) for folder in {path.parent for path in shards}}
    return {path: meta for path, meta in sorted(found.items()) if meta is not None}


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path}: damaged: {problem}; remove {path.parent} and prepare it again "
        "(python -m jepa_dist.data.prepare)"
    )
