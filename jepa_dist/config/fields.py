"""Types of configuration values: bounded numbers, and text that a path or a prompt can be.

Upper bounds are far beyond any use. They keep a typing error from becoming an overflow, a hang or
an allocation of terabytes.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, le=1e12)]
Positive = Annotated[float, Field(gt=0.0, le=1e12)]
Rate = Annotated[float, Field(gt=0.0, le=1e3)]
Decay = Annotated[float, Field(ge=0.0, le=1e3)]
Seconds = Annotated[float, Field(ge=0.0, le=1e7)]
Count = Annotated[int, Field(ge=0, le=10**9)]
PositiveInt = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

_LONGEST_NAME = 255
_LONGEST_PATH = 4000
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def _check_path(text: str) -> str:
    """Refuse text that cannot be a path on any host."""
    problem = _path_problem(text)
    if problem:
        raise PydanticCustomError("path", "{problem}", {"problem": problem})
    return text


def _check_shards(text: str) -> str:
    """Refuse text that can be neither a path nor a URL."""
    return _check_text(text) if _URL.match(text) and "\0" not in text else _check_path(text)


def _check_text(text: str) -> str:
    """Refuse lone surrogates, into which the command line turns bytes that are not UTF-8."""
    if not _is_unicode(text):
        raise PydanticCustomError("text", "is not valid UTF-8 text")
    return text


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _path_problem(text: str) -> str | None:
    if not _is_unicode(text):
        return "is not valid UTF-8 text"
    longest = max(len(part.encode()) for part in text.split("/"))
    if not text:
        return "must not be empty"
    if "\0" in text:
        return "holds a NUL character, which no path can"
    if _URL.match(text):
        return "is a URL; expected a path (mount the storage, or copy the files)"
    if longest > _LONGEST_NAME:
        return f"has a part of {longest} bytes; file names have at most {_LONGEST_NAME}"
    if len(text.encode()) > _LONGEST_PATH:
        return f"is longer than {_LONGEST_PATH} bytes"
    return None


PathText = Annotated[str, AfterValidator(_check_path)]
Text = Annotated[str, AfterValidator(_check_text)]
ShardsText = Annotated[str, AfterValidator(_check_shards)]
# Part of metric names and of lines of text.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]
