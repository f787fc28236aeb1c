"""Windows, the reference's bits per byte at any number of ranks, and the command."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jepa_dist.config import Config, ParallelConfig, load
from jepa_dist.data.check import load_checked_tokenizer
from jepa_dist.data.shards import write_shard
from jepa_dist.data.tokenizer import load_tokenizer
from jepa_dist.errors import UserError
from jepa_dist.evaluate import Validation
from jepa_dist.evaluate.score import score
from jepa_dist.evaluate.settings import EVALUATION
from jepa_dist.evaluate.stream import TokenStream
from jepa_dist.evaluate.weights import find_weights, load_model
from jepa_dist.evaluate.windows import Windows, find_windows
from jepa_dist.interop import parameter_golf
from jepa_dist.interop.safetensors_io import Description, write_export
from jepa_dist.model.gpt import Output
from jepa_dist.parallel.world import start_world
from jepa_dist.training.assemble import build_trainer
from tests.support.commands import Finished, run_command
from tests.support.forked import run_module
from tests.support.golden_cases import GOLDEN_DIR, Case, cases
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, write_corpus

EAGER = ParallelConfig(compile=False)


def write_shards(folder: Path, *counts: int) -> list[Path]:
    """Shards of the given sizes that hold 0, 1, 2, ... in sequence."""
    paths, start = [], 0
    for index, count in enumerate(counts):
        paths.append(folder / f"val_{index}.bin")
        write_shard(paths[-1], np.arange(start, start + count))
        start += count
    return paths


# ------------------------------------------------------------------ stream and windows


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 0), (0, 40), (9, 11), (10, 13), (12, 30), (39, 40)]
)
def test_the_stream_runs_through_all_shards(tmp_path: Path, start: int, stop: int) -> None:
    stream = TokenStream(write_shards(tmp_path, 10, 0, 3, 27), vocab_size=40)
    assert len(stream) == 40
    assert stream.read(start, stop).tolist() == list(range(start, stop))


def test_the_stream_refuses_foreign_ids(tmp_path: Path) -> None:
    stream = TokenStream(write_shards(tmp_path, 10, 10), vocab_size=15)
    with pytest.raises(UserError, match=r"val_1\.bin: holds token id 19"):
        stream.read(8, 20)


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("tokens", [9, 16, 17, 60])
def test_every_target_counts_once_with_enough_context(
    tmp_path: Path, tokens: int, stride: int
) -> None:
    stream = TokenStream(write_shards(tmp_path, 5, tokens - 5), vocab_size=100)
    windows = Windows(stream, seq_len=8, stride=stride)
    rows = windows.read(range(len(windows)), len(windows))
    scored = rows.tokens[:, 1:][rows.scored]
    assert scored.tolist() == list(range(1, (tokens - 1) // 8 * 8 + 1))
    assert windows.num_targets == len(scored)
    later = rows.scored[1:]
    assert not later[:, : 8 - stride].any()
    assert rows.scored.any(axis=1).all()


def test_windows_without_overlap_score_everything(tmp_path: Path) -> None:
    windows = Windows(TokenStream(write_shards(tmp_path, 60), 100), seq_len=8, stride=8)
    rows = windows.read(range(2, len(windows)), 9)
    assert not windows.overlap
    assert rows.scored.all(axis=1).tolist() == [True] * 5 + [False] * 4
    assert rows.tokens[0].tolist() == list(range(16, 25))


def test_sequences_limit_both_kinds_of_windows(tmp_path: Path) -> None:
    stream = TokenStream(write_shards(tmp_path, 60), 100)
    assert [Windows(stream, 8, stride, sequences=2).num_targets for stride in (8, 3)] == [16, 16]
    assert Windows(stream, 8, 8, sequences=99).num_targets == 56


def test_bad_windows_are_refused(tmp_path: Path) -> None:
    stream = TokenStream(write_shards(tmp_path, 4, 4), 100)
    with pytest.raises(UserError, match=r"its 8 tokens do not fill one window of 8 \+ 1 tokens"):
        Windows(stream, seq_len=8, stride=8)
    for stride in (0, 6):
        with pytest.raises(UserError, match=rf"stride {stride}: must be in 1\.\.5"):
            Windows(stream, seq_len=5, stride=stride)


# ------------------------------------------------------------------ the reference's numbers


def golden_export(case: Case, folder: Path) -> Path:
    """Export the case's model in this project's format."""
    config = Config(model=parameter_golf.model_config(case.info["settings"]))
    weights = parameter_golf.build(case.info["settings"], case.tensors("param/"))
    phase = case.info["run"]["loop_phase"]
    description = Description(step=None, phase=phase, weights="live", config=config)
    return write_export(folder, dict(weights.state_dict()), description)


def golden_windows(case: Case, stride: int) -> Windows:
    settings, files = case.info["settings"], case.info["files"]
    paths = [GOLDEN_DIR / name for name in files["shards_in_order"]]
    return Windows(TokenStream(paths, settings["vocab_size"]), settings["eval_seq_len"], stride)


def golden_scores(rank: int, world_size: int, case: Case, export: Path, micro: int) -> list[Any]:
    """Return both evaluations of a case, by a sharded model."""
    world, settings = start_world(EAGER), case.info["settings"]
    source = find_weights(export, "live")
    model = load_model(source, EAGER, world)
    tokenizer = load_tokenizer(str(GOLDEN_DIR / case.info["files"]["tokenizer"]))
    return [
        score(
            model,
            golden_windows(case, stride),
            phase=source.description.phase,
            micro=micro,
            bytes_of=tokenizer.byte_counter(settings["vocab_size"]),
            world=world,
        )
        for stride in (settings["eval_seq_len"], settings["eval_stride"])
    ]


@pytest.mark.parametrize("case", cases("bpb"))
@pytest.mark.parametrize(("world_size", "micro"), [(1, 32), (2, 5), (3, 4)])
def test_bits_per_byte_of_the_reference(
    case: Case, world_size: int, micro: int, tmp_path: Path
) -> None:
    export, golden = golden_export(case, tmp_path), case.arrays()
    for ours in run_ranks(golden_scores, world_size, case, export, micro):
        for name, result in zip(("eval_val", "sliding"), ours, strict=True):
            assert result.num_tokens == golden[f"{name}/token_count"]
            assert result.num_bytes == golden[f"{name}/byte_count"]
            assert abs(result.loss - golden[f"{name}/val_loss"]) <= 5e-6
            assert abs(result.bits_per_byte - golden[f"{name}/val_bpb"]) <= 5e-6


@pytest.mark.parametrize("case", cases("bpb"))
def test_windows_of_the_reference(case: Case) -> None:
    settings, counts, golden = case.info["settings"], case.info["counts"], case.arrays()
    whole = golden_windows(case, settings["eval_seq_len"])
    sliding = golden_windows(case, settings["eval_stride"])
    assert len(whole) == counts["eval_windows"]
    assert len(sliding) == counts["sliding_windows"]
    assert sliding.num_targets == len(golden["val_tokens"]) - 1
    targets = whole.read(range(len(whole)), len(whole)).tokens[:, 1:]
    assert np.array_equal(targets.ravel(), golden["val_tokens"][1:])


# ------------------------------------------------------------------ during and after training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A folder with a corpus, a run of 12 steps, and its last validation."""
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder)
    config = tiny_config(folder, optim__ema_decay=0.9)
    return folder, run_ranks(train_and_export, 1, config)[0]


