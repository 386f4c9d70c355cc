"""GPU of a process: which one it takes, and the reasons to refuse it. Nothing here asks CUDA."""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.common.errors import UserError, require

DRIVERS = {"12": "525.60.13", "13": "580.65.06"}
"""Oldest driver that runs code built for a major version of CUDA (CUDA's release notes, minor version compatibility)."""

ON_CPU = "to train on the CPU all the same: --engine.device cpu, or CUDA_VISIBLE_DEVICES= before any command"
_OF_SLURM = {"SLURM_STEP_GPUS": "", "SLURM_JOB_GPUS": "", "SLURM_GPUS_ON_NODE": "0"}
"""Variables of SLURM that tell of a job's GPUs, and what they say where it has none: the first two list numbers, from 0."""


def index_for(local_rank: int, visible: int) -> int:
    """Choose one of the GPUs that a process sees: its own number, or the one that it was given alone."""
    return local_rank % visible


def check_gpus(uuids: list[str]) -> None:
    """Raise `UserError` where two ranks would compute on one GPU, or some on none; `uuids` by rank, empty for the CPU."""
    if not any(uuids):
        return
    for rank, uuid in enumerate(uuids):
        require(bool(uuid), f"engine.device: rank {rank} sees no GPU, and other ranks do; give each process one GPU")
        first = uuids.index(uuid)
        require(
            first == rank,
            f"--nproc_per_node: ranks {first} and {rank} have one GPU between them ({uuid}); start one process a GPU, or "
            "let each process see one of its own",
        )


def evidence(variables: Mapping[str, str], devices: Path = Path("/dev")) -> str | None:
    """Say what shows that this process was given a GPU; None where nothing does, or CUDA_VISIBLE_DEVICES hides them all."""
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return None
    given = next((name for name, none in _OF_SLURM.items() if variables.get(name, "") not in ("", none)), None)
    if given:
        return f"{given} is {variables[given]}"
    found = next((path for path in sorted(devices.glob("nvidia[0-9]*")) if _is_allowed(path)), None)
    return f"there is {found}" if found else None


def _is_allowed(device: Path) -> bool:
    """Return False where a control group keeps the device from this process, as for a job without GPUs."""
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError as error:
        return error.errno != errno.EPERM
    return True


def unusable(why: str, torch_version: str, cuda: str, driver: str | None, complaint: str) -> UserError:
    """Explain a GPU that torch, built for a version of `cuda`, cannot use although `why` shows that there is one.

    `driver` is its version as `driver_version` reads it, `complaint` what torch says.
    """
    needed = DRIVERS.get(cuda.partition(".")[0])
    if driver and needed and _numbers(driver) < _numbers(needed):
        reason = (
            f"its driver is {driver}, and CUDA {cuda} needs {needed} or newer; update it, or install what fits it "
            "(trainer/README.md)"
        )
    elif driver:
        reason = f"its driver {driver} is new enough, but: {complaint}"
    else:
        reason = "no driver of NVIDIA's is loaded here; in a container, start it with GPUs"
    return UserError(f"engine.device: {why}, but torch {torch_version} can use no GPU: {reason}; {ON_CPU}")


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Read the version of the loaded driver, such as 580.65.06; None where there is none."""
    try:
        found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", file.read_text())
    except OSError:
        return None
    return found[1] if found else None


def check_architecture(name: str, capability: tuple[int, int], built_for: list[str]) -> None:
    """Raise `UserError` where torch has no code for a GPU; `built_for` as in torch.cuda.get_arch_list(): sm_90, compute_120."""
    major, minor = capability
    for built in built_for:
        kind, _, digits = built.partition("_")
        numbers = re.match(r"(\d+)(\d)", digits)
        have = (int(numbers[1]), int(numbers[2])) if numbers else (99, 0)
        # Machine code runs on later GPUs of the same generation, PTX on all later ones.
        if (kind == "sm" and have[0] == major and have[1] <= minor) or (kind == "compute" and have <= capability):
            return
    raise UserError(
        f"engine.device: {name} has compute capability {major}.{minor}, and this torch is built for {', '.join(built_for)}; "
        f"install one for it (trainer/README.md); {ON_CPU}"
    )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
