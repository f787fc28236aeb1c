"""Continue a text with a trained model: ``jepa_dist generate RUN``.

The text, and nothing else, is written to standard output as it is generated, in UTF-8. The same
command writes the same text on the same machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jepa_dist.command_line import Parser, program
from jepa_dist.errors import UserError
from jepa_dist.files import MIB, read_bytes
from jepa_dist.inference.decoding import Sampling
from jepa_dist.inference.trained import TrainedModel, load
from jepa_dist.process.failure import exit_on_user_error
from jepa_dist.process.output import escape_controls

_INTERRUPTED = 130
_BROKEN_PIPE = 141
_PROMPT = "> "


def main(argv: Sequence[str] | None = None) -> int:
    """Write the continuation of a prompt, or of each input line; return the exit code."""
    with exit_on_user_error(rank=0):
        arguments = _parse_arguments(argv)
        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
        prompt = _prompt(arguments)
        trained = load(arguments.run, arguments.checkpoint, arguments.ema)
        trained.tokenizer  # noqa: B018 - raises for a missing tokenizer before anything is written
        try:
            if arguments.interactive:
                _converse(trained, arguments.max_tokens, sampling)
            else:
                _write([prompt])
                _write(trained.stream(prompt, arguments.max_tokens, sampling))
                _end_line()
        except BrokenPipeError:
            # The reader has exited. The interpreter would flush again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _BROKEN_PIPE
        except KeyboardInterrupt:
            _end_line()
            return _INTERRUPTED
    return 0


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=program("jepa_dist.inference"),
        description="Continue a text with a trained model, on this machine's GPU or CPU.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory, exported model, or one checkpoint")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="", metavar="TEXT", help="beginning of the text")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="read it from a file")
    source.add_argument(
        "--interactive",
        action="store_true",
        help="continue each line of standard input as a separate text",
    )
    add(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="maximum number of tokens to add; the text ends with the document (default 256)",
    )
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="logits are divided by it; 0 takes the most likely token (default 1)",
    )
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens only")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the fewest tokens whose probabilities sum up to P",
    )
    add("--seed", type=int, default=0, metavar="S", help="seed of the draws (default 0)")
    add("--ema", action="store_true", help="the averaged weights (optim.ema_decay)")
    add(
        "--checkpoint",
        type=int,
        metavar="STEP",
        help="weights of this step (default: the newest)",
    )
    arguments = parser.parse_args(argv)
    if arguments.max_tokens < 0:
        raise UserError(f"--max-tokens {arguments.max_tokens}: expected a number from 0")
    return arguments


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt_file is None:
        prompt: str = arguments.prompt
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UserError("--prompt: is not valid UTF-8 text")
        return prompt
    try:
        return read_bytes(arguments.prompt_file, MIB).decode()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{arguments.prompt_file}: cannot be read: {reason}") from None
    except UnicodeDecodeError:
        raise UserError(f"{arguments.prompt_file}: is not UTF-8 text") from None


def _converse(trained: TrainedModel, max_tokens: int, sampling: Sampling) -> None:
    """Continue each line of standard input; show a prompt sign and line ends on a terminal."""
    for line in _lines():
        _write(trained.stream(line, max_tokens, sampling))
        _write(["\n"])


def _lines() -> Iterator[str]:
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print(_PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        yield line.decode("utf-8", "replace").rstrip("\r\n")


def _write(pieces: Iterable[str]) -> None:
    """Write each piece immediately, in UTF-8 regardless of the locale; on a terminal without
    control characters."""
    is_terminal = sys.stdout.isatty()
    for piece in pieces:
        if piece:
            text = escape_controls(piece) if is_terminal else piece
            sys.stdout.buffer.write(text.encode())
            sys.stdout.buffer.flush()


def _end_line() -> None:
    """End the last line on a terminal; a file or a pipe gets only the text."""
    if sys.stdout.isatty():
        _write(["\n"])


if __name__ == "__main__":
    sys.exit(main())
