"""How many cores this process may use, which may be fewer than the machine has."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from srfed.config import ResourcesConfig
from srfed.errors import UserError
from srfed.paths import flower_home


def usable_cores() -> int:
    """Cores that affinity (taskset, a scheduler) and the control group's quota (a container) leave;
    at least 1.
    """
    affinity = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = quota_of_group()
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def check_resources(resources: ResourcesConfig, *, federated: bool = True) -> None:
    """Raise UserError where the simulation's resources leave room for no client; centralised
    training has none.
    """
    cores = resources.cpus or usable_cores()
    if resources.client_cpus > cores and resources.ray_address is None:
        raise UserError(
            f"resources.client_cpus = {resources.client_cpus} is above the {cores} cores that this "
            "process may use"
        )
    if federated and resources.backend == "ray" and find_spec("ray") is None:
        raise UserError(
            "resources.backend = ray needs Ray, which is not installed here; allowed: inline "
            "(--backend inline), or pip install 'flwr[simulation]'"
        )
    if federated and resources.backend == "ray":
        # Flower looks for it as soon as its simulation is imported.
        flower_home()
    if (
        federated
        and resources.backend == "ray"
        and (resources.device == "cuda" or resources.precision != "float32")
        and resources.client_gpus == 0
    ):
        raise UserError(
            "resources.client_gpus = 0 gives clients under Ray no GPU; allowed: above 0, such as "
            "0.25"
        )


def quota_of_group(root: Path = Path("/")) -> float | None:
    """The least CPU quota of the process's control group (v1 or v2) and those above it, in cores;
    None without one.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    quotas = []
    for folder in _groups(root):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            # No such file in this group, or `max`.
            continue
    return min((quota for quota in quotas if quota > 0), default=None)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of the process's group and of all above it, in both versions' hierarchies."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    hierarchies = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container may see its own group as the root, under another path than the one it is told.
        for mount in (
            (hierarchies / controllers, hierarchies / "cpu") if controllers else (hierarchies,)
        ):
            group = mount / path.lstrip("/")
            yield from (
                folder for folder in (group, *group.parents) if folder.is_relative_to(mount)
            )
