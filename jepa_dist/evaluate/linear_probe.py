"""Linear probe: a ridge classifier predicts a document's label from the model's frozen states.

The model is not trained on labels: what a linear map can predict from its states, it has learned
from text alone. A document's feature is the mean of the states of one layer over its positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from jepa_dist.data.tokenizer import Tokenizer
from jepa_dist.errors import UserError
from jepa_dist.evaluate.passes import Floats, Ids, Passes
from jepa_dist.evaluate.task_file import TaskFile, Text, check_lines, read_json_lines
from jepa_dist.monitor.evaluation_file import ProbeResult
from jepa_dist.objectives.diagnostics import effective_rank, mean_pairwise_cosine

Labels = npt.NDArray[np.int64]

_TEST_SHARE = 0.3
_MOST_WINDOWS = 4  # of model.seq_len tokens, from the start of a document
_MOST_DOCUMENTS = 20_000
_PENALTIES = 10.0 ** np.arange(-4, 5)  # relative to the mean eigenvalue of the features' covariance
_RESAMPLES = 2000
# Maximum number of windows to measure rank and anisotropy on, and of numbers in their states.
_MOST_DESCRIBED = 64
_MOST_STATES = 2**26


class Document(BaseModel):
    """A line of the file: a text and its label; other fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)

    text: Text
    label: Annotated[str, Field(min_length=1, max_length=200)]


def check_documents(path: Path) -> TaskFile:
    """Read a file of labeled documents from the first line to the last.

    Raises:
        UserError: a bad line, too many documents, a single label, or a split without documents.
    """
    labels: set[str] = set()
    parts: set[bool] = set()

    def check(number: int, document: Document) -> None:
        labels.add(document.label)
        parts.add(is_test(document.text))
        if number > _MOST_DOCUMENTS:
            raise UserError(f"{path}: more than {_MOST_DOCUMENTS:,} lines; sample the documents")

    task = check_lines(path, Document, check)
    if len(labels) < 2:
        raise UserError(f"{path}: all documents have the label {labels.pop()!r}; expected several")
    if len(parts) < 2:
        raise UserError(f"{path}: {task.num_items} documents are too few for a split in two")
    return task


def is_test(text: str) -> bool:
    """Return whether a document is in the test split: a function of its text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < _TEST_SHARE * 2**64


def probe(task: TaskFile, tokenizer: Tokenizer, passes: Passes, layer: int) -> ProbeResult:
    """Train the classifier and test it; the same result on every rank. Collective.

    Args:
        task: From ``check_documents``.
        tokenizer: Tokenizer of the model.
        passes: The model.
        layer: Block whose states to use; -1: the final state.
    """
    rows: list[Ids] = []
    owner: list[int] = []
    names: list[str] = []
    tested: list[bool] = []
    num_cut = 0
    for _, document in read_json_lines(task.path, Document):
        windows, is_cut = _windows(document.text, tokenizer, passes.config.model.seq_len)
        rows += windows
        owner += [len(names)] * len(windows)
        names.append(document.label)
        tested.append(is_test(document.text))
        num_cut += is_cut
    means = passes.mean_states(rows, layer, task.name)
    features = _pool(means, np.array([len(row) for row in rows]), np.array(owner))
    classes, labels = np.unique(names, return_inverse=True)
    test = np.array(tested)
    answers = ridge_classifier(features[~test], labels[~test], len(classes))(features[test])
    correct = answers == labels[test]
    return ProbeResult(
        digest=task.digest,
        layer=layer,
        classes=len(classes),
        train_documents=int((~test).sum()),
        test_documents=int(test.sum()),
        accuracy=float(correct.mean()),
        interval=bootstrap_interval(correct),
        chance=float((labels[test] == np.bincount(labels[~test]).argmax()).mean()),
        cut=num_cut,
        **_describe_states(rows, passes, layer),
    )


def _describe_states(rows: Sequence[Ids], passes: Passes, layer: int) -> dict[str, float]:
    """Return effective rank and anisotropy of the states of the first full windows, if any."""
    length, width = passes.config.model.seq_len, passes.config.model.model_dim
    most = min(_MOST_DESCRIBED, max(1, _MOST_STATES // (length * width)))
    full = [row for row in rows if len(row) == length][:most]
    if not full:
        return {}
    states_BTD = passes.states(full, layer)
    return {
        "effective_rank": effective_rank(states_BTD).item(),
        "mean_cosine": mean_pairwise_cosine(states_BTD).item(),
    }


def _windows(text: str, tokenizer: Tokenizer, seq_len: int) -> tuple[list[Ids], bool]:
    """Return a document's first windows, and whether there are more."""
    ids = [tokenizer.bos_id, *tokenizer.encode(text.encode()).tolist()]
    windows: list[Ids] = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
    return windows[:_MOST_WINDOWS], len(windows) > _MOST_WINDOWS


