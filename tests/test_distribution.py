"""The wheel of `pip install .` holds all that the commands read, whatever folder they are called from."""

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import ROOT
from tests.support.runs import environment

PROGRAM = """
import data_pipeline, launch, trainer
from launch.slurm.profile import PROFILES
from trainer.config import RECIPES, recipes
assert trainer.__file__.startswith("WHERE")
print((PROFILES / "example.yaml").is_file(), "peers/ffcv" in recipes(), (RECIPES / "README.md").is_file())
"""


def test_a_wheel_holds_recipes_and_profiles(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, str(tmp_path), str(tmp_path / "source")], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
    program = PROGRAM.replace("WHERE", str(tmp_path / "installed"))
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=environment() | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert ran.stdout == "True True True\n"
