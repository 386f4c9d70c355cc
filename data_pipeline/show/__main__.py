"""The command `python -m data_pipeline.show`; see `cli`."""

from data_pipeline.common.entry_point import run_command
from data_pipeline.show.cli import main

if __name__ == "__main__":
    run_command(main)
