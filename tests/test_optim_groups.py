"""Parameter groups and schedules against the golden tables."""

from __future__ import annotations

import pytest
import torch

from jepa_dist.config import OptimConfig
from jepa_dist.errors import UserError
from jepa_dist.optim.groups import group_parameters
from jepa_dist.optim.schedule import jepa_weight, lr_multiplier, muon_momentum, next_phase
from tests.support.golden_cases import cases


def _config(settings: dict) -> OptimConfig:
    return OptimConfig(
        matrix="muon",
        matrix_lr=settings["matrix_lr"],
        matrix_wd=settings["muon_wd"],
        scalar_lr=settings["scalar_lr"],
        tied_embed_lr=settings["tied_embed_lr"],
        embed_lr=settings["embed_lr"],
        embed_wd=settings["embed_wd"],
        head_lr=settings["head_lr"],
        adam_wd=settings["adam_wd"],
        beta1=settings["beta1"],
        beta2=settings["beta2"],
        eps=settings["adam_eps"],
    )


def _parameter(shape: list[int]) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape))


def _forgotten_shape(name: str, settings: dict) -> list[int]:
    shape = [settings["model_dim"], settings["embedding_dim"]]
    return shape if name.startswith("embed") else shape[::-1]


@pytest.mark.parametrize("case", cases("optgroups"))
def test_groups_match_golden(case):
    for setting in case.info["cases"].values():
        settings = setting["settings"]
        shapes = {name: shape for g in setting["groups"] for name, shape in g["params"]}
        forgotten = {n: _forgotten_shape(n, settings) for n in setting["in_no_optimizer"]}
        named = [(name, _parameter(shape)) for name, shape in (shapes | forgotten).items()]
        groups = group_parameters(named, _config(settings), settings["tie_embeddings"])

        expected = [{"muon": "matrix"}.get(name, name) for name in setting["step_order"]]
        assert [group.name for group in groups] == expected
        for group, golden in zip(groups, setting["groups"], strict=True):
            members = dict(golden["params"]) | (forgotten if group.name == "matrix" else {})
            assert {n: list(p.shape) for n, p in group.parameters.items()} == members
            assert group.kind == ("muon" if golden["class"] == "Muon" else "adamw")
            assert group.lr == golden["lr"]
            assert group.weight_decay == golden["weight_decay"]
            if golden["class"] != "Muon":
                assert (list(group.betas), group.eps) == (golden["betas"], golden["eps"])


def test_untied_loop_mlps_may_live_inside_blocks():
    named = [("blocks.3.loop_mlps.1.fc.weight", _parameter([6, 4]))]
    (group,) = group_parameters(named, OptimConfig(), tied=True)
    assert (group.name, group.kind) == ("matrix", "adamw")


def test_frozen_and_empty_parameters_are_in_no_group():
    frozen = _parameter([4, 4]).requires_grad_(False)
    named = [("blocks.0.attn.c_q.weight", frozen), ("skip_weights", _parameter([0, 4]))]
    assert group_parameters(named, OptimConfig(), tied=True) == []


def test_all_bad_parameters_are_named_at_once():
    shared = _parameter([4])
    named = [
        ("predictor.weight", _parameter([2, 2])),
        ("blocks.0.conv.weight", _parameter([2, 2, 2])),
        ("lm_head.weight", _parameter([2, 2])),
        ("skip_weights", shared),
        ("skip_gates", shared),
    ]
    with pytest.raises(UserError) as error:
        group_parameters(named, OptimConfig(), tied=True)
    problems = error.value.problems
    assert len(problems) == 4
    for problem, name in zip(problems, ["predictor", "conv", "lm_head", "skip_gates"], strict=True):
        assert name in problem


@pytest.mark.parametrize("case", cases("schedules"))
def test_learning_rate_and_momentum_match_golden(case):
    arrays = case.arrays()
    for name, settings in case.info["lr"].items():
        found = [
            lr_multiplier(float(f), settings["warmdown_frac"], settings["min_lr"])
            for f in arrays[f"lr/{name}/frac"]
        ]
        assert found == pytest.approx(arrays[f"lr/{name}/mul"], abs=1e-12)
    for name, settings in case.info["momentum"].items():
        start, final = settings["muon_momentum_warmup_start"], settings["muon_momentum"]
        steps = settings["muon_momentum_warmup_steps"]
        found = [
            muon_momentum(int(s), start, final, steps) for s in arrays[f"momentum/{name}/step"]
        ]
        assert found == pytest.approx(arrays[f"momentum/{name}/value"], abs=1e-12)


@pytest.mark.parametrize("case", cases("schedules"))
def test_phases_match_golden(case):
    arrays = case.arrays()
    for name, settings in case.info["phase"].items():
        thresholds = [settings[k] for k in ("num_loops", "enable_looping_at", "loop_phase2_at")]
        phase, phases, scales = 0, [], []
        for frac in arrays[f"phase/{name}/frac"]:
            phase = next_phase(phase, float(frac), *thresholds)
            phases.append(phase)
            scales.append(lr_multiplier(float(frac), settings["warmdown_frac"], settings["min_lr"]))
        assert phases == arrays[f"phase/{name}/phase"].tolist()
        assert scales == pytest.approx(arrays[f"phase/{name}/lr_mul"], abs=1e-12)


def test_jepa_weight_starts_ramps_and_stays():
    assert jepa_weight(0.29, 0.1, 0.3, 0.2) == 0.0
    assert jepa_weight(0.3, 0.1, 0.3, 0.2) == 0.0
    assert jepa_weight(0.4, 0.1, 0.3, 0.2) == pytest.approx(0.05)
    assert jepa_weight(0.9, 0.1, 0.3, 0.2) == 0.1
    assert jepa_weight(0.3, 0.1, 0.3, 0.0) == 0.1
    assert jepa_weight(0.0, 0.1, 0.0, 0.0) == 0.1
