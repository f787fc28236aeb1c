"""The exported folder, loaded by the transformers library: same logits, tokens and ids."""

from __future__ import annotations

import ast
import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

# Read when transformers is imported. Code of exported folders is copied to HF_HOME.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_home_")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import jepa_dist
from jepa_dist.config import Config
from jepa_dist.data.tokenizer import load_tokenizer
from jepa_dist.errors import UserError
from jepa_dist.evaluate.weights import find_weights
from jepa_dist.inference.decoding import Sampling, continue_ids
from jepa_dist.inference.export import main as export_main
from jepa_dist.interop import parameter_golf
from jepa_dist.interop.hf.export_folder import Options, write_folder
from jepa_dist.interop.hf.modeling_jepa_gpt import JepaGPTConfig, JepaGPTForCausalLM
from jepa_dist.interop.hf.tokenizer_files import tokenizer_files
from jepa_dist.interop.safetensors_io import Description
from jepa_dist.model.gpt import GPT
from tests.support.golden_cases import GOLDEN_DIR, Case, cases
from tests.support.tiny import tiny_config
from tests.support.trained_run import PHASE, noisy_model, save_checkpoint, save_export

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

CPU = torch.device("cpu")
GREEDY = {"do_sample": False, "eos_token_id": None}


def export(model: GPT, folder: Path, phase: int = PHASE, **options: Any) -> None:
    description = Description(
        step=1, phase=phase, weights="live", config=Config(model=model.config)
    )
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    write_folder(folder, tensors, description, {}, None, {}, Options(**options))


@torch.no_grad()
def test_masked_documents_are_separate_rows(tmp_path: Path) -> None:
    """Padding has the id of BOS, but begins no document."""
    mask = {"model__document_mask": True, "model__reset_positions": True}
    config = tiny_config(tmp_path, jepa__within_documents=True, **mask)
    model = noisy_model(config)
    model.bos_id = 7
    description = Description(step=1, phase=PHASE, weights="live", config=config)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    write_folder(tmp_path, tensors, description, {}, 7, {}, Options())
    theirs = load_in_phase(tmp_path, PHASE)
    row = torch.tensor([[7, 9, 10, 11, 12]])
    error = theirs(row).logits - model(row, phase=PHASE).logits_BTV
    assert error.abs().max() <= 1e-5
    padded, seen = torch.tensor([[7, 7, 9, 10, 11]]), torch.tensor([[0, 1, 1, 1, 1]])
    error = theirs(padded, attention_mask=seen).logits[:, 1:] - theirs(row[:, :4]).logits
    assert error.abs().max() <= 1e-5
    with pytest.raises(ValueError, match="pass each document as a row of its own"):
        theirs(torch.tensor([[7, 9, 7, 11]]))


def load_in_phase(folder: Path, phase: int) -> JepaGPTForCausalLM:
    described = json.loads((folder / "config.json").read_text()) | {"phase": phase}
    config = JepaGPTConfig(**described)
    return JepaGPTForCausalLM.from_pretrained(folder, config=config).eval()


@torch.no_grad()
@pytest.mark.parametrize("case", cases("gpt"))
def test_logits_and_tokens_are_ours_in_every_phase(case: Case, tmp_path: Path) -> None:
    """One case is longer than in training. Generation goes beyond the training length, too."""
    ours = parameter_golf.build(case.info["settings"], case.tensors("param/"))
    tokens_BT = case.tensors()["tokens"].long()[:, :-1]
    export(ours, tmp_path)
    for phase in (0, 1, 2) if ours.config.num_loops else (0,):
        theirs = load_in_phase(tmp_path, phase)
        error = theirs(tokens_BT).logits - ours(tokens_BT, phase=phase).logits_BTV
        assert error.abs().max() <= 1e-5
        prompt = tokens_BT[:1, :5]
        count = min(12, ours.config.seq_len + 3 - prompt.size(1))
        written = theirs.generate(prompt, max_new_tokens=count, **GREEDY)[0, 5:].tolist()
        sampling = Sampling(temperature=0.0)
        ids = prompt[0].tolist()
        assert written == list(
            continue_ids(ours, ids, count, phase=phase, sampling=sampling, device=CPU)
        )
    golden = load_in_phase(tmp_path, case.info["run"]["loop_phase"])
    assert (golden(tokens_BT).logits - case.tensors()["logits"]).abs().max() <= 2e-5


