"""Memory and energy, from made-up trees of RAPL and a library that answers as NVML does."""

import math
import mmap
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from trainer.node.usage import Usage, UsageMeter, nvml_counters, rapl_counters, usage_figures

LIMIT = 1000_000_000  # microjoules
NVML = r"""
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { *device = (void *)7; return strcmp(uuid, "GPU-8f6a") ? 6 : 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    static unsigned long long now = 0;
    *millijoules = now += 1500;
    return device == (void *)7 ? 0 : 2;
}
"""


def domain(folder: Path, name: str, microjoules: int, parent: str = "") -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "name").write_text(parent or f"package-{name[-1]}\n")
    (path / "max_energy_range_uj").write_text(f"{LIMIT}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path / "energy_uj"


def test_energy_of_processors(tmp_path: Path) -> None:
    """Packages alone count, not their parts; a counter that has begun anew has not gone back."""
    first, second = domain(tmp_path, "intel-rapl:0", 5_000_000), domain(tmp_path, "intel-rapl:1", LIMIT - 1_000_000)
    domain(tmp_path, "intel-rapl:0:0", 77, "core\n")
    domain(tmp_path, "intel-rapl:2", 77, "psys\n")
    meter = UsageMeter(torch.device("cpu"), True, tmp_path)
    first.write_text("8000000\n")
    second.write_text("2000000\n")
    usage = meter.read()
    assert usage.cpu_j == pytest.approx(3 + 3) and math.isnan(usage.gpu_j) and math.isnan(usage.gpu_gib)
    meter.restart()
    assert meter.read().cpu_j == 0
    first.unlink()  # as where another user's file cannot be read
    assert math.isnan(meter.read().cpu_j)
    assert rapl_counters(tmp_path) == [] == rapl_counters(tmp_path / "absent")
    assert UsageMeter(torch.device("cpu"), False, tmp_path).read().cpu_j == 0, "another process speaks for the node"


def test_memory_of_the_process() -> None:
    meter = UsageMeter(torch.device("cpu"), True)
    before = meter.read().host_gib
    with mmap.mmap(-1, 1 << 28) as kept:  # new memory, which malloc's need not be
        kept[:: mmap.PAGESIZE] = bytes([1]) * (len(kept) // mmap.PAGESIZE)
        assert meter.read().host_gib - before == pytest.approx(0.25, abs=0.05)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a compiler for the library")
def test_energy_of_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "nvml.c").write_text(NVML)
    library = str(tmp_path / "libnvml.so")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, str(tmp_path / "nvml.c")], check=True)
    (counter,) = nvml_counters("8f6a", library)
    assert counter() - counter() == -1.5
    assert nvml_counters("other", library) == [] == nvml_counters("8f6a", "libno.so")


def test_figures_are_of_all_ranks_and_only_what_all_know() -> None:
    known = [Usage(10.0, 2.0, 300.0, 50.0), Usage(12.0, 1.0, 200.0, 0.0)]
    assert usage_figures(known, 10.0, 100.0) == {
        "perf/gpu_mem_gib": 12.0,
        "perf/host_mem_gib": 2.0,
        "perf/gpu_watts": 50.0,
        "perf/cpu_watts": 5.0,
        "perf/joules_per_image": 5.5,
    }
    nothing = Usage(math.nan, 3.0, math.nan, math.nan)
    for ranks in ([known[0], nothing], [nothing, known[0]]):
        assert usage_figures(ranks, 10.0, 100.0) == {"perf/host_mem_gib": 3.0}
    assert usage_figures([known[0]._replace(cpu_j=math.nan)], 10.0, 100.0)["perf/joules_per_image"] == 3.0
