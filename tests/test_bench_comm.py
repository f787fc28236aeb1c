"""Communication of a step, counted on real ranks: equal to the formulas, with correct gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from jepa_dist.bench.comm import Setting, configured, count_steps, minimum, settings
from jepa_dist.config import Config
from jepa_dist.parallel.shard import fsdp_modules
from jepa_dist.parallel.world import start_world
from jepa_dist.plan import Planner, TrainingClock
from jepa_dist.training.assemble import build_trainer
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, write_corpus

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
SCALARS = 400  # bytes of the norm, the metrics and the plan's header, at most
# Eight blocks, four of them run three times; sizes that two ranks divide.
LOOPED = {"model__num_layers": 8, "model__loop_start": 3, "model__loop_end": 6}
EVEN = {"model__vocab_size": 64, "data__tokenizer": "null", "batch__sequences": 8}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def _count(rank: int, world_size: int, config: Config, wanted: dict[str, Setting]) -> Any:
    return count_steps(CPU, config, wanted)


@pytest.fixture(scope="module")
def config(corpus: Path) -> Config:
    return tiny_config(corpus, **LOOPED, **EVEN)


@pytest.fixture(scope="module")
def counted(config: Config) -> dict[str, Any]:
    wanted = settings(config)
    of_two = run_ranks(_count, 2, config, wanted, timeout=280)
    of_four = run_ranks(_count, 4, config, wanted, timeout=280)
    return of_two[0] | of_four[0]


def test_every_setting_is_at_its_minimum(counted: dict[str, Any], config: Config) -> None:
    assert counted.keys() == settings(config).keys()
    for name, setting in settings(config).items():
        must = minimum(configured(config, setting), setting.ranks, setting.phase, CPU)
        assert counted[name]["launches"] == {kind: m.launches for kind, m in must.items()}, name
        for kind, least in must.items():
            if kind == "all_to_all":
                continue  # differs between ranks; tests/test_bench.py adds them up
            sent = counted[name]["bytes"][kind]
            assert least.bytes <= sent <= 1.005 * least.bytes + SCALARS, (name, kind)


def test_counts_derived_by_hand(counted: dict[str, Any]) -> None:
    """Counted by hand for eight blocks and the root, independently of the formulas."""
    gathers = {name: c["launches"].get("all_gather", 0) for name, c in counted.items()}
    reductions = {name: c["launches"].get("reduce_scatter", 0) for name, c in counted.items()}
    assert gathers["plain"] == 16
    assert gathers["kept after forward"] == gathers["accumulation"] == 9
    assert gathers["accumulation, sharded"] == 4 * 16
    assert (gathers["looped"], gathers["looped, gathered again"]) == (12, 32)
    assert gathers["replication"] == 0
    assert reductions["accumulation, sharded"] == 4 * 9
    for name in ("plain", "accumulation", "looped", "Muon", "HSDP"):
        assert reductions[name] == 9, name
    assert counted["HSDP"]["launches"]["all_reduce"] == 9 + 2


def test_the_objective_adds_no_collective(counted: dict[str, Any]) -> None:
    plain = counted["plain"]
    for objective in ("JEPA", "next state"):
        assert counted[objective]["launches"] == plain["launches"]
    for kind in ("all_gather", "reduce_scatter"):
        assert counted["JEPA"]["bytes"][kind] == plain["bytes"][kind]
    assert counted["JEPA"]["launches"]["broadcast"] == 1  # the plan
    assert counted["JEPA"]["launches"]["all_reduce"] == 2  # the norm and the metrics


# ------------------------------------------------------------------ nothing is lost


def _gradients(rank: int, world_size: int, config: Config) -> dict[str, torch.Tensor]:
    """Return the full gradients of the first step, in float64 to compare them."""
    trainer = build_trainer(config, start_world(config.parallel))
    plan = Planner(config, TrainingClock()).plan(0)
    trainer.train_step.accumulate(trainer.segment.batches, plan)
    full = {}
    for name, parameter in trainer.state.model.named_parameters():
        assert isinstance(parameter.grad, DTensor), name
        full[name] = parameter.grad.full_tensor().double()
    return full


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="looped"),
        pytest.param({"model__untie_loop_mlps": True}, id="looped-untied"),
        pytest.param({"batch__micro": 1}, id="accumulation"),
        pytest.param({"batch__micro": 1, "parallel__accumulate": "sharded"}, id="sharded"),
    ],
)
def test_gradients_equal_a_single_process(corpus: Path, changes: dict[str, Any]) -> None:
    in_last_phase = {"train__enable_looping_at": 0.0, "train__loop_phase2_at": 0.0}
    settings = LOOPED | EVEN | in_last_phase | changes
    single = run_ranks(_gradients, 1, tiny_config(corpus, **settings | {"batch__micro": 8}))[0]
    for ours in run_ranks(_gradients, 2, tiny_config(corpus, **settings)):
        assert ours.keys() == single.keys()
        norm = sum(g.square().sum() for g in single.values()).sqrt()
        off = sum((ours[name] - g).square().sum() for name, g in single.items()).sqrt()
        assert off <= 5e-7 * norm


def _gathered_after_evaluation(rank: int, world_size: int, config: Config) -> list[bool]:
    trainer = build_trainer(config, start_world(config.parallel))
    state = trainer.state
    trainer.evaluation.validation.run(state.root, 0)
    before = [_is_sharded(module) for module in fsdp_modules(state.root)]
    state.schedule.release()
    after = [_is_sharded(module) for module in fsdp_modules(state.root)]
    return [any(before), all(after)]


def _is_sharded(module: torch.nn.Module) -> bool:
    return all(isinstance(parameter, DTensor) for parameter in module.parameters())


def test_evaluation_leaves_nothing_gathered(corpus: Path) -> None:
    """Otherwise the EMA would be evaluated with gathered live weights."""
    config = tiny_config(corpus, parallel__reshard_after_forward=False)
    assert run_ranks(_gathered_after_evaluation, 2, config) == [[False, True]] * 2
