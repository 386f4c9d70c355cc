"""python -m launch COMMAND ...: train here, hand runs to SLURM, and see what has become of them."""

from data_pipeline.common.entry_point import run_command
from launch.cli import main

if __name__ == "__main__":
    run_command(main)
