"""Small files of a checkpoint, which its writer may remove while somebody reads them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from trainer.checkpoint.progress import read_json


def test_a_file_that_goes_away_is_missing_not_damaged(tmp_path: Path) -> None:
    here, away, over = tmp_path / "manifest.json", tmp_path / "removed", Event()
    here.write_text("{}")

    def come_and_go() -> None:
        while not over.is_set():
            here.rename(away)
            away.rename(here)

    seen = set()
    with ThreadPoolExecutor(1) as others:
        others.submit(come_and_go)
        try:
            for _ in range(20_000):
                try:
                    seen.add(str(read_json(here)))
                except FileNotFoundError as error:
                    seen.add(type(error).__name__)
        finally:
            over.set()  # the other thread would never end
    assert seen == {"{}", "FileNotFoundError"}
