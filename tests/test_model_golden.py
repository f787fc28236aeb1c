"""The model against the reference's numbers (golden README section 1)."""

from __future__ import annotations

import pytest
import torch

from jepa_dist.interop import parameter_golf
from jepa_dist.model.execution import execution_order
from jepa_dist.model.gpt import GPT
from tests.support.golden_cases import Case, cases
from tests.support.gradients import assert_gradients_match


def build(case: Case) -> GPT:
    return parameter_golf.build(case.info["settings"], case.tensors("param/"))


def run(model: GPT, case: Case, tap: int):
    tokens = case.tensors()["tokens"].long()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    phase = case.info["run"]["loop_phase"]
    output = model(inputs, targets, torch.ones(len(inputs)), phase=phase, taps=(tap,))
    logits = model(inputs, phase=phase).logits_BTV
    return output.loss_sum / targets.numel(), logits, output.taps[0]


@pytest.mark.parametrize("case", cases("gpt"))
def test_forward_and_gradients(case: Case) -> None:
    model, golden = build(case), case.tensors()
    loss, logits, final = run(model, case, tap=-1)
    assert abs(loss.item() - golden["loss"].item()) <= 1e-5
    assert (logits - golden["logits"]).abs().max() <= 2e-5
    scale = golden["hidden_prenorm"].abs().max()
    assert (final - golden["hidden_prenorm"]).abs().max() <= 5e-6 * scale
    loss.backward()
    assert_gradients_match(model, case.tensors("grad/"))


@pytest.mark.parametrize("case", cases("gpt"))
def test_every_tap_is_the_last_execution_of_its_block(case: Case) -> None:
    model = build(case)
    for index, reference in case.tensors("hidden_after_block/").items():
        _, _, tapped = run(model, case, tap=int(index))
        limit = 5e-6 * reference.abs().max()
        assert (tapped - reference).abs().max() <= limit, f"block {index}"


@pytest.mark.parametrize("case", cases("gpt"))
def test_execution_order(case: Case) -> None:
    model, derived = build(case), case.info["derived"]
    order = execution_order(model.config, case.info["run"]["loop_phase"])
    assert [e.block for e in order.encoder] == derived["encoder_indices"]
    assert [e.block for e in order.decoder] == derived["decoder_indices"]
    assert model.skip_weights is not None
    assert len(model.skip_weights) == derived["num_skip_weights"]
