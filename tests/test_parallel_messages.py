"""Values that ranks send each other: JSON, bounded, and errors that name the rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jepa_dist.parallel import messages
from jepa_dist.parallel.messages import broadcast_json, gather_json
from tests.support.ranks import run_ranks

VALUES = [{"a": [1, 2.5, None, True]}, "\N{SNOWMAN} \udc80", [], {"": ["x" * 10_000]}]


def error_of(fn: Any) -> str:
    with pytest.raises((RuntimeError, TypeError)) as caught:
        fn()
    return str(caught.value)


def exchange(rank: int, world_size: int) -> list[Any]:
    group = dist.group.WORLD
    assert group is not None
    results: list[Any] = [
        gather_json(VALUES[rank], group),
        broadcast_json(VALUES[rank], group),
        gather_json((rank, 1 / 3), group),
        math.isnan(broadcast_json(math.nan, group)),
    ]
    messages.MOST_BYTES = 100
    results.append(error_of(lambda: gather_json("x" * (99 * (rank == 1)), group)))
    results.append(error_of(lambda: broadcast_json("x" * 99, group)))
    return results


def test_every_rank_gets_the_same() -> None:
    for gathered, sent, tuples, is_nan, long, long_sent in run_ranks(exchange, 2):
        assert gathered == VALUES[:2]
        assert sent == VALUES[0]
        assert tuples == [[0, 1 / 3], [1, 1 / 3]]
        assert is_nan
        assert long == "messages between ranks: rank 1 sends 101 bytes; expected 1 to 100"
        assert long_sent == "messages between ranks: rank 0 sends 101 bytes; expected 1 to 100"


@pytest.mark.parametrize("octets", [b"cos\nsystem\n.", b"\xff\xfe", b"[" * 100_000])
def test_values_that_are_not_json_name_their_rank(octets: bytes) -> None:
    with pytest.raises(RuntimeError, match=r"^messages between ranks: rank 3 sent no JSON: "):
        messages._decode(torch.frombuffer(bytearray(octets), dtype=torch.uint8), 3)
