"""Training from the weights of another run (train.init_from)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import jepa_dist
from jepa_dist.config import Config
from jepa_dist.errors import UserError
from jepa_dist.evaluate.weights import find_initial
from jepa_dist.evaluate.windows import find_windows
from jepa_dist.inference.export import main as export_main
from jepa_dist.interop.safetensors_io import gather
from jepa_dist.parallel.world import start_world
from jepa_dist.training.assemble import build_trainer
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, write_corpus
from tests.support.trained_run import noisy_model, save_export

# A model that the challenge's script supports, and an EMA that begins at the initial weights.
SETTINGS = {"optim__ema_decay": 0.9, "eval__sequences": 4}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    write_corpus(folder)
    config = tiny_config(folder, **SETTINGS)
    save_export(folder / "run", 20, config, noisy_model(config))
    save_export(folder / "run", 20, config, noisy_model(config, 2), weights="ema")
    for kind in ("hf", "parameter_golf"):
        export_main([str(folder / "run"), str(folder / kind), "--format", kind])
    return {
        "run": folder / "run",
        "average": folder / "run/ema.safetensors",
        "hf": folder / "hf",
        "final_model": folder / "parameter_golf/final_model.pt",
    }


def start(
    rank: int, world_size: int, configs: list[Config]
) -> list[tuple[dict[str, Tensor], dict[str, Tensor], float | None]]:
    """Weights, average and first validation loss (phase 0) of new runs."""
    results = []
    world = start_world(configs[0].parallel)
    for config in configs:
        trainer = build_trainer(config, world)
        weights = gather(trainer.state.model, keep=True)
        with trainer.state.ema.swap():
            average = gather(trainer.state.model, keep=True)
        found = trainer.evaluation.validation.run(trainer.state.root, 0)
        results.append((weights, average, found["val/loss"]))
    return results


def test_a_run_starts_from_the_weights_of_every_kind_of_source(sources: dict[str, Path]) -> None:
    """With another optimizer, objective and batch; the first loss is that of the source."""
    folder = sources["run"].parent
    changes = {**SETTINGS, "jepa__lambda": 0, "optim__matrix_lr": 0.01, "batch__sequences": 4}
    configs = [
        tiny_config(folder, train__init_from=path, run__dir=folder / f"new_{name}", **changes)
        for name, path in sources.items()
    ]
    (results,) = run_ranks(start, 1, configs)
    (windows,) = find_windows(configs[0], None).values()
    tokens = torch.from_numpy(windows.read(range(len(windows)), len(windows)).tokens)
    for (name, path), (weights, average, loss) in zip(sources.items(), results, strict=True):
        origin = path if name == "average" else sources["run"]
        trained = jepa_dist.load(origin, ema=name == "average")
        expected = dict(trained.model.named_parameters())
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[n], expected[n]) for n in expected), name
        assert all(torch.equal(average[n], expected[n]) for n in expected), name
        logits = trained.model(tokens[:, :-1]).logits_BTV
        nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert loss == pytest.approx(nll.item(), rel=1e-5)


def test_another_architecture_is_refused_in_one_line(sources: dict[str, Path]) -> None:
    folder = sources["run"].parent
    other = tiny_config(folder, model__num_layers=5, model__logit_softcap=20)
    for name in ("run", "hf"):
        with pytest.raises(UserError) as error:
            find_initial(sources[name], other)
        (line,) = error.value.problems
        assert line == (
            f"train.init_from={sources[name]}: another architecture: model.num_layers is 4 there "
            "and 5 here; model.logit_softcap is 30.0 there and 20.0 here"
        )
    with pytest.raises(UserError, match=r"blocks\.4\.attn\.c_q\.weight: missing"):
        find_initial(sources["final_model"], other)
    with pytest.raises(UserError, match="no such file or folder"):
        find_initial(folder / "nowhere", other)


def test_initial_values_are_not_part_of_the_architecture(sources: dict[str, Path]) -> None:
    config = tiny_config(
        sources["run"].parent, model__qk_gain_init=2, model__tied_embed_init_std=0.1
    )
    assert find_initial(sources["run"], config).path.name == "model.safetensors"
