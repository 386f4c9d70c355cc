"""python -m launch check-nodes [--profile NAME|FILE] [--nodes N ...] [--out DIR] [-- options of trainer.check]: accept a cluster.

Each node of an allocation runs the items of `python -m trainer.check`, then all of its ranks measure how fast they sum.
Within a job the nodes are the job's; elsewhere salloc is asked for them first.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

from data_pipeline.common.entry_point import run_command
from data_pipeline.common.errors import printable, require
from launch.slurm.commands import first_host, run_slurm
from launch.slurm.job import rank_variables
from launch.slurm.profile import Profile, parse, request_of, request_parser
from trainer.check.rank_report import shared_gpus, slowest_pair
from trainer.check.results import FAIL, PASS, SKIPPED, Result, read

PROG = "python -m launch check-nodes"
ROOT = Path(__file__).parents[2]
SLOW = 0.85
"""Share of the other nodes' median below which a node's speed is that of a slow one."""
MINUTES = 60
"""Time limit of the allocation, where the profile does not set a shorter one."""
_IN_JOB = "SLURM_JOB_ID"
_GPU_VALUES, _CPU_VALUES = 25_000_000, 2_500_000  # float32 that all ranks sum


def main(arguments: list[str]) -> None:
    """Check every node and print what was found. Exits with 1 where something failed. Raises `UserError`."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = request_parser(PROG)
    parser.add_argument("--out", default="check", help="A new folder, with a check of each node in it.")
    values = parse(parser, arguments[:split])
    request, out, items = request_of(values), Path(values["out"]).absolute(), arguments[split + 1 :]
    require(not any(one.split("=")[0] == "--out" for one in items), "--out: it is behind --; put it before")
    require(not out.exists(), f"--out: {out} exists; give another folder")
    if request.dry_run:
        print(shlex.join(salloc(request.profile)))
    elif _IN_JOB in os.environ:
        sys.exit(check_nodes(request.profile, out, items))
    else:
        run_slurm("salloc", "--version")
        here = [sys.executable, "-m", "launch", "check-nodes", *arguments]
        sys.exit(subprocess.run([*salloc(request.profile), *here], env=_environment({})).returncode)


def salloc(profile: Profile) -> list[str]:
    """The command that waits for an allocation, in front of another that runs within it."""
    asked = {
        "job-name": "sluice-check",
        "nodes": profile.nodes,
        "ntasks-per-node": profile.ranks_per_node,
        "gpus-per-node": profile.gpus_per_node or None,
        "cpus-per-task": profile.cpus_per_task,
        "time": min(profile.minutes, MINUTES),
        **profile.options(),
    }
    return ["salloc", *(f"--{name}={value}" for name, value in asked.items() if value is not None)]


def check_nodes(profile: Profile, out: Path, items: list[str]) -> int:
    """Run both parts on the nodes of this job; returns the exit code."""
    nodes = run_slurm("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    out.mkdir(parents=True)
    check = shlex.join([_python(profile), "-m", "trainer.check", *items, "--out"])
    command = f'{check} {shlex.quote(str(out))}/"$SLURMD_NODENAME"'
    subprocess.run(
        [*_srun(profile, len(nodes), 1), "--label", *_shell(profile, command)], env=_environment(profile.env)
    )
    # The nodes together, each with all of its ranks.
    report = out / "ranks.json"
    values = _GPU_VALUES if profile.gpus_per_node else _CPU_VALUES
    rank = shlex.join([_python(profile), "-m", "launch.slurm.check_nodes", str(report), str(values)])
    subprocess.run(
        [*_srun(profile, len(nodes), profile.ranks_per_node), "--kill-on-bad-exit=1", *_shell(profile, rank)],
        env=_environment(profile.env),
    )
    found = {node: results_of(out / node) for node in nodes}
    ranks = json.loads(report.read_text()) if report.exists() else None
    lines = [*node_lines(found), *speed_lines(found), *rank_lines(ranks)]
    text = "\n".join(map(printable, lines))
    (out / "summary.txt").write_text(text + "\n")
    print(f"\n{text}\nall of it: {printable(str(out))}", flush=True)
    return int(any(line.startswith(FAIL) for line in lines))


def _python(profile: Profile) -> str:
    return profile.python or sys.executable


def _srun(profile: Profile, nodes: int, tasks: int) -> list[str]:
    """So many tasks on each node, which see all of its cores and GPUs."""
    container = [f"--container-image={profile.container}"] if profile.container else []
    spread = [f"--nodes={nodes}", f"--ntasks={nodes * tasks}", f"--ntasks-per-node={tasks}"]
    return ["srun", *spread, "--cpu-bind=none", *container, *profile.srun_args]


def _shell(profile: Profile, command: str) -> list[str]:
    return ["bash", "-c", "\n".join([*profile.setup, f"exec {command}"])]


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def results_of(folder: Path) -> list[Result]:
    """Results that a node has written; none where it has not."""
    try:
        return read(folder)
    except (OSError, ValueError):
        return []


def node_lines(found: Mapping[str, list[Result]]) -> Iterator[str]:
    """A line for each node, and one for each item that failed."""
    for node, results in found.items():
        states = [result.state for result in results]
        if states:
            yield f"{node}: " + ", ".join(f"{states.count(state)} {state}" for state in (PASS, FAIL, SKIPPED))
        else:
            yield f"{FAIL} {node} has written no check"
    for node, results in found.items():
        yield from (f"{FAIL} {node}, {one.item}: {one.told}" for one in results if one.state == FAIL)


def speed_lines(found: Mapping[str, list[Result]]) -> Iterator[str]:
    """Name the nodes that are slower than the others, or else the slowest one."""
    speeds = {node: {k: v for one in results for k, v in one.figures.items()} for node, results in found.items()}
    worst: dict[str, tuple[float, str]] = {}
    for node, own in speeds.items():
        for name, value in own.items():
            others = [other[name] for at, other in speeds.items() if at != node and name in other]
            if others:
                share = value / median(others)
                worst[node] = min(worst.get(node, (share, name)), (share, name))
    slow = {node: share for node, share in worst.items() if share[0] < SLOW}
    for node, (share, name) in sorted((slow or worst).items(), key=lambda one: one[1])[: len(slow) or 1]:
        words = "slow node" if slow else "slowest node, within the usual"
        yield f"{words}: {node}, {share:.0%} of the others in {name.partition(',')[0]}"


def rank_lines(report: dict[str, object] | None) -> Iterator[str]:
    """Say where the ranks are, and how fast they sum."""
    if report is None:
        yield f"{FAIL} the ranks have not found together"
        return
    places, together = report["places"], report["together_gb_s"]
    assert isinstance(places, list)
    yield from (f"{FAIL} {line}" for line in shared_gpus(places))
    yield from (f"rank {one['rank']}: {one['node']}, {one['device']} {one['uuid']}".rstrip() for one in places)
    if together is not None:
        yield f"all-reduce of {report['megabytes']:.0f} MB by {len(places)} ranks: {together:.2f} GB/s"
        yield slowest_pair(report)


def join(file: str, values: str) -> None:
    """Be one of the ranks that measure, in a step with a task for each."""
    os.environ.update(rank_variables(os.environ, first_host(os.environ["SLURM_JOB_NODELIST"])))
    from trainer.check.ranks import main as measure

    measure(file, values)


if __name__ == "__main__":
    run_command(lambda: join(*sys.argv[1:]))
