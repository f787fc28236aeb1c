"""Likelihood tasks in JSON Lines files: which of several texts continues a context.

A line is ``{"context": TEXT, "choices": [TEXT, ...], "answer": INDEX}``; other fields are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jepa_dist.data.tokenizer import Tokenizer
from jepa_dist.errors import UserError, invalid_fields
from jepa_dist.evaluate.passes import Request
from jepa_dist.files import MIB, read_lines
from jepa_dist.monitor.evaluation_file import digest_of

_LINE_BYTES = MIB
_MOST_CHOICES = 100

Text = Annotated[str, Field(min_length=1)]
Line = TypeVar("Line", bound=BaseModel)


class Item(BaseModel):
    """One question."""

    model_config = ConfigDict(strict=True, frozen=True)

    context: str
    """May be empty: the choices are then whole documents."""
    choices: Annotated[list[Text], Field(min_length=2, max_length=_MOST_CHOICES)]
    answer: Annotated[int, Field(ge=0)]
    """Index of the right choice."""

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> Item:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer}: expected 0..{len(self.choices) - 1}")
        return self


@dataclass(frozen=True)
class TaskFile:
    """A file whose lines have all been checked."""

    path: Path
    digest: str
    num_items: int

    @property
    def name(self) -> str:
        """The file's name without suffix."""
        return self.path.stem


def read_json_lines(path: Path, kind: type[Line]) -> Iterator[tuple[int, Line]]:
    """Yield each line's number, from 1, and contents, one at a time.

    Raises:
        UserError: the file cannot be read, or a line is not ``kind`` or longer than 1 MiB.
    """
    try:
        for number, line in enumerate(read_lines(path), 1):
            if len(line) > _LINE_BYTES:
                raise UserError(f"{path}:{number}: longer than 1 MiB; split it or remove it")
            if line.strip():
                yield number, _parse(line, kind, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(line: bytes, kind: type[Line], place: str) -> Line:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        fields = ", ".join(kind.model_fields)
        raise UserError(f"{place}: {invalid_fields(error)[0]}; a line has {fields}") from None


def check_lines(path: Path, kind: type[Line], check: Callable[[int, Line], object]) -> TaskFile:
    """Read a whole file, calling ``check`` for each line.

    Raises:
        UserError: a bad line, or no line at all.
    """
    count = 0
    for number, line in read_json_lines(path, kind):
        check(number, line)
        count += 1
    if not count:
        raise UserError(
            f"{path}: is empty; expected JSON Lines with {', '.join(kind.model_fields)}"
        )
    return TaskFile(path, digest_of(path), count)


def check_tasks(paths: Sequence[Path], tokenizer: Tokenizer, seq_len: int) -> list[TaskFile]:
    """Read all lines of task files, and encode their texts.

    Raises:
        UserError: a bad line, a choice that does not fit into the model, or files of the same name.
    """

    def check(path: Path) -> TaskFile:
        return check_lines(
            path, Item, lambda number, item: encode(item, tokenizer, seq_len, path, number)
        )

    tasks = [check(path) for path in paths]
    check_names(tasks, "--tasks")
    return tasks


def check_names(files: Sequence[TaskFile], option: str) -> None:
    """Raise if two files have the same name, or a name is not printable.

    Raises:
        UserError: with the names.
    """
    names = [file.name for file in files]
    unprintable = [name for name in names if not name.isprintable() or len(name) > 200]
    if unprintable:
        raise UserError(
            f"{option}: {unprintable[0]}: rename the file; expected printable characters"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{option}: several files are named {', '.join(twice)}; results are listed by name, so "
            "rename one"
        )


def encode(
    item: Item, tokenizer: Tokenizer, seq_len: int, path: Path, number: int
) -> list[Request]:
    """Return one request for each choice.

    Raises:
        UserError: a choice adds no token, or more than ``seq_len``; names file and line.
    """
    requests = []
    for index, choice in enumerate(item.choices):
        request = encode_pair(tokenizer, item.context, choice)
        if not 0 < len(request.target) <= seq_len:
            raise UserError(
                f"{path}:{number}: choice {index}: has {len(request.target)} tokens; expected 1 to "
                f"model.seq_len={seq_len}"
            )
        requests.append(request)
    return requests


def encode_pair(tokenizer: Tokenizer, context: str, choice: str) -> Request:
    """Return the ids of a context, which begins a document, and of the choice after it.

    As lm-evaluation-harness (TemplateLM._encode_pair): white space at the context's end belongs to
    the choice, since tokens often begin with a space. The choice's tokens are those of context
    and choice together, minus the number that the context alone has.
    """
    kept = context.rstrip()
    start = tokenizer.encode(kept.encode()).tolist()
    whole = tokenizer.encode((context + choice).encode()).tolist()
    return Request([tokenizer.bos_id, *start], whole[len(start) :])
