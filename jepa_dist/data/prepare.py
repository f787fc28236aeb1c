"""Turn text into token shards: ``python -m jepa_dist.data.prepare [INPUT ...]``.

Without INPUT it prepares the default corpus: the standard library of the running Python.
The output folder holds train_000000.bin ..., val_000000.bin ... and meta.json, and appears
atomically; its contents do not depend on the number of processes. The same command resumes one that
was killed or interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from jepa_dist.command_line import Parser, program
from jepa_dist.data import corpus
from jepa_dist.data.byte_level import hugging_face_from
from jepa_dist.data.corpus import SPLITS, InputFile, Split
from jepa_dist.data.documents import (
    TASK_BYTES,
    Encoded,
    Encoder,
    Part,
    Selected,
    read_head,
    split_of,
    tasks,
)
from jepa_dist.data.duplicates import Digester, Duplicates
from jepa_dist.data.journal import Journal, ShuffleState, State, digest_of, read_state
from jepa_dist.data.meta import META_NAME, Meta, read_meta
from jepa_dist.data.prepared_output import Output
from jepa_dist.data.prepared_report import report, table
from jepa_dist.data.record_files import TextOf
from jepa_dist.data.shard_format import MOST_TOKENS, token_dtype
from jepa_dist.data.shards import read_count
from jepa_dist.data.shuffle import ShuffledDocuments, num_buckets
from jepa_dist.data.staging import resolve_target, staged
from jepa_dist.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from jepa_dist.data.tokenizer_training import BOS, train_tokenizer
from jepa_dist.data.workers import ordered_map
from jepa_dist.errors import UserError

DEFAULT_OUT = "data/stdlib"
_MOST_WORKERS = 16
_MOST_PER_CORE = 8
_LOG_SECONDS = 60.0
_LEAST_VOCABULARY = 257  # all bytes, and the token that begins documents
_MOST_VOCABULARY = 2**20
_MOST_SEED = 2**63 - 1
TOKENIZER_NAME = "tokenizer.json"
# Settings that meta.json of earlier versions lacks.
_OF_LATER_VERSIONS = ("content", "deduplicate", "split_by")
REPORT_NAME = "report.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code (2: a user's mistake, 130 or 143: a signal)."""
    try:
        options = _parser().parse_args(argv)
        signal.signal(signal.SIGTERM, _terminate)
        print(prepare(options))
        if options.report:
            _report(_out(options))
    except UserError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return 2
    except OSError as error:
        place = f" (temporary files are in {tempfile.gettempdir()})" if not error.filename else ""
        print(f"{error}{place}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        kept = getattr(error, "__notes__", ["nothing was written"])
        print("interrupted;", *kept, file=sys.stderr)
        number = signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT
        return 128 + number
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C: schedulers interrupt with it."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program("jepa_dist.data.prepare"),
        description="Turn text into token shards; without INPUT, the text of Python's standard "
        "library.",
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help=f"file of {corpus.SUFFIXES}, or folder")
    add("--out", help=f"output folder (default without INPUT: {DEFAULT_OUT})")
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument(
        "--tokenizer",
        default=BYTES,
        help="'bytes' (default), or the path of a SentencePiece model, a tokenizer.json or a "
        "tiktoken file",
    )
    vocabulary.add_argument(
        "--train-tokenizer",
        type=functools.partial(_count, least=_LEAST_VOCABULARY, most=_MOST_VOCABULARY),
        metavar="VOCAB",
        help="train a byte-level BPE of VOCAB ids on the input, and write it to OUT as "
        f"{TOKENIZER_NAME}",
    )
    add("--field", default="text", help="field of a record that holds the text")
    add("--template", help=r"several fields joined, e.g. '{title}\n\n{text}'; in place of --field")
    add("--separator", help=r"text between the documents of a .txt file, e.g. '\n\n'")
    validation = parser.add_mutually_exclusive_group()
    add_validation = validation.add_argument
    add_validation("--val", action="append", default=[], metavar="INPUT", help="validation text")
    add_validation("--val-fraction", type=_fraction, default=0.01, help="of the documents (0.01)")
    add(
        "--shard-tokens",
        type=functools.partial(_count, most=MOST_TOKENS),
        default=100_000_000,
        help="maximum number of tokens of a shard",
    )
    cores = os.cpu_count() or 1
    workers = min(cores, _MOST_WORKERS)
    most = _MOST_PER_CORE * cores
    add(
        "--workers",
        type=functools.partial(_count, most=most),
        default=workers,
        help=f"processes (here {workers}, at most {most})",
    )
    add(
        "--shuffle",
        type=functools.partial(_count, most=_MOST_SEED, least=0),
        metavar="SEED",
        help="put the training documents into a random order",
    )
    add("--keep-duplicates", action="store_true", help="keep documents that equal others")
    add("--report", action="store_true", help=f"show lengths of documents; writes {REPORT_NAME}")
    add("--overwrite", action="store_true", help="replace an output made with other settings")
    return parser


