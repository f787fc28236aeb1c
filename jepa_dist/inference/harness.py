"""A run as a model of lm-evaluation-harness (extra ``lm-eval``): scores by ``evaluate.passes``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from jepa_dist.data.tokenizer import Tokenizer
from jepa_dist.evaluate.passes import Passes, Request
from jepa_dist.inference.decoding import Sampling
from jepa_dist.inference.trained import TrainedModel

_MOST_NEW_TOKENS = 256

Pair = tuple[tuple[str, str], list[int], list[int]]


class RunLM(TemplateLM):
    """A trained model; every text begins a document, with BOS.

    Args:
        trained: From ``jepa_dist.load``.
    """

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        self._trained = trained
        self._tokenizer: Tokenizer = trained.tokenizer
        self._passes = Passes(trained.model, trained.config, trained.phase, trained.device)

    @property
    def eot_token_id(self) -> int:
        """BOS, which also ends the previous document."""
        return self._tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return BOS and the text's tokens; without BOS if ``add_special_tokens`` is False."""
        ids = self._tokenizer.encode(string.encode()).tolist()
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score([Request(context, target) for _, context, target in requests])

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return each text's log-likelihood, in windows of ``model.seq_len`` tokens.

        Only the last window overlaps the previous one, so that it has as much context as fits.
        """
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                self.eot_token_id,
                max_seq_len=self._trained.config.model.seq_len,
                context_len=1,
            )
            parts = [Request(*make_disjoint_window(window)) for window in windows]
            totals.append(sum(total for total, _ in self._score(parts)))
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each prompt, up to the first of its ``until``."""
        shown = tqdm(requests, desc="generating", disable=disable_tqdm or not sys.stderr.isatty())
        return [self._continue(*request.args) for request in shown]

    def _continue(self, prompt: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
        sampling = Sampling(temperature, options.get("top_k"), options.get("top_p"))
        text = ""
        count = int(options.get("max_gen_toks", _MOST_NEW_TOKENS))
        for piece in self._trained.stream(prompt, count, sampling):
            text += piece
            ends = [place for place in map(text.find, until) if place >= 0]
            if ends:
                return text[: min(ends)]
        return text

    def _score(self, requests: list[Request]) -> list[tuple[float, bool]]:
        found = self._passes.log_likelihoods(requests)
        return list(zip(found.total_N.tolist(), found.greedy_N.tolist(), strict=True))