def _pool(means_ND: Floats, lengths_N: Labels, owner_N: Labels) -> Floats:
    """Return each document's mean over the positions of all its windows, [documents, D]."""
    num_documents = int(owner_N[-1]) + 1
    sums, counts = np.zeros((num_documents, means_ND.shape[1])), np.zeros(num_documents)
    np.add.at(sums, owner_N, means_ND * lengths_N[:, None])
    np.add.at(counts, owner_N, lengths_N)
    return sums / counts[:, None]


@dataclass(frozen=True)
class RidgeClassifier:
    """A linear score per class; predicts the class of the largest one."""

    mean_D: Floats
    scale_D: Floats
    weights_DK: Floats
    bias_K: Floats

    def __call__(self, features_ND: Floats) -> Labels:
        """Return the predictions, [N]."""
        scores_NK = (features_ND - self.mean_D) / self.scale_D @ self.weights_DK + self.bias_K
        return scores_NK.argmax(1)


def ridge_classifier(features_ND: Floats, labels_N: Labels, classes: int) -> RidgeClassifier:
    """Fit standardized features to one-hot labels by ridge regression, in closed form.

    The penalty minimizes the leave-one-out squared error, which needs no further fit: a residual
    is divided by 1 - h, with h the sample's leverage.
    """
    mean_D = features_ND.mean(0)
    scale_D = features_ND.std(0)
    scale_D[scale_D == 0] = 1
    x_ND = (features_ND - mean_D) / scale_D
    one_hot_NK = np.eye(classes)[labels_N]
    bias_K = one_hot_NK.mean(0)
    y_NK = one_hot_NK - bias_K
    u_NR, s_R, vt_RD = np.linalg.svd(x_ND, full_matrices=False)
    uy_RK = u_NR.T @ y_NK

    def loo_error(penalty: float) -> float:
        shrink_R = s_R**2 / (s_R**2 + penalty)
        residual_NK = y_NK - u_NR @ (shrink_R[:, None] * uy_RK)
        leverage_N = 1 / len(y_NK) + (u_NR**2 * shrink_R).sum(1)  # 1 / N: of the mean
        return float(np.square(residual_NK / (1 - leverage_N[:, None])).sum())

    penalty = min(_PENALTIES * float((s_R**2).mean()), key=loo_error)
    weights_DK = vt_RD.T @ ((s_R / (s_R**2 + penalty))[:, None] * uy_RK)
    return RidgeClassifier(mean_D, scale_D, weights_DK, bias_K)


def bootstrap_interval(correct_N: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean over resampled documents; seeded."""
    generator = np.random.Generator(np.random.PCG64(0))
    # The mean of a resample of N flags only depends on the number of set ones.
    means = generator.binomial(len(correct_N), correct_N.mean(), _RESAMPLES) / len(correct_N)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def describe(results: dict[str, ProbeResult]) -> Iterator[str]:
    """Yield lines that describe the results."""
    for name, one in results.items():
        layer = "the final state" if one.layer == -1 else f"block {one.layer}"
        yield (
            f"probe    {name}: {one.accuracy:.4f} accuracy (95 % {one.interval[0]:.4f} to "
            f"{one.interval[1]:.4f}) on {one.test_documents} documents, chance {one.chance:.4f}; "
            f"{one.classes} labels, {one.train_documents} documents to train on, {layer}"
        )
        if one.effective_rank is not None and one.mean_cosine is not None:
            yield (
                f"states   {name}: effective rank {one.effective_rank:.2f}, mean pairwise cosine "
                f"{one.mean_cosine:.4f}"
            )
        if one.cut:
            yield f"note     {name}: the end of {one.cut} long documents was cut off"
