"""Typed configuration: defaults < YAML file < JEPA_* environment < KEY=VALUE command line.

Every option is one annotated field with its meaning right below it. ``load`` returns the
validated ``Config`` together with where each value came from; anything wrong raises ``UserError``
with one line per problem, before torch is imported and before any process group exists.

``python -m jepa_dist.config`` prints the reference page kept in docs/configuration.md.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import stat
import types
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from jepa_dist.errors import UserError

# Upper bounds are far beyond any use; they keep a slip of the finger from becoming an overflow, a
# hang or an allocation of terabytes.
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, le=1e12)]
Positive = Annotated[float, Field(gt=0.0, le=1e12)]
Rate = Annotated[float, Field(gt=0.0, le=1e3)]
Decay = Annotated[float, Field(ge=0.0, le=1e3)]
Seconds = Annotated[float, Field(ge=0.0, le=1e7)]
Count = Annotated[int, Field(ge=0, le=10**9)]
PositiveInt = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

_LONGEST_NAME = 255
_LONGEST_PATH = 4000
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def _check_path(text: str) -> str:
    """Refuse what cannot be a path on any host."""
    problem = _path_problem(text)
    if problem:
        raise PydanticCustomError("path", "{problem}", {"problem": problem})
    return text


def _check_text(text: str) -> str:
    """Refuse half characters, which the command line makes of bytes that are not UTF-8."""
    if not _is_unicode(text):
        raise PydanticCustomError("text", "is not valid UTF-8 text")
    return text


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _path_problem(text: str) -> str | None:
    if not _is_unicode(text):
        return "is not valid UTF-8 text"
    longest = max(len(part.encode()) for part in text.split("/"))
    if not text:
        return "must not be empty"
    if "\0" in text:
        return "holds a NUL character, which no path can"
    if _URL.match(text):
        return "is a URL; expected a path (mount the storage, or copy the files)"
    if longest > _LONGEST_NAME:
        return f"has a part of {longest} bytes; file names have at most {_LONGEST_NAME}"
    if len(text.encode()) > _LONGEST_PATH:
        return f"is longer than {_LONGEST_PATH} bytes"
    return None


PathText = Annotated[str, AfterValidator(_check_path)]
Text = Annotated[str, AfterValidator(_check_text)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class RunConfig(_Section):
    """Where the run lives."""

    dir: PathText = "runs/default"
    """Run directory: resolved config, metrics, TensorBoard events, logs. Never overwritten."""


class TrainConfig(_Section):
    """Length of the run and its curricula. Fractions are of the whole run."""

    steps: PositiveInt = 1000
    """Optimiser steps; schedules stretch to this length."""
    max_wallclock_seconds: Annotated[float, Field(gt=0.0, le=1e9)] | None = None
    """End after this much training time (evaluation and warm-up excluded), and run all schedules
    on that clock; null runs them on steps alone."""
    stop_at: PositiveInt | None = None
    """Stop after this many steps with a checkpoint; schedules remain those of train.steps."""
    max_bad_steps: PositiveInt = 10
    """Steps in a row, skipped because loss or gradient is not finite, before a roll-back."""
    log_every: PositiveInt = 10
    """Steps between two metric records (the device is synchronised only then)."""
    gc_every: Count = 50
    """Steps between runs of Python's garbage collector, on all ranks at once; automatic collection,
    which stops ranks one by one, is off. 0 leaves it to Python."""
    enable_looping_at: Fraction = 0.5
    """Fraction of the run at which depth recurrence starts (phase 1). Needs model.num_loops > 0."""
    loop_phase2_at: Fraction = 0.0
    """Fraction at which all loops run (phase 2); 0 goes from phase 0 to 2 at enable_looping_at."""


class BatchConfig(_Section):
    """The global batch, which never depends on the number of ranks (contract C1)."""

    sequences: Annotated[int, Field(ge=1, le=2**20)] = 32
    """Sequences in the global batch of one optimiser step."""
    micro: Annotated[int, Field(ge=1, le=2**20)] = 8
    """Most sequences a rank holds in one forward pass; gradient accumulation makes up the rest."""


class ModelConfig(_Section):
    """The GPT. Defaults are a plain GPT; the reference's extras are switched on one by one."""

    vocab_size: Annotated[int, Field(ge=1, le=2**24)] = 257
    """Number of token ids (257 = bytes and a BOS)."""
    seq_len: Annotated[int, Field(ge=1, le=2**22)] = 512
    """Training sequence length; longer inputs rescale the rotary base (NTK style)."""
    num_layers: Annotated[int, Field(ge=1, le=4096)] = 4
    """Number of blocks."""
    model_dim: Annotated[int, Field(ge=1, le=2**18)] = 128
    """Width of the residual stream."""
    num_heads: PositiveInt = 4
    """Query heads."""
    num_kv_heads: PositiveInt = 4
    """Key/value heads; consecutive query heads share one."""
    mlp_mult: Annotated[float, Field(gt=0.0, le=1024.0)] = 4.0
    """MLP hidden width = floor(mlp_mult * model_dim)."""
    embedding_dim: Annotated[int, Field(ge=1, le=2**18)] | None = None
    """Width of the token embedding; null means model_dim, otherwise projections are added."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head."""
    tied_embed_init_std: Rate = 0.005
    """Standard deviation of a tied embedding at the start (an untied one starts at 1)."""
    logit_softcap: NonNegative = 0.0
    """Logits become cap * tanh(logits / cap); 0 switches the cap off."""
    rope_base: Positive = 10000.0
    """Base of the rotary frequencies."""
    rope_dims: Count = 0
    """Rotated dimensions of each head (even); 0 rotates all."""
    qk_gain_init: Positive | None = None
    """Learned gain of each query head after QK norm, started here; null leaves it out."""
    ln_scale: bool = False
    """Scale block i's normed inputs by 1/sqrt(i+1)."""
    xsa_last_n: Count = 0
    """In the last n blocks remove from each head's output its own value direction (XSA)."""
    x0_mix: bool = False
    """Learned per-channel mix of the residual stream with the embedding at every block."""
    branch_scales: bool = False
    """Learned per-channel scales on the attention and MLP branches."""
    unet_skips: bool = False
    """U-Net skips from the first half of the executed blocks to the second."""
    skip_gates: bool = False
    """Gate the skips with a learned sigmoid (needs unet_skips)."""
    parallel_residual_start: int = Field(default=-1, ge=-1)
    """From this block on attention and MLP read the same input; -1 means never."""
    num_loops: Annotated[int, Field(ge=0, le=1024)] = 0
    """Extra passes over blocks loop_start..loop_end in recurrence phase 2 (phase 1: one)."""
    loop_start: Count = 0
    """First block of the looped segment."""
    loop_end: Count = 0
    """Last block of the looped segment (inclusive)."""
    untie_loop_mlps: bool = False
    """Give every extra pass an MLP of its own (needs num_loops > 0)."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_mult * self.model_dim)

    @property
    def embed_width(self) -> int:
        """Width of the token embedding."""
        return self.embedding_dim or self.model_dim

    @property
    def rotary_dims(self) -> int:
        """Rotated dimensions of each head."""
        return self.rope_dims or self.head_dim


class DataConfig(_Section):
    """Token shards: 256 int32 header words, then uint16 ids (the field's .bin format)."""

    train: PathText = "data/stdlib/train_*.bin"
    """Glob of the training shards, read in sorted order."""
    val: PathText = "data/stdlib/val_*.bin"
    """Glob of the validation shards."""
    tokenizer: PathText | None = "bytes"
    """'bytes', or the path of a SentencePiece .model (extra [sentencepiece]); null if it is not
    at hand (GPT-2 shards, say): then there are no bits per byte and no text samples."""
    bos_id: Count | None = None
    """Id that begins every document; null takes what meta.json or the tokenizer says."""
    workers: Annotated[int, Field(ge=0, le=256)] = 2
    """Loader processes per rank; 0 reads in a thread of the training process."""
    prefetch: Annotated[int, Field(ge=1, le=4096)] = 4
    """Micro-batches that each loader process keeps ready."""


class JepaConfig(_Section):
    """The auxiliary objective: docs/objective.md."""

    lambda_: NonNegative = Field(default=0.0, alias="lambda")
    """Weight of the JEPA loss; 0 leaves the objective out entirely."""
    max_span_frac: Fraction = 0.5
    """Longest span as a fraction of the sequence."""
    start_frac: Fraction = 0.0
    """Fraction of the run at which the objective is switched on."""
    ramp_frac: Fraction = 0.0
    """Fraction of the run over which lambda then rises linearly from 0; 0 means at once."""
    layer: int = -1
    """Tapped state: -1 the final pre-norm state, i block i's output at its last execution."""
    spans_per_sequence: Annotated[int, Field(ge=1, le=4096)] = 1
    """Spans sampled per sequence; their losses are averaged."""
    sampler: Literal["start_then_length", "uniform"] = "start_then_length"
    """Uniform start then uniform length, or uniform over all legal spans."""
    within_documents: bool = False
    """Only spans that lie in one document, the state before them included (needs BOS ids in the
    shards). Sequences without such a span do not count."""
    norm_floor: NonNegative = 0.05
    """Floor of both norms in the cosine, relative to the RMS norm of the sequence's tapped states;
    0 uses an absolute 1e-8 and can explode at the start of training."""


class OptimConfig(_Section):
    """Parameter groups and schedules (golden README sections 3-5)."""

    matrix: Literal["muon", "adamw"] = "adamw"
    """Optimiser of the matrices inside the blocks and of the embedding projections."""
    matrix_lr: Rate = 0.002
    """Learning rate of the matrices."""
    matrix_wd: Decay = 0.085
    """Decoupled weight decay of the matrices."""
    scalar_lr: Rate = 0.02
    """Learning rate of scales, gains, mixes and skips (AdamW)."""
    tied_embed_lr: Rate = 0.03
    """Learning rate of a tied token embedding (AdamW)."""
    embed_lr: Rate = 0.6
    """Learning rate of an untied token embedding (AdamW)."""
    embed_wd: Decay = 0.085
    """Decoupled weight decay of the token embedding."""
    head_lr: Rate = 0.008
    """Learning rate of an untied head (Adam, no decay)."""
    adam_wd: Decay = 0.02
    """Decoupled weight decay of the scalar group."""
    beta1: Fraction = 0.9
    """Adam's first moment decay."""
    beta2: Fraction = 0.95
    """Adam's second moment decay."""
    eps: Rate = 1e-8
    """Adam's epsilon, outside the square root."""
    muon_momentum: Fraction = 0.99
    """Muon's momentum after its warm-up."""
    muon_momentum_warmup_start: Fraction = 0.92
    """Muon's momentum at step 0."""
    muon_momentum_warmup_steps: Count = 1500
    """Steps over which Muon's momentum rises linearly; 0 starts with the final one."""
    muon_nesterov: bool = True
    """Orthogonalise gradient + momentum * buffer; otherwise, as in the reference, the gradient."""
    muon_row_normalize: bool = True
    """Bring every row of the update to norm 1 before it is orthogonalised (MuonEq-R)."""
    muon_backend_steps: Annotated[int, Field(ge=1, le=100)] = 5
    """Newton-Schulz iterations."""
    muon_coefficients: Literal["fixed", "polar_express"] = "fixed"
    """Coefficients of the Newton-Schulz iteration."""
    muon_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the iteration; auto is bfloat16 on CUDA and float32 on CPU."""
    grad_clip_norm: NonNegative = 0.3
    """Clip the global gradient norm here; 0 switches clipping off."""
    warmdown_frac: Fraction = 0.667
    """Last fraction of the run over which the learning rates fall linearly."""
    min_lr: Fraction = 0.0
    """Floor of the learning-rate multiplier (a multiplier, not a rate)."""
    ema_decay: Fraction = 0.0
    """Weight of the past in the moving average of the parameters (float32); 0 keeps none."""


class ParallelConfig(_Section):
    """How the plain model is laid out over ranks and compiled."""

    compile: bool = True
    """Compile embedding, blocks, skips, head and JEPA loss as regions."""
    compile_warmup: bool = False
    """Compile every graph that the run will need before step 0 (all phases, JEPA, evaluation);
    no effect where compile is off."""
    dp_replicate: Annotated[int, Field(ge=1, le=2**20)] = 1
    """Replicas of the sharded model (HSDP when > 1; equal to the world size: pure replication)."""
    dp_shard: int = -1
    """Ranks over which one replica is sharded; -1 takes all that dp_replicate leaves."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of computation (master weights and gradient reduction stay float32);
    auto is bfloat16 on CUDA and float32 on CPU."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math", "flex"] = "auto"
    """Attention kernel; auto is PyTorch's choice for the device. One that the device cannot run is
    refused (the CPU runs flash and math)."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in backward: none; all but attention and matmul (selective); or all
    but attention (full)."""
    blocks_per_unit: PositiveInt = 1
    """Consecutive blocks that are gathered, reduced and freed together. More of them mean fewer,
    larger collectives and less work for the host, but less overlap and more memory. Looped blocks
    form units of their own, unless one unit holds all blocks (this many or fewer): then the whole
    model is gathered once and stays so until backward is done."""
    deterministic: bool = False
    """Run deterministic algorithms only, on CUDA: slower, without cuDNN attention, and the same
    start of the same run gives the same bits (docs/performance.md). The CPU always does."""
    reshard_after_forward: bool = True
    """Free gathered parameters after each unit's forward (less memory, one more gather)."""
    keep_looped_gathered: bool = True
    """Keep looped blocks gathered from their first pass until backward is done, and reduce their
    gradients once."""
    accumulate: Literal["gathered", "sharded"] = "gathered"
    """Between micro-batches: parameters gathered and gradients whole, so that a step gathers and
    reduces once; or both sharded, at a gather and a reduction per micro-batch (for models of which
    a rank cannot hold a whole copy)."""
    timeout_seconds: Annotated[float, Field(gt=0.0, le=1e7)] = 600.0
    """A collective that waits longer ends the job instead of hanging."""


