"""Parameter groups: which optimizer updates which parameter (golden README section 4).

Four groups, in step order: ``tok`` (the token embedding), ``head`` (an untied output head),
``matrix`` (every 2-D matrix inside the blocks and the objective, and the embedding projections)
and ``scalar`` (scales, gains, mixes, skips). A parameter is assigned by its name and number of
dimensions only, so nothing here depends on the model's classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from jepa_dist.config import OptimConfig
from jepa_dist.errors import UserError

GroupName = Literal["tok", "head", "matrix", "scalar"]
STEP_ORDER: tuple[GroupName, ...] = ("tok", "head", "matrix", "scalar")

_CONTROLS = {"attn_scale", "mlp_scale", "resid_mix", "q_gain"}
_RULE = (
    "known are tok_emb.weight, lm_head.weight (only when untied), embed_proj.weight, "
    "head_proj.weight, skip_weights, skip_gates, the 2-D weights under override_mlps, and "
    "everything that is 1-D or 2-D under objective and under blocks "
    f"({', '.join(sorted(_CONTROLS))} are scalars)"
)


@dataclass(frozen=True)
class ParamGroup:
    """A group of parameters by name, and the hyperparameters they share.

    ``lr`` is the base rate (schedules multiply it), ``weight_decay`` is decoupled. ``betas`` and
    ``eps`` are Adam's, not used if ``kind`` is ``muon``.
    """

    name: GroupName
    kind: Literal["adamw", "muon"]
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    parameters: dict[str, Tensor]


def group_parameters(
    named_parameters: Iterable[tuple[str, Tensor]], config: OptimConfig, tied: bool
) -> list[ParamGroup]:
    """Sort every trainable parameter into exactly one group.

    Frozen parameters and empty ones (skips of a model without any) belong to none.

    Args:
        named_parameters: Names as in the golden files and the parameters (plain or DTensor);
            untied loop MLPs may live under ``override_mlps`` or inside their blocks.
        config: Rates, decays and the choice of optimizer for the matrices.
        tied: Whether the token embedding is also the output head.

    Returns:
        The non-empty groups, in step order; members in the order given.

    Raises:
        UserError: parameters that match no rule, or are given twice; all of them at once.
    """
    members: dict[GroupName, dict[str, Tensor]] = {name: {} for name in STEP_ORDER}
    owners: dict[int, str] = {}
    problems = []
    for name, parameter in named_parameters:
        if not parameter.requires_grad or parameter.numel() == 0:
            continue
        group = _group_of(name, parameter.ndim, tied)
        first = owners.setdefault(id(parameter), name)
        if group is None:
            problems.append(
                f"parameter {name} {list(parameter.shape)}: belongs to no group "
                f"(embeddings {'tied' if tied else 'untied'}); {_RULE}; rename it or extend "
                "jepa_dist/optim/groups.py"
            )
        elif first != name or name in members[group]:
            problems.append(
                f"parameter {name}: is trained twice (first as {first}); hand in every parameter "
                "once, under one name"
            )
        else:
            members[group][name] = parameter
    if problems:
        raise UserError(*problems)
    return [_build(name, config, tied, members[name]) for name in STEP_ORDER if members[name]]


def _group_of(name: str, ndim: int, tied: bool) -> GroupName | None:
    root, leaf = name.split(".", 1)[0], name.rsplit(".", 1)[-1]
    if name == "tok_emb.weight":
        return "tok"
    if name == "lm_head.weight" and not tied:
        return "head"
    # The reference leaves the projections out of every optimizer by mistake (golden section 4).
    if name in ("embed_proj.weight", "head_proj.weight"):
        return "matrix"
    if name in ("skip_weights", "skip_gates"):
        return "scalar"
    if root == "blocks" and (ndim == 1 or leaf in _CONTROLS):
        return "scalar"
    if root == "objective" and ndim == 1:
        return "scalar"
    if root in ("blocks", "override_mlps", "objective") and ndim == 2:
        return "matrix"
    return None


def _build(
    name: GroupName, config: OptimConfig, tied: bool, parameters: dict[str, Tensor]
) -> ParamGroup:
    lr, weight_decay = {
        "tok": (config.tied_embed_lr if tied else config.embed_lr, config.embed_wd),
        "head": (config.head_lr, 0.0),  # plain Adam: AdamW without decay
        "matrix": (config.matrix_lr, config.matrix_wd),
        "scalar": (config.scalar_lr, config.adam_wd),
    }[name]
    return ParamGroup(
        name=name,
        kind=config.matrix if name == "matrix" else "adamw",
        lr=lr,
        weight_decay=weight_decay,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        parameters=parameters,
    )
