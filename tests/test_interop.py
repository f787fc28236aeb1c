"""Models in and out: safetensors with a JSON, and the challenge's final_model.pt."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from jepa_dist.build import build_gpt
from jepa_dist.config import Config, ParallelConfig
from jepa_dist.errors import UserError
from jepa_dist.evaluate.weights import find_weights, load_model
from jepa_dist.interop import parameter_golf
from jepa_dist.interop.safetensors_io import (
    Description,
    export_model,
    gather,
    publish,
    write_export,
)
from jepa_dist.model.gpt import GPT
from jepa_dist.model.init import initial_value
from jepa_dist.parallel.world import start_world
from tests.support.golden_cases import Case, cases
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config

EAGER = ParallelConfig(compile=False)


def zeros(name: str, shape: torch.Size, *, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, device=device)


def tiny_state(config: Config) -> dict[str, Tensor]:
    """Return the model's initial weights."""
    model = GPT(config.model)
    cpu = torch.device("cpu")
    return {
        name: initial_value(name, parameter.shape, config.model, 1, cpu)
        + torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        for name, parameter in model.named_parameters()
    }


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An export of the tiny model."""
    config = tiny_config(tmp_path)
    description = Description(step=7, phase=1, weights="live", config=config)
    write_export(tmp_path / "export", tiny_state(config), description)
    return tmp_path / "export"


# ------------------------------------------------------------------ safetensors


def test_an_export_describes_itself(exported: Path) -> None:
    source = find_weights(exported, "live")
    assert source.path == exported / "model.safetensors"
    assert (source.description.step, source.description.phase) == (7, 1)
    assert source.description.config.jepa.lambda_ == 0.1
    assert find_weights(source.path, "live") == source
    plain = json.loads((exported / "model.json").read_text())
    assert plain["config"]["jepa"]["lambda"] == 0.1
    assert plain["metadata"]["parameters"] == str(
        sum(t.numel() for t in load_file(source.path).values())
    )
    assert sorted(path.name for path in exported.iterdir()) == ["model.json", "model.safetensors"]


def reexport(rank: int, world_size: int, folder: Path, out: Path) -> dict[str, Any]:
    """Load an export into shards, write it again, and return how much this rank held."""
    world = start_world(EAGER)
    source = find_weights(folder, "live")
    model = load_model(source, EAGER, world)
    tokens = torch.zeros(1, 24, dtype=torch.int64)
    with torch.no_grad():
        model(tokens)  # leaves the root gathered: an export must not care
    export_model(out, model, source.description.config, 8, world, phase=2)
    held = 0
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        held += parameter.to_local().numel()
    return {"held": held, "kept": len(gather(model, keep=rank == 0))}


def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for name in ("a.safetensors", "a.json"):
            publish(tmp_path / name, lambda partial: save_file({"x": torch.ones(1)}, partial))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_exports_do_not_depend_on_the_ranks(exported: Path, tmp_path: Path) -> None:
    original = load_file(exported / "model.safetensors")
    source = exported
    for world_size in (3, 2, 1):
        out = tmp_path / f"of_{world_size}"
        ranks = run_ranks(reexport, world_size, source, out)
        copy = load_file(out / "model.safetensors")
        assert copy.keys() == original.keys()
        assert all(torch.equal(copy[name], original[name]) for name in original)
        assert sum(r["held"] for r in ranks) == sum(t.numel() for t in original.values())
        assert [r["kept"] for r in ranks] == [len(original)] + [0] * (world_size - 1)
        assert find_weights(out, "live").description.step == 8
        source = out


def test_bad_tensors_are_all_listed(exported: Path) -> None:
    path = exported / "model.safetensors"
    state = load_file(path)
    del state["skip_weights"], state["blocks.3.attn.q_gain"]
    state["blocks.9.mlp.fc.weight"] = torch.zeros(2)
    state["tok_emb.weight"] = torch.zeros(256, 32)
    state["blocks.0.mlp_scale"] = state["blocks.0.mlp_scale"].bfloat16()
    save_file(state, path)
    with pytest.raises(UserError) as error:
        find_weights(exported, "live")
    assert list(error.value.problems) == [
        f"{path}: skip_weights: missing",
        f"{path}: blocks.3.attn.q_gain: missing",
        f"{path}: blocks.9.mlp.fc.weight: not in this model",
        f"{path}: tok_emb.weight: shape (256, 32), expected (257, 32)",
        f"{path}: blocks.0.mlp_scale: dtype BF16, expected F32",
    ]


def test_incomplete_exports_are_refused(exported: Path) -> None:
    path, beside = exported / "model.safetensors", exported / "model.json"
    text, whole = beside.read_text(), path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(
        UserError, match=r"model\.safetensors: damaged: not a whole safetensors file"
    ):
        find_weights(exported, "live")
    path.write_bytes(whole)
    beside.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match=r"model\.json: format: Input should be 1"):
        find_weights(exported, "live")
    beside.write_text(text.replace('"num_heads": 4', '"num_heads": 5'))
    with pytest.raises(UserError, match=r"model\.json: config: model.num_heads=5"):
        find_weights(exported, "live")
    beside.unlink()
    with pytest.raises(UserError, match=r"model\.json: cannot be read .* incomplete"):
        find_weights(exported, "live")


def test_places_without_the_weights_asked_for_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no ema\.safetensors; a run with optim\.ema_decay"):
        find_weights(exported, "ema")
    with pytest.raises(UserError, match="holds live weights, but ema weights were asked for"):
        find_weights(exported / "model.safetensors", "ema")
    with pytest.raises(UserError, match="no such file or folder"):
        find_weights(tmp_path / "nowhere", "live")
    with pytest.raises(UserError, match=r"expected a \.safetensors file"):
        find_weights(exported / "model.json", "live")


def export_to(rank: int, world_size: int, folder: Path, config: Config) -> str:
    world = start_world(EAGER)
    try:
        export_model(
            folder, build_gpt(config.model, EAGER, world, zeros)[0], config, 1, world, phase=0
        )
    except UserError as error:
        return str(error)
    return ""


def test_a_folder_that_cannot_be_written_fails_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    messages = run_ranks(export_to, 2, tmp_path / "file", tiny_config(tmp_path))
    assert messages[0] == messages[1]
    assert "cannot be written" in messages[0]


# ------------------------------------------------------------------ final_model.pt


@pytest.mark.parametrize("case", [*cases("gpt"), *cases("bpb")])
def test_final_model_in_and_out_again(case: Case, tmp_path: Path) -> None:
    """Bit for bit, by the command line, for every kind of model."""
    state, folder = case.tensors("param/"), tmp_path / "ours"
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(case.info["settings"]))
    # As the script saves it: the embedding in bfloat16 (golden values are exact in it).
    torch.save({n: t.bfloat16() if "emb" in n else t for n, t in state.items()}, tmp_path / "a.pt")
    parameter_golf.main(
        ["import", f"{tmp_path}/a.pt", "--settings", str(settings), "--out", str(folder)]
    )
    source = find_weights(folder, "live")
    assert source.description.step is None
    assert source.description.phase == (2 if case.info["settings"]["num_loops"] else 0)
    parameter_golf.main(["export", str(folder), "--out", str(tmp_path / "final_model.pt")])
    again = parameter_golf.read_final_model(tmp_path / "final_model.pt")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    written = json.loads((tmp_path / "final_model.json").read_text())
    theirs = case.info["settings"]
    assert parameter_golf.model_config(written) == parameter_golf.model_config(theirs)


class Hostile:
    """A pickle that leaves a trace when it is executed."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_hostile_file_is_not_executed(tmp_path: Path, protocol: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "final_model.pt"
    content = {"tok_emb.weight": Hostile(trace)}
    if protocol == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="not a file of tensors alone, so it was not loaded"):
        parameter_golf.read_final_model(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if protocol == "torch" else pickle.loads(path.read_bytes())
    assert trace.exists()  # an unrestricted load executes it


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {3: torch.zeros(1)}, torch.zeros(2)])
def test_other_content_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "final_model.pt")
    with pytest.raises(UserError, match="holds something else than named tensors"):
        parameter_golf.read_final_model(tmp_path / "final_model.pt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"nonsense" * 9])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "final_model.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"final_model\.pt: not a file of tensors alone"):
        parameter_golf.read_final_model(tmp_path / "final_model.pt")