class EvalConfig(_Section):
    """Validation on a fixed set."""

    every: Count = 100
    """Steps between validations; 0 evaluates only at the end."""
    sequences: Count = 0
    """Validation sequences, from the start of the shards; 0 takes all of them."""
    sample_tokens: Annotated[int, Field(ge=0, le=2**16)] = 64
    """Length of the text sample written at each validation; 0 writes none."""
    prompt: Text = ""
    """Beginning of the sample."""


class CheckpointConfig(_Section):
    """What a run needs to go on: docs/checkpointing.md. One is always saved when a run stops."""

    every: Count = 1000
    """Steps between checkpoints; 0 goes by minutes alone."""
    minutes: Annotated[float, Field(ge=0.0, le=1e7)] = 0.0
    """Minutes between checkpoints, besides those by steps; 0 goes by steps alone."""
    keep_last: PositiveInt = 2
    """How many of the newest are kept."""
    keep_every: Count = 0
    """Those at multiples of this step are kept for ever; 0 keeps none so."""
    grace_seconds: Annotated[float, Field(gt=0.0, le=1e7)] = 300.0
    """Longest time from a stop signal to the exit; a rank that has not saved by then leaves all the
    same. Choose a little less than the cluster grants."""
    resume: PathText = "auto"
    """auto: go on from the newest whole one in run.dir, if there is any. never: only a new run.
    Otherwise the folder of a checkpoint, of any run, to go on from in a new run.dir."""
    allow_other_data: bool = False
    """Go on although the data are not those that the checkpoint was trained on."""


