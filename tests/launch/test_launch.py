"""Launching without a cluster: this machine's processes, profiles, what a run folder tells, and every wrong command."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import UserError
from launch.cli import COMMANDS, MODULES, main, sluice
from launch.runs import table, tail
from launch.slurm.after import decide
from launch.slurm.commands import Queued, own_job
from launch.slurm.cores import share
from launch.slurm.job import rank_variables
from launch.slurm.profile import PROFILES, Profile, parse_request
from launch.slurm.submission import LOST, Job, Submission, find, fresh_folder, newest
from launch.supervisor.record import record_restart
from launch.supervisor.supervisor import Restart
from tests.support import warm
from tests.support.runs import ROOT, descendants, dotted, environment, rows, settings_of
from trainer.checkpoint.store import Store
from trainer.node.arrival import Place
from trainer.resilience.slow_ranks import INTERVALS, RankTimes, SlowRanks

PROFILE_NAMES = sorted(file.stem for file in PROFILES.glob("*.yaml"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def launch(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return warm.run("launch", *arguments, environment={**environment(), **variables}, cwd=cwd)


# This machine


def test_local_run_of_two_processes(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "it's a run"
    done = launch("local", "-n", "2", *dotted(settings_of(base, run)), "--run.max_steps", "2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "stopped after run.max_steps: 2 of 15 steps" in done.stdout
    assert Store(run).progress().step == 2


def test_local_mistake_is_one_line(tmp_path: Path) -> None:
    """Of any number of processes, and nothing from torchrun."""
    done = launch("local", "-n", "2", "--data.path", "/no where", "--run.name", "a", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: data.path: /no where is not a folder") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_local_crash_and_signal(base: Path, tmp_path: Path) -> None:
    """A killed rank takes the others along; SIGTERM has the run saved first."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "launch", "local", "-n", "2", *dotted(settings_of(base, run, epochs=20))]
    for act, code, said in ((kill_a_rank, 137, "was ended by SIGKILL\n"), (terminate, 143, "")):
        before = len(rows(run))
        job = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while job.poll() is None and len(rows(run)) <= before:
            time.sleep(0.02)
        act(job.pid)
        _, errors = job.communicate(timeout=60)
        assert job.returncode == code
        assert errors.endswith(said)
    saved = Store(run).progress()
    assert not saved.finished and saved.step == rows(run)[-1]["step"]