def test_prefixes_of_wrappers_are_removed(tmp_path: Path) -> None:
    names = ["module._orig_mod.blocks.0.attn.w", "_orig_mod.tok.w", "blocks.1._orig_mod.mlp.w"]
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "final_model.pt")
    state = parameter_golf.read_final_model(tmp_path / "final_model.pt")
    assert list(state) == ["blocks.0.attn.w", "tok.w", "blocks.1.mlp.w"]


def test_bad_states_and_settings_are_all_listed() -> None:
    case: Case = cases("gpt")[0].values[0]
    settings, state = case.info["settings"], case.tensors("param/")
    del state["skip_gates"]
    state["extra"] = torch.zeros(1)
    state["tok_emb.weight"] = state["tok_emb.weight"].T
    state["blocks.0.attn_scale"] = state["blocks.0.attn_scale"].int()
    with pytest.raises(UserError) as error:
        parameter_golf.build(settings, state)
    shown = "\n".join(error.value.problems)
    for part in (
        "skip_gates: missing",
        "extra: not in this model",
        "tok_emb.weight: shape",
        "blocks.0.attn_scale: dtype torch.int32",
    ):
        assert part in shown
    assert len(error.value.problems) == 4
    with pytest.raises(UserError, match="missing train_seq_len, num_layers"):
        parameter_golf.model_config(
            {k: v for k, v in settings.items() if k not in ("train_seq_len", "num_layers")}
        )
    with pytest.raises(UserError) as error:
        parameter_golf.model_config(settings | {"num_heads": "4", "train_seq_len": 0})
    assert len(error.value.problems) == 2
    with pytest.raises(UserError, match="must divide"):
        parameter_golf.model_config(settings | {"num_heads": 7})


def test_settings_without_effect_in_the_script_are_ignored() -> None:
    settings = cases("gpt")[0].values[0].info["settings"] | {"num_loops": 0}
    idle = settings | {"untie_loop_mlps": True, "parallel_residual_start": 99}
    off = settings | {"untie_loop_mlps": False, "parallel_residual_start": -1}
    assert parameter_golf.model_config(idle) == parameter_golf.model_config(off)


def test_models_that_the_script_cannot_hold_are_not_exported(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, model__x0_mix=False, model__logit_softcap=0, model__qk_gain_init="null"
    )
    with pytest.raises(UserError) as error:
        parameter_golf.settings_of(config.model)
    assert len(error.value.problems) == 3
