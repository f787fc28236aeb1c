"""Exponential moving average of the parameter shards, in float32, without any communication."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from jepa_dist.optim.local_shards import local


class EMA:
    """average <- decay * average + (1 - decay) * parameter, per shard.

    Starts as a copy of the parameters; no bias correction (golden README section 4). Under FSDP2
    construct it after sharding, and call it while parameters are sharded (``model.reshard()``).

    Args:
        named_parameters: All parameters of the model, float32, plain or DTensors.
        decay: Weight of the past, in [0, 1].

    Raises:
        ValueError: a parameter that is not float32, which ``swap`` could not restore exactly.
    """

    is_on = True

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self._decay = decay
        self._parameters = dict(named_parameters)
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"parameter {name}: is {parameter.dtype}; the EMA averages float32 master "
                    "weights (cast in forward, not in the parameters)"
                )
        self._averages = {n: p.detach().clone() for n, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current parameters; call once per optimizer step."""
        averages, parameters = self._shards()
        torch._foreach_lerp_(averages, parameters, 1 - self._decay)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Put the average into the model inside this context, and restore its values afterwards.

        Values are exchanged in place, tensor by tensor (memory for the largest shard, no copy of
        the model), bit for bit, and restored after an exception, too. Do not train, ``update`` or
        save inside. Reshard before and after: FSDP2 may still hold gathered copies of the other
        values.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the averages, keyed ``ema/NAME``, placed like their parameters.

        These are the live tensors: to resume, write into them.
        """
        return {f"ema/{name}": average for name, average in self._averages.items()}

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, parameter in zip(*self._shards(), strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def _shards(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return this rank's non-empty shards of averages and parameters, in the same order."""
        averages = [local(average) for average in self._averages.values()]
        parameters = [local(parameter) for parameter in self._parameters.values()]
        filled = [index for index, shard in enumerate(parameters) if shard.numel()]
        return [averages[i] for i in filled], [parameters[i] for i in filled]


class NoEMA(EMA):
    """The absence of an average: nothing to update, save or swap."""

    is_on = False

    def __init__(self) -> None:
        super().__init__((), decay=0.0)

    def update(self) -> None:
        """Do nothing."""
