"""The team's W&B pages as code: python -m launch dashboard --entity TEAM --project PROJECT [--dry_run]

A workspace (every metric by section, the runs filtered, grouped and ranked) and a report (the same questions, with words).
Both are made once and then updated in place, so links to them stay good. Pages that people saved under other names stay.
"""

import json
import sys
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from data_pipeline.common.cli import parse_plain, plain_parser
from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import UserError, require
from trainer.tracking.config import TrackingConfig

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

TITLE = "Sluice"
VIEW = "nw-sluiceoverview-v"
"""Name of the workspace on the server. The client would draw a random one; with a fixed name a later call finds its own."""


class Panel(NamedTuple):
    """One chart of a section."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    """Names as runs log them; `system/...` is measured by wandb itself. Those of a GPU are one pattern for all GPUs."""
    over: str = "train/step"
    """Metric on the x-axis. `world_size` draws bars: for each number of processes the median of its runs."""


class Section(NamedTuple):
    """Panels that answer one question."""

    title: str
    question: str
    panels: tuple[Panel, ...]


SECTIONS = (
    Section(
        "Quality",
        "How good is the model, and is it still getting better?",
        (
            Panel("Validation top-1, or mAP", "%", ("val/top1_pct", "val/map_pct"), "epoch"),
            Panel("Best validation top-1, or mAP", "%", ("val/best_top1_pct", "val/best_map_pct"), "epoch"),
            Panel("Validation top-5", "%", ("val/top5_pct",), "epoch"),
            Panel("Validation loss", "nats", ("val/loss",), "epoch"),
            Panel("Training loss", "nats", ("train/loss",)),
            Panel("Training accuracy", "%", ("train/top1_pct", "train/top5_pct")),
        ),
    ),
    Section(
        "Throughput",
        "How fast is it, and what takes the time?",
        (
            Panel("Images per second", "images/s", ("perf/images_per_s",)),
            Panel("Time of a step, median and 95th percentile", "ms", ("perf/step_ms_p50", "perf/step_ms_p95")),
            Panel("Share of a matrix product's FLOP/s (MFU)", "%", ("perf/mfu_pct",)),
            Panel("Images trained on", "images", ("train/samples",)),
            Panel("Time of an epoch", "s", ("perf/epoch_s",), "epoch"),
            Panel("Checkpoint: the wait for its copy, and its writing", "s", ("perf/ckpt_save_s", "perf/ckpt_write_s")),
        ),
    ),
    Section(
        "Data wait",
        "Does the model wait for images, and can all of them be read?",
        (
            Panel("Waiting for data", "% of the training time", ("perf/data_wait_pct",)),
            Panel("Images that cannot be read", "images", ("data/bad_images",)),
        ),
    ),
    Section(
        "Ranks",
        "Does one rank hold up the others?",
        (
            Panel("Own work of the slowest rank beyond the median's", "%", ("perf/slowest_pct",)),
            Panel("Ranks named as slow", "ranks", ("perf/slow_ranks",)),
            Panel("Ranks waiting for slower ones", "% of the training time", ("perf/rank_wait_pct",)),
            Panel("Computing, and exchanging gradients behind it", "ms of a step", ("perf/compute_ms", "perf/comm_ms")),
        ),
    ),
    Section(
        "Learning rate",
        "Is the schedule as intended, and are the gradients sound?",
        (
            Panel("Learning rate", "per optimizer step", ("train/lr",)),
            Panel("Norm of the gradient", "", ("train/grad_norm",)),
            Panel("Loss scale (fp16)", "", ("train/loss_scale",)),
        ),
    ),
    Section(
        "System",
        "Is the hardware busy?",
        (
            Panel("GPU utilisation", "%", (r"system/gpu\.\d+\.gpu$",), "RelativeTime(Wall)"),
            Panel("GPU memory allocated", "%", (r"system/gpu\.\d+\.memoryAllocated$",), "RelativeTime(Wall)"),
            Panel("CPU", "%", ("system/cpu",), "RelativeTime(Wall)"),
            Panel("Memory", "%", ("system/memory_percent",), "RelativeTime(Wall)"),
            Panel("Memory of the process", "MB", ("system/proc.memory.rssMB",), "RelativeTime(Wall)"),
            Panel("Memory of the fullest rank", "GiB", ("perf/gpu_mem_gib", "perf/host_mem_gib")),
            Panel("Power of all ranks", "W", ("perf/gpu_watts", "perf/cpu_watts")),
            Panel("Energy of an image", "J", ("perf/joules_per_image",)),
        ),
    ),
    Section(
        "Scaling by world size",
        "Do twice the processes train twice as fast?",
        (
            Panel("Images per second by number of processes", "images/s", ("perf/images_per_s",), "world_size"),
            Panel("Data wait by number of processes", "%", ("perf/data_wait_pct",), "world_size"),
            Panel("Best top-1 by number of processes", "%", ("val/best_top1_pct",), "world_size"),
        ),
    ),
)
RANKED_BY = "val/best_top1_pct"
GROUPED_BY = "model.name"
COLUMNS = (RANKED_BY, "perf/images_per_s", "perf/data_wait_pct", "epoch")
"""Columns of the list of runs, beside the name."""
SHOWN = "State != 'failed'"


def workspace(entity: str, project: str) -> "ws.Workspace":
    """Build the workspace, not yet saved. Needs no network."""
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=section.title, panels=_charts(section), is_open=number < 3)
        for number, section in enumerate(SECTIONS)
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[*sections, ws.Section(name="Runs compared", panels=[_comparer()])],
        settings=ws.WorkspaceSettings(x_axis="train/step", max_runs=20),
        runset_settings=ws.RunsetSettings(
            filters=SHOWN,
            groupby=[ws.Config(GROUPED_BY)],
            order=[ws.Ordering(ws.Summary(RANKED_BY), ascending=False)],
            pinned_columns=[f"summary:{name}" for name in COLUMNS],
        ),
    )


def report(entity: str, project: str) -> "wr.Report":
    """Build the report, not yet saved. Needs no network."""
    import wandb_workspaces.reports.v2 as wr

    def grid(panels: list[Any]) -> "wr.PanelGrid":
        runs = wr.Runset(  # of the report's own project: to name it would ask the server for its number
            name="Runs", filters=SHOWN, order=[wr.OrderBy(wr.SummaryMetric(RANKED_BY), ascending=False)]
        )
        return wr.PanelGrid(runsets=[runs], panels=panels)

    blocks: list[Any] = [wr.TableOfContents()]
    for section in SECTIONS:
        blocks += [wr.H2(section.title), wr.P(section.question), grid(_charts(section))]
    blocks += [wr.H2("Runs compared"), wr.P("In which options do the runs differ?"), grid([_comparer()])]
    return wr.Report(entity=entity, project=project, title=TITLE, blocks=blocks, width="fluid")


def specification(entity: str, project: str) -> dict[str, Any]:
    """Workspace and report as the JSON values that would be sent to W&B, equal at every call."""
    pages: dict[str, Any] = {"workspace": workspace(entity, project), "report": report(entity, project)}
    return {
        name: _named(json.loads(page._to_model().model_dump_json(by_alias=True, exclude_none=True)))
        for name, page in pages.items()
    }


def _named(value: Any) -> Any:
    """Drop the values that the library draws at random: names of panels and sets of runs, times."""
    if isinstance(value, list):
        return [_named(entry) for entry in value]
    if isinstance(value, dict):
        drawn = ("__id__", "id", "createdAt", "updatedAt")
        return {key: _named(entry) for key, entry in value.items() if key not in drawn}
    return value


def _charts(section: Section) -> list[Any]:
    """Lay out the panels of a section in rows of three."""
    import wandb_workspaces.reports.v2 as wr

    charts: list[Any] = []
    for number, panel in enumerate(section.panels):
        place = wr.Layout(x=8 * (number % 3), y=6 * (number // 3), w=8, h=6)
        # A scaling plot compares processes, so it is bars over their number; all others are curves over time.
        if panel.over == "world_size":
            charts.append(
                wr.BarPlot(
                    title=panel.title,
                    title_x=panel.unit,
                    metrics=[wr.SummaryMetric(name) for name in panel.metrics],
                    groupby=wr.Config(panel.over),
                    groupby_aggfunc="median",
                    layout=place,
                )
            )
        else:
            pattern = panel.metrics[0] if "\\" in panel.metrics[0] else None
            charts.append(
                wr.LinePlot(
                    title=panel.title,
                    title_y=panel.unit or None,
                    x=panel.over,
                    y=[] if pattern else list(panel.metrics),
                    metric_regex=pattern,
                    layout=place,
                )
            )
    return charts


def _comparer() -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=12))


def publish(entity: str, project: str) -> list[str]:
    """Make the workspace and the report, or update those that an earlier call made. Returns their URLs.

    Raises `UserError` where the server cannot be reached, or refuses the key, the team or the project.
    """
    import wandb
    from wandb_workspaces.workspaces.internal import View

    try:
        # A misspelt project is said before any page is made for it.
        wandb.setup(wandb.Settings(silent=True))
        require(
            any(found.name == project for found in wandb.Api().projects(entity)),
            f"--project: {entity} has no project {project}; train a run with --tracking.project {project} first",
        )
        # The fixed name makes a second call update the first call's workspace.
        board = workspace(entity, project)
        board._internal_name = VIEW
        with suppress(ValueError):  # there is none yet
            board._internal_id = View.from_name(entity, project, VIEW).id
        board.save()

        page = report(entity, project)
        # Reports have no names of ours on the server, so the title finds the earlier one.
        ours = [found.id for found in wandb.Api().reports(f"{entity}/{project}") if found.display_name == TITLE]
        page.id = ours[0] if ours else ""
        page.save()
        return [board.url, page.url]
    except UserError:
        raise
    except Exception as error:  # the client raises what its transport does
        why = " ".join(str(error).split())
        raise UserError(
            f"--entity: W&B does not take the pages of {entity}/{project} ({why}); see `wandb login`"
        ) from None


def main(arguments: list[str]) -> None:
    parser = plain_parser("python -m launch dashboard", "Make or update the team's W&B workspace and report.")
    parser.add_argument("--entity", required=True, help="W&B team or user that owns the project.")
    parser.add_argument("--project", default=TrackingConfig().project, help="W&B project.")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="Print the specification as JSON instead.")
    args = parse_plain(parser, arguments)
    require(
        find_spec("wandb_workspaces") is not None,
        "launch dashboard: wandb-workspaces is not installed; run pip install 'sluice-train[dashboards]'",
    )
    if args.dry_run:
        print(json.dumps(specification(args.entity, args.project), indent=1, ensure_ascii=False))
    else:
        print("\n".join(publish(args.entity, args.project)))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
