"""The quantized artifact: Hessians, the file, and the commands on one rank and on three."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import pytest
import torch
import torch.nn.functional as F
from safetensors import torch as safetensors_torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import jepa_dist
from jepa_dist.build import build_gpt
from jepa_dist.config import Config, QuantizationConfig
from jepa_dist.data.layout import BatchLayout
from jepa_dist.errors import UserError
from jepa_dist.evaluate.__main__ import main as evaluate_main
from jepa_dist.evaluate.quantized import evaluate_quantized, plan_quantization
from jepa_dist.evaluate.score import score
from jepa_dist.evaluate.settings import EVALUATION, QUANTIZED_EVALUATION
from jepa_dist.evaluate.weights import check_comparable, find_weights, load_model, load_weights
from jepa_dist.evaluate.windows import find_windows
from jepa_dist.inference.artifact_export import export_artifact, plan_artifact, values_of
from jepa_dist.inference.export import main as export_main
from jepa_dist.inference.stored import read_stored
from jepa_dist.interop.safetensors_io import Description
from jepa_dist.model.gpt import GPT
from jepa_dist.model.layers import MLP, Attention
from jepa_dist.monitor.evaluation_file import read_evaluation
from jepa_dist.parallel.world import start_world
from jepa_dist.quantize.artifact import (
    find_artifact,
    read_artifact,
    to_float16,
    write_artifact,
)
from jepa_dist.quantize.calibration import collect_hessians
from jepa_dist.quantize.gptq import QuantizedMatrix, quantize_matrix
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, write_corpus
from tests.support.trained_run import PHASE, noisy_model, save_export

OVERRIDES = ["quantization.float16_elements=600", "quantization.calibration_sequences=7"]


# ------------------------------------------------------------------ Hessians


class LinearInputs(TorchFunctionMode):
    """Records the inputs of every product with a weight, as the model computes them."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear:
            self.inputs.append(args[0])
        return func(*args, **(kwargs or {}))


def expected_hessians(model: GPT, tokens: Tensor, phase: int) -> dict[str, Tensor]:
    """Return Hessians by parameter name, summed over all rows, from a pass's products."""
    sums: dict[str, Tensor] = {}
    seen = LinearInputs()

    def add(name: str, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2).double()
        sums[name] = sums.get(name, 0) + flat.T @ flat

    def after(name: str, leaves: list[str]) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            first, second = seen.inputs[-2:]
            if isinstance(module, MLP):
                first = first * inputs[1]  # its norm is applied behind the product
            for leaf in leaves:
                add(f"{name}.{leaf}.weight", first)
            add(f"{name}.proj.weight", second)

        return hook

    handles = []
    for name, module in model.named_modules():
        leaves = {Attention: ["c_q", "c_k", "c_v"], MLP: ["fc"]}.get(type(module))
        if leaves:
            handles.append(module.register_forward_hook(after(name, leaves)))
    with seen:
        model(tokens, phase=phase)
    add("tok_emb.weight", seen.inputs[-1])
    add("head_proj.weight", seen.inputs[-2])
    add("embed_proj.weight", seen.inputs[0])
    for handle in handles:
        handle.remove()
    return sums


def hessians(rank: int, world_size: int, config: Config) -> dict[str, Tensor]:
    """Return a sharded model's Hessians: batches of 2, 2, 2 and 1 rows, uneven on three ranks."""
    world = start_world(config.parallel)
    stored = read_stored(Path(config.run.dir), None, "live")
    model, _ = build_gpt(config.model, config.parallel, world, values_of(stored))
    tokens = calibration_tokens(config)
    names = [name for name, _ in model.named_parameters()]
    found = collect_hessians(model, tokens.numpy(), names, phase=PHASE, micro=2, world=world)
    assert BatchLayout(4, 1, rank, world_size).num_micro == -(-4 // world_size)
    return found


def calibration_tokens(config: Config) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 61, (7, config.model.seq_len), generator=generator)


