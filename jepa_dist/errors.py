"""Exceptions for problems that the user can fix.

The entry points print them without a traceback, one line per problem, and exit with their code
(early, clear errors on every rank). A message names the key, file or rank, what was expected, and
how to fix it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

_LONGEST_PROBLEM = 2000

_LONGEST_FIELD = 80
_LONGEST_MESSAGE = 200


class UserError(Exception):
    """Bad configuration, data or state file: one or more one-line problems."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(map(one_line, problems))
        super().__init__("\n".join(self.problems))


class SharedError(UserError):
    """A problem that every rank raises at the same point, so that rank 0 alone prints it."""


class TrainingError(SharedError):
    """The run itself cannot continue."""

    exit_code = 3


def invalid_fields(error: ValidationError) -> list[str]:
    """Return ``a.b: what was expected`` for each field that failed pydantic's validation."""
    return [_invalid_field(item["loc"], item["msg"]) for item in error.errors()]


def _invalid_field(location: tuple[int | str, ...], message: str) -> str:
    field = ".".join(map(str, location))[:_LONGEST_FIELD]
    return f"{field}: {message[:_LONGEST_MESSAGE]}" if field else message[:_LONGEST_MESSAGE]


def one_line(text: str) -> str:
    """Return ``text`` as one printable line; text read from files may contain anything."""
    text = " ".join(text.splitlines()) if len(text.splitlines()) > 1 else text
    if len(text) > _LONGEST_PROBLEM:  # the end says what was expected
        half = _LONGEST_PROBLEM // 2
        text = f"{text[:half]}...{text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
