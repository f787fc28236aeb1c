"""Kinds of configuration keys, by prefix: what a difference between two configurations affects."""

from __future__ import annotations

# Monitoring, saving and paths: neither weights nor results depend on them.
WATCHING = (
    *("run.", "monitor.", "checkpoint."),
    *("train.log_every", "train.stop_at", "train.max_bad_steps", "train.gc_every"),
    "quantization.",  # of exports
)
# Measurements of the weights.
MEASURING = ("eval.", "data.val")
# Distribution of the work over processes and memory. Precision, attention and compiling are not
# here: they change the trained weights, if only in the last bits.
LAYOUT = (
    *("batch.micro", "data.workers", "data.prefetch"),
    *("parallel.dp_", "parallel.activation_checkpointing", "parallel.reshard_after_forward"),
    *("parallel.keep_looped_gathered", "parallel.accumulate", "parallel.timeout_seconds"),
    *("parallel.compile_warmup", "parallel.blocks_per_unit"),
)
