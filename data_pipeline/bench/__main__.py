"""The command `python -m data_pipeline.bench`; see `cli`."""

from data_pipeline.bench.cli import main
from data_pipeline.common.entry_point import run_command

if __name__ == "__main__":
    run_command(main)
