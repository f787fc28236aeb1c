"""Next-latent prediction against independent computations, and its limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jepa_dist.config import load
from jepa_dist.errors import UserError
from jepa_dist.model import head as model_head
from jepa_dist.model.gpt import EMBEDDED, GPT, OutputLayer
from jepa_dist.objectives.joint import JointModel, ObjectiveInput
from jepa_dist.objectives.next_latent import NextLatentObjective, divergence_sum
from tests.support.tiny import tiny_config, tiny_overrides

VOCAB, WIDTH, EMBED_WIDTH, BOS = 61, 8, 6, 2


def objective_for(rows: int, positions: int, **changes: object) -> NextLatentObjective:
    """Return the objective in float64."""
    config = tiny_config(
        Path(), jepa__objective="next_latent", jepa__lambda=1.0, model__model_dim=WIDTH,
        model__seq_len=positions, model__num_heads=1, model__num_kv_heads=1, model__rope_dims=2,
        model__embedding_dim=EMBED_WIDTH, model__vocab_size=VOCAB, batch__sequences=rows,
        batch__micro=1, **changes,
    )  # fmt: skip
    objective = NextLatentObjective(config, BOS)
    for name, parameter in objective.named_parameters():
        parameter.data = objective.initial_value(
            name, parameter.shape, seed=0, device=torch.device("cpu")
        )
    return objective.double()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output_layer(projected: bool = True) -> OutputLayer:
    proj = random(EMBED_WIDTH, WIDTH, seed=3) / WIDTH**0.5 if projected else None
    return OutputLayer(random(VOCAB, EMBED_WIDTH if projected else WIDTH, seed=2), proj)


def gelu(x: np.ndarray) -> np.ndarray:
    erf = torch.erf(torch.from_numpy(x) / 2**0.5).numpy()
    return 0.5 * x * (1 + erf)


def log_probabilities(y: np.ndarray, layer: OutputLayer, softcap: float) -> np.ndarray:
    assert layer.proj_ED is not None
    logits = layer.head_VE.numpy() @ (layer.proj_ED.numpy() @ y)
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    return logits - np.log(np.exp(logits).sum())


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_against_a_loop(kl_weight: float, softcap: float) -> None:
    rows, positions = 3, 7
    h, embedded = random(rows, positions, WIDTH), random(rows, positions, WIDTH, seed=1)
    tokens = torch.full((rows, positions), 5)
    tokens[0, 4] = tokens[2, 1] = BOS
    objective = objective_for(
        rows, positions, jepa__next_latent__kl=kl_weight, model__logit_softcap=softcap,
        jepa__next_latent__within_documents=True,
    )  # fmt: skip
    assert objective.reads_output_layer == (kl_weight > 0)
    layer = output_layer()
    enter, middle, leave = (parameter.detach().numpy() for parameter in objective.parameters())
    assert (enter.shape, middle.shape, leave.shape) == ((16, 16), (16, 16), (8, 16))
    expected = {"distance": 0.0, "unchanged": 0.0, "kl": 0.0, "counted": 0.0}
    for b in range(rows):
        u = h[b].numpy() / np.sqrt(np.mean(h[b].numpy() ** 2, 1, keepdims=True) + 2.0**-23)
        for t in range(positions - 1):
            if tokens[b, t + 1] == BOS:
                continue
            x = gelu(enter @ np.concatenate((u[t], embedded[b, t + 1].numpy())))
            p = u[t] + leave @ gelu(middle @ x)
            for name, guess in (("distance", p), ("unchanged", u[t])):
                gap = np.abs(guess - u[t + 1])
                expected[name] += np.mean(np.where(gap < 1, gap**2 / 2, gap - 0.5))
            log_z, log_p = (log_probabilities(y, layer, softcap) for y in (u[t + 1], p))
            expected["kl"] += np.sum(np.exp(log_z) * (log_z - log_p))
            expected["counted"] += 1
    given = layer if kl_weight else None
    sums = objective((h, embedded), tokens, torch.ones(rows), None, given)
    total = expected["distance"] + kl_weight * expected["kl"]
    assert sums.loss.item() == pytest.approx(total / (positions - 1), rel=1e-6)
    if not kl_weight:
        del expected["kl"]
    assert {name: part.item() for name, part in sums.parts.items()} == pytest.approx(
        expected, rel=1e-6
    )
    values = {name: part.item() for name, part in sums.parts.items()}
    metrics = objective.metrics(None, values)
    assert metrics["jepa/counted"] == pytest.approx((rows * (positions - 1) - 2) / 18)
    assert metrics["jepa/relative"] == pytest.approx(expected["distance"] / expected["unchanged"])
    assert ("jepa/kl" in metrics) == (kl_weight > 0)


def test_gradients_reach_the_predicting_state_the_embedding_and_the_mlp() -> None:
    h, embedded = random(2, 6, WIDTH), random(2, 6, WIDTH, seed=1)
    h.requires_grad_()
    embedded.requires_grad_()
    objective, tokens = objective_for(2, 6), torch.full((2, 6), 5)
    objective((h, embedded), tokens, torch.ones(2), None, output_layer()).loss.backward()
    assert h.grad is not None
    assert h.grad[:, -1].abs().max() == 0  # only a target
    assert (h.grad[:, :-1].abs().sum(-1) > 0).all()
    assert embedded.grad is not None
    assert embedded.grad[:, 0].abs().max() == 0  # no state precedes it
    assert (embedded.grad[:, 1:].abs().sum(-1) > 0).all()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_no_gradient_reaches_the_head() -> None:
    config = tiny_config(
        Path(), jepa__objective="next_latent", jepa__lambda=1.0, jepa__layer=-1,
        model__tie_embeddings=False, model__embedding_dim=20,
    )  # fmt: skip
    root = JointModel(GPT(config.model), NextLatentObjective(config, None))
    for parameter in root.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(config.model.vocab_size, (2, config.model.seq_len))
    given = ObjectiveInput(torch.ones(2), None, None)
    output = root(tokens, tokens, torch.ones(2), objective=given)
    output.objective.loss.backward()
    assert output.objective.parts["kl"] > 0
    without = {name for name, p in root.trained_parameters().items() if p.grad is None}
    assert {"lm_head.weight", "head_proj.weight"} <= without
    with_gradient = root.trained_parameters().keys() - without
    assert {"tok_emb.weight", "embed_proj.weight", "objective.leave.weight"} <= with_gradient


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("chunks", [1, 4])
def test_gradient_of_the_divergence(
    chunks: int, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd through PyTorch's own KL divergence."""
    monkeypatch.setattr(model_head, "_SMALLEST_VOCAB", 1)
    monkeypatch.setattr(model_head, "_FEWEST_LOGITS", 1)
    monkeypatch.setattr(model_head, "_FEWEST_ROWS", 12 // chunks)
    assert model_head.num_chunks(12, VOCAB) == chunks
    p, z = random(2, 6, WIDTH), random(2, 6, WIDTH, seed=1)
    layer, counts = output_layer(projected=False), torch.rand(2, 6)
    ours, reference = p.clone().requires_grad_(), p.clone().requires_grad_()
    loss = divergence_sum(ours, z, counts, layer, softcap)
    (loss * 0.7).backward()
    log_z, log_p = (
        torch.log_softmax(softcap * torch.tanh(y / softcap) if softcap else y, -1)
        for y in (z @ layer.head_VE.T, reference @ layer.head_VE.T)
    )
    each = torch.nn.functional.kl_div(log_p, log_z, reduction="none", log_target=True).sum(-1)
    expected = (counts * each).sum()
    (expected * 0.7).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert ours.grad is not None
    assert reference.grad is not None
    assert torch.allclose(ours.grad, reference.grad, rtol=1e-4, atol=1e-6)


def test_rows_of_weight_zero_do_not_count() -> None:
    h, embedded = random(4, 6, WIDTH), random(4, 6, WIDTH, seed=1)
    tokens, weight = torch.full((4, 6), 5), torch.tensor([1.0, 0.0, 1.0, 0.0])
    objective, layer = objective_for(4, 6), output_layer()
    all_rows = objective((h, embedded), tokens, weight, None, layer)
    alone = objective((h[::2], embedded[::2]), tokens[::2], torch.ones(2), None, layer)
    assert all_rows.loss.item() == pytest.approx(alone.loss.item(), rel=1e-6)
    assert {name: part.item() for name, part in all_rows.parts.items()} == pytest.approx(
        {name: part.item() for name, part in alone.parts.items()}, rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_stay_finite(dtype: torch.dtype) -> None:
    objective = objective_for(2, 5).to(dtype)
    layer = OutputLayer(*(matrix.to(dtype) for matrix in output_layer() if matrix is not None))
    for values in (torch.zeros(2, 5, WIDTH), torch.ones(2, 5, WIDTH), 1e4 * random(2, 5, WIDTH)):
        h = values.to(dtype).requires_grad_()
        sums = objective((h, h.detach()), torch.full((2, 5), 5), torch.ones(2), None, layer)
        sums.loss.backward()
        assert sums.loss.dtype == torch.float32
        assert sums.loss.isfinite()
        assert h.grad is not None
        assert h.grad.isfinite().all()


def test_the_embedding_is_tapped_before_the_first_block() -> None:
    config = tiny_config(Path()).model
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(config.vocab_size, (2, config.seq_len))
    (embedded,) = model(tokens, taps=(EMBEDDED,)).taps
    projection = None if model.embed_proj is None else model.embed_proj.weight
    assert torch.equal(embedded, model.embed(tokens, model.tok_emb.weight, projection))


def test_flops_are_those_of_the_mlp_and_of_the_output_layer() -> None:
    mlp = 16 * 16 + 16 * 16 + 8 * 16
    head = VOCAB * EMBED_WIDTH + EMBED_WIDTH * WIDTH
    assert objective_for(2, 10).flops_per_token == pytest.approx(6 * (mlp + head) * 9 / 10)
    without = objective_for(2, 10, jepa__next_latent__kl=0)
    assert without.flops_per_token == pytest.approx(6 * mlp * 9 / 10)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["jepa.layer=1"], "use jepa.next_latent.kl=0 to predict another layer's"),
        (["jepa.next_latent.hidden_mult=0.001"], "hidden_mult=0.001: leaves no hidden unit"),
        (["jepa.next_latent.kl=-1"], "jepa.next_latent.kl"),
        (["jepa.within_documents=true"], "use jepa.next_latent.within_documents"),
    ],
)
def test_impossible_settings(tmp_path: Path, settings: list[str], expected: str) -> None:
    overrides = tiny_overrides(tmp_path, jepa__objective="next_latent")
    with pytest.raises(UserError) as error:
        load(None, [*overrides, *settings], {})
    assert any(expected in problem for problem in error.value.problems)