@torch.no_grad()
def test_a_folder_loads_with_the_library_alone(tmp_path: Path) -> None:
    """By AutoModel and AutoTokenizer, from the files in the folder."""
    config = tiny_config(tmp_path)
    save_export(tmp_path / "run", 20, config, noisy_model(config))
    assert export_main([str(tmp_path / "run"), str(tmp_path / "hf"), "--format", "hf"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    trained = jepa_dist.load(tmp_path / "run")
    inputs = tokenizer("def f", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    assert text == trained.generate("def f", max_tokens=30, temperature=0)
    many = tokenizer(["def", "import os"], return_tensors="pt", padding=True)
    alone = model(tokenizer("def", return_tensors="pt").input_ids).logits[0, -1]
    assert (model(**many).logits[0, -1] - alone).abs().max() <= 1e-5  # padded on the left
    ids = tokenizer("some text", return_tensors="pt").input_ids
    assert model(ids, labels=ids).loss.item() == pytest.approx(trained.loss("some text"), rel=1e-5)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a cache holds at most 24"):
        model(torch.ones(1, 20, dtype=torch.int64), past_key_values=cache)


def test_exported_code_imports_nothing_of_this_package() -> None:
    for path in Path(jepa_dist.__file__).parent.glob("interop/hf/*_jepa_gpt.py"):
        imported = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
        }
        assert not any(str(name).startswith("jepa_dist") for name in imported)
        assert not any(
            isinstance(node, ast.ImportFrom) and node.level
            for node in ast.walk(ast.parse(path.read_text()))
        )


def test_a_checkpoint_of_several_ranks_and_a_whole_model_export_alike(tmp_path: Path) -> None:
    """Byte for byte, in several files; weights of an earlier export are replaced."""
    config = tiny_config(tmp_path)
    model = noisy_model(config)
    save_checkpoint(tmp_path / "several", 20, config, model, noisy_model(config, 2))
    save_export(tmp_path / "whole", 20, config, model)
    (tmp_path / "hf_whole").mkdir()
    (tmp_path / "hf_whole/model-00001-of-00009.safetensors").touch()
    for name in ("several", "whole"):
        folders = [str(tmp_path / name), str(tmp_path / f"hf_{name}")]
        export_main([*folders, "--format", "hf", "--max-shard-size", "50KB"])
    files = {
        name: {p.name: p.read_bytes() for p in (tmp_path / f"hf_{name}").iterdir()}
        for name in ("several", "whole")
    }
    assert files["several"] == files["whole"]
    shards = [name for name in files["whole"] if name.startswith("model-")]
    assert len(shards) == 4
    index = json.loads(files["whole"]["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    assert index["weight_map"].keys() == dict(model.named_parameters()).keys()


def test_weights_can_be_written_in_bfloat16(tmp_path: Path) -> None:
    model = noisy_model(tiny_config(tmp_path))
    export(model, tmp_path / "hf", dtype=torch.bfloat16)
    loaded = JepaGPTForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(loaded.tok_emb.weight, model.tok_emb.weight.bfloat16())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    model = noisy_model(config)
    model.blocks[1].attn.c_q.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.c_q\.weight: is not fi"):
        export(model, tmp_path / "hf")
    assert not list((tmp_path / "hf").glob("*.json"))
    export(model, tmp_path / "hf", allow_not_finite=True)


# ------------------------------------------------------------------ tokenizers


def load_exported(folder: Path, spec: str) -> Any:
    for name, content in tokenizer_files(spec, load_tokenizer(spec), 100).items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module", params=["bytes", str(GOLDEN_DIR / "bpb_p1_tok.model")])
def tokenizers(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param != "bytes":  # AutoTokenizer looks there for the kind of model
        (folder / "config.json").write_text('{"model_type": "jepa_gpt"}')
    return load_tokenizer(request.param), load_exported(folder, request.param)


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_ids_and_text_are_those_of_our_tokenizer(tokenizers: tuple[Any, Any], text: str) -> None:
    ours, theirs = tokenizers
    ids = [ours.bos_id, *ours.encode(text.encode()).tolist()]
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_special_tokens(tokenizers: tuple[Any, Any]) -> None:
    ours, theirs = tokenizers
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.bos_id)
    assert theirs.decode([ours.bos_id, *ours.encode(b"x")], skip_special_tokens=True) == "x"


def test_a_tokenizer_json_is_copied(tmp_path: Path) -> None:
    """With BOS before every text, whatever the file's own post-processor does."""
    byte_level = load_tokenizer("bytes")
    plain = json.loads(tokenizer_files("bytes", byte_level, 100)["tokenizer.json"])
    plain["post_processor"] = None
    (tmp_path / "mine.json").write_text(json.dumps(plain))
    (tmp_path / "out").mkdir()
    spec = str(tmp_path / "mine.json")
    for name, content in tokenizer_files(spec, byte_level, 100).items():
        (tmp_path / "out" / name).write_bytes(content)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == [256, 97, 98]
    with pytest.raises(UserError, match="cannot be exported for transformers"):
        tokenizer_files(str(tmp_path / "a.tiktoken"), byte_level, 100)
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match=r"no tokenizer\.json with a token of id 256"):
        tokenizer_files(spec, byte_level, 100)


# ------------------------------------------------------------------ reading a folder


def test_an_exported_folder_loads_as_a_run(tmp_path: Path) -> None:
    model = noisy_model(tiny_config(tmp_path))
    export(model, tmp_path / "hf", shard_bytes=50_000)
    loaded = jepa_dist.load(tmp_path / "hf")
    assert (loaded.step, loaded.phase) == (1, PHASE)
    expected = dict(model.named_parameters())
    found = dict(find_weights(tmp_path / "hf", "live").tensors or {})
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(loaded.model.tok_emb.weight, model.tok_emb.weight)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    export(noisy_model(tiny_config(tmp_path)), folder)
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    for text, problem in (
        (whole.replace("model-00001-of", "../model-00001-of"), "names a file"),
        ("{}", r"index\.json: cannot be read"),
        (whole.replace("00001-of-00001", "00007-of-00007"), "not a whole safetensors file"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=problem):
            find_weights(folder, "live")
    index.write_text(whole)
    (folder / "jepa_dist.json").unlink()
    with pytest.raises(UserError, match=r"jepa_dist\.json: cannot be read"):
        find_weights(folder, "live")