def train_and_export(rank: int, world_size: int, config: Config) -> dict[str, float]:
    world = start_world(config.parallel)
    trainer = build_trainer(config, world)
    outcome = trainer.run()
    trainer.export(Path(config.run.dir), outcome)
    return {key: value for key, value in outcome.metrics.items() if key.startswith("val/")}


def evaluate(*arguments: Any, ranks: int = 1) -> Finished:
    if ranks == 1:
        return run_module("jepa_dist.evaluate", *arguments)
    torchrun = ("torch.distributed.run", "--rdzv-backend=loopback", f"--nproc-per-node={ranks}")
    return run_command(sys.executable, "-m", *torchrun, "-m", "jepa_dist.evaluate", *arguments)


def numbers(output: str) -> dict[str, float]:
    words = [line.split() for line in output.splitlines()]
    return {word[0]: float(word[1]) for word in words if word[0] in ("loss", "bpb", "tokens")}


def test_the_command_reproduces_the_last_validation(trained: tuple[Path, dict]) -> None:
    folder, validation = trained
    done = evaluate(folder / "run")
    assert done.code == 0, done.output
    assert "model.safetensors (live, step 12, phase 2)" in done.output
    result = numbers(done.output)
    assert result["loss"] == pytest.approx(validation["val/loss"], abs=1e-5)
    assert result["bpb"] == pytest.approx(validation["val/bpb"], abs=1e-5)
    assert result["tokens"] == 259 // 24 * 24


@pytest.mark.slow
def test_the_command_on_several_ranks(trained: tuple[Path, dict]) -> None:
    folder, validation = trained
    averaged = evaluate(folder / "run", "--ema")
    sliding = [
        evaluate(folder / "run", "--sliding", "--stride", 5, ranks=ranks) for ranks in (1, 3)
    ]
    for done in (averaged, *sliding):
        assert done.code == 0, done.output
    assert numbers(averaged.output)["bpb"] == pytest.approx(validation["val/ema_bpb"], abs=1e-5)
    one, three = (numbers(done.output) for done in sliding)
    assert three == pytest.approx(one, abs=2e-6)
    assert one["bpb"] < validation["val/bpb"]  # more context


def test_user_errors_are_printed_once_without_a_traceback(trained: tuple[Path, dict]) -> None:
    done = evaluate(trained[0] / "run", "data.tokenizer=nowhere.model")
    assert done.code == 2
    assert done.output.startswith("error: data.tokenizer: tokenizer 'nowhere.model': no such file")
    assert done.output.count("\n") == 1