def test_hessians_of_all_ranks_are_those_of_the_inputs(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model__embedding_dim=24, model__untie_loop_mlps=True)
    model = noisy_model(config)
    save_export(Path(config.run.dir), 20, config, model)
    expected = expected_hessians(model, calibration_tokens(config), PHASE)
    for found in run_ranks(hessians, 3, config):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            error = (found[name] * 4 - value).abs().max() / value.abs().max()
            assert error < 1e-6, name


# ------------------------------------------------------------------ the file


def small_artifact(folder: Path) -> tuple[Path, dict[str, Any], Description]:
    config = tiny_config(folder)
    parameters: dict[str, Any] = {}
    for name, tensor in noisy_model(config).named_parameters():
        if tensor.dim() == 2 and tensor.numel() > 600:
            parameters[name] = quantize_matrix(
                tensor, torch.eye(tensor.size(1)), bits=4, clip_sigmas=3.0, hessian_clip_lambda=0.0
            )
        else:
            parameters[name] = to_float16(tensor)
    description = Description(step=20, phase=PHASE, weights="live", config=config)
    path = folder / "model.jepaq"
    assert write_artifact(path, parameters, description) == path.stat().st_size
    return path, parameters, description


def test_a_file_round_trips(tmp_path: Path) -> None:
    path, parameters, description = small_artifact(tmp_path)
    found = read_artifact(path)
    assert found.description == description
    assert found.parameters.keys() == parameters.keys()
    for name, stored in parameters.items():
        again = found.parameters[name]
        if isinstance(stored, QuantizedMatrix):
            assert isinstance(again, QuantizedMatrix)
            assert torch.equal(again.q_RC, stored.q_RC)
            assert torch.equal(again.scale_R, stored.scale_R)
            assert torch.equal(found.tensor(name), stored.dequantize())
        else:
            assert torch.equal(found.tensor(name), stored.float())


