"""A trained model on one device: ``jepa_dist.load``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from jepa_dist.config import Config
from jepa_dist.data.check import load_checked_tokenizer
from jepa_dist.data.tokenizer import Tokenizer
from jepa_dist.errors import UserError
from jepa_dist.inference.decoding import Sampling, continue_ids
from jepa_dist.inference.stored import Stored, read_stored
from jepa_dist.inference.text_stream import TextStream
from jepa_dist.interop.verify import Signature, mismatches
from jepa_dist.model.gpt import GPT


class TrainedModel:
    """A model with its weights and its tokenizer.

    Nothing is compiled or sharded, and the weights keep their own dtype (float32).

    Attributes:
        model: The GPT itself: ``model(tokens_BT, phase=phase).logits_BTV``.
        config: Configuration of the run.
        phase: Recurrence phase that the weights were last trained in, and must be run in.
        step: Optimizer step of the weights; None if unknown.
        device: Where the model is.
    """

    def __init__(self, stored: Stored, device: torch.device) -> None:
        self.config: Config = stored.description.config
        self.phase = stored.description.phase
        self.step = stored.description.step
        self.device = device
        self.model = _build(stored).to(device)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run (``data.tokenizer``).

        Raises:
            UserError: the run had none, or its file is missing (relative paths are relative to the
                working directory).
        """
        tokenizer = load_checked_tokenizer(self.config, ())
        if tokenizer is None:
            raise UserError(
                "data.tokenizer=null: the run was trained on token ids of an unknown tokenizer, so "
                "text cannot be encoded or decoded; use model with token ids"
            )
        return tokenizer

    def generate(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str:
        """Return the prompt and its continuation; a function of the arguments only.

        Args:
            prompt: Start of a document; may be empty.
            max_tokens: Maximum number of tokens to add; the text ends with the document.
            temperature: Logits are divided by this before drawing; 0 takes the most likely token.
            top_k: Draw only from this many most likely tokens.
            top_p: Draw from the fewest tokens whose probabilities sum up to this.
            seed: Seed of the draws.

        Raises:
            UserError: a value out of range, or there is no tokenizer.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        return prompt + "".join(self.stream(prompt, max_tokens, sampling))

    def stream(self, prompt: str, max_tokens: int, sampling: Sampling) -> Iterator[str]:
        """Yield the continuation of ``prompt`` in pieces, as soon as they are complete.

        Raises:
            UserError: there is no tokenizer, or the prompt is not valid Unicode text.
        """
        tokenizer = self.tokenizer
        ids = self._encode(prompt)
        text = TextStream(tokenizer)
        text.add(*ids)
        text.finish()
        new = continue_ids(
            self.model,
            ids,
            max_tokens,
            phase=self.phase,
            sampling=sampling,
            device=self.device,
        )
        for index in new:
            if index == tokenizer.bos_id:
                break
            yield text.add(index)
        yield text.finish()

    @torch.no_grad()
    def loss(self, text: str) -> float:
        """Return the mean cross-entropy of a document's tokens, in nats per token.

        A text longer than ``model.seq_len`` is scored in windows that do not overlap, as
        ``jepa_dist evaluate`` does.

        Raises:
            UserError: the text is empty or not valid Unicode text, or there is no tokenizer.
        """
        ids = torch.tensor(self._encode(text))
        length, count = self.config.model.seq_len, len(ids) - 1
        if count == 0:
            raise UserError("text: is empty; expected at least one token to predict")
        total = 0.0
        for start in range(0, count, length):
            window = ids[start : start + length + 1].to(self.device)[None]
            weight = torch.ones(1, device=self.device)
            output = self.model(window[:, :-1], window[:, 1:], weight, phase=self.phase)
            assert output.loss_sum is not None
            total += output.loss_sum.item()
        return total / count

    @torch.no_grad()
    def states(self, text: str, layer: int = -1) -> Tensor:
        """Return the hidden states of a document: BOS and its tokens, [T, D] on the device.

        Args:
            text: The document.
            layer: Block whose output (at its last execution) to return; -1: the final state, which
                the head reads.

        Raises:
            UserError: no such layer, a text of more positions than ``model.seq_len``, or there is
                no tokenizer.
        """
        blocks, longest = self.config.model.num_layers, self.config.model.seq_len
        if not -1 <= layer < blocks:
            raise UserError(f"layer={layer}: expected -1 (the final state) to {blocks - 1}")
        ids = self._encode(text)
        if len(ids) > longest:
            raise UserError(
                f"text: has {len(ids)} tokens (with BOS), but the model was trained on "
                f"model.seq_len={longest}; cut the text"
            )
        tokens_BT = torch.tensor([ids], device=self.device)
        tap_BTD = self.model(tokens_BT, phase=self.phase, taps=(layer,)).taps[0]
        assert isinstance(tap_BTD, Tensor)
        return tap_BTD[0]

    def _encode(self, text: str) -> list[int]:
        """Return BOS and the tokens of ``text``."""
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise UserError("text: is not valid Unicode (lone surrogates)") from None
        tokenizer = self.tokenizer
        return [tokenizer.bos_id, *tokenizer.encode(data).tolist()]


def load(
    run: str | Path,
    step: int | None = None,
    ema: bool = False,
    device: str | torch.device | None = None,
) -> TrainedModel:
    """Load the model of a run: ``jepa_dist.load``, which documents arguments and errors."""
    stored = read_stored(Path(run).expanduser(), step, "ema" if ema else "live")
    for note in stored.notes:
        warnings.warn(note, stacklevel=3)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return TrainedModel(stored, torch.device(device))


def _build(stored: Stored) -> GPT:
    """Return the model with the stored tensors as its parameters."""
    with torch.device("meta"):
        config = stored.description.config
        model = GPT(config.model, config.data.bos_id)
    expected = {name: _signature(tensor) for name, tensor in model.named_parameters()}
    found = {name: _signature(tensor) for name, tensor in stored.tensors.items()}
    problems = mismatches(str(stored.path), expected, found)
    if problems:
        raise UserError(*problems)
    model.load_state_dict(dict(stored.tensors), assign=True)
    return model.requires_grad_(False).eval()


def _signature(tensor: Tensor) -> Signature:
    return Signature(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
