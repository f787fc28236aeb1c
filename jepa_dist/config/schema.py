"""The schema: every option is one annotated field with its meaning right below it.

A section yields its own violated rules (``problems``); rules between sections are in
``jepa_dist.config.rules``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from jepa_dist.config.fields import (
    Count,
    Decay,
    Fraction,
    Name,
    NonNegative,
    PathText,
    Positive,
    PositiveInt,
    Rate,
    Seconds,
    Seed,
    ShardsText,
    Text,
)

_MOST_EXECUTIONS = 2**14
_MOST_SOURCES = 64

Bits = Annotated[int, Field(ge=2, le=8)]
ClipSigmas = Annotated[float, Field(gt=0.0, le=1e3)]
ClipFactor = Annotated[float, Field(gt=0.0, le=1e3)]


class Section(BaseModel):
    """A group of options: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def problems(self) -> Iterator[str]:
        """Yield the rules between this section's own fields that are violated, one line each."""
        yield from ()


class RunConfig(Section):
    """The run directory."""

    dir: PathText = "runs/default"
    """Directory of the run: resolved config, metrics, checkpoints, TensorBoard events, logs. A
    directory of another run is refused, never overwritten."""


class TrainConfig(Section):
    """Length and phases of the run. Fractions are of the whole run."""

    steps: PositiveInt = 1000
    """Optimizer steps. All schedules scale with this length."""
    max_wallclock_seconds: Annotated[float, Field(gt=0.0, le=1e9)] | None = None
    """Stop after this much training time (evaluation and warm-up excluded), and advance all
    schedules by that time; null: by steps alone."""
    stop_at: PositiveInt | None = None
    """Save a checkpoint and stop after this step; the schedules remain those of train.steps."""
    init_from: PathText | None = None
    """Weights to start from instead of random ones (docs/using.md): a finished run, an exported
    model, a folder written for transformers, an artifact, or a final_model.pt. The architecture
    must be the same. Only a new run reads it."""
    max_bad_steps: PositiveInt = 10
    """Roll back to the newest checkpoint after this many consecutive steps whose loss or gradient
    is not finite (such steps are skipped)."""
    log_every: PositiveInt = 10
    """Record metrics every this many steps (only then the device is synchronized)."""
    gc_every: Count = 50
    """Run Python's garbage collector every this many steps, on all ranks in the same step, instead
    of automatically (which pauses one rank at a time); 0: automatically."""
    enable_looping_at: Fraction = 0.5
    """Fraction of the run at which depth recurrence starts (phase 1: one extra pass). No effect
    unless model.num_loops > 0."""
    loop_phase2_at: Fraction = 0.0
    """Fraction of the run from which all model.num_loops extra passes are made (phase 2); 0: from
    enable_looping_at, without phase 1."""


class BatchConfig(Section):
    """The global batch, which does not depend on the number of ranks."""

    sequences: Annotated[int, Field(ge=1, le=2**20)] = 32
    """Sequences per optimizer step, over all ranks."""
    micro: Annotated[int, Field(ge=1, le=2**20)] = 8
    """Largest number of sequences in one forward pass of a rank; gradients are accumulated over as
    many passes as its share of the batch takes."""


