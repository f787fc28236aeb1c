"""Train a byte-level BPE on the prepared text (``prepare --train-tokenizer``)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from jepa_dist.data.corpus import InputFile
from jepa_dist.data.documents import read_texts, tasks
from jepa_dist.data.record_files import TextOf
from jepa_dist.errors import UserError

BOS = "<|endoftext|>"
SAMPLE_BYTES = 1 << 27

# GPT-4's pattern: contractions, letters with a preceding character, up to three digits, marks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    files: Sequence[InputFile],
    separator: bytes | None,
    text_of: TextOf,
    val_fraction: float,
    vocab_size: int,
) -> bytes:
    """Return a ``tokenizer.json`` of at most ``vocab_size`` ids, trained on files.

    Large input is sampled: about ``SAMPLE_BYTES``, in pieces of about 1 MiB selected by a hash of
    their index, without validation text. The same input gives the same vocabulary.

    Args:
        files: Files to read.
        separator: Bytes between the documents of a text file (``documents.tasks``).
        text_of: Extracts the text of a record.
        val_fraction: Fraction of validation documents, if files do not determine the split.
        vocab_size: Number of ids, including the 256 bytes and the one that begins documents.

    Raises:
        UserError: the tokenizers package is missing, or bad input.
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "--train-tokenizer: needs the tokenizers package; pip install 'jepa_dist[hf]'"
        ) from None
    pre_tokenizers: Any = tokenizers.pre_tokenizers
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(_sample(files, separator, text_of, val_fraction), trainer)
    return model.to_str(pretty=False).encode()


def _sample(
    files: Sequence[InputFile], separator: bytes | None, text_of: TextOf, val_fraction: float
) -> Iterator[str]:
    share = SAMPLE_BYTES / max(1, sum(file.size for file in files))
    sampled = 0
    for index, task in enumerate(tasks(files, separator, text_of)):
        digest = hashlib.blake2b(b"sample %d" % index, digest_size=8).digest()
        # Compressed files hold more than their sizes say: sample less once there is enough.
        if int.from_bytes(digest, "little") >= share / 2 ** (sampled // SAMPLE_BYTES) * 2**64:
            continue
        for part in task:
            for text in read_texts(part, text_of, val_fraction):
                if text.split == "train":
                    sampled += len(text.data)
                    yield text.data.decode("utf-8", "ignore")
