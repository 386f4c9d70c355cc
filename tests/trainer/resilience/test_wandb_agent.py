"""Reasons for which a run of a W&B sweep is asked to stop; another process is the agent, and the real one in `end_to_end`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from trainer.resilience.wandb_agent import Agent

AGENT = "import subprocess, sys; subprocess.run([sys.executable, '-Sc', sys.argv[-1]])"
BELOW = """if True:
    import signal, sys
    from trainer.resilience.wandb_agent import Agent
    agent = Agent.above()
    print(agent.pid, agent.forwards, *map(agent.took_away, (signal.SIGTERM, None, signal.SIGUSR2)), flush=True)
    sys.stdin.read()
    print(agent.took_away(signal.SIGTERM), flush=True)
"""


@pytest.mark.parametrize(
    ("words", "forwards", "takes"),
    [(["agent", "me/p/5weep"], False, "False False True"), (["agent", "-f", "5weep"], True, "True True True")],
)
def test_an_agent_that_is_there_has_stopped_the_trial(
    tmp_path: Path, words: list[str], forwards: bool, takes: str
) -> None:
    (tmp_path / "wandb").write_text(AGENT)
    process = subprocess.Popen(
        [sys.executable, "-S", str(tmp_path / "wandb"), *words, BELOW],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdin and process.stdout
    assert process.stdout.readline() == f"{process.pid} {forwards} {takes}\n"
    process.kill()  # with its machine; it stays a zombie, as below a script that does not look after it
    while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    process.stdin.close()
    assert process.stdout.read() == "True\n"
    process.wait()


def test_agent_out_of_sight() -> None:
    """As in a step of SLURM: nobody knows, so that a SIGTERM does not bring a stopped trial back for ever."""
    agent = Agent.above()
    assert agent.pid is None and not agent.forwards
    assert not agent.took_away(signal.SIGTERM) and agent.took_away(signal.SIGUSR2)