def kill_a_rank(launcher: int) -> None:
    ranks = [pid for pid in descendants(launcher) if b"\0trainer\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(ranks[-1], signal.SIGKILL)


def terminate(launcher: int) -> None:
    os.kill(launcher, signal.SIGTERM)


# Commands


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["start"], "start: no such command; give one of local, submit, check-nodes, sweep, summary, status"),
        (["local", "-n", "two"], "-n: 'two' is no number of processes"),
        (["local", "-n", "0"], "-n: '0' is no number of processes"),
        (["local", "-n", "2", "--restarts", "many"], "--restarts: 'many' is no number of restarts; give one such as 3"),
        (["submit", "--nodes", "2", "--", "--run.name", "a"], "no sbatch here: this machine has no SLURM"),
        (["submit", "--dry_run"], "no sbatch here: this machine has no SLURM"),
        (["submit", "--run.name", "a"], "put the trainer's options after --"),
        (["submit", "--", "--optim.lr", "fast"], "optim.lr: fast does not fit"),
        (["status"], "no squeue here: this machine has no SLURM"),
        (["logs"], "following arguments are required: RUN; see python -m launch logs --help"),
        (["local", "--lr", "3"], "--lr: no such option; did you mean --optim.lr?"),
        (["logs", "nobody"], "nobody: no run of that name was submitted"),
        (["cancel", "nobody"], "nobody: no run of that name was submitted"),
        (["resubmit"], "RUN: no run given"),
        (["resubmit", "nobody", "--nodes", "2"], "nobody: no run of that name was submitted"),
    ],
)
def test_wrong_commands_are_refused(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands on a machine without SLURM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(sys, "argv", ["launch", *arguments])
    with pytest.raises(UserError) as refused:
        main()
    assert words in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_refused_command_says_one_line(tmp_path: Path) -> None:
    done = launch("submit", "--nodes", "2", "--", "--run.name", "a", cwd=tmp_path, PATH="/nonexistent")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert done.stderr.startswith("error: no sbatch here")


def test_tools_without_a_cluster_are_one_line(tmp_path: Path) -> None:
    """As on a machine where SLURM is installed and not set up."""
    tool = tmp_path / "squeue"
    tool.write_text("""#!/bin/sh
echo 'squeue: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host' >&2
echo 'squeue: error: fetch_config: DNS SRV lookup failed' >&2
echo 'squeue: fatal: Could not establish a configuration source' >&2
exit 1
""")
    tool.chmod(0o755)
    done = launch("status", cwd=tmp_path, PATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert done.stderr.startswith("error: squeue belongs to no cluster: SLURM is installed here, but has no slurm.conf")


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["launch", *arguments])
        main()
        said = capsys.readouterr().out
        assert all(f"  {command} " in said for command in COMMANDS)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands on a machine without SLURM."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(sys, "argv", ["launch", command, "--help"])
    with suppress(SystemExit):
        main()
    output, errors = capsys.readouterr()
    assert output.startswith(f"usage: python -m launch {command}") and errors == ""


def test_one_name_has_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"sluice": "launch.cli:sluice"}
    monkeypatch.setattr(sys, "argv", ["sluice"])
    with pytest.raises(SystemExit) as ended:
        sluice()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"  {command} " in said for command in (*MODULES, *COMMANDS))
    modules = {
        "trainer.__main__",
        "trainer.evaluate",
        *(f"{package}.__main__" for package in packages_with_a_command()),
    }
    assert {module for module, _ in MODULES.values()} == modules, "every `python -m` is there"
    for command, words in (
        ("train --lr 1", "did you mean --optim.lr"),
        ("logs nobody", "nobody: no run"),
        ("x", "x: no"),
    ):
        monkeypatch.setattr(sys, "argv", ["sluice", *command.split()])
        with pytest.raises(SystemExit) as ended:
            sluice()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: ") and words in said


def packages_with_a_command() -> list[str]:
    mains = [*ROOT.glob("trainer/*/__main__.py"), *ROOT.glob("data_pipeline/*/__main__.py")]
    return [".".join(path.parent.relative_to(ROOT).parts) for path in mains]


# Profiles


@pytest.mark.parametrize("name", PROFILE_NAMES)
def test_every_profile_loads(name: str) -> None:
    request = parse_request("submit", ["--profile", name])
    assert request == parse_request("submit", [f"--profile={PROFILES / name}.yaml"])
    assert request.profile != Profile()
    assert not request.dry_run


