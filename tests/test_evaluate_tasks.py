"""Likelihood tasks, linear probes and their files: against independent computations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jepa_dist
from jepa_dist.data.shards import write_shard
from jepa_dist.data.tokenizer import load_tokenizer
from jepa_dist.errors import UserError
from jepa_dist.evaluate.__main__ import main
from jepa_dist.evaluate.linear_probe import bootstrap_interval, is_test, ridge_classifier
from jepa_dist.evaluate.make_tasks import _Lines as Lines
from jepa_dist.evaluate.make_tasks import (
    cloze,
    labeled_documents,
    make_tasks,
    order,
    read_documents,
)
from jepa_dist.evaluate.passes import Passes, Request
from jepa_dist.evaluate.task_file import Item, check_tasks, encode_pair
from jepa_dist.evaluate.weights import find_weights, load_model
from jepa_dist.inference.trained import TrainedModel
from jepa_dist.monitor.evaluation_file import read_evaluation
from jepa_dist.parallel.world import start_world
from tests.support.ranks import run_ranks
from tests.support.tiny import REPOSITORY, tiny_config
from tests.support.trained_run import noisy_model, save_export

BYTES = load_tokenizer("bytes")
SEQ_LEN = 24
WORDS = ("tide", "moon", "reef", "salt", "heron", "kelp", "gull", "wave")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder, batch__micro=4)
    save_export(folder, 20, config, noisy_model(config))
    return folder


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedModel:
    return jepa_dist.load(run, device="cpu")


def passes_of(trained: TrainedModel) -> Passes:
    return Passes(trained.model, trained.config, trained.phase, trained.device)


def items(count: int) -> list[dict[str, Any]]:
    """Contexts of 0 to 33 bytes (the model has 24 positions), choices of 3 to 9."""
    generator = np.random.Generator(np.random.PCG64(1))
    made = []
    for number in range(count):
        context = " ".join(generator.choice(WORDS, number % 8))[: 5 * (number % 8)]
        choices = [f" {word}" * (1 + number % 2) for word in generator.choice(WORDS, 3, False)]
        answer = int(generator.integers(3))
        made.append({"context": context, "choices": choices, "answer": answer, "extra": number})
    return made


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def naive_likelihood(trained: TrainedModel, context: str, choice: str) -> tuple[float, bool]:
    """Compute the likelihood in float64 from one row without padding."""
    ids = [BYTES.bos_id, *(context + choice).encode()]
    # White space before the choice is scored with it.
    count = len(choice) + len(context) - len(context.rstrip())
    row = ids[-(SEQ_LEN + 1) :]
    with torch.no_grad():
        logits_TV = trained.model(torch.tensor([row[:-1]]), phase=trained.phase).logits_BTV[0]
    scored = logits_TV.double().log_softmax(-1)[-count:]
    targets = torch.tensor(row[-count:])
    total = float(scored.gather(1, targets[:, None]).sum())
    return total, bool((scored.argmax(1) == targets).all())


def test_likelihoods_are_those_of_single_rows(trained: TrainedModel) -> None:
    pairs = [(one["context"], choice) for one in items(17) for choice in one["choices"]]
    requests = [encode_pair(BYTES, *pair) for pair in pairs]
    assert sum(request.is_cut(SEQ_LEN) for request in requests) > 5
    found = passes_of(trained).log_likelihoods(requests)
    expected = [naive_likelihood(trained, *pair) for pair in pairs]
    np.testing.assert_allclose(found.total_N, [total for total, _ in expected], rtol=1e-5)
    assert found.greedy_N.tolist() == [greedy for _, greedy in expected]
    assert len(passes_of(trained).log_likelihoods([]).total_N) == 0


def test_the_likeliest_continuation_is_greedy(trained: TrainedModel) -> None:
    ids = [BYTES.bos_id]
    for _ in range(5):
        logits_TV = trained.model(torch.tensor([ids]), phase=trained.phase).logits_BTV[0]
        ids.append(int(logits_TV[-1].argmax()))
    found = passes_of(trained).log_likelihoods([Request(ids[:1], ids[1:]), Request(ids[:1], [0])])
    assert found.greedy_N.tolist() == [True, ids[1] == 0]


def test_mean_states_are_those_of_single_rows(trained: TrainedModel) -> None:
    texts = ["", "tide", "a moon over the reef"]
    rows = [[BYTES.bos_id, *text.encode()] for text in texts]
    for layer in (-1, 1):
        found = passes_of(trained).mean_states(rows, layer)
        expected = [trained.states(text, layer).mean(0).numpy() for text in texts]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def scores_of_rank(rank: int, world_size: int, run: Path) -> tuple[list[float], bytes]:
    source = find_weights(run, "live")
    config = source.description.config
    world = start_world(config.parallel)
    model = load_model(source, config.parallel, world)
    passes = Passes(model, config, 2, world.device, world.rank, world.world_size)
    requests = [encode_pair(BYTES, one["context"], c) for one in items(9) for c in one["choices"]]
    states = passes.mean_states([request.context[-SEQ_LEN:] for request in requests], 1)
    return passes.log_likelihoods(requests).total_N.tolist(), states.tobytes()


def test_results_are_bit_equal_on_any_number_of_ranks(run: Path) -> None:
    """27 rows make 7 batches of up to 4, which 2 or 3 ranks do not share evenly."""
    first = run_ranks(scores_of_rank, 1, run)[0]
    for world_size in (2, 3):
        assert run_ranks(scores_of_rank, world_size, run) == [first] * world_size


def test_white_space_at_the_seam_belongs_to_the_choice() -> None:
    assert encode_pair(BYTES, "a b ", "c") == Request([256, *b"a b"], [*b" c"])
    assert encode_pair(BYTES, "", "c") == Request([256], [*b"c"])


def test_tokens_that_span_the_seam() -> None:
    """A choice's tokens are those of the whole text after as many as the context has."""

    class Pairs:
        bos_id = 0

        def encode(self, text: bytes) -> np.ndarray:
            return np.array([len(text[i : i + 2]) * 1000 + text[i] for i in range(0, len(text), 2)])

    request = encode_pair(Pairs(), "abc", "de")  # type: ignore[arg-type]
    assert request == Request([0, 2000 + ord("a"), 1000 + ord("c")], [1000 + ord("e")])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "Invalid JSON"),
        ('{"context": "a", "choices": ["b", "c"]}', "answer: Field required"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "answer 2: expected 0..1"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "answer: "),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "choices: "),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', "choices.1: "),
        ('{"context": 1, "choices": ["b", "c"], "answer": 0}', "context: "),
        ('{"context": "a", "choices": ["b", "' + "c" * 25 + '"], "answer": 0}', "has 25 tokens"),
        ('{"context": "' + "a" * 2**20 + '"}', "longer than 1 MiB"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(json.dumps(items(1)[0]) + "\n\n" + line + "\n")
    with pytest.raises(UserError) as caught:
        check_tasks([file], BYTES, SEQ_LEN)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 500


def test_files_that_are_refused(tmp_path: Path) -> None:
    empty = write_lines(tmp_path / "empty.jsonl", [])
    good = write_lines(tmp_path / "good.jsonl", items(1))
    for paths, problem in (
        ([empty], "is empty"),
        ([tmp_path / "none.jsonl"], "No such file"),
        ([tmp_path], "not a regular file"),
        ([good, good], "several files are named good"),
    ):
        with pytest.raises(UserError, match=problem):
            check_tasks(paths, BYTES, SEQ_LEN)


def test_the_command(
    run: Path, trained: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = write_lines(tmp_path / "tide.jsonl", items(40))
    texts = [" ".join(np.roll(WORDS, n)[: 5 + n % 3]) for n in range(8)] + list("abcdefghijkl")
    labeled = [{"text": text, "label": "word" if len(text) > 1 else "letter"} for text in texts]
    probe = write_lines(tmp_path / "kind.jsonl", labeled)
    per_item, json_file = tmp_path / "items.jsonl", tmp_path / "evaluation.json"
    files = ["--tasks", str(task), "batch.micro=3", "--probe", str(probe), "--layer", "1"]
    main([str(run), *files, "--per-item", str(per_item), "--json", str(json_file)])

    evaluation = read_evaluation(json_file)
    assert evaluation is not None
    assert (evaluation.step, evaluation.weights) == (20, "live")
    found = evaluation.tasks["tide"]
    lines = [json.loads(line) for line in per_item.read_text().splitlines()]
    expected = [
        [naive_likelihood(trained, one["context"], choice)[0] for choice in one["choices"]]
        for one in items(40)
    ]
    np.testing.assert_allclose([line["log_likelihoods"] for line in lines], expected, rtol=1e-5)
    answers = [one["answer"] for one in items(40)]
    right = np.mean(np.argmax(expected, 1) == answers)
    bytes_of = [[len(choice) for choice in one["choices"]] for one in items(40)]
    right_per_byte = np.mean(np.argmax(np.array(expected) / bytes_of, 1) == answers)
    assert (found.accuracy, found.accuracy_per_byte) == (right, right_per_byte)
    assert found.chance == pytest.approx(1 / 3)
    assert found.error(found.accuracy) == pytest.approx(math.sqrt(right * (1 - right) / 40))
    assert found.cut == sum(line["cut"] > 0 for line in lines) > 0
    shown = capsys.readouterr().out
    assert f"tide                 40  {right:.4f} +- {found.error(right):.4f}" in shown
    assert f"the context of {found.cut} of 40 items is longer than the model" in shown

    probed = evaluation.probes["kind"]
    assert (probed.layer, probed.classes) == (1, 2)
    assert probed.test_documents == sum(is_test(text) for text in texts)
    assert probed.interval[0] <= probed.accuracy <= probed.interval[1]
    assert "probe    kind: " in shown
    full = [text for text in texts if len(text) + 1 >= SEQ_LEN]
    states = [trained.states(text[: SEQ_LEN - 1], 1)[1:] for text in full]
    unit_ND = torch.nn.functional.normalize(torch.cat(states).double(), dim=1)
    pairs_NN = unit_ND @ unit_ND.T
    cosine = (pairs_NN.sum() - len(unit_ND)) / (len(unit_ND) * (len(unit_ND) - 1))
    assert probed.mean_cosine == pytest.approx(cosine.item(), rel=1e-3)
    assert probed.effective_rank is not None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--layer", "1"], "--layer: only with --probe"),
        (["--per-item", "x"], "--per-item: only with --tasks"),
        (["--json", "x"], "--json: only with --tasks, --probe or --quantize"),
        (["--tasks", "x", "--sliding"], "--sliding: has no effect on --tasks, --probe and --quan"),
        (["--quantize", "4", "--compare", "y"], "--compare: has no effect on --tasks, --probe and"),
        (["--quantize", "4", "9"], "--quantize 9: expected numbers of bits, 2 to 8"),
        (["--quantize", "batch.micro=2"], "--quantize: expected numbers of bits, 2 to 8"),
        (["--tasks", "x.jsonl"], "x.jsonl: cannot be read"),
        (["--probe", "x.jsonl", "--layer", "4"], "--layer 4: expected -1 (the final state) to 3"),
    ],
)
def test_options_without_effect_are_refused(
    run: Path, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(run), *arguments])
    assert caught.value.code == 2
    assert problem in capsys.readouterr().err