class ModelConfig(Section):
    """The GPT. The defaults are a plain GPT; features of the reference are switched on one by one
    (docs/recipe.md)."""

    vocab_size: Annotated[int, Field(ge=1, le=2**24)] = 257
    """Number of token ids (257: bytes and a BOS)."""
    seq_len: Annotated[int, Field(ge=1, le=2**22)] = 512
    """Training sequence length; for longer inputs the rotary base is rescaled (NTK)."""
    num_layers: Annotated[int, Field(ge=1, le=4096)] = 4
    """Number of blocks."""
    model_dim: Annotated[int, Field(ge=1, le=2**18)] = 128
    """Width of the residual stream."""
    num_heads: PositiveInt = 4
    """Query heads."""
    num_kv_heads: PositiveInt = 4
    """Key/value heads; each is shared by num_heads / num_kv_heads consecutive query heads."""
    mlp_mult: Annotated[float, Field(gt=0.0, le=1024.0)] = 4.0
    """MLP hidden width = floor(mlp_mult * model_dim)."""
    embedding_dim: Annotated[int, Field(ge=1, le=2**18)] | None = None
    """Width of the token embedding; null: model_dim. Another width adds projections to and from
    model_dim."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head."""
    tied_embed_init_std: Rate = 0.005
    """Standard deviation of the initial values of a tied embedding (an untied one: 1)."""
    logit_softcap: NonNegative = 0.0
    """Replace logits by cap * tanh(logits / cap); 0: no cap."""
    rope_base: Positive = 10000.0
    """Base of the rotary frequencies."""
    rope_dims: Count = 0
    """Dimensions of each head that rotary embedding rotates (even); 0: all."""
    qk_gain_init: Positive | None = None
    """Initial value of a learned gain per query head, applied after QK norm; null: no gain."""
    ln_scale: bool = False
    """Multiply the normalized inputs of block i by 1/sqrt(i+1)."""
    xsa_last_n: Count = 0
    """In the last n blocks, subtract from each head's output its projection onto the position's own
    value vector (XSA)."""
    x0_mix: bool = False
    """Mix the embedding into the residual stream before every block, with learned weights per
    channel."""
    branch_scales: bool = False
    """Learned scales per channel on the outputs of attention and MLP."""
    unet_skips: bool = False
    """U-Net skip connections from the first half of the executed blocks to the second."""
    skip_gates: bool = False
    """Gate each skip connection with a learned sigmoid (needs unet_skips)."""
    parallel_residual_start: int = Field(default=-1, ge=-1)
    """First block whose attention and MLP read the same input (parallel residuals); -1: none."""
    num_loops: Annotated[int, Field(ge=0, le=1024)] = 0
    """Extra passes over blocks loop_start..loop_end in phase 2 (phase 1: one pass)."""
    loop_start: Count = 0
    """First block of the looped segment."""
    loop_end: Count = 0
    """Last block of the looped segment (inclusive)."""
    untie_loop_mlps: bool = False
    """Use separate MLP weights in every extra pass (needs num_loops > 0)."""
    document_mask: bool = False
    """Attend only within the own document of a packed row (needs BOS ids in the shards)."""
    reset_positions: bool = False
    """Count positions from the start of each document of a row (needs document_mask)."""

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

    @property
    def executions(self) -> int:
        """Number of blocks executed in a pass with all loops."""
        looped = self.loop_end - self.loop_start + 1
        return self.num_layers + (self.num_loops * looped if self.num_loops else 0)

    def problems(self) -> Iterator[str]:
        """Yield the violated rules."""
        if self.model_dim % self.num_heads:
            yield (
                f"model.num_heads={self.num_heads}: must divide model.model_dim={self.model_dim}"
            )
        if self.num_heads % self.num_kv_heads:
            yield (
                f"model.num_kv_heads={self.num_kv_heads}: must divide "
                f"model.num_heads={self.num_heads}"
            )
        if self.rotary_dims % 2 or self.rotary_dims > self.head_dim:
            yield (
                f"model.rope_dims={self.rope_dims}: must be even and at most the head width "
                f"{self.head_dim} (0 rotates the whole head, whose width must then be even)"
            )
        if self.mlp_hidden < 1:
            yield (
                f"model.mlp_mult={self.mlp_mult}: leaves no hidden unit at "
                f"model.model_dim={self.model_dim}"
            )
        if self.num_loops and not self.loop_start <= self.loop_end < self.num_layers:
            yield (
                f"model.loop_start={self.loop_start}, model.loop_end={self.loop_end}: must be a "
                f"range inside the blocks 0..{self.num_layers - 1}"
            )
        if self.untie_loop_mlps and not self.num_loops:
            yield "model.untie_loop_mlps=true: needs model.num_loops > 0"
        if self.reset_positions and not self.document_mask:
            yield "model.reset_positions=true: needs model.document_mask=true"
        if self.skip_gates and not self.unet_skips:
            yield "model.skip_gates=true: needs model.unet_skips=true"
        if self.parallel_residual_start >= self.num_layers:
            yield (
                f"model.parallel_residual_start={self.parallel_residual_start}: must be -1 (none) "
                f"or a block 0..{self.num_layers - 1}"
            )
        if self.num_loops and self.executions > _MOST_EXECUTIONS:
            yield (
                f"model.num_loops={self.num_loops}: at most {_MOST_EXECUTIONS} blocks can be "
                "executed in a pass"
            )