def test_damaged_files_are_refused_by_name_and_digest(tmp_path: Path) -> None:
    path, _, _ = small_artifact(tmp_path)
    whole = path.read_bytes()
    for place in (8, 40, 48, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.jepaq: damaged artifact: SHA-256 is .*, expe"):
            read_artifact(path)
    for length in (48, 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.jepaq: damaged artifact: SHA-256"):
            read_artifact(path)
    path.write_bytes(whole[:20])
    with pytest.raises(UserError, match="it ends after 20 bytes"):
        read_artifact(path)
    path.write_bytes(b"\x80\x04" + whole)
    with pytest.raises(UserError, match="is not a quantized artifact of this version"):
        read_artifact(path)
    with pytest.raises(UserError, match=r"none\.jepaq: cannot be read"):
        read_artifact(tmp_path / "none.jepaq")


def seal(path: Path, payload: bytes, size: int | None = None) -> None:
    """Write an artifact of these contents with a valid digest."""
    body = (len(payload) if size is None else size).to_bytes(8, "little")
    body += brotli.compress(payload, quality=1)
    path.write_bytes(b"JEPAQNT1" + hashlib.sha256(body).digest() + body)


def payload_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    found = read_artifact(path)
    tensors: dict[str, Tensor] = {}
    for name, stored in found.parameters.items():
        if isinstance(stored, QuantizedMatrix):
            tensors |= {f"q/{name}": stored.q_RC, f"scale/{name}": stored.scale_R}
        else:
            tensors[f"float16/{name}"] = stored
    return tensors, {"description": found.description.model_dump_json(by_alias=True)}


def test_crafted_contents_are_refused(tmp_path: Path) -> None:
    path, _, _ = small_artifact(tmp_path)
    tensors, metadata = payload_of(path)
    name = next(key for key in tensors if key.startswith("q/"))
    scale = name.replace("q/", "scale/")
    whole = safetensors_torch.save(tensors, metadata)
    crafted: list[tuple[bytes, int | None, str]] = [
        (whole, len(whole) - 1, "does not hold the"),
        (whole, len(whole) + 1, "does not hold the"),
        (whole, 2**60, "it claims to hold"),
        (bytes(2**26), 100, "does not hold the 100 bytes"),
        (b"\x80\x04nonsense", None, "does not hold a described model"),
        (safetensors_torch.save(tensors), None, "does not hold a described model"),
        (safetensors_torch.save(tensors, {"description": "{}"}), None, "not hold a described"),
    ]
    for changed, problem in (
        ({scale: None}, r"q/.*is no part"),
        ({name: None}, r"scale/.*is no part"),
        ({name: tensors[name].float()}, "is no part"),
        ({name: tensors[name][:, :-1].contiguous()}, r"shape .*, expected"),
        ({"float16/extra": torch.zeros(1).half()}, "extra: not in this model"),
        ({"other": torch.zeros(1)}, "other: .* is no part"),
    ):
        kept = {k: v for k, v in {**tensors, **changed}.items() if v is not None}
        crafted.append((safetensors_torch.save(kept, metadata), None, problem))
    for payload, size, problem in crafted:
        seal(path, payload, size)
        with pytest.raises(UserError, match=problem):
            read_artifact(path)


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(UserError, match=r"its largest magnitude is 7e\+04"):
        to_float16(torch.tensor([7e4]))


# ------------------------------------------------------------------ the commands


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("quantized")
    write_corpus(folder, val_tokens=500)
    config = tiny_config(folder)
    save_export(Path(config.run.dir), 20, config, noisy_model(config))
    return config


def export_and_evaluate(rank: int, world_size: int, config: Config, out: Path) -> list[float]:
    """Return losses before and after quantization to many and few bits, from artifacts and from
    ``evaluate --quantize``."""
    world = start_world(config.parallel)
    stored = read_stored(Path(config.run.dir), None, "live")
    few = ["quantization.matrix_bits=4"]
    for name, chosen in (("many", ["quantization.matrix_bits=8"]), ("few", few)):
        overrides = [*OVERRIDES, *chosen]
        line = export_artifact(plan_artifact(stored, overrides), out / name, world)
        assert "matrices quantized" in line
        assert "calibrated on 7 sequences" in line
    source = find_weights(Path(config.run.dir), "live")
    settings = EVALUATION.resolve(config, [])
    model = load_model(source, settings.parallel, world)
    (windows,) = find_windows(settings, None).values()
    losses = []
    for path in (Path(config.run.dir), out / "many/model.jepaq", out / "few/model.jepaq"):
        each = find_weights(path, "live")
        check_comparable(each, source)
        load_weights(each, model)
        found = score(model, windows, phase=PHASE, micro=2, bytes_of=None, world=world)
        losses.append(found.loss)
    config = QUANTIZED_EVALUATION.resolve(config, OVERRIDES)
    results = evaluate_quantized(plan_quantization([8, 4], config), source, config, None, world)
    return [*losses, *(one.loss for one in results), *(one.full_loss for one in results)]


@pytest.mark.slow
def test_one_rank_and_three_write_the_same_artifact(run: Config, tmp_path: Path) -> None:
    """Byte for byte, so their Hessians are equal, too."""
    (one,) = run_ranks(export_and_evaluate, 1, run, tmp_path / "one")
    three = run_ranks(export_and_evaluate, 3, run, tmp_path / "three")
    for name in ("many", "few"):
        files = [tmp_path / ranks / name / "model.jepaq" for ranks in ("one", "three")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert all(losses == pytest.approx(one, abs=2e-6) for losses in three)
    plain, many, few, *without_artifact = one
    assert without_artifact == pytest.approx([many, few, plain, plain], abs=1e-6)
    assert abs(many - plain) < 0.02 < abs(few - plain)
    artifact = read_artifact(tmp_path / "one/few/model.jepaq")
    matrix = artifact.parameters["blocks.0.mlp.fc.weight"]
    assert isinstance(matrix, QuantizedMatrix)
    assert 1 <= matrix.q_RC.abs().max() <= 7
    expected = QuantizationConfig(float16_elements=600, calibration_sequences=7, matrix_bits=4)
    assert artifact.description.config.quantization == expected


def test_the_command_evaluates_every_width(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [run.run.dir, "--json", str(tmp_path / "out.json")]
    evaluate_main([*arguments, "--quantize", "4", "6", "4", *OVERRIDES])
    evaluation = read_evaluation(tmp_path / "out.json")
    assert evaluation is not None
    assert (evaluation.step, evaluation.tasks) == (20, {})
    four, six = evaluation.quantized
    assert (four.settings.matrix_bits, four.settings.float16_elements) == (4, 600)
    assert four.full_loss == six.full_loss
    assert abs(six.loss - six.full_loss) < abs(four.loss - four.full_loss)
    gap = four.loss - four.full_loss
    bits = gap / math.log(2)  # a token is a byte
    assert evaluation.metrics()["quantized/4_bits/gap"] == pytest.approx(bits)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"full     {four.full_loss:.6f} nats per token, ")
    assert lines[1].startswith(f"4 bits   {four.loss:.6f} nats per token, ")
    assert lines[1].endswith(
        f"; gap {gap:+.6f} nats per token, {bits:+.6f} bits per byte; "
        f"{four.matrices} matrices quantized"
    )


def test_a_model_without_large_tensors_is_not_quantized(
    run: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate_main([run.run.dir, "--quantize", "4"])
    error = capsys.readouterr().err
    assert "quantization.float16_elements=65536: no tensor of this model has more" in error
    assert error.count("\n") == 1


def test_live_and_averaged_weights_are_distinguished(tmp_path: Path) -> None:
    path, _, _ = small_artifact(tmp_path)
    with pytest.raises(UserError, match="holds live weights, but ema weights were asked for"):
        find_weights(path, "ema")
    assert find_weights(path, None).description.weights == "live"


def test_an_artifact_can_be_loaded(run: Config, tmp_path: Path) -> None:
    path, _, _ = small_artifact(tmp_path)
    loaded = jepa_dist.load(path)
    assert (loaded.step, loaded.phase) == (20, PHASE)
    assert torch.equal(loaded.model.tok_emb.weight, read_artifact(path).tensor("tok_emb.weight"))


def test_a_folder_with_one_artifact_stands_for_it(tmp_path: Path) -> None:
    path, _, _ = small_artifact(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    inside = path.rename(folder / "model.jepaq")
    assert find_artifact(inside, "live") == find_artifact(folder, "live") == inside
    assert find_artifact(folder, "ema") is None
    (folder / "checkpoints").mkdir()
    assert find_artifact(folder, "live") is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["model.num_layers=3"], "model.num_layers=3: has no effect on a quantized artifact"),
        (["quantization.matrix_bits=9"], "quantization.matrix_bits=9"),
        (["--calibration-sequences", "0"], "quantization.calibration_sequences=0"),
        (["data.train=nowhere/*.bin"], "data.train"),
        (["--not-finite"], "weights that are not finite cannot be quantized"),
        (["--max-shard-size", "1GB"], "--max-shard-size: has an effect only with --format hf"),
        (["--format", "hf", "--max-shard-size", "1TB"], "expected a size such as 500MB or 4GB"),
        (["--format", "torch", "quantization.matrix_bits=4"], "only with --format artifact"),
    ],
)
def test_the_command_reports_user_errors(
    run: Config,
    tmp_path: Path,
    arguments: list[str],
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        export_main([run.run.dir, str(tmp_path), "--format", "artifact", *arguments])
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert problem in error
    assert error.count("\n") == 1
