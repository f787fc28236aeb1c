"""The adapter for lm-evaluation-harness: the harness reproduces our own scorer's numbers.

Needs the extra ``lm-eval``, which is not part of ``dev``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import jepa_dist
from jepa_dist.inference import lm_eval_command
from jepa_dist.inference.trained import TrainedModel
from tests.support.tiny import tiny_config
from tests.support.trained_run import noisy_model, save_export

WORDS = ("tide", "moon", "reef", "salt", "heron", "kelp", "gull", "wave")


def write_task(folder: Path, count: int) -> Path:
    """Write a task file and its description for the harness; return the file."""
    generator = np.random.Generator(np.random.PCG64(1))
    items = []
    for number in range(count):
        context = " ".join(generator.choice(WORDS, 1 + number % 8))
        choices = [f" {word}" * (1 + n % 2) for n, word in enumerate(generator.choice(WORDS, 3))]
        answer = int(generator.integers(3))
        items.append({"context": context, "choices": choices, "answer": answer})
    file = folder / "tide.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        **{"task": "tide", "dataset_path": "json", "test_split": "test"},
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        **{"output_type": "multiple_choice", "doc_to_text": "context", "target_delimiter": ""},
        **{"doc_to_choice": "choices", "doc_to_target": "answer"},
        "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}],
    }
    (folder / "tide.yaml").write_text(yaml.safe_dump(task))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder, model__seq_len=64)
    save_export(folder, 20, config, noisy_model(config))
    return folder


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedModel:
    return jepa_dist.load(run, device="cpu")


def test_without_the_extra(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert lm_eval_command.main([str(run), "--tasks", "tide"]) == 2
    assert "pip install 'jepa_dist[lm-eval]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_harness_finds_the_numbers_of_our_own_scorer(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the run, and by the harness's own class for transformers from the exported folder."""
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    from lm_eval.api.instance import Instance

    from jepa_dist.evaluate.__main__ import main
    from jepa_dist.inference.export import main as export

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    file = write_task(tmp_path, 16)
    names = {"own": "own.json", "items": "items.jsonl", "harness": "harness.json"}
    out = {name: tmp_path / file_name for name, file_name in names.items()}
    main(
        [str(run), "--tasks", str(file), "--json", str(out["own"]), "--per-item", str(out["items"])]
    )
    own = json.loads(out["own"].read_text())["tasks"]["tide"]
    harness = ["--tasks", "tide", "--include", str(tmp_path), "--json", str(out["harness"])]
    assert lm_eval_command.main([str(run), *harness]) == 0
    found = json.loads(out["harness"].read_text())["tide"]
    assert found["acc,none"] == pytest.approx(own["accuracy"])
    assert found["acc_bytes,none"] == pytest.approx(own["accuracy_per_byte"])

    pytest.importorskip("accelerate", reason="the harness needs it for transformers")
    from lm_eval.models.huggingface import HFLM

    assert export([str(run), str(tmp_path / "hf"), "--format", "hf"]) == 0
    model = HFLM(
        str(tmp_path / "hf"), device="cpu", dtype="float32", trust_remote_code=True, batch_size=4
    )
    items = [json.loads(line) for line in file.read_text().splitlines()]
    pairs = [(item["context"], choice) for item in items for choice in item["choices"]]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    totals = [total for total, _ in model.loglikelihood(asked, disable_tqdm=True)]
    lines = [json.loads(line) for line in out["items"].read_text().splitlines()]
    expected = [value for line in lines for value in line["log_likelihoods"]]
    np.testing.assert_allclose(totals, expected, rtol=1e-4, atol=1e-4)


def test_rolling_likelihood_and_generation(trained: TrainedModel) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    from lm_eval.api.instance import Instance

    from jepa_dist.inference.harness import RunLM

    model = RunLM(trained)
    text = ("the tide and the moon, the reef and the salt; " * 3)[:128]  # two whole windows
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (found,) = model.loglikelihood_rolling([request])
    assert found == pytest.approx(-trained.loss(text) * len(text), rel=1e-5)
    greedy = trained.generate("tide", max_tokens=20, temperature=0).removeprefix("tide")
    until = greedy[7:9]
    for options, expected in (
        ({"max_gen_toks": 20}, greedy),
        ({"max_gen_toks": 20, "until": [until]}, greedy[: greedy.find(until)]),
    ):
        asked = Instance("generate_until", {}, ("tide", options), 0)
        assert model.generate_until([asked]) == [expected]
    assert torch.is_grad_enabled()