Weight = Annotated[float, Field(ge=0.0, le=1e6)]


class TrainSource(Section):
    """A source of a mixture."""

    name: Name
    """Of metrics: letters, digits and `_.-`."""
    shards: ShardsText
    """Glob pattern of its shards, in sorted order; or a URL with wildcards."""
    weight: Weight = 1.0
    """Its share of the training sequences, relative to the sum of all weights."""
    epochs_at_most: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """Refuse at the start a run that would visit its sequences more often; null: no limit."""


class ValSource(Section):
    """A source of the validation set."""

    name: Name
    """Of metrics: `val/loss/NAME`, `val/bpb/NAME`."""
    shards: ShardsText
    """Glob pattern of its shards, in sorted order; or a URL with wildcards."""


class MixtureStage(Section):
    """A change of the weights."""

    at: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Fraction of train.steps from which the weights hold."""
    weights: dict[Name, Weight]
    """Weight of every source, by name."""


def _form(value: object) -> str:
    return "list" if isinstance(value, list) else "text"


_Sources = Field(min_length=1, max_length=_MOST_SOURCES)
TrainData = Annotated[
    Annotated[ShardsText, Tag("text")]
    | Annotated[Annotated[list[TrainSource], _Sources], Tag("list")],
    Discriminator(_form),
]
ValData = Annotated[
    Annotated[ShardsText, Tag("text")]
    | Annotated[Annotated[list[ValSource], _Sources], Tag("list")],
    Discriminator(_form),
]


class DataConfig(Section):
    """Token shards: a header of 256 int32 words, then uint16 or uint32 ids (docs/data.md)."""

    train: TrainData = "data/stdlib/train_*.bin"
    """Glob pattern of the training shards, in sorted order, or a URL with wildcards; or a list
    of sources (name, shards, weight, epochs_at_most), which are mixed by their weights."""
    val: ValData = "data/stdlib/val_*.bin"
    """Glob pattern of the validation shards, or a URL with wildcards; or a list of sources (name,
    shards), each of which is reported by itself as well."""
    stages: Annotated[list[MixtureStage], Field(max_length=64)] = []
    """Changes of the weights of data.train over the run, in order (at, weights)."""
    tokenizer: PathText | None = "bytes"
    """'bytes', or the path of a SentencePiece .model (extra [sentencepiece]), a byte-level
    tokenizer.json (extra [hf]) or a .tiktoken file (extra [tiktoken]); null: unknown, so neither
    bits per byte nor text samples are available."""
    bos_id: Count | None = None
    """Token id at the beginning of every document; null: from meta.json or the tokenizer."""
    workers: Annotated[int, Field(ge=0, le=256)] = 2
    """Loader processes per rank; 0: a thread of the training process."""
    prefetch: Annotated[int, Field(ge=1, le=4096)] = 4
    """Micro-batches that each loader process prepares in advance."""

    def problems(self) -> Iterator[str]:
        """Yield the violated rules."""
        for key, sources in (("data.train", self.train), ("data.val", self.val)):
            names = [] if isinstance(sources, str) else [source.name for source in sources]
            for name in {name: None for name in names if names.count(name) > 1}:
                yield f"{key}: {names.count(name)} sources are named {name}; names must be distinct"
        if isinstance(self.train, str):
            if self.stages:
                yield "data.stages: only a data.train that is a list of sources has weights"
            return
        if not any(source.weight for source in self.train):
            yield "data.train: the weights of its sources are all 0; at least one must be above"
        yield from self._stage_problems({source.name for source in self.train})

    def _stage_problems(self, names: set[str]) -> Iterator[str]:
        starts = [stage.at for stage in self.stages]
        if any(after <= before for before, after in pairwise(starts)):
            yield f"data.stages: at={starts}: each stage must begin after the one before it"
        for stage in self.stages:
            if stage.weights.keys() != names:
                yield (
                    f"data.stages: at={stage.at}: its weights are of {', '.join(stage.weights)}; "
                    f"expected one for each source of data.train: {', '.join(sorted(names))}"
                )
            elif not any(stage.weights.values()):
                yield f"data.stages: at={stage.at}: the weights are all 0; one must be above"


class ObjectiveSection(Section):
    """The settings of one objective, in a field of ``JepaConfig`` that has the objective's name."""

    within_documents: bool = False
    """Whether the objective needs to know where documents begin."""

    def problems_of(self, model: ModelConfig, jepa: JepaConfig) -> Iterator[str]:
        """Yield the violated rules, given the model and what all objectives share; asked only if
        the objective is chosen."""
        yield from ()


