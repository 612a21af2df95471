"""Where the configuration file and the store are by default.

Apart from `swarm.config`, since a command that is told where its daemon is has no use for the settings, and making their
classes is an eighth of the time that `swarm fetch` takes to start.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def default_file(environment: Mapping[str, str]) -> Path:
    """The configuration nobody named: `/etc/swarm/swarm.toml` for root, else below `$XDG_CONFIG_HOME`."""
    if os.geteuid() == 0:
        return Path("/etc/swarm/swarm.toml")
    return Path(environment.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")) / "swarm" / "swarm.toml"


def default_data_dir(environment: Mapping[str, str]) -> Path:
    """`/var/lib/swarm` for root, else below `$XDG_STATE_HOME`."""
    if os.geteuid() == 0:
        return Path("/var/lib/swarm")
    return Path(environment.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) / "swarm"


def locate_data_dir(flag: Path | None, environment: Mapping[str, str] | None = None) -> Path:
    """Where the daemon's control socket is, without reading more than that needs.

    Raises:
        ConfigError: The configuration file cannot be read, or its `data_dir` is no path.
    """
    environment = os.environ if environment is None else environment
    if flag is not None:
        return flag
    if environment.get("SWARM_DATA_DIR"):
        return Path(environment["SWARM_DATA_DIR"])
    file = Path(environment["SWARM_CONFIG"]) if environment.get("SWARM_CONFIG") else default_file(environment)
    if file.exists():
        from swarm.config import data_dir_in

        found = data_dir_in(file)
        if found is not None:
            return found
    return default_data_dir(environment)
