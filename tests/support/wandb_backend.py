"""A W&B server on this machine: the few answers that a run of the real client needs, and what it was sent."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.runs import SOLO
from trainer.checkpoint.progress import Progress
from trainer.config import Config
from trainer.loop import fit
from trainer.resilience.signals import StopFlag

KEY = "a" * 40
ENTITY = "me"


@dataclass
class SentRun:
    """One run as the server knows it."""

    config: dict[str, Any] = field(default_factory=dict)
    """Key -> value, wandb's own facts left out."""
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Line number -> row: a row sent twice has the same number."""
    summary: dict[str, Any] = field(default_factory=dict)
    alerts: list[tuple[str, str]] = field(default_factory=list)
    """Title and text."""
    starts: int = 0
    """Times that the client asked for the run: once an attempt."""
    exit_code: int | None = None
    display_name: str = ""
    project: str = "sluice"
    entity: str = ENTITY
    system: dict[str, float] = field(default_factory=dict)
    """Last measurement of the machine by the client."""
    sweep: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    notes: str = ""
    preempting: bool = False
    """True once the client has said that its machine is taken away."""


@dataclass
class Sweep:
    """One grid as the server knows it: its file, and the trials that agents are given one after another."""

    config: str
    """The file's text."""
    trials: list[tuple[str, dict[str, Any]]] = field(init=False)
    """Id of each run that is still to be given out, and its values."""
    given: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Id of each run given out -> its values."""
    stop: set[str] = field(default_factory=set)
    """Runs that Hyperband stops."""
    commands: list[tuple[str, str]] = field(default_factory=list)
    """Type and run of each command that an agent was sent."""

    def __post_init__(self) -> None:
        parameters = yaml.safe_load(self.config)["parameters"]
        combinations = product(*(parameter["values"] for parameter in parameters.values()))
        self.trials = [(f"trial{n}", dict(zip(parameters, one, strict=True))) for n, one in enumerate(combinations)]


class Backend(http.server.ThreadingHTTPServer):
    """Listens on a free port of the loopback interface; `url` is WANDB_BASE_URL for it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, SentRun] = {}
        self.uploads: dict[str, bytes] = {}
        """Upload path -> content."""
        self.artifacts: list[dict[str, Any]] = []
        """Inputs of CreateArtifact, with `committed` where all its files have come."""
        self.views: dict[str, dict[str, Any]] = {}
        """Id -> workspace or report."""
        self.sweeps: dict[str, Sweep] = {}
        self.stopped = False
        """True where somebody has pressed Stop."""
        self.status = 200
        """Of every answer: 503 is a server that dies."""
        self.faults: list[str] = []
        """Errors of this server rather than the client; a test that passes has none."""

    @property
    def run(self) -> SentRun:
        """The only run there is."""
        (run,) = self.runs.values()
        return run

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError):  # the client leaves without waiting for answers to its telemetry
            self.faults.append(repr(error))

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        """Take a piece of a run's files."""
        run, files = self.runs[name], sent.get("files") or {}
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(history["content"], history["offset"]):
            row = {key: value for key, value in json.loads(line).items() if key[0] != "_"}
            assert run.history.setdefault(number, row) == row, f"line {number} of the history was overwritten"
        for line in files.get("wandb-summary.json", {"content": []})["content"]:
            run.summary = json.loads(line)
        for line in files.get("wandb-events.jsonl", {"content": []})["content"]:
            run.system |= json.loads(line)
        run.preempting |= bool(sent.get("preempting"))
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")
            if run.preempting and run.exit_code and run.sweep:
                self.sweeps[run.sweep].trials.insert(0, (name, self.sweeps[run.sweep].given[name]))

    def graphql(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """The answer's data."""
        answer: Callable[[dict[str, Any]], dict[str, Any]] = getattr(self, f"_{operation}", lambda given: {})
        return answer(given)

    def _Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "v", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}}

    _GetDefaultEntity = _Viewer

    def _ServerFeaturesQuery(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        if run is None:
            return {"model": None}
        bucket = self._bucket(given["name"]) | {
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(run.history[number]) for number in sorted(run.history)[-1:]]),
            "eventsTail": "[]",
            "tags": [],
            "notes": "",
            "wandbConfig": '{"t": 1}',
        }
        return {"model": {"id": "p", "name": given["project"], "entity": {"id": "e", "name": ENTITY}, "bucket": bucket}}

    def _UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given.get("name") or given["id"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, SentRun())
        run.starts += bool(given.get("host"))
        run.display_name = given.get("displayName") or run.display_name
        run.project = given.get("project") or run.project
        run.entity = given.get("entity") or run.entity
        run.sweep, run.group = given.get("sweep") or run.sweep, given.get("groupName") or run.group
        run.tags, run.notes = given.get("tags") or run.tags, given.get("notes") or run.notes
        for key, entry in json.loads(given.get("config") or "{}").items():
            if key != "_wandb":
                run.config[key] = entry["value"]
        return {"upsertBucket": {"bucket": self._bucket(name), "inserted": inserted}}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        return {
            "id": name,
            "name": name,
            "displayName": run.display_name,
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": run.entity}},
            "historyLineCount": len(run.history),
        }

    def _UpsertSweep(self, given: dict[str, Any]) -> dict[str, Any]:
        name = f"5weep{len(self.sweeps)}"
        self.sweeps[name] = Sweep(given["config"])
        project = {"id": "p", "name": given["projectName"], "entity": {"id": "e", "name": given["entityName"]}}
        return {"upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": []}}

    def _SweepWithRuns(self, given: dict[str, Any]) -> dict[str, Any]:
        sweep = {"id": given["sweep"], "config": self.sweeps[given["sweep"]].config, "runs": {"edges": []}}
        return {"project": {"sweep": sweep}}

    def _CreateAgent(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": given["sweep"]}}}

    def _Heartbeat(self, given: dict[str, Any]) -> dict[str, Any]:
        """Give an agent that is idle the next trial; stop what is to stop; send it home when nothing is left."""
        sweep, running = self.sweeps[given["id"]], json.loads(given["runState"])
        commands: list[dict[str, Any]] = [{"type": "stop", "run_id": name} for name in running if name in sweep.stop]
        if not running and sweep.trials:
            name, values = sweep.trials.pop(0)
            kind = "resume" if name in sweep.given else "run"
            sweep.given[name] = values
            arguments = {option: {"value": value} for option, value in values.items()}
            commands = [{"type": kind, "run_id": name, "program": "", "args": arguments}]
        elif not running:
            commands = [{"type": "exit"}]
        sweep.commands += [(command["type"], command.get("run_id", "")) for command in commands]
        return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}}

    def _GetProjects(self, given: dict[str, Any]) -> dict[str, Any]:
        names = dict.fromkeys(run.project for run in self.runs.values())
        project = {
            "entityName": given["entity"],
            "createdAt": "2026-01-01T00:00:00Z",
            "isBenchmark": False,
            "user": None,
        }
        edges = [{"node": project | {"id": name, "name": name}, "cursor": ""} for name in names]
        return {"models": {"edges": edges, "pageInfo": {"endCursor": "", "hasNextPage": False}}}

    def _View(self, given: dict[str, Any]) -> dict[str, Any]:
        found = [view for view in self.views.values() if view["type"] == given["viewType"]]
        found = [view for view in found if given.get("viewName") in (None, view["name"])]
        edges = [{"node": view, "cursor": ""} for view in found]
        return {"project": {"allViews": {"edges": edges, "pageInfo": {"endCursor": "", "hasNextPage": False}}}}

    def _ProjectViews(self, given: dict[str, Any]) -> dict[str, Any]:
        return self._View({"viewType": "runs"} | given)

    def _upsertView(self, given: dict[str, Any]) -> dict[str, Any]:
        key = given.get("id") or f"view{len(self.views)}"
        kept = ("type", "name", "displayName", "description", "spec")
        stamps = {"createdAt": "2026-01-01T00:00:00Z", "updatedAt": "2026-01-01T00:00:00Z"}
        project = {"id": "p", "name": given["projectName"], "entityName": given["entityName"]}
        self.views[key] = {"id": key, **{name: given[name] for name in kept}, "project": project, **stamps}
        return {"upsertView": {"view": self.views[key], "inserted": "id" not in given}}

    _UpsertView2 = _upsertView

    def _CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _NotifyScriptableRunAlert(self, given: dict[str, Any]) -> dict[str, Any]:
        self.runs[given["runName"]].alerts.append((given["title"], given["text"]))
        return {"notifyScriptableRunAlert": {"success": True}}

    def _ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}  # no such artifact yet

    def _CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(given["input"] | {"committed": False})
        artifact = {
            "id": str(len(self.artifacts) - 1),
            "state": "PENDING",
            "artifactSequence": {"id": "s", "name": given["input"]["artifactCollectionName"], "latestArtifact": None},
        }
        return {"createArtifact": {"artifact": artifact}}

    def _CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        upload = {"uploadUrl": f"{self.url}/upload/manifest-{given['artifactID']}", "uploadHeaders": []}
        return {
            "createArtifactManifest": {"artifactManifest": {"id": given["artifactID"], "file": {"id": "f", **upload}}}
        }

    def _CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        nodes: list[dict[str, Any]] = [
            {
                "storagePath": None,
                "uploadUrl": f"{self.url}/upload/artifact-{file['artifactID']}/{file['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            for file in given["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[int(given["artifactID"])]
        artifact["committed"] = True
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": artifact["digest"]}}}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Backend

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        answer: dict[str, Any] = {}
        if self.server.status == 200 and self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
            answer = {"stopped": self.server.stopped}
        elif self.server.status == 200 and self.path == "/graphql":
            request = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            answer = {"data": self.server.graphql(operation[1] if operation else "", request.get("variables") or {})}
        self._reply(json.dumps(answer).encode())

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        md5 = self.headers.get("content-md5")
        assert md5 is None or base64.b64decode(md5) == hashlib.md5(body).digest()
        self.server.uploads[self.path.removeprefix("/upload/")] = body
        self._reply(b"")

    def _reply(self, body: bytes) -> None:
        self.send_response(self.server.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


def isolate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, mode or settings of whoever runs the tests, or of a test before, reaches them; no request is waited for long."""
    import wandb  # not by who imports this file for a server alone

    wandb.teardown()  # it keeps the settings that it has read once in a process
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = folder / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "3")


def wandb_cores() -> set[int]:
    """The background processes that wandb has started for this one."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            command = (process / "cmdline").read_bytes().decode().split("\0")
            if command[0].endswith("/wandb-core") and str(os.getpid()) in command:
                found.add(int(process.name))
    return found


def inspect(segment: Path) -> list[dict[str, Any]]:
    """The records of a file that wandb has written."""
    beside = Path(sys.executable).parent / "wandb"
    command = [str(beside if beside.exists() else "wandb"), "leet", "inspect", "--json", str(segment)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def wandb_rows(segment: Path) -> list[dict[str, Any]]:
    """The rows of a file that wandb has written."""
    return [record["history"]["item"] for record in inspect(segment) if record["type"] == "history"]


def train_here(cfg: Config) -> Progress:
    """Train in this process, which has the slow imports behind it already."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two, where others compute too, wait for each other
    try:
        return fit(cfg, SOLO, StopFlag())
    finally:
        torch.set_num_threads(threads)


@contextmanager
def serving() -> Iterator[Backend]:
    """A server that answers until the context, or `shutdown` and `server_close`, ends it."""
    with Backend() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()
