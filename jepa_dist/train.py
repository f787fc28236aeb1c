"""Train a model: ``python -m jepa_dist.train CONFIG [KEY=VALUE ...]``, also under torchrun."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from jepa_dist.command_line import Parser, program
from jepa_dist.config import Config, check_world, load
from jepa_dist.data.check import check_data, with_bos
from jepa_dist.data.sources import fingerprint_split
from jepa_dist.monitor.run_dir import check_run_dir
from jepa_dist.monitor.startup import Startup
from jepa_dist.process.dist_env import (
    adopt_launcher,
    die_with_launcher,
    launched_rank,
    launched_world_size,
    print_local_ranks,
    ranks_on_this_host,
)
from jepa_dist.process.failure import exit_on_host_error, exit_on_rank_error
from jepa_dist.process.garbage import collection_paused
from jepa_dist.process.output import keep_output_alive
from jepa_dist.process.variables import set_defaults
from jepa_dist.remote import open_remote
from jepa_dist.run.consistency import statement
from jepa_dist.start.host import check_compiler_space, check_host


def main() -> None:
    """Check everything that can be checked, then train."""
    keep_output_alive()
    with exit_on_host_error():
        arguments = parse_arguments()
        adopt_launcher(os.environ, will_meet=not (arguments.print_config or arguments.check))
        die_with_launcher()
        set_defaults(ranks_on_this_host())
        resolved = load(arguments.config, arguments.overrides)
        if arguments.print_config:
            if launched_rank() == 0:
                print(resolved.describe())
            return
        config = resolved.config
        check_world(config, launched_world_size())
        check_data(config)
        config = with_bos(config)
        if config.parallel.compile:
            check_compiler_space()
        if config.checkpoint.mirror is not None:
            open_remote(config.checkpoint.mirror, "checkpoint.mirror")
        if arguments.check:
            check_run_dir(Path(config.run.dir).expanduser())
            return
        check_host(config)
        mine = statement(config, data := fingerprint_data(config))
    print_local_ranks()
    startup = Startup()
    startup.done("check")
    with exit_on_rank_error(launched_rank()), collection_paused():
        # Imported here, so that configuration errors are printed before the slow import of torch.
        from jepa_dist.run_training import run_training
    startup.done("imports")
    run_training(config, data, mine, startup)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; options may appear anywhere.

    Raises:
        UserError: invalid arguments.
    """
    parser = Parser(prog=program("jepa_dist.train"), description=__doc__)
    parser.add_argument(
        "config", type=Path, help="YAML file, or the name of a shipped one, e.g. debug"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="e.g. jepa.lambda=0.02"
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the resolved values and where each came from, then exit",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run a start's checks of configuration, data and run directory, then exit",
    )
    return parser.parse_intermixed_args()


def fingerprint_data(config: Config) -> dict[str, Any]:
    """Return the fingerprint of the shards, by split."""
    return {split: fingerprint_split(config, split) for split in ("train", "val")}


if __name__ == "__main__":
    main()
