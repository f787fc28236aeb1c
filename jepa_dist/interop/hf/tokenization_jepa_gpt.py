"""The SentencePiece tokenizer of a model trained with jepa_dist, for transformers
(``trust_remote_code=True``). Needs sentencepiece."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer


class JepaGPTTokenizer(PreTrainedTokenizer):
    """Encodes as SentencePiece itself does, with BOS before every text."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 - as transformers has it
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        import sentencepiece

        self.vocab_file = vocab_file
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        kwargs.setdefault("bos_token", self.pieces.id_to_piece(self.pieces.bos_id()))
        kwargs.setdefault("eos_token", kwargs["bos_token"])
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return int(self.pieces.get_piece_size())

    def get_vocab(self) -> dict[str, int]:
        """Return the pieces with their ids."""
        return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)}

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put BOS first."""
        return [self.pieces.bos_id(), *token_ids_0, *(token_ids_1 or [])]

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(self.pieces.encode(text, out_type=str))

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.pieces.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.pieces.id_to_piece(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of the pieces; control pieces have none."""
        return str(self.pieces.decode([self.pieces.piece_to_id(token) for token in tokens]))

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Copy the model file."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory) / f"{prefix}tokenizer.model"
        if path.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, path)
        return (str(path),)