def _count(text: str, most: int, least: int = 1) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return value


# ---------------------------------------------------------------------------- the work


def prepare(options: argparse.Namespace) -> str:
    """Prepare the output, unless it exists already; return one line that says what was done.

    Raises:
        UserError: bad input, an output made with other settings, or an empty split.
    """
    out = resolve_target(_out(options))
    tokenizer = load_tokenizer(options.tokenizer)
    separator = _unescaped("--separator", options.separator)
    text_of = _text_of(options)
    source, files = _files(options)
    trained = _train_tokenizer(options, files, separator, text_of)
    if trained is not None:
        tokenizer = hugging_face_from(trained, "the trained tokenizer", BOS)
        if tokenizer.vocab_size < options.train_tokenizer:
            print(
                f"--train-tokenizer {options.train_tokenizer}: the text yields no more than "
                f"{tokenizer.vocab_size} ids",
                file=sys.stderr,
            )
    settings = {
        "listing": corpus.listing(files),
        "content": corpus.content_digest(files),
        "tokenizer": tokenizer.name,
        "field": options.field,
        "template": options.template,
        "separator": options.separator,
        "val_fraction": None if options.val else options.val_fraction,
        "split_by": "text" if any(file.is_split_by_text for file in files) else None,
        "shard_tokens": options.shard_tokens,
        "shuffle": options.shuffle,
        "deduplicate": not options.keep_duplicates,
    }
    if out.exists() and _is_done(out, settings, options.overwrite):
        return f"{out}: already prepared with these settings"
    if separator is None:
        _check_whole_files(files, options.val_fraction)
    if tokenizer.note:
        print(tokenizer.note, file=sys.stderr)
    encoder = Encoder(tokenizer, text_of, options.val_fraction)
    digest = digest_of({**settings, "tasks of": TASK_BYTES})
    with staged(out, lambda folder: read_state(folder, digest).tasks > 0) as folder:
        state = read_state(folder, digest)
        totals = _write(folder, files, separator, encoder, options, state)
        meta = Meta(source=source, **settings, **_describe(tokenizer), **totals)
        text = json.dumps(meta.model_dump(exclude_none=True), indent=1)
        (folder / META_NAME).write_text(text + "\n", encoding="utf-8")
        if trained is not None:
            (folder / TOKENIZER_NAME).write_bytes(trained)
    return f"{out}: " + ", ".join(
        f"{split} {meta.documents[split]:,} documents, {meta.tokens[split]:,} tokens"
        f"{_lost(meta.text_bytes[split], meta.counted_bytes[split])}"
        for split in SPLITS
    )


def _report(out: Path) -> None:
    meta = read_meta(out)
    assert meta is not None
    splits = report(out, meta)
    (out / REPORT_NAME).write_text(json.dumps(splits, indent=1) + "\n", encoding="utf-8")
    print(table(splits))


def _train_tokenizer(
    options: argparse.Namespace,
    files: Sequence[InputFile],
    separator: bytes | None,
    text_of: TextOf,
) -> bytes | None:
    """Train a tokenizer if requested; return the contents of its tokenizer.json, else None."""
    if options.train_tokenizer is None:
        return None
    return train_tokenizer(files, separator, text_of, options.val_fraction, options.train_tokenizer)


def _lost(text_bytes: int, counted_bytes: int) -> str:
    """Return how the bytes of the tokens differ from those of the text; empty if they do not."""
    if text_bytes == counted_bytes:
        return ""
    return f" ({counted_bytes:,} of {text_bytes:,} bytes of the text are in them)"


