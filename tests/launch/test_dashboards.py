"""The pages are compared with what a real run sends, with a golden file, and with what a server gets to keep."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from data_pipeline.common.errors import UserError
from launch.pages.dashboards import SECTIONS, TITLE, VIEW, main, publish, specification
from tests.support.runs import USUAL, dotted, metrics_table, rows, settings_of
from tests.support.wandb_backend import Backend, isolate, serving, train_here
from trainer.config import load

GOLDEN = Path(__file__).parent / "dashboard.json"
OF_A_GPU = {"system/gpu.0.gpu", "system/gpu.7.memoryAllocated"}  # as wandb names them; this machine may have none


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    isolate(tmp_path, monkeypatch)
    yield
    wandb.teardown()


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server
        assert server.faults == []


def values(tree: Any, key: str) -> Iterator[Any]:
    """All values of `key`, however deep."""
    if isinstance(tree, list):
        for entry in tree:
            yield from values(entry, key)
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from values(value, key)


def shown(tree: Any) -> set[str]:
    """Every metric that a panel, a column or the ranking shows."""
    metrics = {name for names in values(tree, "metrics") for name in names}
    columns = {name for order in values(tree, "columnOrder") for name in order}
    ranked = {key["key"]["name"] for keys in values(tree, "keys") for key in keys}
    names = {*metrics, *columns, *ranked, *values(tree, "xAxis"), *values(tree, "metricRegex")}
    return {re.sub("^(summary_metrics[.]|summary:)", "", name) for name in names if not name.startswith(("_", "run:"))}


def test_every_metric_shown_is_one_that_a_run_logs(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.2")
    options = settings_of(tmp_path_factory.getbasetemp(), tmp_path / "run", epochs=3) | {"tracking.wandb": "online"}
    options |= {"run.log_every": "1", "tracking.histograms_every": "0"}  # which have pages of their own
    train_here(load(dotted(options)))
    logged = {name for row in rows(tmp_path / "run") for name in row}
    sent = {name for row in backend.run.history.values() for name in row}
    assert logged - {"step", "time"} == sent - {"train/step"}
    measured = {name.replace(".", "/", 1) for name in backend.run.system} | OF_A_GPU
    documented = metrics_table()
    assert logged - {"step", "epoch", "time"} <= documented.keys(), "trainer/tracking/README.md defines each"
    assert {name for name, when in documented.items() if when in USUAL} <= logged

    pages = specification("my-team", "sluice")
    charted = {name for section in SECTIONS for panel in section.panels for name in panel.metrics}
    assert {name for name in charted if not name.startswith("system/")} <= documented.keys()
    metrics = shown(pages["workspace"])
    assert metrics == shown(pages["report"]) | {"epoch"}
    assert (
        len(metrics) > 20
        and {name for section in SECTIONS for panel in section.panels for name in panel.metrics} < metrics
    )
    for name in metrics:
        matched = (
            {found for found in measured if re.search(name, found)}
            if "\\" in name
            else {name} & (sent | measured | documented.keys())
        )
        assert matched, f"no run logs {name}"
    for key in values(pages["workspace"], "grouping"):
        assert [entry["name"] for entry in key] == ["model.value.name"] and "name" in backend.run.config["model"]
    assert set(values(pages, "groupBy")) == {"world_size.value"} and "world_size" in backend.run.config


def test_specification_is_the_golden_one(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for _ in range(2):
        main(["--entity", "my-team", "--project", "sluice", "--dry_run"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    command = f"python -m launch dashboard --entity my-team --project sluice --dry_run > tests/{GOLDEN.name}"
    assert printed[0] == GOLDEN.read_text(), f"if the change is meant: {command}"


def test_pages_are_made_once_and_then_updated(backend: Backend) -> None:
    with pytest.raises(UserError, match=r"--project: me has no project sluice; train a run"):
        publish("me", "sluice")
    wandb.init(project="sluice", settings=wandb.Settings(silent=True)).finish()
    first = publish("me", "sluice")
    board, page = backend.views.values()
    assert (board["name"], board["type"], page["type"]) == (VIEW, "project-view", "runs")
    assert first == [
        f"{backend.url}/me/sluice?nw=sluiceoverview",
        f"{backend.url}/me/sluice/reports/{TITLE}--{page['id']}",
    ]
    expected = specification("me", "sluice")
    assert shown(json.loads(board["spec"])) == shown(expected["workspace"])

    for view in backend.views.values():
        view["spec"] = view["spec"].replace("Validation top-1", "something else")
    other = {**page, "id": "other", "displayName": "somebody's report"}
    backend.views["other"] = dict(other)
    assert publish("me", "sluice") == first
    assert list(backend.views) == [board["id"], page["id"], "other"] and backend.views["other"] == other
    assert all("Validation top-1" in backend.views[view["id"]]["spec"] for view in (board, page))


def test_mistakes_are_told_in_one_line(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="required: --entity; see"):
        main([])
    backend.status = 401
    with pytest.raises(UserError, match="--entity: W&B does not take the pages of me/sluice") as raised:
        publish("me", "sluice")
    assert len(str(raised.value).splitlines()) == 1
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(UserError, match=r"not installed; run pip install 'sluice-train\[dashboards\]'"):
        main(["--entity", "me", "--dry_run"])
