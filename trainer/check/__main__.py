"""The command `python -m trainer.check`; see `cli`."""

from data_pipeline.common.entry_point import run_command
from trainer.check.cli import main

if __name__ == "__main__":
    run_command(main)
