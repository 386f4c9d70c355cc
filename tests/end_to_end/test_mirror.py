"""A run whose machine and folder are lost goes on from its mirror, to the same bits."""

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

from data_pipeline.common.address import parse_address
from data_pipeline.sources.storage import store as objects
from tests.support import object_stores
from tests.support.runs import STEPS, Job, checkpoint, dotted, reference, rows, settings_of


@pytest.mark.slow
def test_a_run_that_is_gone_is_restored_and_ends_with_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Killed, then preempted by SIGTERM, then finished; each time its folder is lost. The same command each time."""
    base, run = tmp_path_factory.getbasetemp(), tmp_path / "a run"
    with object_stores.moto("runs") as bucket:
        place = parse_address(bucket, "bucket") / "gone"
        settings = settings_of(base, run) | {"run.mirror": bucket, "run.name": "gone"}

        def shown() -> bool:
            with suppress(FileNotFoundError):
                return bool(json.loads(objects.read(place / "mirror.json"))["last"])
            return False

        def start() -> Job:
            return Job(2, tmp_path / "log", "trainer", *dotted(settings))

        job = start()
        while not shown():
            assert job.process.poll() is None, job.output()
            time.sleep(0.2)
        job.kill()
        shutil.rmtree(run)

        job = start()
        job.wait_for_step(run, 5)
        job.terminate()
        assert job.wait() != 0
        lines = job.output().splitlines()
        assert any(
            line.startswith(f"{run} is gone: restoring step ") and line.endswith(f" from {place}") for line in lines
        )
        assert f"mirrored to {place}" in lines
        shutil.rmtree(run)

        job = start()
        assert job.wait() == 0, job.output()
        assert f"mirrored to {place}" in job.output().splitlines()
        assert checkpoint(run) == checkpoint(reference(base, 2))
        assert [row["step"] for row in rows(run) if "val/top1_pct" not in row] == sorted(
            {*range(1, STEPS + 1)} - {5, 10, 15}
        )
        shutil.rmtree(run)

        job = start()
        assert job.wait() == 0
        assert f"{run} is finished: " in job.output()
        assert checkpoint(run) == checkpoint(reference(base, 2))