def test_overrides_that_do_nothing_are_refused(trained: tuple[Path, dict]) -> None:
    config = find_weights(trained[0] / "run", "live").description.config
    with pytest.raises(UserError) as error:
        EVALUATION.resolve(config, ["train.steps=3", "model.seq_len=48", "batch.micro=2"])
    assert len(error.value.problems) == 2
    with pytest.raises(UserError, match=r"did you mean 'batch.micro'"):
        EVALUATION.resolve(config, ["batch.micros=2"])
    with pytest.raises(UserError, match="must be the world size 1"):
        EVALUATION.resolve(config, ["parallel.dp_replicate=2"])


def test_an_evaluation_need_not_have_the_ranks_of_the_run(trained: tuple[Path, dict]) -> None:
    config = find_weights(trained[0] / "run", "live").description.config
    parallel = config.parallel.model_copy(update={"dp_replicate": 4, "dp_shard": 2})
    resolved = EVALUATION.resolve(
        config.model_copy(update={"parallel": parallel}), ["batch.micro=3"]
    )
    assert resolved.model == config.model
    assert resolved.data.val == config.data.val
    assert (resolved.parallel.dp_replicate, resolved.batch.micro) == (1, 3)
    assert not resolved.parallel.compile


def test_a_foreign_tokenizer_or_too_little_text_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, 100)
    (tmp_path / "meta.json").write_text(
        json.dumps({"tokenizer": "sentencepiece 123", "vocab_size": 257, "shards": {}})
    )
    values = {"data": {"val": f"{tmp_path}/val_*.bin"}}
    config = Config.model_validate({**values, "model": {"vocab_size": 300, "seq_len": 100}})
    with pytest.raises(UserError) as error:
        load_checked_tokenizer(config, ("val",))
    assert "has 257 ids, but model.vocab_size=300" in error.value.problems[0]
    assert "vocab_size=257, but model.vocab_size=300" in error.value.problems[1]
    assert "'sentencepiece 123'" in error.value.problems[2]
    with pytest.raises(UserError, match=r"data\.val: its 100 tokens do not fill one window"):
        find_windows(config, stride=None)


def test_validation_limits_its_set_and_counts_its_windows(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, 40, 30)
    counts, windows = run_ranks(validate, 1, paths)[0]
    assert counts == {"all": 8, "some": 3}
    assert windows.tolist() == [list(range(8 * i, 8 * i + 9)) for i in range(8)]


def validate(rank: int, world_size: int, paths: list[Path]) -> tuple[Any, np.ndarray]:
    world, counter = start_world(EAGER), load_tokenizer("bytes").byte_counter()
    stream = TokenStream(paths, vocab_size=257)
    everything = Validation({"": stream}, 8, 0, 3, counter, world)
    some = Validation({"": stream}, 8, 3, 3, counter, world)
    return {"all": everything.num_sequences, "some": some.num_sequences}, everything.windows(99)


@dataclass
class Spy:
    """Replaces the model and records its arguments."""

    shapes: set[tuple[int, ...]]

    def __call__(self, *tensors: torch.Tensor, phase: int) -> Output:
        self.shapes.add(tuple(size for tensor in tensors for size in tensor.shape))
        return Output(loss_sum=tensors[2].sum())


def call_shapes(rank: int, world_size: int, paths: list[Path]) -> list[set[tuple[int, ...]]]:
    """(tokens, targets, weight) of all calls, without and with overlap."""
    world, seen = start_world(EAGER), []
    for stride in (8, 5):
        spy, windows = Spy(set()), Windows(TokenStream(paths, 257), seq_len=8, stride=stride)
        counter = load_tokenizer("bytes").byte_counter()
        score(spy, windows, phase=0, micro=3, bytes_of=counter, world=world)  # type: ignore[arg-type]
        seen.append(spy.shapes)
    return seen


def test_every_pass_has_the_shapes_of_training(tmp_path: Path) -> None:
    """So that graphs are reused: 8 windows on 3 ranks in rows of 3 are uneven."""
    for seen in run_ranks(call_shapes, 3, write_shards(tmp_path, 66)):
        assert seen == [{(3, 8, 3, 8, 3)}, {(3, 8, 3, 8, 3, 8)}]


def test_data_at_a_url_that_only_the_model_names_are_not_fetched() -> None:
    trained = load(None, ["data.val=https://stranger.example/val_0.bin"], {}).config
    with pytest.raises(UserError) as caught:
        EVALUATION.resolve(trained, [])
    (line,) = caught.value.problems
    assert line.startswith("data.val='https://stranger.example/val_0.bin': is a URL that the model")
    url = "data.val=s3://mine/val_*.bin"
    assert EVALUATION.resolve(trained, [url]).data.val == "s3://mine/val_*.bin"
