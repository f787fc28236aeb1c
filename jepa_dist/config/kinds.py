"""What a difference between two configurations concerns, by the beginnings of dotted keys."""

from __future__ import annotations

# What is watched, saved and where: neither weights nor results depend on it.
WATCHING = (
    *("run.", "monitor.", "checkpoint."),
    *("train.log_every", "train.stop_at", "train.max_bad_steps", "train.gc_every"),
    "quantization.",  # of what is exported
)
# What is measured of the weights.
MEASURING = ("eval.", "data.val")
# How the work is laid out over processes and memory. Precision, attention and compiling are not
# here: they change the trained weights, if only in the last bits.
LAYOUT = (
    *("batch.micro", "data.workers", "data.prefetch"),
    *("parallel.dp_", "parallel.activation_checkpointing", "parallel.reshard_after_forward"),
    *("parallel.keep_looped_gathered", "parallel.accumulate", "parallel.timeout_seconds"),
    *("parallel.compile_warmup", "parallel.blocks_per_unit"),
)
