"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
data_dir_option: Final = click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Where content, keys and the control socket live [default: /var/lib/swarm for root, else $XDG_STATE_HOME/swarm].",
)
config_option: Final = click.option("--config", type=click.Path(path_type=Path), help="Configuration file (TOML).")
join_option: Final = click.option("--join", multiple=True, metavar="H:P", help="A node to contact first; may be repeated.")


def network_options(command: Command) -> Command:
    """`--network` and `--open-network`."""
    command = click.option(
        "--open-network",
        is_flag=False,
        flag_value="default",
        default=None,
        metavar="[NAME]",
        help="Join the open network of this name (anyone can): no protection, private content is never shared.",
    )(command)
    return click.option(
        "--network",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Directory of a closed network (see swarm network create).",
    )(command)