class NextStateConfig(ObjectiveSection):
    """The next-state objective (docs/objective.md)."""

    target_layer: Annotated[int, Field(ge=0)] | None = None
    """Block whose output (at its last execution) is predicted; null: round(0.2 * layers)."""
    shift: Count = 1
    """Distance in positions from the predicting state to its target. 0 predicts the same position:
    a control arm, trivially solved."""
    head: Literal["none", "linear", "swiglu"] = "swiglu"
    """Map from the normalized state to the prediction; without bias."""
    head_mult: Annotated[float, Field(gt=0.0, le=64.0, allow_inf_nan=False)] = 4.0
    """Hidden width of a swiglu head, relative to model.model_dim."""
    within_documents: bool = False
    """Do not count positions whose target begins a document (needs BOS ids in the shards)."""
    stop_gradient: bool = True
    """Let no gradient reach the target. false: a control arm."""

    def target(self, num_layers: int) -> int:
        """Return the block whose output is the target."""
        return round(0.2 * num_layers) if self.target_layer is None else self.target_layer

    def hidden(self, width: int) -> int:
        """Return the hidden width of a swiglu head."""
        return int(self.head_mult * width)

    def problems_of(self, model: ModelConfig, jepa: JepaConfig) -> Iterator[str]:
        """Yield the violated rules, given the model and what all objectives share."""
        if self.target(model.num_layers) >= model.num_layers:
            yield (
                f"jepa.next_state.target_layer={self.target_layer}: must be a block "
                f"0..{model.num_layers - 1}"
            )
        if self.shift >= model.seq_len:
            yield (
                f"jepa.next_state.shift={self.shift}: must be below model.seq_len={model.seq_len}"
            )
        if self.head == "swiglu" and self.hidden(model.model_dim) < 1:
            yield (
                f"jepa.next_state.head_mult={self.head_mult}: leaves no hidden unit at "
                f"model.model_dim={model.model_dim}"
            )


class NextLatentConfig(ObjectiveSection):
    """The next-latent objective (docs/objective.md)."""

    hidden_mult: Annotated[float, Field(gt=0.0, le=64.0, allow_inf_nan=False)] = 2.0
    """Width of both hidden layers of the MLP, relative to model.model_dim."""
    kl: NonNegative = 1.0
    """Weight of the KL divergence of the next-token distributions, beside the distance of the
    states; 0 leaves it out. Needs jepa.layer=-1."""
    within_documents: bool = False
    """Do not count positions whose next token begins a document (needs BOS ids in the shards)."""

    def hidden(self, width: int) -> int:
        """Return the width of the hidden layers."""
        return int(self.hidden_mult * width)

    def problems_of(self, model: ModelConfig, jepa: JepaConfig) -> Iterator[str]:
        """Yield the violated rules, given the model and what all objectives share."""
        if model.seq_len < 2:
            yield f"model.seq_len={model.seq_len}: next_latent needs at least 2 positions"
        if self.kl and jepa.layer != -1:
            yield (
                f"jepa.layer={jepa.layer}: the KL divergence of next_latent needs the final state, "
                "-1; use jepa.next_latent.kl=0 to predict another layer's"
            )
        if self.hidden(model.model_dim) < 1:
            yield (
                f"jepa.next_latent.hidden_mult={self.hidden_mult}: leaves no hidden unit at "
                f"model.model_dim={model.model_dim}"
            )


