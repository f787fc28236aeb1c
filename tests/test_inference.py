"""Loading a run and writing text with it: cached against uncached, reference and real processes."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import jepa_dist
from jepa_dist.data.tokenizer import load_tokenizer
from jepa_dist.errors import UserError
from jepa_dist.generate import draw, generate, next_logits
from jepa_dist.inference.__main__ import main
from jepa_dist.inference.decoding import Sampling, continue_ids, restrict
from jepa_dist.inference.export import main as export_main
from jepa_dist.inference.text_stream import TextStream
from jepa_dist.interop import parameter_golf
from jepa_dist.model.cache import KVCache
from jepa_dist.model.gpt import GPT
from jepa_dist.model.layers import Attention
from tests.support.golden_cases import GOLDEN_DIR, Case, cases
from tests.support.tiny import tiny_config
from tests.support.trained_run import PHASE, noisy_model, save_checkpoint, save_export

CPU = torch.device("cpu")
BYTES = load_tokenizer("bytes")


# ---------------------------------------------------------------------------- cache


def build(case: Case, **changes: Any) -> tuple[GPT, int]:
    model = parameter_golf.build(case.info["settings"] | changes, case.tensors("param/"))
    return model.requires_grad_(False), case.info["run"]["loop_phase"]


@pytest.mark.parametrize("first", [1, 7])
@pytest.mark.parametrize("case", cases("gpt"))
def test_cached_logits_equal_the_reference(case: Case, first: int) -> None:
    """A prompt in one pass, then token by token; one case is longer than in training."""
    model, phase = build(case)
    golden = case.tensors()
    tokens_BT = golden["tokens"].long()[:, :-1]
    rows, length = tokens_BT.shape
    cache = KVCache(model.config, phase=phase, length=length, batch=rows)
    bounds = [0, *range(first, length + 1)]
    logits = [
        model(tokens_BT[:, start:end], phase=phase, cache=cache).logits_BTV
        for start, end in itertools.pairwise(bounds)
    ]
    assert cache.used == length
    assert (torch.cat(logits, dim=1) - golden["logits"]).abs().max() <= 2e-5


def uncached(model: GPT, ids: list[int], count: int, phase: int, sampling: Sampling) -> list[int]:
    """Return the ids that ``generate.generate`` samples."""
    ids, generator = list(ids), torch.Generator().manual_seed(sampling.seed)
    for _ in range(count):
        logits_V = next_logits(model, ids, phase, CPU)
        ids.append(draw(logits_V, sampling.temperature, generator))
    return ids[-count:]


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("gpt"))
def test_200_tokens_are_those_without_a_cache(case: Case) -> None:
    """All fit into one row, so one pass has the logits of every draw."""
    model, phase = build(case, train_seq_len=256)
    prompt, sampling = [1, 2, 3], Sampling(seed=5)
    new = [*continue_ids(model, prompt, 200, phase=phase, sampling=sampling, device=CPU)]
    row_BT = torch.zeros(1, 256, dtype=torch.int64)
    row_BT[0, : 3 + 200] = torch.tensor([*prompt, *new])
    logits_TV = model(row_BT, phase=phase).logits_BTV[0].double()
    generator = torch.Generator().manual_seed(sampling.seed)
    assert new == [draw(logits_TV[2 + i], 1.0, generator) for i in range(200)]


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_cached_tokens_are_those_of_generate(tmp_path: Path, phase: int) -> None:
    """With every feature of the model, and a window that slides from the 24th token on."""
    model = noisy_model(tiny_config(tmp_path))
    ids = [BYTES.bos_id, *b"def"]
    new = continue_ids(model, ids, 30, phase=phase, sampling=Sampling(seed=3), device=CPU)
    expected = generate(
        *(model, BYTES, "def"), num_tokens=30, temperature=1.0, seed=3, phase=phase, device=CPU
    )
    assert BYTES.decode([*ids, *new]) == expected


def test_a_prompt_longer_than_the_context(tmp_path: Path) -> None:
    model = noisy_model(tiny_config(tmp_path))
    ids, sampling = [BYTES.bos_id, *b"0123456789" * 4], Sampling()
    new = continue_ids(model, ids, 5, phase=2, sampling=sampling, device=CPU)
    assert list(new) == uncached(model, ids, 5, 2, sampling)


def test_the_cache_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    model = noisy_model(tiny_config(tmp_path))
    tokens_BT = torch.tensor([[1, 2, 3]])
    cache = KVCache(model.config, phase=0, length=4)
    model(tokens_BT, cache=cache)
    for tokens, phase, problem in (
        (tokens_BT[:, :1], 1, "of phase 0"),
        (tokens_BT[:, :2], 0, "holds at most 4"),
    ):
        with pytest.raises(ValueError, match=problem):
            model(tokens, phase=phase, cache=cache)
    cache.length = 9
    with pytest.raises(ValueError, match="one at a time"):
        model(tokens_BT[:, :2], cache=cache)
    attends = {m.attend for m in model.modules() if isinstance(m, Attention)}
    assert len(attends) == 1  # as it was before the passes


# ---------------------------------------------------------------------------- drawing


def kept(logits: list[float], **options: Any) -> list[int]:
    logits_V = torch.tensor(logits, dtype=torch.float64)
    return restrict(logits_V, Sampling(**options)).isfinite().nonzero().flatten().tolist()


def test_top_k_and_top_p() -> None:
    """Probabilities 0.1, 0.4, 0.2, 0.3."""
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert kept(logits) == [0, 1, 2, 3]
    assert kept(logits, top_k=9) == [0, 1, 2, 3]
    assert kept(logits, top_k=1) == [1]
    assert kept(logits, top_k=3) == [1, 2, 3]
    assert kept(logits, top_p=0.39) == [1]
    assert kept(logits, top_p=0.41) == [1, 3]
    assert kept(logits, top_p=0.95) == [0, 1, 2, 3]
    assert kept(logits, top_k=2, top_p=0.5) == [1]  # 4/7 alone reaches it
    assert kept(logits, top_p=1e-9) == [1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: expected a number from 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0: expected a number of tokens from 1"),
        ({"top_p": 0.0}, "top_p=0.0: expected a probability"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Sampling(**options)


# ---------------------------------------------------------------------------- text


def streamed(tokenizer: Any, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.add(i) for i in ids), stream.finish()]


def test_characters_are_streamed_once_complete() -> None:
    euro, frog = "\u20ac".encode(), "\U0001f438".encode()
    assert streamed(BYTES, [*euro]) == ["", "", "\u20ac", ""]
    assert streamed(BYTES, [*frog, *b"x"]) == ["", "", "", "\U0001f438", "x", ""]
    assert streamed(BYTES, [*frog[:3]]) == ["", "", "", "\ufffd"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=60))
def test_pieces_are_the_text_of_any_bytes(ids: list[int]) -> None:
    assert "".join(streamed(BYTES, ids)) == BYTES.decode(ids)


def test_pieces_are_the_text_beyond_the_window() -> None:
    ids = list(("\u00e4 \u20ac x" * 400).encode()) + [0xFF] * 5
    assert "".join(streamed(BYTES, ids)) == BYTES.decode(ids)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(3, 500), max_size=40))
def test_pieces_are_the_text_of_sentencepiece(ids: list[int]) -> None:
    tokenizer = load_tokenizer(str(GOLDEN_DIR / "bpb_p1_tok.model"))
    ids = [i for i in ids if i < tokenizer.vocab_size]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


# ---------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks at the steps 10 and 20, each with weights of its own."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = tiny_config(folder)
    for step in (10, 20):
        save_checkpoint(folder, step, config, noisy_model(config, step), noisy_model(config, -step))
    return folder


def embedding(model: GPT) -> Tensor:
    return model.tok_emb.weight


def test_load_takes_the_newest_the_named_and_the_average(run: Path) -> None:
    config = tiny_config(run)
    for arguments, seed in (((), 20), ((10,), 10), ((None, True), -20), ((10, True), -10)):
        trained = jepa_dist.load(run, *arguments, device="cpu")
        expected = noisy_model(config, seed)
        assert (trained.step, trained.phase) == (abs(seed), PHASE)
        found = dict(trained.model.named_parameters())
        assert all(torch.equal(p, found[name]) for name, p in expected.named_parameters())
    assert jepa_dist.load(run / "checkpoints/step_00000010").step == 10


def test_load_takes_the_exported_model_unless_a_checkpoint_is_newer(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    save_export(tmp_path, 20, config, noisy_model(config, 1))
    assert jepa_dist.load(tmp_path).step == 20
    assert jepa_dist.load(tmp_path / "model.safetensors", step=20).step == 20
    save_checkpoint(tmp_path, 10, config, noisy_model(config, 2), noisy_model(config, 3))
    assert torch.equal(embedding(jepa_dist.load(tmp_path).model), embedding(noisy_model(config, 1)))
    path = save_checkpoint(tmp_path, 30, config, noisy_model(config, 4), noisy_model(config, 5))
    assert jepa_dist.load(tmp_path).step == 30
    file = path / "shard_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match="step_00000030: skipped, it is damaged"):
        assert jepa_dist.load(tmp_path).step == 20


def test_the_functions_of_a_loaded_run(run: Path) -> None:
    trained = jepa_dist.load(run)
    text = "def sum_of(a, b):\n    return a + b\n"  # more than one window of 24 positions
    assert trained.generate("def", max_tokens=9, seed=4) == trained.generate(
        "def", max_tokens=9, seed=4
    )
    greedy = trained.generate("def", max_tokens=9, temperature=0)
    assert greedy == trained.generate("def", max_tokens=9, top_k=1)
    assert greedy.startswith("def")
    ids = torch.tensor([BYTES.bos_id, *text.encode()])
    nll = 0.0
    for start in range(0, len(ids) - 1, 24):
        row = ids[start : start + 25]
        logits_TV = trained.model(row[None, :-1], phase=PHASE).logits_BTV[0]
        nll += torch.nn.functional.cross_entropy(logits_TV, row[1:], reduction="sum").item()
    assert trained.loss(text) == pytest.approx(nll / len(text), rel=1e-5)
    for layer in (-1, 0, 3):
        states_TD = trained.states("short text", layer)
        tokens_BT = torch.tensor([[BYTES.bos_id, *b"short text"]])
        expected = trained.model(tokens_BT, phase=PHASE, taps=(layer,)).taps[0]
        assert torch.equal(states_TD, expected[0])


def test_what_a_loaded_run_refuses(run: Path) -> None:
    trained = jepa_dist.load(run)
    for call, problem in (
        (lambda: trained.states("x" * 24), "has 25 tokens"),
        (lambda: trained.states("x", 4), "layer=4: expected -1"),
        (lambda: trained.loss(""), "is empty"),
        (lambda: trained.loss("\ud800"), "not valid Unicode"),
    ):
        with pytest.raises(UserError, match=problem):
            call()


def test_a_run_with_a_missing_tokenizer_loads(tmp_path: Path) -> None:
    for name, tokenizer, problem in (
        ("none", "null", "data.tokenizer=null"),
        ("gone", "gone.model", "data.tokenizer: tokenizer 'gone.model': no such file"),
    ):
        config = tiny_config(tmp_path / name, data__tokenizer=tokenizer)
        save_export(tmp_path / name, 5, config, noisy_model(config))
        trained = jepa_dist.load(tmp_path / name)
        assert trained.model(torch.tensor([[1, 2]])).logits_BTV.shape == (1, 2, 257)
        with pytest.raises(UserError, match=problem):
            trained.generate("x")


def test_the_package_imports_no_torch() -> None:
    code = "import jepa_dist, sys; print(callable(jepa_dist.load), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


# ---------------------------------------------------------------------------- the command


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: Any, stdin: bytes = b"") -> bytes:
    """Return what the command writes to standard output."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # whatever the locale says
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    assert main([str(argument) for argument in arguments]) == 0
    buffer = out.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue()