def _out(options: argparse.Namespace) -> Path:
    if options.out is None and options.inputs:
        raise UserError("--out: name the output folder for your INPUT, e.g. --out data/mine")
    if options.val and not options.inputs:
        raise UserError("--val: goes with INPUT; the default corpus is split automatically")
    if "://" in (options.out or ""):
        raise UserError(f"--out {options.out}: is a URL; name a folder")
    return Path(options.out or DEFAULT_OUT)


def _unescaped(option: str, text: str | None) -> bytes | None:
    """Return the text of an option, in which a line end is written as backslash and n."""
    if text is None:
        return None
    try:  # "\n" arrives from the shell as two characters
        unescaped = text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode()
    except UnicodeError as error:
        raise UserError(f"{option} {text!r}: {error}") from None
    if not unescaped:
        raise UserError(f"{option}: is empty; expected text, e.g. '\\n\\n'")
    return unescaped


def _text_of(options: argparse.Namespace) -> TextOf:
    template = _unescaped("--template", options.template)
    text_of = TextOf(options.field, None if template is None else template.decode())
    if not text_of.fields:
        raise UserError(
            f"--template {options.template!r}: names no field; expected fields in braces, e.g. "
            "'{title} {text}'"
        )
    return text_of


def _files(options: argparse.Namespace) -> tuple[Any, list[InputFile]]:
    if not options.inputs:
        return corpus.default_corpus()
    skipped = corpus.Skipped()
    files = corpus.user_files(options.inputs, "train" if options.val else None, skipped)
    files += corpus.user_files(options.val, "val", skipped)
    if str(skipped):
        print(skipped, file=sys.stderr)
    corpus.check_distinct(files)
    return options.inputs, files