class JepaConfig(Section):
    """The auxiliary objective (docs/objective.md)."""

    lambda_: NonNegative = Field(default=0.0, alias="lambda")
    """Weight of the JEPA loss; 0 disables the objective."""
    objective: Literal["span", "next_state", "next_latent"] = "span"
    """The auxiliary loss. span: hidden states at the ends of a span move linearly (#1772).
    next_state: a state predicts a shallow layer's state at the next position (NITP). next_latent: a
    state and the next token predict the same layer's next state (NextLat)."""
    max_span_frac: Fraction = 0.5
    """span: length of the longest span, as a fraction of the sequence."""
    start_frac: Fraction = 0.0
    """Fraction of the run at which the objective starts."""
    ramp_frac: Fraction = 0.0
    """Fraction of the run over which the weight then rises from 0 to lambda; 0: no ramp."""
    stop_frac: Fraction = 1.0
    """Fraction of the run from which the objective is off again; 1: never."""
    layer: int = -1
    """State that the loss reads (next_state, next_latent: that predicts): -1: the final state
    before the last norm; i: the output of block i at its last execution."""
    spans_per_sequence: Annotated[int, Field(ge=1, le=4096)] = 1
    """span: number of spans sampled in each sequence; their losses are averaged."""
    sampler: Literal["start_then_length", "uniform"] = "start_then_length"
    """span: distribution of the spans: uniform start, then uniform length; or uniform over all
    spans."""
    within_documents: bool = False
    """span: sample only spans inside one document, together with the state before them (needs BOS
    ids in the shards). Sequences without such a span are not counted."""
    norm_floor: NonNegative = 0.05
    """Lower bound of both norms in the cosine, relative to the RMS norm of the sequence's states;
    0: an absolute bound of 1e-8, with which gradients can explode at the start of training."""
    next_state: NextStateConfig = NextStateConfig()
    next_latent: NextLatentConfig = NextLatentConfig()

    @property
    def section(self) -> ObjectiveSection | None:
        """The settings of the chosen objective; None for span, whose settings are these."""
        return getattr(self, self.objective, None)

    @property
    def documents_key(self) -> str | None:
        """Key of the option by which the objective needs to know where documents begin; None if it
        does not."""
        section = self.section
        if section is not None and section.within_documents:
            return f"jepa.{self.objective}.within_documents"
        return "jepa.within_documents" if section is None and self.within_documents else None

    def problems(self) -> Iterator[str]:
        """Yield the violated rules."""
        if self.lambda_ == 0:
            return
        if self.section is not None and self.within_documents:
            yield (
                f"jepa.within_documents=true: concerns spans, but jepa.objective={self.objective}; "
                f"use jepa.{self.objective}.within_documents"
            )
        if self.stop_frac <= self.start_frac < 1:
            yield (
                f"jepa.stop_frac={self.stop_frac}: must be above jepa.start_frac="
                f"{self.start_frac}; use jepa.lambda=0 to disable the objective"
            )
        if self.objective == "span" and self.max_span_frac == 0:
            yield "jepa.max_span_frac=0.0: must be above 0 when jepa.lambda > 0"
        if self.start_frac >= 1:
            yield (
                f"jepa.start_frac={self.start_frac}: with jepa.lambda={self.lambda_} the objective "
                "would never start; use jepa.lambda=0 to disable it"
            )