def test_options_win_over_the_file_and_that_over_an_earlier_job(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text('nodes: 4\ntime: "2-03:04:05"\nsetup: [a, b]\n')
    earlier = {"nodes": 2, "mem": "8G", "qos": "low"}
    request = parse_request("submit", ["--profile", str(file), "--nodes", "6", "--qos", "01"], earlier)
    profile = request.profile
    assert (profile.nodes, profile.time, profile.setup, profile.mem, profile.qos) == (
        6,
        "2-03:04:05",
        ["a", "b"],
        "8G",
        "01",
    )
    assert profile.minutes == (2 * 24 + 3) * 60 + 4 + 1
    assert Profile(time="0:30").minutes == 30


def test_one_process_a_gpu() -> None:
    assert Profile(gpus_per_node=8).ranks_per_node == 8
    assert Profile(tasks_per_node=3).ranks_per_node == 3
    assert Profile().ranks_per_node == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--profile", "nobody"], "--profile: 'nobody' is neither a file nor a profile; the profiles are dev, example"),
        (["--nodes", "2", "--profile", "dev"], "--profile: it comes after other options"),
        (["--nodes", "0"], "nodes: 0 is not positive"),
        (["--nodes", "many"], "nodes: many does not fit; give a whole number"),
        (["--gpus_per_node", "8", "--tasks_per_node", "4"], "tasks_per_node: 4 beside gpus_per_node 8"),
        (["--time", "90"], "time: '90' is no time"),
        (["--node", "2"], "--node: no such option of a job"),
        (["--comment", "a\n#SBATCH --uid=0"], "comment: 'a\\n#SBATCH --uid=0' has a line break"),
        (["--env.HF_TOKEN", "x"], "env: HF_TOKEN would be written into the job's script"),
        (["--env", '{"A;rm": "x"}'], "env: 'A;rm' is no name of a variable"),
        (["--export", '["A,ALL"]'], "export: 'A,ALL' is no name of a variable"),
        (["--max_crashes", "-1"], "max_crashes: -1 is negative"),
        (["--spares", "-1"], "spares: -1 is negative"),
        (["--restarts", "-1"], "restarts: -1 is negative"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_request("submit", arguments)
    assert words in str(refused.value)


def test_time_needs_no_quotes(tmp_path: Path) -> None:
    """YAML itself takes 4:00:00 for a number, to base sixty."""
    file = tmp_path / "mine.yaml"
    file.write_text("time: 4:00:00\n")
    request = parse_request("submit", ["--profile", str(file)])
    assert request.profile.time == "4:00:00"


PARTITIONS = """PartitionName=gpu Default=NO MaxCPUsPerNode=UNLIMITED Nodes=a[1-2] State=UP
PartitionName=mixed Default=YES MaxCPUsPerNode=60 Nodes=a1,b1,c1 State=UP
"""
NODES = """NodeName=a1 Arch=x86_64 CPUAlloc=0 CPUEfctv=124 CPUTot=128 Gres=gpu:a100:8(S:0-1) Partitions=gpu,mixed State=IDLE
NodeName=a2 Arch=x86_64 CPUAlloc=0 CPUTot=128 Gres=gpu:a100:4,gpu:v100:2 Partitions=gpu State=DOWN
NodeName=b1 CPUAlloc=0 CPUEfctv=64 CPUTot=64 Gres=gpu:2 Partitions=mixed State=IDLE
NodeName=c1 CPUAlloc=0 CPUEfctv=48 CPUTot=48 Gres=(null) Partitions=mixed State=IDLE
"""


@pytest.mark.parametrize(
    ("profile", "cores"),
    [
        (Profile(partition="gpu", gpus_per_node=8), 15),  # without the cores that the system keeps
        (Profile(partition="gpu", gpus_per_node=1), 15),  # a1 has fewer cores a GPU than a2
        (Profile(gpus_per_node=2), 7),  # of the default partition's 60 on a1
        (Profile(partition="gpu,mixed", gpus_per_node=4), 7),
        (Profile(tasks_per_node=2), 24),
        (Profile(partition="gpu", gpus_per_node=9), None),
        (Profile(partition="other"), None),
    ],
)
def test_a_task_asks_for_its_share_of_a_node(profile: Profile, cores: int | None) -> None:
    assert share(profile, PARTITIONS, NODES) == cores


# What a job's processes and its folder say


def test_ranks_join_as_torchrun_would_have_them() -> None:
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "12",
        "SLURM_STEP_NUM_NODES": "3",
        "SLURM_JOB_ID": "4012345",
    }
    assert rank_variables(slurm, "gpu07") == {
        "RANK": "5",
        "WORLD_SIZE": "12",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "22345",
    }


def test_a_task_of_an_array_is_not_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of its tasks has the array's own number."""
    monkeypatch.setenv("SLURM_JOB_ID", "70")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert own_job() == "70"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert own_job() == "70_4"


def submitted(run: Path, number: str = "7") -> Submission:
    (run / "config.yaml").parent.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").touch()
    submission = Submission(fresh_folder(run))
    submission.folder.mkdir(parents=True)
    submission.write_job(Job(str(run), str(run.parent), {"max_crashes": 1}, "v", "2026-01-31 12:00:00", number))
    return submission


def test_a_tree_without_git_can_be_submitted_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an unpacked archive of the source, which need not be installed either."""
    from launch.slurm import submit  # here, for submitit takes a second

    monkeypatch.setattr(submit, "ROOT", tmp_path)
    installed = next((one.version for one in distributions(name="sluice")), "unknown")
    assert submit.code_version() == installed


def test_the_newest_submission_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/it's"
    first = submitted(run, "7")
    first.folder.rename(first.folder.with_name("20260101-000000-aaaa"))
    second = submitted(run, "8")
    (run / "slurm/99999999-never-submitted").mkdir()
    last = newest(run)
    assert last and last.folder == second.folder and last.job.id == "8"
    assert find("it's")[1].folder == Path("runs/it's/slurm") / second.folder.name
    assert find(str(run))[0] == run
    with pytest.raises(UserError, match="no run of that name"):
        find("its")


@pytest.mark.parametrize(
    ("outcome", "end", "code"),
    [("finished", "finished", 0), ("stopped", "stopped", 0), ("error: data.path: x", "error: data.path: x", 2)],
)
def test_a_job_that_has_ended_stays_ended(
    outcome: str, end: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its processes returned; no question to SLURM is needed."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    submission = submitted(tmp_path / "run")
    submission.write_outcome(0, outcome)
    assert decide(submission, 143) == code
    assert (submission.end, submission.restarts, submission.crashes) == (end, 0, 0)


@pytest.mark.parametrize(("outcome", "crashes"), [(LOST, 0), ("failed: another process trains", 1)])
def test_a_job_that_goes_back_into_the_queue(
    outcome: str, crashes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More lost nodes than spares are no crash; a mistake in words is one, where it appeared only after a restart."""
    asked: list[str] = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setattr("launch.slurm.after.state_of", lambda job: "RUNNING")
    monkeypatch.setattr("launch.slurm.after.requeue", asked.append)
    submission = submitted(tmp_path / "run")
    submission.write_outcome(0, outcome)
    decide(submission, 1)
    assert (asked, submission.crashes, submission.restarts, submission.end) == (["7"], crashes, 1, None)


def test_an_outcome_is_that_of_one_start(tmp_path: Path) -> None:
    submission = submitted(tmp_path / "run")
    assert submission.outcome(0) is None and submission.end is None
    submission.write_outcome(0, "handed over")
    assert submission.outcome(0) == "handed over"
    assert submission.outcome(1) is None, "the next start has not said anything yet: it may have crashed"


def slow_rank(rank: int) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl about a rank that is slow, and another that no longer is."""
    watch = SlowRanks(20, [Place("gpu1", "")] * (rank + 1))
    usual, slow = RankTimes(0.001, 0.099, 0.0), RankTimes(0.042, 0.099, 0.0)
    lines: list[dict[str, Any]] = []
    for other in (slow, usual):
        for _ in range(INTERVALS):
            told = watch.look([other, *[usual] * (rank - 1), slow])
            lines += [{"alert": title, "text": text, **facts._asdict()} for title, text, facts in told]
    assert [line["rank"] for line in lines] == [0, rank, 0]
    return lines


def test_the_table_of_runs(tmp_path: Path) -> None:
    figures: list[dict[str, Any]] = [
        {"step": 1, "epoch": 0.1, "time": 1.0},
        {"step": 5, "epoch": 1, "time": 1000.0, "perf/images_per_s": 100.0, "val/best_top1_pct": 50.0},
        {"step": 7, "epoch": 1.5, "time": 1100.0, "perf/images_per_s": 120.0, "train/loss": None},
    ]
    for number, name in enumerate(("waiting", "running", "ended", "lost", "cancelled")):
        submission = submitted(tmp_path / name, str(number))
        if name == "running":
            (tmp_path / name / "config.yaml").write_text("run: {epochs: 3}")
            lines = [*figures[:2], *slow_rank(9), {**figures[1], "perf/slow_ranks": 0.0}, *slow_rank(3), *figures[2:]]
            (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines) + '{"st')
        if name in ("ended", "cancelled"):
            submission.write_restarts(crashes=1, restarts=3, end="finished" if name == "ended" else "cancelled")
    (tmp_path / "not submitted").mkdir()
    submitted(tmp_path / "sweep/lr=0.1", "5_1")
    jobs = {
        "5_1": Queued("PENDING", "", 0, "JobArrayTaskLimit"),
        "0": Queued("PENDING", "", 0, "Priority"),
        "1": Queued("RUNNING", "gpu[1-2]", 2, "None"),
        "7": Queued("PENDING", "", 0, "QOSMaxJobsPerUserLimit"),
        "4": Queued("COMPLETING", "gpu3", 0, "None"),
    }
    for name, job in (("by sbatch", "7"), ("by sbatch and done", "8")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "slurm_job.txt").write_text(f"{job}\n")
    rows = {row.name: row for row in table(tmp_path, jobs, 1110.0)}
    assert list(rows) == [
        "by sbatch",
        "by sbatch and done",
        "cancelled",
        "ended",
        "lost",
        "running",
        "sweep/lr=0.1",
        "waiting",
    ]
    assert rows["sweep/lr=0.1"].state == "pending: as many of its sweep run as may (JobArrayTaskLimit)"
    assert rows["waiting"].state == "pending: others come first (Priority)" and rows["waiting"].epoch is None
    slow = "rank 3 on gpu1 (data, 41 %)"
    assert rows["running"] == ("running", "running", "gpu[1-2]", 2, 1.5, 290.0, 120.0, 50.0, slow, None)
    assert rows["ended"].slow == ""
    assert rows["by sbatch"].state == "pending: a limit on what may run at once (QOSMaxJobsPerUserLimit)"
    assert rows["by sbatch and done"].state == "stopped"
    assert (rows["ended"].state, rows["ended"].restarts) == ("finished", 3)
    assert rows["lost"].state == "gone"
    assert rows["cancelled"].state == "completing"
    record_restart(tmp_path / "running", Restart(1, "rank 1 on gpu2 was ended by SIGKILL", ("gpu1", "gpu3")))
    again = {row.name: row for row in table(tmp_path, jobs, 1110.0)}["running"]
    assert again[1:4] == ("running; last restart: rank 1 on gpu2 was ended by SIGKILL", "gpu[1-2]", 3)


def test_logs_are_followed_to_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks the file grows by a part that may end within a line, or within a letter."""
    monkeypatch.setattr("launch.runs.POLL_S", 0)
    file = tmp_path / "rank-0.log"
    written = "".join(f"ü {number}\n" for number in range(40)).encode() + b"torn"
    parts = [written[at : at + 7] for at in range(0, len(written), 7)]

    def grow() -> bool:
        with file.open("ab") as log:
            log.write(parts.pop(0))
        return bool(parts)

    texts = list(tail((tmp_path / "absent.log", file), grow))
    assert "".join(texts).encode() == written
    assert len(texts) > 20 and all(text.endswith("\n") for text in texts[:-1])


def test_a_shell_completes_commands_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sluice", "completion", "bash"])
    with pytest.raises(SystemExit):
        sluice()
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    for words, expected in (("sluice tr", "train"), ("sluice train --optim.lr", "--optim.lr")):
        program = (
            f"source completion; COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}; "
            "$(complete -p sluice | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo ${COMPREPLY[@]}"
        )
        done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.split() == [expected], done.stderr
    monkeypatch.setattr(sys, "argv", ["sluice", "completion", "nosh"])
    with pytest.raises(SystemExit):
        sluice()
    assert capsys.readouterr().err.startswith("error: completion: give a shell, one of ")
