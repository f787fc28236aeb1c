"""Expected figures of ``bench gpu`` on known cards, as ranges.

``measured``: on one card with torch 2.11 and CUDA 13.0, widened by the variation between runs
(about 7 % on the worse side). ``predicted``: from the bytes and operations of the compiled step and
the card's data sheet; not measured yet. A value on the better side of a range is not a problem.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """A range and its better side."""

    low: float
    high: float
    is_more_better: bool

    def verdict(self, value: float) -> str:
        """Return ``ok``, ``better`` or ``OFF``; not a number is OFF."""
        if self.low <= value <= self.high:
            return "ok"
        is_better = value > self.high if self.is_more_better else value < self.low
        return "better" if is_better else "OFF"


def _more(low: float, high: float) -> Expected:
    return Expected(low, high, is_more_better=True)


def _less(low: float, high: float) -> Expected:
    return Expected(low, high, is_more_better=False)


@dataclass(frozen=True)
class Card:
    """Expected figures of a device, by ``PART [CONFIGURATION]: FIGURE``."""

    source: str
    """``measured`` or ``predicted``."""
    figures: dict[str, Expected]


def _of_jepa(config: str) -> dict[str, Expected]:
    """Return the objective's share of a step, the same on every card; rounds differ by 3 %."""
    return {
        f"jepa {config}: absent / off, time ratio": _less(0.96, 1.03),
        f"jepa {config}: on / off, time ratio": _less(0.97, 1.03),
    }


# One device each. Names are those of torch.cuda.get_device_name.
CARDS: dict[str, Card] = {
    "NVIDIA H200": Card(
        "measured",
        {
            "launches: add_ us": _less(2, 14),
            "copies: copy GB/s": _more(3900, 4500),
            "copies: compiled kernel GB/s": _more(3850, 4450),
            "copies: to page-locked memory GB/s": _more(45, 64),
            "attention gpt_36m: cudnn, forward TFLOP/s": _more(370, 440),
            "attention gpt_36m: cudnn, forward and backward TFLOP/s": _more(310, 370),
            "attention gpt_36m: flash, forward TFLOP/s": _more(245, 300),
            "attention gpt_36m: flash, forward and backward TFLOP/s": _more(200, 245),
            "attention gpt_1b: cudnn, forward TFLOP/s": _more(480, 570),
            "attention gpt_1b: cudnn, forward and backward TFLOP/s": _more(390, 460),
            "attention gpt_1b: flash, forward TFLOP/s": _more(260, 310),
            "attention gpt_1b: flash, forward and backward TFLOP/s": _more(220, 265),
            "matrices gpt_36m: block, all products TFLOP/s": _more(630, 740),
            "matrices gpt_36m: block, slowest product TFLOP/s": _more(430, 600),
            "matrices gpt_36m: head TFLOP/s": _more(640, 760),
            "matrices gpt_1b: block, all products TFLOP/s": _more(680, 790),
            "matrices gpt_1b: block, slowest product TFLOP/s": _more(570, 720),
            "matrices gpt_1b: head TFLOP/s": _more(610, 730),
            "newton_schulz gpt_36m: all matrices ms": _less(1.2, 2.8),
            "newton_schulz gpt_1b: all matrices ms": _less(70, 98),
            "step gpt_36m: tokens/s": _more(1.0e6, 1.3e6),
            "step gpt_36m: MFU of step %": _more(36, 46),
            "step gpt_36m: MFU of forward and backward %": _more(37, 48),
            "step gpt_36m: host ms": _less(20, 120),
            "step gpt_36m: optimizer ms": _less(1.5, 5.0),
            "step gpt_36m: peak memory GiB": _less(15, 25),
            "step gpt_1b: tokens/s": _more(51_000, 64_000),
            "step gpt_1b: MFU of step %": _more(37.5, 48),
            "step gpt_1b: MFU of forward and backward %": _more(50, 62),
            "step gpt_1b: optimizer ms": _less(70, 145),
            "step gpt_1b: peak memory GiB": _less(35, 46),
            **_of_jepa("gpt_36m"),
            **_of_jepa("gpt_1b"),
            "checkpoint gpt_36m: stall of the first save ms": _less(30, 400),
            "checkpoint gpt_36m: stall of the second save ms": _less(5, 80),
        },
    ),
    "NVIDIA H100 80GB HBM3": Card(
        "predicted",
        {
            "launches: add_ us": _less(2, 14),
            "copies: copy GB/s": _more(2400, 3000),
            "copies: compiled kernel GB/s": _more(2400, 3000),
            "copies: to page-locked memory GB/s": _more(45, 64),
            "attention gpt_36m: cudnn, forward TFLOP/s": _more(340, 440),
            "attention gpt_1b: cudnn, forward TFLOP/s": _more(440, 570),
            "matrices gpt_36m: block, all products TFLOP/s": _more(520, 740),
            "matrices gpt_1b: block, all products TFLOP/s": _more(640, 790),
            "newton_schulz gpt_36m: all matrices ms": _less(1.2, 3.0),
            "newton_schulz gpt_1b: all matrices ms": _less(70, 110),
            "step gpt_36m: tokens/s": _more(0.88e6, 1.1e6),
            "step gpt_36m: MFU of step %": _more(31, 40),
            "step gpt_36m: optimizer ms": _less(1.5, 6.0),
            "step gpt_36m: peak memory GiB": _less(15, 25),
            "step gpt_1b: tokens/s": _more(48_000, 62_000),
            "step gpt_1b: MFU of forward and backward %": _more(47, 58),
            "step gpt_1b: optimizer ms": _less(70, 150),
            "step gpt_1b: peak memory GiB": _less(25, 45),
            **_of_jepa("gpt_36m"),
            **_of_jepa("gpt_1b"),
            "checkpoint gpt_36m: stall of the second save ms": _less(5, 100),
        },
    ),
}