class ProfileConfig(_Section):
    """A look at single steps (docs/monitoring.md); slows them down."""

    start: Count = 20
    """Steps that this start of the run takes before; the first ones compile."""
    steps: Count = 0
    """How many are traced; 0 traces nothing."""
    ranks: Annotated[list[Count], Field(max_length=4096)] = [0]
    """Which ranks leave a trace."""


class MonitorConfig(_Section):
    """What is watched while the run trains."""

    late_seconds: Seconds = 120.0
    """A rank that stays in one place (step and phase) for longer is told about, with everybody's
    Python stacks in the logs; 0 does not watch. Compiling counts as a place."""
    jepa_every: Count = 100
    """Steps between two looks at whether the objective is alive and what it learns
    (docs/objective.md), while it is on; such steps are logged. 0 never looks."""
    dead_gradient_ratio: NonNegative = 1e-5
    """Warn when the gradient of lambda * JEPA at the tapped state is less than this share of
    cross-entropy's: far less than cross-entropy's own changes from batch to batch."""
    collapse_share: Fraction = 0.25
    """Warn when the effective rank of the tapped states is below this share of what it was when
    first looked at, twice in a row."""
    straggler_ratio: NonNegative = 1.3
    """Warn when the slowest rank takes so many times as long as a typical one for the same
    computation, several records in a row; 0 does not compare ranks."""
    histogram_every: Count = 0
    """Steps between two histograms of parameters and clipped gradients in TensorBoard; 0
    makes none."""
    profile: ProfileConfig = ProfileConfig()
    memory_snapshot: bool = False
    """Record the allocations of every CUDA device and leave them in profile/ at the end. What is
    allocated when memory runs out is left there in any case."""


