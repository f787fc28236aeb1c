"""Make likelihood tasks and labeled documents from a configuration's corpus.

    jepa_dist tasks CONFIG [--out DIR] [KEY=VALUE ...]

    cloze.jsonl    which of four passages continues a document, from inside a word on; the other
                   three come from other documents
    order.jsonl    in which order two adjacent passages stand, given the text before them
    package.jsonl  documents labeled with the package of the standard library that they come from,
                   for the probe; only for the corpus of jepa_dist prepare without INPUT

The first two come from whole documents of the validation shards (data.val), which are not trained
on. What is written is a function of the corpus alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jepa_dist.command_line import Parser, errors_in_one_line, program
from jepa_dist.config import Config, load
from jepa_dist.data.check import load_checked_tokenizer
from jepa_dist.data.corpus import InputFile, default_corpus, listing
from jepa_dist.data.meta import metas_beside
from jepa_dist.data.sources import find_split
from jepa_dist.data.tokenizer import Tokenizer
from jepa_dist.errors import UserError
from jepa_dist.evaluate.stream import TokenStream
from jepa_dist.files import read_bytes, write_atomically

_CONTEXT_BYTES = 128
_PASSAGE_BYTES = 64
_CLOZE_BYTES = 24
_CHOICES = 4
_MOST_ITEMS = 600
_MOST_TOKENS = 2**24  # maximum number read from the validation shards

_EXCERPT_BYTES = 1000
_DOCUMENTS_PER_PACKAGE = 150
_FEWEST_PER_PACKAGE = 40

_INSIDE_WORD = re.compile(rb"(?<=[A-Za-z])(?=[A-Za-z])")

Record = dict[str, Any]
Random = np.random.Generator


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; return the exit code."""
    try:
        with errors_in_one_line():
            arguments = _parse_arguments(argv)
            config = load(arguments.config, arguments.overrides).config
            print(*make_tasks(config, arguments.out), sep="\n")
    except UserError as error:
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return error.exit_code
    return 0


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=program("jepa_dist.evaluate.make_tasks"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file or the name of a shipped configuration")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. data.val=...")
    parser.add_argument("--out", type=Path, default=Path("data/tasks"), help="default: data/tasks")
    return parser.parse_intermixed_args(argv)


def make_tasks(config: Config, out: Path) -> Iterator[str]:
    """Write the files to ``out``; yield one line about each.

    Raises:
        UserError: no tokenizer, no validation shards, or too little text in them.
    """
    tokenizer = load_checked_tokenizer(config, ("val",))
    if tokenizer is None:
        raise UserError("data.tokenizer=null: tasks are text; name the tokenizer of the data")
    out.mkdir(parents=True, exist_ok=True)
    documents = [_Lines(text) for text in read_documents(config, tokenizer)]
    for name, records in (("cloze", cloze(documents)), ("order", order(documents))):
        if not records:
            raise UserError(
                f"data.val={config.data.val!r}: too little text for the task {name}; expected "
                f"documents with several hundred bytes, and more than {_CHOICES - 1} of them"
            )
        yield _write(out / f"{name}.jsonl", records)
    files = _corpus_of(config)
    if files is None:
        yield (
            f"{out / 'package.jsonl'}: not made: the shards are not of the standard library of "
            "this Python, so that it is not known where a document comes from"
        )
    else:
        yield _write(out / "package.jsonl", list(labeled_documents(files)))


def _write(path: Path, records: Iterable[Record]) -> str:
    lines = [json.dumps(record) + "\n" for record in records]
    write_atomically(path, "".join(lines))
    return f"{path}: {len(lines)} lines"