# ---------------------------------------------------------------------------- probe


def test_ridge_with_the_penalty_of_the_smallest_leave_one_out_error() -> None:
    """Against one fit per sample, by the normal equations."""
    generator = np.random.Generator(np.random.PCG64(3))
    x, labels = generator.normal(size=(30, 5)), generator.integers(0, 3, 30)
    x[:, 0] += labels
    classifier = ridge_classifier(x, labels, 3)
    z = (x - x.mean(0)) / x.std(0)
    one_hot = np.eye(3)[labels]

    def fit(rows: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        design = np.hstack([np.ones((len(rows), 1)), z[rows]])
        penalties = penalty * np.diag([0.0, *[1.0] * 5])
        solved = np.linalg.solve(design.T @ design + penalties, design.T @ one_hot[rows])
        return solved[0], solved[1:]

    def loo_error(penalty: float) -> float:
        error = 0.0
        for out in range(30):
            bias, weights = fit(np.delete(np.arange(30), out), penalty)
            error += ((z[out] @ weights + bias - one_hot[out]) ** 2).sum()
        return error

    scale = np.linalg.svd(z, compute_uv=False) ** 2
    best = min(10.0 ** np.arange(-4, 5) * scale.mean(), key=loo_error)
    bias, weights = fit(np.arange(30), best)
    np.testing.assert_allclose(classifier.weights_DK, weights, rtol=1e-8)
    np.testing.assert_allclose(classifier.bias_K, bias, rtol=1e-8)
    assert classifier(x).tolist() == (z @ weights + bias).argmax(1).tolist()


def test_the_bootstrap_interval_is_that_of_resamples() -> None:
    correct = np.arange(50) < 35
    generator = np.random.Generator(np.random.PCG64(9))
    means = [correct[generator.integers(0, 50, 50)].mean() for _ in range(5000)]
    expected = np.quantile(means, (0.025, 0.975))
    np.testing.assert_allclose(bootstrap_interval(correct), expected, atol=0.021)


# ---------------------------------------------------------------------------- made tasks


def write_documents(folder: Path, count: int) -> list[str]:
    generator = np.random.Generator(np.random.PCG64(5))
    texts = []
    for number in range(count):
        lines = [f"line {n} of {number}: {' '.join(generator.choice(WORDS, 5))}" for n in range(40)]
        texts.append("\n".join(lines) + "\n")
    ids = np.concatenate([np.array([256, *text.encode()], np.uint16) for text in texts])
    write_shard(folder / "val_0.bin", ids)
    return texts


def test_made_items_are_parts_of_documents(tmp_path: Path) -> None:
    texts = write_documents(tmp_path, 6)
    config = tiny_config(tmp_path)
    assert list(read_documents(config, BYTES)) == texts
    messages = list(make_tasks(config, tmp_path / "out"))
    assert "package.jsonl: not made" in messages[2]
    found = {name: (tmp_path / f"out/{name}.jsonl").read_text() for name in ("cloze", "order")}
    documents = [Lines(text) for text in texts]
    assert found["cloze"] == "".join(json.dumps(one) + "\n" for one in cloze(documents))
    for name, choices in (("cloze", 4), ("order", 2)):
        made = [Item.model_validate_json(line) for line in found[name].splitlines()]
        assert len(made) > 20
        assert {item.answer for item in made} == set(range(choices))
        for item in made:
            whole = [any(item.context + c in text for text in texts) for c in item.choices]
            assert whole == [place == item.answer for place in range(choices)]
            assert len({len(choice) for choice in item.choices}) == 1
    for item in order(documents):
        assert sorted(item["choices"][0]) == sorted(item["choices"][1])


def test_too_little_text_for_tasks(tmp_path: Path) -> None:
    write_shard(tmp_path / "val_0.bin", np.array([256, *b"short"], np.uint16))
    with pytest.raises(UserError, match="too little text for the task cloze"):
        list(make_tasks(tiny_config(tmp_path), tmp_path / "out"))


def test_documents_are_labeled_by_package(tmp_path: Path) -> None:
    from jepa_dist.data.corpus import Skipped, user_files

    for package, count in (("reef", 45), ("salt", 160), ("tide", 3)):
        (tmp_path / package).mkdir()
        for number in range(count):
            (tmp_path / package / f"{number:03}.txt").write_text(f"line {number}\n" * 300)
    made = list(labeled_documents(user_files([str(tmp_path)], None, Skipped())))
    labels = [one["label"] for one in made]
    assert {label: labels.count(label) for label in labels} == {"reef": 45, "salt": 80}
    assert all(900 < len(one["text"]) <= 1000 for one in made)


def test_the_documentation_names_all_files() -> None:
    page = (REPOSITORY / "docs/evaluation.md").read_text()
    for name in ("cloze.jsonl", "order.jsonl", "package.jsonl", "evaluation.json"):
        assert name in page