class OptimConfig(Section):
    """Optimizer, parameter groups and learning-rate schedule (docs/recipe.md)."""

    matrix: Literal["muon", "adamw"] = "adamw"
    """Optimizer of the matrices inside the blocks and of the embedding projections."""
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
    """Decay of Adam's first moment."""
    beta2: Fraction = 0.95
    """Decay of Adam's second moment."""
    eps: Rate = 1e-8
    """Adam's epsilon, added outside the square root."""
    muon_momentum: Fraction = 0.99
    """Muon's momentum after its warm-up."""
    muon_momentum_warmup_start: Fraction = 0.92
    """Muon's momentum at step 0."""
    muon_momentum_warmup_steps: Count = 1500
    """Steps over which Muon's momentum rises linearly to muon_momentum; 0: no warm-up."""
    muon_nesterov: bool = True
    """Orthogonalize gradient + momentum * buffer; false (reference): the gradient alone."""
    muon_row_normalize: bool = True
    """Normalize each row of the update to norm 1 before orthogonalization (MuonEq-R)."""
    muon_backend_steps: Annotated[int, Field(ge=1, le=100)] = 5
    """Newton-Schulz iterations."""
    muon_coefficients: Literal["fixed", "polar_express"] = "fixed"
    """Coefficients of the Newton-Schulz iteration."""
    muon_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the iteration; auto: bfloat16 on CUDA, float32 on CPU."""
    grad_clip_norm: NonNegative = 0.3
    """Clip the global gradient norm to this value; 0: no clipping."""
    warmdown_frac: Fraction = 0.667
    """Final fraction of the run over which the learning rates fall linearly."""
    min_lr: Fraction = 0.0
    """Learning rates fall to this fraction of their values (a multiplier, not a rate)."""
    ema_decay: Fraction = 0.0
    """Decay of the exponential moving average of the parameters (float32); 0: no average."""

    def problems(self) -> Iterator[str]:
        """Yield the violated rules."""
        if max(self.beta1, self.beta2) >= 1:
            yield f"optim.beta1={self.beta1}, optim.beta2={self.beta2}: must be below 1"
        if self.ema_decay >= 1:
            yield "optim.ema_decay=1.0: the average would never change; use a value below 1"


class ScheduleConfig(Section):
    """Learning rates over the run, as a multiplier of the rates in optim (docs/schedules.md)."""

    kind: Literal["warmdown", "cosine", "wsd"] = "warmdown"
    """warmdown (reference): constant, then linear over the last optim.warmdown_frac. cosine: half a
    cosine. wsd: constant, then a decay over the last decay_frac. All go down to optim.min_lr."""
    warmup_frac: Fraction = 0.0
    """Fraction of the run over which the learning rates first rise linearly from 0; 0: none."""
    decay_frac: Fraction = 0.2
    """wsd: final fraction of the run over which the learning rates fall."""
    decay_shape: Literal["linear", "one_minus_sqrt"] = "linear"
    """wsd: shape of the decay, linear or 1 - sqrt of the part of it that is over."""
    decay_from: Literal["now"] | Fraction | None = None
    """wsd: fraction of the run at which the decay begins, in place of decay_frac. now: where the
    checkpoint ends that checkpoint.resume=PATH names (a cool-down branch)."""

    def problems(self) -> Iterator[str]:
        """Yield the violated rules."""
        if self.kind != "wsd" and self.decay_from is not None:
            yield (
                f"schedule.decay_from={self.decay_from}: schedule.kind={self.kind} has no decay of "
                "its own; use schedule.kind=wsd"
            )
        if (
            self.kind == "wsd"
            and self.decay_from is None
            and self.warmup_frac + self.decay_frac > 1
        ):
            yield (
                f"schedule.warmup_frac={self.warmup_frac}, schedule.decay_frac={self.decay_frac}: "
                "must add up to at most 1"
            )
        if self.kind == "cosine" and self.warmup_frac == 1:
            yield "schedule.warmup_frac=1.0: must be below 1 with schedule.kind=cosine"


class ParallelConfig(Section):
    """Sharding, compilation and numerics of the model."""

    compile: bool = True
    """Compile embedding, blocks, skips, head and JEPA loss, each as a region of its own."""
    compile_warmup: bool = False
    """Compile every graph that the run will need (all phases, JEPA, evaluation) before step 0. No
    effect if compile is false."""
    dp_replicate: Annotated[int, Field(ge=1, le=2**20)] = 1
    """Number of replicas of the sharded model (above 1: HSDP; world size: plain replication)."""
    dp_shard: int = -1
    """Number of ranks that share one replica; -1: world size / dp_replicate."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of computation (master weights and gradient reduction are float32 in any case); auto:
    bfloat16 on CUDA, float32 on CPU."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math", "flex"] = "auto"
    """Attention kernel; auto: PyTorch's choice for the device. A kernel that the device cannot run
    is refused (the CPU runs flash and math)."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What backward recomputes: nothing; everything except attention and matrix products
    (selective); everything except attention (full)."""
    blocks_per_unit: PositiveInt = 1
    """Number of consecutive blocks in one FSDP unit, which is gathered, reduced and freed as a
    whole. More blocks: fewer and larger collectives and less host time, but less overlap and more
    memory. Looped blocks form units of their own unless one unit holds all blocks; the model then
    stays gathered from the first forward until backward ends."""
    deterministic: bool = False
    """On CUDA, use only deterministic algorithms: repeated runs are equal bit for bit, but slower
    and without cuDNN attention (docs/performance.md). On CPU runs are deterministic in any case."""
    reshard_after_forward: bool = True
    """Free gathered parameters after each unit's forward (less memory, another gather per unit)."""
    keep_looped_gathered: bool = True
    """Keep looped blocks gathered from their first pass until backward ends, and reduce their
    gradients once."""
    accumulate: Literal["gathered", "sharded"] = "gathered"
    """State between micro-batches. gathered: parameters gathered and gradients unsharded, with one
    gather and one reduction per step. sharded: both sharded, with one gather and one reduction per
    micro-batch, for models of which a rank cannot hold a whole copy."""
    timeout_seconds: Annotated[float, Field(gt=0.0, le=1e7)] = 600.0
    """Time limit of a collective; the job fails when one takes longer."""

    def problems(self) -> Iterator[str]:
        """Yield the violated rules."""
        if self.dp_shard < 1 and self.dp_shard != -1:
            yield (
                f"parallel.dp_shard={self.dp_shard}: must be -1 (world size / dp_replicate) or at "
                "least 1"
            )
        if self.deterministic and self.attention == "cudnn":
            yield (
                "parallel.attention=cudnn: its backward is not deterministic and "
                "parallel.deterministic is true; use auto, flash, efficient, math or flex"
            )