class Config(_Section):
    """Everything that defines a run."""

    seed: Seed = 0
    """Seeds initialisation, data order and spans; nothing else does."""
    run: RunConfig = RunConfig()
    train: TrainConfig = TrainConfig()
    batch: BatchConfig = BatchConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    jepa: JepaConfig = JepaConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()


# The environment switches of parameter-golf issue #1772.
ENVIRONMENT = {
    "JEPA_LAMBDA": "jepa.lambda",
    "JEPA_MAX_SPAN_FRAC": "jepa.max_span_frac",
    "JEPA_START_FRAC": "jepa.start_frac",
    "JEPA_LAYER": "jepa.layer",
}
# JEPA_* variables that are not configuration.
_FOREIGN_ENVIRONMENT = {"JEPA_GOLDEN_DIR"}


@dataclass(frozen=True)
class Resolved:
    """A validated configuration and, per dotted key, where its value came from."""

    config: Config
    sources: Mapping[str, str]

    def describe(self) -> str:
        """One line per key: value and origin (default, file, environment, command line)."""
        lines = []
        for key, value in flatten(to_dict(self.config)):
            shown = f"{key}: {_yaml_scalar(value)}"
            lines.append(f"{shown:<50} # {self.sources.get(key, 'default')}")
        return "\n".join(lines)