def read_documents(config: Config, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the texts of the documents of the validation shards, at most 2^24 tokens in all.

    Raises:
        UserError: no shards, or damaged ones.
    """
    paths = find_split(config, "val")
    stream = TokenStream(paths, config.model.vocab_size)
    ids = stream.read(0, min(len(stream), _MOST_TOKENS))
    starts = np.flatnonzero(ids == tokenizer.bos_id)
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        yield tokenizer.decode(ids[start + 1 : stop].tolist())


# ---------------------------------------------------------------------------- likelihood tasks


class _Lines:
    """A document's text, and the byte offsets of its lines."""

    def __init__(self, text: str) -> None:
        self.text = text.encode()
        line_ends = np.flatnonzero(np.frombuffer(self.text, np.uint8) == ord("\n"))
        self.starts = np.concatenate([[0], line_ends + 1])

    def line_at_or_after(self, place: int) -> int:
        """Return the start of the first line at or after ``place``; the text's end without one."""
        index = int(np.searchsorted(self.starts, place))
        return int(self.starts[index]) if index < len(self.starts) else len(self.text)

    def inside_word(self, place: int) -> int:
        """Return the first offset at or after ``place`` between two letters; the text's end
        without one."""
        found = _INSIDE_WORD.search(self.text, place)
        return len(self.text) if found is None else found.start()

    def passage(self, start: int, size: int) -> str | None:
        """Return ``size`` bytes of the text; None if it is shorter, they are mostly white space,
        or they cut a character."""
        data = self.text[start : start + size]
        words = data.split()
        if len(data) < size or len(words) < 2 or 2 * sum(map(len, words)) < size:
            return None
        try:
            return data.decode()
        except UnicodeDecodeError:
            return None


def cloze(documents: Sequence[_Lines]) -> list[Record]:
    """Return items: 128 bytes of a document that end inside a word, and four passages of 24 bytes
    that begin inside one; one continues the context, the others come from other documents.

    Long passages that begin with a line do not work: their own likelihood varies more than the
    effect of the context, and a small model stays at chance (0.26 with 64 bytes).
    """
    random = np.random.Generator(np.random.PCG64(0))
    items = []
    for index, place in _places(documents, random):
        start = documents[index].inside_word(place)
        context = documents[index].passage(start - _CONTEXT_BYTES, _CONTEXT_BYTES)
        right = documents[index].passage(start, _CLOZE_BYTES)
        choices = [right, *(_elsewhere(documents, index, random) for _ in range(_CHOICES - 1))]
        if context is not None and None not in choices and len(set(choices)) == _CHOICES:
            items.append(_shuffled(context, choices, random))
    return items[:_MOST_ITEMS]


def order(documents: Sequence[_Lines]) -> list[Record]:
    """Return items: 128 bytes of a document, and the next two passages of whole lines, 64 bytes
    or little more each, in their order and exchanged."""
    random = np.random.Generator(np.random.PCG64(1))
    items = []
    for index, place in _places(documents, random):
        lines = documents[index]
        start = lines.line_at_or_after(place)
        context = lines.passage(start - _CONTEXT_BYTES, _CONTEXT_BYTES)
        middle = lines.line_at_or_after(start + _PASSAGE_BYTES // 2)
        end = lines.line_at_or_after(middle + _PASSAGE_BYTES // 2)
        first, second = lines.passage(start, middle - start), lines.passage(middle, end - middle)
        if context is None or first is None or second is None or first == second:
            continue
        if end - start <= 2 * _PASSAGE_BYTES and second.endswith("\n"):
            items.append(_shuffled(context, [first + second, second + first], random))
    return items[:_MOST_ITEMS]


def _places(documents: Sequence[_Lines], random: Random) -> list[tuple[int, int]]:
    """Return document and byte offset of all places for an item, in random order.

    Places are 256 bytes apart, so that items hardly overlap.
    """
    step = _CONTEXT_BYTES + 2 * _PASSAGE_BYTES
    places = [
        (index, place)
        for index, lines in enumerate(documents)
        for place in range(_CONTEXT_BYTES, len(lines.text), step)
    ]
    return [places[number] for number in random.permutation(len(places))]


def _elsewhere(documents: Sequence[_Lines], index: int, random: Random) -> str | None:
    """Return a passage of another document, drawn by its share of all text."""
    weights = np.array([float(len(lines.text)) for lines in documents])
    weights[index] = 0
    if weights.sum() == 0:
        return None
    for _ in range(20):
        lines = documents[int(random.choice(len(documents), p=weights / weights.sum()))]
        start = lines.inside_word(int(random.integers(len(lines.text))))
        passage = lines.passage(start, _CLOZE_BYTES)
        if passage is not None:
            return passage
    return None


def _shuffled(context: str, choices: Sequence[str | None], random: Random) -> Record:
    """Return the item with its choices, the first of which is the right one, in random order."""
    places = random.permutation(len(choices))
    return {
        "context": context,
        "choices": [choices[place] for place in places],
        "answer": int(np.flatnonzero(places == 0)[0]),
    }


# ---------------------------------------------------------------------------- labeled documents


def _corpus_of(config: Config) -> list[InputFile] | None:
    """Return the files of the default corpus if the validation shards were made from them."""
    metas = metas_beside(find_split(config, "val")).values()
    try:
        _, files = default_corpus()
    except UserError:
        return None
    expected = listing(files)
    return files if metas and all(meta.listing == expected for meta in metas) else None


def labeled_documents(files: Sequence[InputFile]) -> Iterator[Record]:
    """Yield 1,000 bytes from the middle of files of the large packages, with the package's name.

    A package is a folder that contains modules. At most 150 files of each are used, evenly spaced
    by name. The middle, because files of one package often have the same start.
    """
    packages = Counter(_package(file) for file in files if _package(file))
    for package, count in sorted(packages.items()):
        if count < _FEWEST_PER_PACKAGE:
            continue
        named = [file for file in files if _package(file) == package]
        for file in named[:: -(-count // _DOCUMENTS_PER_PACKAGE)]:
            excerpt = _middle_of(read_bytes(file.path, 2**26))
            if excerpt:
                yield {"text": excerpt, "label": package}


def _package(file: InputFile) -> str:
    return file.name.rpartition("/")[0]


def _middle_of(data: bytes) -> str:
    """Return the lines in the middle of a text."""
    start = max(0, len(data) - _EXCERPT_BYTES) // 2
    if start:
        start = data.find(b"\n", start) + 1
    return data[start : start + _EXCERPT_BYTES].decode("utf-8", "ignore").strip()


if __name__ == "__main__":
    sys.exit(main())