def _is_done(out: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Return whether ``out`` was made with ``settings``; False if it may be replaced."""
    if out.is_dir() and not any(out.iterdir()):
        return False
    meta = read_meta(out) if out.is_dir() else None
    if meta is None:  # never delete what this program did not make
        raise UserError(f"{out}: exists and was not prepared by this program; choose another --out")
    before = meta.model_dump()
    differing = [
        f"other text in the files ({key})" if key == "content" else f"{key} {was!r}, now {value!r}"
        for key, value in settings.items()
        if (was := before[key]) != value and not (key in _OF_LATER_VERSIONS and was is None)
    ]
    if overwrite:
        return False
    if differing:
        raise UserError(
            f"{out}: was prepared with {'; '.join(differing)}; choose another --out, or replace "
            "it with --overwrite"
        )
    for name in meta.shards:
        read_count(out / name)
    return True


def _check_whole_files(files: Sequence[InputFile], val_fraction: float) -> None:
    """Raise for an empty split before the work, if files are documents and the split is known."""
    if all(file.kind == "text" for file in files):
        splits = [_split_of_whole(file, val_fraction) for file in files if file.size]
        _check_splits({split: splits.count(split) for split in SPLITS})


def _split_of_whole(file: InputFile, val_fraction: float) -> Split:
    with open(file.path, "rb") as stream:
        return split_of(file, 0, read_head(stream, 0, file.size), val_fraction)


def _check_splits(documents: dict[Split, int]) -> None:
    if not documents["train"] or not documents["val"]:
        name = "validation" if documents["train"] else "training"
        raise UserError(
            f"of {sum(documents.values())} documents none fell into the {name} split; cut .txt "
            r"files into documents with --separator (e.g. '\n\n'), change --val-fraction, or "
            "name validation text with --val INPUT"
        )


def _describe(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "tokenizer_note": tokenizer.note,
    }


def _write(
    folder: Path,
    files: Sequence[InputFile],
    separator: bytes | None,
    encoder: Encoder,
    options: argparse.Namespace,
    state: State,
) -> dict[str, Any]:
    """Encode all files into shards in ``folder``; return the results for meta.json."""
    total = sum(file.size for file in files)
    parts: Iterable[Selected | list[Part]] = tasks(files, separator, encoder.text_of)
    duplicates = None
    if not options.keep_duplicates:
        duplicates = _find_duplicates(files, separator, encoder, options.workers)
        parts = duplicates.selected(tasks(files, separator, encoder.text_of))
    with contextlib.ExitStack() as stack:
        output, state = _open_output(folder, state, encoder.tokenizer, options, total)
        stack.enter_context(output)
        journal = Journal(folder)
        progress = stack.enter_context(
            tqdm(
                total=total,
                initial=state.bytes_read,
                unit="B",
                unit_scale=True,
                desc="preparing",
                **_progress_pace(),
            )
        )
        rest = itertools.islice(parts, state.tasks, None)
        results = ordered_map(encoder, rest, options.workers)
        for encoded in stack.enter_context(contextlib.closing(results)):
            progress.update(encoded.bytes_read)
            output.write(encoded)
            state = _after(state, encoded)
            if journal.is_due:
                journal.write(functools.partial(_noted, state, output))
        _check_splits(state.documents)
        if options.shuffle is not None:
            journal.write(functools.partial(_noted, state, output))
        output.finish()
    journal.close()
    return {
        "documents": state.documents,
        "tokens": {split: sum(shards.counts.values()) for split, shards in output.sets.items()},
        "shards": {name: n for shards in output.sets.values() for name, n in shards.counts.items()},
        "text_bytes": state.text_bytes,
        "counted_bytes": state.counted_bytes,
        **({} if duplicates is None else {"duplicates": duplicates.counts()}),
    }


def _open_output(
    folder: Path, state: State, tokenizer: Tokenizer, options: argparse.Namespace, size: int
) -> tuple[Output, State]:
    """Open the output, resuming an earlier process's files if they match their journal.

    Returns:
        The output and its state.
    """
    vocab_size = tokenizer.vocab_size

    def shuffle(place: Path, resume: ShuffleState | None) -> ShuffledDocuments:
        buckets, dtype = num_buckets(size), token_dtype(vocab_size)
        return ShuffledDocuments(place, tokenizer.bos_id, options.shuffle, buckets, dtype, resume)

    settings = (options.shard_tokens, vocab_size, None if options.shuffle is None else shuffle)
    try:
        output = Output(folder, state, *settings)
    except (OSError, UserError):
        if not state.tasks:
            raise
        state = State(settings=state.settings)
        output = Output(folder, state, *settings)
    if state.tasks:
        done = state.bytes_read / max(1, size)
        print(f"{folder}: resuming after {done:.0%} of the input", file=sys.stderr)
    return output, state


def _after(state: State, encoded: Encoded) -> State:
    """Return the state after one more task."""

    def sums(name: str) -> dict[Split, int]:
        before, more = getattr(state, name), getattr(encoded, name)
        return {split: before[split] + more[split] for split in SPLITS}

    return state.model_copy(
        update={
            "tasks": state.tasks + 1,
            "bytes_read": state.bytes_read + encoded.bytes_read,
            **{name: sums(name) for name in ("documents", "text_bytes", "counted_bytes")},
        }
    )


def _noted(state: State, output: Output) -> State:
    """Flush the output; return the state with the sizes of its files."""
    shards, shuffled = output.flushed()
    return state.model_copy(update={"shards": shards, "shuffled": shuffled})


def _find_duplicates(
    files: Sequence[InputFile], separator: bytes | None, encoder: Encoder, workers: int
) -> Duplicates:
    """Read all files once to find duplicate documents; print how many there are."""
    duplicates = Duplicates(any(file.is_split_by_text for file in files))
    digester = Digester(encoder.text_of, encoder.val_fraction)
    results = ordered_map(digester, tasks(files, separator, encoder.text_of), workers)
    with (
        contextlib.closing(results),
        tqdm(unit="MiB", desc="looking for duplicates", **_progress_pace()) as progress,
    ):
        for records in results:
            duplicates.add(records)
            progress.update()
    duplicates.find()
    if duplicates.total:
        print(duplicates, file=sys.stderr)
    return duplicates


def _progress_pace() -> dict[str, Any]:
    """Return how often to show progress: continuously in a terminal, once a minute in a log."""
    return {} if sys.stderr.isatty() else {"delay": _LOG_SECONDS, "mininterval": _LOG_SECONDS}


if __name__ == "__main__":
    sys.exit(main())
