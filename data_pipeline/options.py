"""Options of `DataConfig` on the command lines of the data's own commands."""

from dataclasses import fields

from jsonargparse import ArgumentParser, set_parsing_settings

from data_pipeline.common.option_files import read_as_meant
from data_pipeline.config import DataConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)
read_as_meant({})  # there are no files of options; for values that are lists or numbers

CHOOSING = (
    "val_share",
    "fold",
    "group",
    "images",
    "image_column",
    "label_column",
    "labels",
    "split_column",
    "quarantine",
)
"""Fields of `DataConfig` that decide which images a split has."""


def command_line(prog: str, description: str, data: tuple[str, ...] = CHOOSING) -> ArgumentParser:
    """A parser that knows `--data.NAME` for each name in `data`."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(DataConfig, "data", skip={field.name for field in fields(DataConfig)} - set(data))
    return parser
