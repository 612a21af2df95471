"""What every test shares: the `system` mark and modest Hypothesis settings.

Tests marked `system` need root, network namespaces or an installed program.  Without ``SYSTEM=1`` they are deselected,
never skipped: a run says how many it left out.  With it, whatever is missing is an error that names its cure.
"""

from __future__ import annotations

import os
import shutil

import pytest
from hypothesis import settings

# The programs of requirements/system-deps.sh that system tests start.
SYSTEM_PROGRAMS = (
    *("ip", "tc", "iptables", "ip6tables", "curl", "nginx", "faketime"),
    *("docker-registry", "containerd", "ctr", "dockerd", "docker", "podman", "skopeo"),
)

# No deadline: a shared machine stalls for longer than any honest example takes.
settings.register_profile("swarm", deadline=None, max_examples=100)
settings.load_profile("swarm")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    system = [item for item in items if item.get_closest_marker("system") is not None]
    if not system:
        return
    if os.environ.get("SYSTEM") == "1":
        _require_system()
        return
    config.hook.pytest_deselected(items=system)
    items[:] = [item for item in items if item.get_closest_marker("system") is None]


def _require_system() -> None:
    if os.geteuid() != 0:
        raise pytest.UsageError("SYSTEM=1 needs root, for network namespaces; without it leave SYSTEM unset")
    missing = [program for program in SYSTEM_PROGRAMS if shutil.which(program) is None]
    if missing:
        raise pytest.UsageError(f"SYSTEM=1 needs {', '.join(missing)}; run: make system-deps")