def load(
    path: str | Path | None,
    overrides: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Resolved:
    """Resolve a configuration.

    Args:
        path: YAML file, or None for defaults only.
        overrides: ``KEY=VALUE`` strings, e.g. ``jepa.lambda=0.02``.
        environ: Environment to read the ``JEPA_*`` switches from (default: the process's).

    Raises:
        UserError: unknown keys, wrong types, impossible combinations; all of them at once.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    problems: list[str] = []
    unknown = 0
    layers = [
        *([_from_file(Path(path))] if path is not None else []),
        _from_environment(os.environ if environ is None else environ),
        _from_command_line(overrides),
    ]
    for layer in layers:
        for key, value, source in layer:
            if key in _known_keys():
                values[key] = value
                sources[key] = source
                continue
            unknown += 1
            if unknown <= _MOST_UNKNOWN:
                problems.append(_unknown_key(key, source))
    if unknown > _MOST_UNKNOWN:
        problems.append(f"and {unknown - _MOST_UNKNOWN} more unknown keys")
    try:
        config = Config.model_validate(_nest(values))
    except ValidationError as error:
        problems += [_explain(item, sources) for item in error.errors()]
        raise UserError(*problems) from None
    problems += [*check(config), *_homeless(config)]
    if problems:
        raise UserError(*problems)
    return Resolved(config, sources)


def _homeless(config: Config) -> Iterator[str]:
    """Paths in the home directory of somebody whom this host does not know."""
    for key, value in flatten(to_dict(config)):
        is_path = key in _text_keys() and key != "eval.prompt" and str(value).startswith("~")
        if is_path and os.path.expanduser(value) == value:
            yield f"{key}={value!r}: there is no such home directory on this host"


def check(config: Config) -> list[str]:
    """Problems of combination that no single field can see, one line each."""
    model, jepa = config.model, config.jepa
    train, optim, parallel = config.train, config.optim, config.parallel
    rules = [
        (
            model.model_dim % model.num_heads == 0,
            f"model.num_heads={model.num_heads}: must divide model.model_dim={model.model_dim}",
        ),
        (
            model.num_heads % model.num_kv_heads == 0,
            f"model.num_kv_heads={model.num_kv_heads}: must divide "
            f"model.num_heads={model.num_heads}",
        ),
        (
            model.rotary_dims % 2 == 0 and model.rotary_dims <= model.head_dim,
            f"model.rope_dims={model.rope_dims}: must be even and at most the head width "
            f"{model.head_dim} (0 rotates the whole head, whose width must then be even)",
        ),
        (
            model.mlp_hidden >= 1,
            f"model.mlp_mult={model.mlp_mult}: leaves no hidden unit at "
            f"model.model_dim={model.model_dim}",
        ),
        (
            model.num_loops == 0 or model.loop_start <= model.loop_end < model.num_layers,
            f"model.loop_start={model.loop_start}, model.loop_end={model.loop_end}: must be a "
            f"range inside the blocks 0..{model.num_layers - 1}",
        ),
        (
            not model.untie_loop_mlps or model.num_loops > 0,
            "model.untie_loop_mlps=true: needs model.num_loops > 0",
        ),
        (
            not model.skip_gates or model.unet_skips,
            "model.skip_gates=true: needs model.unet_skips=true",
        ),
        (
            model.parallel_residual_start < model.num_layers,
            f"model.parallel_residual_start={model.parallel_residual_start}: must be -1 (never) "
            f"or a block 0..{model.num_layers - 1}",
        ),
        (
            model.vocab_size <= 2**16,
            f"model.vocab_size={model.vocab_size}: token shards hold uint16 ids, at most 65536",
        ),
        (
            -1 <= jepa.layer < model.num_layers,
            f"jepa.layer={jepa.layer}: must be in -1..{model.num_layers - 1} "
            f"(model.num_layers={model.num_layers})",
        ),
        (
            jepa.lambda_ == 0 or model.seq_len >= 3,
            f"model.seq_len={model.seq_len}: the JEPA objective needs at least 3 positions",
        ),
        (
            config.data.bos_id is None or config.data.bos_id < model.vocab_size,
            f"data.bos_id={config.data.bos_id}: must be below model.vocab_size={model.vocab_size}",
        ),
        (
            jepa.max_span_frac > 0 or jepa.lambda_ == 0,
            "jepa.max_span_frac=0.0: must be above 0 when jepa.lambda > 0",
        ),
        (
            jepa.lambda_ == 0 or jepa.start_frac < 1,
            f"jepa.start_frac={jepa.start_frac}: with jepa.lambda={jepa.lambda_} the objective "
            "would never start; use jepa.lambda=0 to leave it out",
        ),
        (
            jepa.lambda_ == 0 or jepa.start_frac >= 1 or _starts(config),
            f"jepa.start_frac={jepa.start_frac}, jepa.ramp_frac={jepa.ramp_frac}: with "
            f"train.steps={train.steps} the weight would be 0 in every step; begin earlier, or use "
            "jepa.lambda=0 to leave the objective out",
        ),
        (
            model.num_loops == 0 or not 0 < train.loop_phase2_at < train.enable_looping_at,
            f"train.loop_phase2_at={train.loop_phase2_at}: must not come before "
            f"train.enable_looping_at={train.enable_looping_at} (0 skips phase 1)",
        ),
        (
            optim.beta1 < 1 and optim.beta2 < 1,
            f"optim.beta1={optim.beta1}, optim.beta2={optim.beta2}: must be below 1",
        ),
        (
            optim.ema_decay < 1,
            "optim.ema_decay=1.0: the average would never move; use a value below 1",
        ),
        (
            model.num_layers + model.num_loops * (model.loop_end - model.loop_start + 1) <= 2**14
            or model.num_loops == 0,
            f"model.num_loops={model.num_loops}: at most {2**14} blocks can be executed in a pass",
        ),
        (
            config.batch.sequences * jepa.spans_per_sequence <= 2**24,
            f"jepa.spans_per_sequence={jepa.spans_per_sequence}: times batch.sequences="
            f"{config.batch.sequences} there can be at most {2**24} spans in a step",
        ),
        (
            parallel.dp_shard == -1 or parallel.dp_shard >= 1,
            f"parallel.dp_shard={parallel.dp_shard}: must be -1 (all ranks left) or at least 1",
        ),
        (
            not parallel.deterministic or parallel.attention != "cudnn",
            "parallel.attention=cudnn: its backward is not deterministic and parallel.deterministic"
            " is true; use auto, flash, efficient, math or flex",
        ),
    ]
    return [problem for holds, problem in rules if not holds]


def _starts(config: Config) -> bool:
    """Whether the weight of the objective is above 0 in the last step; by the clock, nobody can
    tell beforehand."""
    if config.train.max_wallclock_seconds is not None:
        return True
    last = (config.train.steps - 1) / config.train.steps
    start = config.jepa.start_frac
    return last > start or (last == start and config.jepa.ramp_frac == 0)


def check_world(config: Config, world_size: int) -> None:
    """Reject a configuration that cannot run on ``world_size`` ranks.

    Raises:
        UserError: the batch has fewer sequences than ranks, or the mesh does not fit.
    """
    problems = []
    if config.batch.sequences < world_size:
        problems.append(
            f"batch.sequences={config.batch.sequences}: the global batch needs at least one "
            f"sequence per rank ({world_size}); raise it or start fewer ranks"
        )
    replicate, shard = config.parallel.dp_replicate, config.parallel.dp_shard
    if world_size % replicate or (shard != -1 and replicate * shard != world_size):
        problems.append(
            f"parallel.dp_replicate={replicate}, parallel.dp_shard={shard}: their product must be "
            f"the world size {world_size} (dp_shard=-1 takes what dp_replicate leaves)"
        )
    if problems:
        raise UserError(*problems)


def to_dict(config: BaseModel) -> dict[str, Any]:
    """The configuration as nested plain data, with the names used in files."""
    return config.model_dump(by_alias=True)


def to_yaml(config: Config) -> str:
    """The configuration as YAML with all defaults written out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaf values of nested mappings, in order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# ---------------------------------------------------------------------------- reading


# A resolved configuration has 6 KB.
_MOST_BYTES = 2**16
_MOST_NODES = 2**16
_DEEPEST = 32
_MOST_DIGITS = 40
_MOST_UNKNOWN = 20
_LONGEST_SUGGESTED = 80
_MOST_SHOWN = 120

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML in which numbers are decimal (010 is ten, 1e-3 a number) and dates are text.

    Refuses a key given twice and explicit tags besides those of JSON's types.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as the base class declares it
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Decimal; an integer unless there is a point or an exponent."""
        text = self.construct_scalar(node).replace("_", "")
        if len(text) > _MOST_DIGITS:
            raise yaml.MarkedYAMLError(
                problem=f"a number of more than {_MOST_DIGITS} digits", problem_mark=node.start_mark
            )
        if node.tag == f"{_TAG}int":
            return int(text)
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))


for _name, _pattern, _first in (
    ("bool", "(?i:yes|no|true|false|on|off)", "yYnNtTfFoO"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
    ("int", r"[-+]?[0-9](_?[0-9])*", "-+0123456789"),
    ("float", r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", "-+0123456789."),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
for _name in ("null", "bool", "str", "seq", "map"):
    _Loader.add_constructor(f"{_TAG}{_name}", yaml.SafeLoader.yaml_constructors[f"{_TAG}{_name}"])
for _name in ("int", "float"):
    _Loader.add_constructor(f"{_TAG}{_name}", _Loader.construct_number)
_Loader.yaml_constructors[None] = yaml.SafeLoader.construct_undefined

_Layer = Iterable[tuple[str, Any, str]]


def _parse_yaml(text: str) -> tuple[Any, dict[str, str]]:
    """Return a document's value, and the text of its plain scalars by dotted key.

    Raises:
        ValueError: not YAML, or larger or deeper than any configuration; says why on one line.
    """
    if len(text) > _MOST_BYTES:
        raise ValueError(f"longer than {_MOST_BYTES // 2**10} KiB")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _check_extent(node, {}, 0)
        return loader.construct_document(node), dict(_plain_scalars(node))
    except RecursionError:
        raise ValueError("nested too deep") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    finally:
        if loader is not None:
            loader.dispose()


def _check_extent(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Return the number of nodes with all aliases written out.

    Args:
        node: The root of what is counted.
        sizes: Of the nodes that were counted, by id; 0 for those that are being counted.
        depth: Of ``node``.

    Raises:
        ValueError: too many, too deep, or within itself.
    """
    if depth > _DEEPEST:
        raise ValueError("nested too deep")
    known = sizes.get(id(node))
    if known == 0:
        raise ValueError("an alias stands for something that holds it")
    if known is not None:
        return known
    sizes[id(node)] = 0
    children = [] if isinstance(node, yaml.ScalarNode) else node.value
    parts = (part for child in children for part in _as_tuple(child))
    size = 1
    for part in parts:
        size += _check_extent(part, sizes, depth + 1)
        if size > _MOST_NODES:
            raise ValueError(f"more than {_MOST_NODES} values with all aliases written out")
    sizes[id(node)] = size
    return size


def _as_tuple(child: Any) -> tuple[yaml.Node, ...]:
    return child if isinstance(child, tuple) else (child,)


def _plain_scalars(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, str]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if isinstance(value, yaml.ScalarNode):
            yield f"{prefix}{key.value}", value.value
        else:
            yield from _plain_scalars(value, f"{prefix}{key.value}.")


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping; an empty file is an empty one.

    Raises:
        UserError: unreadable, not YAML, a key given twice, or no mapping.
    """
    return _read_mapping(path)[0]


def _read_mapping(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        tree, texts = _parse_yaml(_read_text(path))
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return {str(name): value for name, value in tree.items()}, texts


def _read_text(path: Path) -> str:
    """Read a regular file of bounded size: devices and pipes may never end.

    Raises:
        OSError, ValueError: it cannot be read, or is none.
    """
    if "\0" in str(path):
        raise ValueError("its name holds a NUL character")
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(None, "Is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("expected a regular file")
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"larger than {_MOST_BYTES // 2**10} KiB")
    return data.decode()


def _from_file(path: Path) -> _Layer:
    tree, texts = _read_mapping(path)
    return [
        (key, _as_text(key, value, texts), f"file {path}") for key, value in _flatten_known(tree)
    ]


def _as_text(key: str, value: Any, texts: Mapping[str, str]) -> Any:
    """Give a text key what stands in the file: 2026-11-26 and yes are names, too."""
    is_other = key in _text_keys() and not isinstance(value, str | None)
    return texts.get(key, value) if is_other else value


def _flatten_known(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten a file; an empty section counts as absent, a scalar section is kept to be refused."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _flatten_known(value, f"{key}.")
        elif value is None and key in _sections():
            continue
        else:
            yield key, value


def _from_environment(environ: Mapping[str, str]) -> _Layer:
    layer = []
    for name in sorted(environ):
        if not name.startswith("JEPA_") or name in _FOREIGN_ENVIRONMENT:
            continue
        if name not in ENVIRONMENT:
            raise UserError(
                f"environment {name}: unknown switch{_suggest(name, ENVIRONMENT)}; "
                f"known are {', '.join(ENVIRONMENT)}"
            )
        source = f"environment {name}"
        key = ENVIRONMENT[name]
        layer.append((key, parse_value(key, environ[name], source), source))
    return layer


def _from_command_line(overrides: Iterable[str]) -> _Layer:
    layer: list[tuple[str, Any, str]] = []
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"command line: {item!r}: expected KEY=VALUE, e.g. jepa.lambda=0.02")
        key = key.strip()
        value = parse_value(key, text, f"command line: {key}")
        layer += [(k, v, "command line") for k, v in _flatten_known({key: value})]
    return layer


def parse_value(key: str, text: str, source: str) -> Any:
    """Return the value in ``KEY=VALUE``: the text as it stands where the key's type is text, a
    YAML value otherwise.

    Raises:
        UserError: not YAML; ``source`` says where it was given.
    """
    if key in _text_keys():
        return None if text == "null" and _text_keys()[key] else text
    if key not in _known_keys() and key not in _sections():
        return text
    try:
        return _parse_yaml(text)[0]
    except ValueError as error:
        raise UserError(f"{source}={_shown(text)}: not a valid value: {error}") from None


def as_override(key: str, value: Any) -> str:
    """Return the ``KEY=VALUE`` that ``load`` reads as ``value``, on one line unless it is text."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


@functools.cache
def _known_keys() -> dict[str, None]:
    return {key: None for key, _ in flatten(to_dict(Config()))}


@functools.cache
def _sections() -> frozenset[str]:
    parts = [key.split(".") for key in _known_keys()]
    return frozenset(".".join(path[:n]) for path in parts for n in range(1, len(path)))


@functools.cache
def _text_keys() -> dict[str, bool]:
    """The keys whose type is text, and whether they may be null."""
    return dict(_texts_of(Config))


def _texts_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, bool]]:
    for name, field in section.model_fields.items():
        key, annotation = f"{prefix}{field.alias or name}", field.annotation
        if _is_section(field):
            yield from _texts_of(annotation, f"{key}.")  # type: ignore[arg-type]
        elif _is_text(annotation):
            yield key, type(None) in get_args(annotation)