class EvalConfig(Section):
    """Validation and text samples."""

    every: Count = 100
    """Validate every this many steps; 0: only at the end."""
    sequences: Count = 0
    """Number of validation sequences, from the start of the shards; 0: all."""
    sample_tokens: Annotated[int, Field(ge=0, le=2**16)] = 64
    """Number of tokens in the text sample of each validation; 0: no sample."""
    prompt: Text = ""
    """Prompt of the text sample."""


class CheckpointConfig(Section):
    """Checkpoints (docs/checkpointing.md). One is always saved when a run stops."""

    every: Count = 1000
    """Save every this many steps; 0: by minutes alone."""
    minutes: Annotated[float, Field(ge=0.0, le=1e7)] = 0.0
    """Save when this many minutes have passed since the last checkpoint, too; 0: by steps alone."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every: Count = 0
    """Keep every checkpoint whose step is a multiple of this; 0 disables."""
    grace_seconds: Annotated[float, Field(gt=0.0, le=1e7)] = 300.0
    """Time limit from a stop signal to the exit; a rank that has not saved by then exits without.
    Choose a little less than the cluster grants."""
    resume: PathText = "auto"
    """auto: resume from the newest complete checkpoint in run.dir, if there is one. never: only
    start new runs. PATH: start a new run.dir from this checkpoint of any run."""
    mirror: Annotated[str, Field(max_length=4000)] | None = None
    """URL of a folder (s3://, gs://, ...) to which checkpoints are copied in the background, and
    from which a run resumes whose directory holds none; null: no copies."""
    allow_other_data: bool = False
    """Resume although the training data differ from those of the checkpoint."""


class ProfileConfig(Section):
    """Profiler traces of single steps (docs/monitoring.md), which slow them down."""

    start: Count = 20
    """Number of steps of this start before the first traced one; the first steps compile."""
    steps: Count = 0
    """Number of steps to trace; 0: none."""
    ranks: Annotated[list[Count], Field(max_length=4096)] = [0]
    """Ranks that write a trace."""


class MonitorConfig(Section):
    """Checks and diagnostics during training (docs/monitoring.md)."""

    late_seconds: Seconds = 120.0
    """If a rank makes no progress (in step or phase; compiling counts as a phase) for this many
    seconds, warn and write the stacks of all ranks to the logs; 0 disables."""
    jepa_every: Count = 100
    """While the objective is on, compute its diagnostics every this many steps (docs/objective.md)
    and log these steps; 0 disables."""
    dead_gradient_ratio: NonNegative = 1e-5
    """Warn if the gradient norm of lambda * JEPA at the tapped state is below this fraction of
    cross-entropy's. The default is far below the differences of cross-entropy between batches."""
    collapse_share: Fraction = 0.25
    """Warn if the effective rank of the tapped states is below this fraction of its first value in
    two consecutive diagnostics."""
    straggler_ratio: NonNegative = 1.3
    """Warn if the slowest rank takes this many times as long as the median rank for the same
    computation in several consecutive records; 0 disables."""
    histogram_every: Count = 0
    """Write histograms of parameters and clipped gradients to TensorBoard every this many steps; 0
    disables."""
    profile: ProfileConfig = ProfileConfig()
    memory_snapshot: bool = False
    """Record the allocations of every CUDA device and write them to profile/ at the end. If memory
    runs out, a snapshot is written there in any case."""


class QuantizationConfig(Section):
    """The quantized artifact that `jepa_dist export --format artifact` writes (docs/using.md).
    Training ignores this section. Defaults are those of parameter-golf PR #1412."""

    matrix_bits: Bits = 6
    """Bits per element of all matrices but the token embedding."""
    embed_bits: Bits = 8
    """Bits per element of the token embedding."""
    matrix_clip_sigmas: ClipSigmas = 12.85
    """Half the range of a row of these matrices, in standard deviations of the row."""
    embed_clip_sigmas: ClipSigmas = 20.0
    """The same for the embedding."""
    hessian_clip_lambda: NonNegative = 0.175
    """Effect of a row's importance on its range; 0: none. Importance is the row's mean magnitude,
    weighted by the Hessian's diagonal, relative to the other rows'."""
    loop_layer_bits: Annotated[int, Field(ge=0, le=8)] = 0
    """Bits of the matrices of looped blocks and of the MLPs of their repeats; 0: matrix_bits."""
    loop_layer_clip_sigmas: Annotated[float, Field(ge=0.0, le=1e3)] = 0.0
    """Range of those, if loop_layer_bits is set; 0: matrix_clip_sigmas."""
    clip_mult_early: ClipFactor = 1.0
    """Factor on the range in blocks 0 to 2, looped or not."""
    clip_mult_loop: ClipFactor = 1.0
    """Factor on the range in looped blocks."""
    clip_mult_mid: ClipFactor = 1.0
    """Factor on the range in blocks 3, 6 and 7."""
    clip_mult_late: ClipFactor = 1.0
    """Factor on the range in blocks from 8 on."""
    float16_elements: Count = 65536
    """Tensors of at most this many elements are stored as float16."""
    calibration_sequences: PositiveInt = 64
    """Number of training sequences from which the Hessians are collected, evenly spread over the
    training data."""

    def problems(self) -> Iterator[str]:
        """Yield the violated rules."""
        if self.loop_layer_bits == 1:
            yield "quantization.loop_layer_bits=1: must be 0 (matrix_bits) or 2 to 8"

    def with_bits(self, matrix_bits: int) -> QuantizationConfig:
        """Return the same settings with another ``matrix_bits``."""
        return self.model_copy(update={"matrix_bits": matrix_bits})


class Config(Section):
    """Everything that defines a run."""

    seed: Seed = 0
    """Seed of initialization, data order and spans."""
    run: RunConfig = RunConfig()
    train: TrainConfig = TrainConfig()
    batch: BatchConfig = BatchConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    jepa: JepaConfig = JepaConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    quantization: QuantizationConfig = QuantizationConfig()

    @property
    def documents_key(self) -> str | None:
        """Key of an option that needs to know where documents begin; None if none does."""
        return "model.document_mask" if self.model.document_mask else self.jepa.documents_key