def test_the_command_writes_the_text_and_nothing_else(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = jepa_dist.load(run)
    prompt = "h\u00e9ron"
    (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
    short = ("--max-tokens", 12)
    expected = trained.generate(prompt, max_tokens=12)
    written = run_main(monkeypatch, run, "--prompt", prompt, *short)
    assert written.decode() == expected
    assert run_main(monkeypatch, run, "--prompt-file", tmp_path / "prompt.txt", *short) == written
    other = jepa_dist.load(run, 10, ema=True).generate(
        max_tokens=12, temperature=0.5, top_k=9, top_p=0.9, seed=7
    )
    options = ("--temperature", 0.5, "--top-k", 9, "--top-p", 0.9, "--seed", 7)
    of_step = ("--checkpoint", 10, "--ema")
    assert run_main(monkeypatch, run, *short, *options, *of_step).decode() == other
    lines = run_main(monkeypatch, run, "--interactive", *short, stdin=b"ab\n\nx")
    pieces = [trained.generate(p, max_tokens=12).removeprefix(p) for p in ("ab", "", "x")]
    assert lines.decode() == "".join(f"{piece}\n" for piece in pieces)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{tmp}/nowhere"], "no such file or folder; expected a run directory"),
        (["{tmp}"], "holds no checkpoint and no exported model"),
        (["{run}", "--checkpoint", "15"], "has no weights of step 15; it has 10, 20"),
        (["{run}", "--temperature", "-1"], "temperature=-1.0: expected a number from 0"),
        (["{run}", "--max-tokens", "-1"], "--max-tokens -1: expected a number from 0"),
        (["{run}", "--prompt-file", "{tmp}/none"], "none: cannot be read: No such file"),
        (["{run}", "--prompt-file", "/dev/zero"], "/dev/zero: cannot be read: not a regular file"),
        (["{run}", "--prompt", "a", "--interactive"], "not allowed with argument"),
        (["{run}", "--top-k", "some"], "invalid int value"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    run: Path,
    tmp_path: Path,
    arguments: list[str],
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([argument.format(tmp=tmp_path, run=run) for argument in arguments])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert problem in err
    assert err.count("\n") == 1


def test_export_writes_three_formats(run: Path, tmp_path: Path) -> None:
    expected = dict(noisy_model(tiny_config(run), 10).named_parameters())

    def export_to(name: str, *options: str) -> Path:
        assert export_main([str(run), str(tmp_path / name), "--checkpoint", "10", *options]) == 0
        return tmp_path / name

    loaded = jepa_dist.load(export_to("safetensors"))
    assert (loaded.step, loaded.phase) == (10, PHASE)
    out = export_to("torch", "--format", "torch")
    reference = export_to("golf", "--format", "parameter_golf")
    settings = json.loads((reference / "final_model.json").read_text(encoding="utf-8"))
    assert settings["recurrence_phase"] == PHASE
    state = torch.load(out / "model.pt", weights_only=True)
    final = torch.load(reference / "final_model.pt", weights_only=True)
    assert {parameter_golf.from_reference_name(name) for name in final} == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(final[parameter_golf.to_reference_name(name)], tensor)
        assert torch.equal(dict(loaded.model.named_parameters())[name], tensor)


def test_a_closed_pipe_ends_the_command_quietly(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main([str(run), "--prompt", "x", "--max-tokens", "5"]) == 141
    assert capfd.readouterr() == ("", "")
