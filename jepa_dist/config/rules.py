"""Rules that concern several sections, or the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

from jepa_dist.config.schema import Config, Section
from jepa_dist.errors import UserError

_MOST_SPANS = 2**24


def check(config: Config) -> list[str]:
    """Return the violated rules of all sections and between sections, one line each."""
    sections = (config, *(getattr(config, name) for name in Config.model_fields))
    within = [
        problem
        for section in sections
        if isinstance(section, Section)
        for problem in section.problems()
    ]
    return [*within, *_between_sections(config)]


def _between_sections(config: Config) -> Iterator[str]:
    model, jepa, train = config.model, config.jepa, config.train
    if not -1 <= jepa.layer < model.num_layers:
        yield (
            f"jepa.layer={jepa.layer}: must be in -1..{model.num_layers - 1} "
            f"(model.num_layers={model.num_layers})"
        )
    if jepa.lambda_ and jepa.objective == "span" and model.seq_len < 3:
        yield f"model.seq_len={model.seq_len}: the JEPA objective needs at least 3 positions"
    if jepa.lambda_ and jepa.section is not None:
        yield from jepa.section.problems_of(model, jepa)
    if jepa.lambda_ and jepa.start_frac < min(1, jepa.stop_frac) and not _starts(config):
        stop = f", jepa.stop_frac={jepa.stop_frac}" if jepa.stop_frac < 1 else ""
        yield (
            f"jepa.start_frac={jepa.start_frac}, jepa.ramp_frac={jepa.ramp_frac}{stop}: with "
            f"train.steps={train.steps} the weight would be 0 in every step; start earlier, or use "
            "jepa.lambda=0 to disable the objective"
        )
    if config.batch.sequences * jepa.spans_per_sequence > _MOST_SPANS:
        yield (
            f"jepa.spans_per_sequence={jepa.spans_per_sequence}: times batch.sequences="
            f"{config.batch.sequences} there can be at most {_MOST_SPANS} spans in a step"
        )
    if config.data.bos_id is not None and config.data.bos_id >= model.vocab_size:
        yield (
            f"data.bos_id={config.data.bos_id}: must be below model.vocab_size={model.vocab_size}"
        )
    if model.document_mask and jepa.lambda_ and jepa.documents_key is None:
        section = "jepa" if jepa.section is None else f"jepa.{jepa.objective}"
        yield (
            f"model.document_mask=true: {section}.within_documents=false would compare states of "
            f"documents that do not see each other; set {section}.within_documents=true"
        )
    if config.data.stages and train.max_wallclock_seconds is not None:
        yield (
            "data.stages: begin at fractions of train.steps, but train.max_wallclock_seconds="
            f"{train.max_wallclock_seconds} ends the run at a step that is not known in advance; "
            "remove one of them"
        )
    if model.num_loops and 0 < train.loop_phase2_at < train.enable_looping_at:
        yield (
            f"train.loop_phase2_at={train.loop_phase2_at}: must not come before "
            f"train.enable_looping_at={train.enable_looping_at} (0 skips phase 1)"
        )


def _starts(config: Config) -> bool:
    """Return whether the objective's weight is above 0 in the last step before it stops.

    A run that ends by the clock has no known last step and counts as true.
    """
    if config.train.max_wallclock_seconds is not None:
        return True
    steps, start, stop = config.train.steps, config.jepa.start_frac, config.jepa.stop_frac
    number = steps - 1
    if stop < 1:
        number = max(0, math.ceil(stop * steps) - 1)
        number -= number > 0 and number / steps >= stop
    last = number / steps
    return last > start or (last == start and config.jepa.ramp_frac == 0)


def check_world(config: Config, world_size: int) -> None:
    """Refuse a configuration that cannot run on ``world_size`` ranks.

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
            f"the world size {world_size} (dp_shard=-1: world size / dp_replicate)"
        )
    if problems:
        raise UserError(*problems)
