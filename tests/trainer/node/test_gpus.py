"""GPUs that a process takes, and those that are refused, from what drivers, SLURM and torch say."""

import errno
import os
import re
from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from trainer.node import gpus

MEANT = "to train on the CPU all the same: --engine.device cpu, or CUDA_VISIBLE_DEVICES= before any command"


@pytest.mark.parametrize(
    ("visible", "taken"),
    [
        (8, [0, 1, 2, 3]),
        (4, [0, 1, 2, 3]),
        (1, [0, 0, 0, 0]),  # --gpus-per-task=1: each process sees one GPU of its own, as number 0
        (2, [0, 1, 0, 1]),  # --gpus-per-task=2
    ],
)
def test_each_process_takes_one_that_it_sees(visible: int, taken: list[int]) -> None:
    assert [gpus.index_for(rank, visible) for rank in range(4)] == taken


def test_only_ranks_that_share_a_gpu_are_refused() -> None:
    gpus.check_gpus(["a", "b", "c", "d"])
    gpus.check_gpus(["", "", ""])
    with pytest.raises(UserError, match=r"^--nproc_per_node: ranks 1 and 3 have one GPU between them \(b\); start one"):
        gpus.check_gpus(["a", "b", "c", "b"])
    with pytest.raises(UserError, match=r"^engine\.device: rank 2 sees no GPU, and other ranks do; give each"):
        gpus.check_gpus(["a", "b", ""])


# ---- a GPU that is there, but not for torch --------------------------------------------------------------------------

CLOSED = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)
"""
OPEN = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22)  Tue Sep 23 2025
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)
"""


@pytest.mark.parametrize(("text", "version"), [(CLOSED, "535.104.05"), (OPEN, "580.95.05"), ("what?\n", None)])
def test_version_of_the_driver(text: str, version: str | None, tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert gpus.driver_version(file) is None
    file.write_text(text)
    assert gpus.driver_version(file) == version


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        ("535.104.05", "its driver is 535.104.05, and CUDA 13.0 needs 580.65.06 or newer; update it, or install what fits it "
         "(trainer/README.md)"),
        ("580.95.05", "its driver 580.95.05 is new enough, but: CUDA unknown error"),
        (None, "no driver of NVIDIA's is loaded here; in a container, start it with GPUs"),
    ],
)  # fmt: skip
def test_the_reason_is_told(driver: str | None, reason: str) -> None:
    error = gpus.unusable("there is /dev/nvidia0", "2.14.1+cu130", "13.0", driver, "CUDA unknown error")
    assert str(error) == (
        f"engine.device: there is /dev/nvidia0, but torch 2.14.1+cu130 can use no GPU: {reason}; {MEANT}"
    )


def test_what_shows_that_there_is_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus.evidence({}, tmp_path) is None
    assert gpus.evidence({"SLURM_JOB_GPUS": "2,3"}, tmp_path) == "SLURM_JOB_GPUS is 2,3"
    assert gpus.evidence({"SLURM_STEP_GPUS": "0"}, tmp_path) == "SLURM_STEP_GPUS is 0", "the number of the first GPU"
    assert gpus.evidence({"SLURM_GPUS_ON_NODE": "0"}, tmp_path) is None
    for name in ("nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert gpus.evidence({}, tmp_path) is None, "a driver without a GPU"
    (tmp_path / "nvidia1").touch()
    assert gpus.evidence({}, tmp_path) == f"there is {tmp_path}/nvidia1"
    assert gpus.evidence({"CUDA_VISIBLE_DEVICES": "0"}, tmp_path) == f"there is {tmp_path}/nvidia1"
    for hidden in ("", "-1", "NoDevFiles"):
        assert gpus.evidence({"CUDA_VISIBLE_DEVICES": hidden, "SLURM_JOB_GPUS": "0"}, tmp_path) is None, "it is meant"

    def denied(path: Path, flags: int) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "open", denied)  # what a control group answers, which needs a SLURM of one's own
    assert gpus.evidence({}, tmp_path) is None


CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 1), (13, 0)])
def test_gpus_that_torch_is_built_for(capability: tuple[int, int]) -> None:
    gpus.check_architecture("GPU", capability, CUDA_13)


@pytest.mark.parametrize(("capability", "built"), [((7, 0), CUDA_13), ((6, 1), CUDA_13), ((11, 0), CUDA_13[:-1])])
def test_gpus_that_torch_is_not_built_for(capability: tuple[int, int], built: list[str]) -> None:
    number = re.escape(".".join(map(str, capability)))
    with pytest.raises(
        UserError, match=rf"^engine\.device: V100 has compute capability {number}, and this torch is built"
    ):
        gpus.check_architecture("V100", capability, built)
