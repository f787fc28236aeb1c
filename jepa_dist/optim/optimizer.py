"""The optimizer of a run: one step over all groups, one flat dictionary of state."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from jepa_dist.optim.adamw import AdamW
from jepa_dist.optim.groups import GroupName, ParamGroup
from jepa_dist.optim.muon import Muon, MuonSettings


class Optimizer:
    """Optimizer of all groups, in the order given, at the rates and momentum last scheduled.

    Construct it after sharding, on every rank. Before the first ``set_schedule`` it uses the base
    rates.

    Args:
        groups: From ``group_parameters``.
        muon: Settings of the groups of kind ``muon``.
    """

    def __init__(self, groups: Iterable[ParamGroup], muon: MuonSettings) -> None:
        self._groups = list(groups)
        self._members: dict[GroupName, AdamW | Muon] = {
            group.name: _build(group, muon) for group in self._groups
        }

    def set_schedule(self, lr_multiplier: float, momentum: float) -> None:
        """Scale all base rates (and with them all decays) and set Muon's momentum; host only."""
        for group in self._groups:
            member = self._members[group.name]
            for settings in member.param_groups:
                settings["lr"] = group.lr * lr_multiplier
                if isinstance(member, Muon):
                    settings["momentum"] = momentum

    def step(self, skip: Tensor | None = None) -> None:
        """Update all parameters in place. Collective if a group is optimized by Muon.

        Args:
            skip: 0-dim float32 on the parameters' device, the same on every rank: 1 leaves
                parameters and state unchanged, whatever the gradients are; 0 or None updates. Not
                read by the host.
        """
        for member in self._members.values():
            member.step(skip)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for member in self._members.values():
            member.zero_grad(set_to_none=True)

    def parameters(self) -> dict[str, list[Tensor]]:
        """Return all optimized parameters, by group name."""
        return {group.name: list(group.parameters.values()) for group in self._groups}

    def learning_rates(self) -> dict[str, float]:
        """Return the current rate of each group, by group name."""
        return {name: member.param_groups[0]["lr"] for name, member in self._members.items()}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the whole state, keyed ``kind/parameter name``; complete from the start.

        These are the live tensors: to resume, write into them (torch.distributed.checkpoint loads
        in place). Moments and momenta are DTensors placed like their parameter, so they reshard;
        ``adam_step`` is a 0-dim float32 tensor with the same value on every rank.
        """
        return {
            f"{kind}/{name}": tensor
            for group in self._groups
            for name, parameter in group.parameters.items()
            for kind, tensor in self._members[group.name].state[parameter].items()
        }


def _build(group: ParamGroup, muon: MuonSettings) -> AdamW | Muon:
    members: list[tuple[str, Tensor]] = list(group.parameters.items())
    if group.kind == "muon":
        return Muon(members, group.lr, group.weight_decay, muon)
    return AdamW(members, group.lr, group.weight_decay, group.betas, group.eps)