def _is_text(annotation: Any) -> bool:
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return all(isinstance(part, str) for part in parts)
    if get_origin(annotation) is Annotated:
        return _is_text(parts[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return all(part is type(None) or _is_text(part) for part in parts)
    return annotation is str


def _unknown_key(key: str, source: str) -> str:
    if key in _sections():
        return f"{source}: {key}: is a section; set its keys, e.g. {_example(key)}"
    return f"{source}: {_cut(key)}: unknown key{_suggest(key, _known_keys())}"


def _example(section: str) -> str:
    return next(key for key in _known_keys() if key.startswith(f"{section}."))


def _suggest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` for the nearest known name, or nothing."""
    known = list(known)
    if len(name) > _LONGEST_SUGGESTED:
        return ""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # a right leaf in the wrong section, e.g. lambda for jepa.lambda
        leaf = name.rpartition(".")[2]
        near = [key for key in known if key.rpartition(".")[2] == leaf][:1]
    return f" (did you mean {near[0]!r}?)" if near else ""


def _explain(item: Any, sources: Mapping[str, str]) -> str:
    path = [str(part) for part in item["loc"]]
    key = next(
        (k for k in (".".join(path[:n]) for n in range(len(path), 0, -1)) if k in sources),
        ".".join(path),
    )
    return f"{sources.get(key, 'configuration')}: {key}={_shown(item['input'])}: {item['msg']}"


def _shown(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _yaml_scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


# ---------------------------------------------------------------------------- reference page


def reference_page() -> str:
    """docs/configuration.md: every key, its type, default and meaning (Markdown)."""
    lines = [
        "# Configuration reference",
        "",
        "Generated by `python -m jepa_dist.config > docs/configuration.md`; a test keeps it true.",
        "",
        "Values are resolved in this order, later ones win: default, YAML file, environment,",
        "`KEY=VALUE` on the command line. `python -m jepa_dist.train CONFIG --print-config` shows",
        "the result and where each value came from.",
        "",
        "A key whose type is `str`, or one of several names, takes the text as it stands, on the",
        "command line without quotes of its own (`run.dir=runs/exp #2`); all others take a YAML",
        "value. Numbers are decimal. Paths are paths of a mounted file system, not URLs.",
        "",
        "| environment | key |",
        "|---|---|",
        *[f"| `{name}` | `{key}` |" for name, key in ENVIRONMENT.items()],
    ]
    for name, field in Config.model_fields.items():
        lines += ["", *_section(name, field)]
    return "\n".join(lines) + "\n"


def _section(name: str, field: Any) -> list[str]:
    """A heading and the table of its keys; sections within follow."""
    header = ["| key | type | default | meaning |", "|---|---|---|---|"]
    if not _is_section(field):
        return ["## top level", "", *header, _row(name, field)]
    within = [(f"{name}.{f.alias or leaf}", f) for leaf, f in field.annotation.model_fields.items()]
    rows = [_row(key, leaf) for key, leaf in within if not _is_section(leaf)]
    lines = [f"## {name}", "", (field.annotation.__doc__ or "").strip(), "", *header, *rows]
    for key, leaf in within:
        lines += ["", *_section(key, leaf)] if _is_section(leaf) else []
    return lines


def _is_section(field: Any) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _row(key: str, field: Any) -> str:
    meaning = " ".join((field.description or "").split())
    return f"| `{key}` | {_type_name(field)} | `{_yaml_scalar(field.default)}` | {meaning} |"


def _type_name(field: Any) -> str:
    annotation = field.annotation
    options = getattr(annotation, "__args__", None)
    if options and all(isinstance(option, str) for option in options):
        return ", ".join(f"`{option}`" for option in options)
    bare = [getattr(part, "__origin__", part) for part in options or [annotation]]
    names = ["null" if part.__name__ == "NoneType" else part.__name__ for part in bare]
    return f"list of {names[0]}" if annotation in (list[Count],) else " or ".join(names)


if __name__ == "__main__":
    print(reference_page(), end="")
