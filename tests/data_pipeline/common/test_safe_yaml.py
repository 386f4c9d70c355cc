"""Files of options that stand for too much are refused at once; all others mean what PyYAML says."""

import pytest
import yaml

from data_pipeline.common.safe_yaml import DEPTH, load_yaml

BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
REFUSED = {
    "aliases of aliases": (BOMB, "stands for more than 10000 values"),
    "merges of merges": (MERGES, "stands for more than 10000 values"),
    "itself": ("run: &a\n  name: x\n  more: *a\n", "contains itself"),
    "itself in a list": ("&a [1, *a]", "contains itself"),
    "depth": ("[" * 100_000, f"more than {DEPTH} deep"),
    "depth of tables": ("".join(" " * n + "a:\n" for n in range(100)), f"more than {DEPTH} deep"),
    "length": ("x" * (2 << 20), "more than 1 MiB"),
    "many values": ("a: [" + "1," * 20_000 + "]", "stands for more than 10000 values"),
    "a long number": ("a: " + "9" * 100_000, "Exceeds the limit"),
    "no such day": ("a: 2026-13-40", "month must be in 1..12"),
    "code": ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_stands_for_too_much_is_refused(case: str) -> None:
    text, why = REFUSED[case]
    with pytest.raises(yaml.YAMLError, match=why):
        load_yaml(text)


def test_ordinary_files_and_their_aliases_are_read() -> None:
    text = "base: &base {lr: 0.1, sizes: &sizes [64, 96]}\noptim:\n  <<: *base\n  lr: 0.2\ndata: {size_px: *sizes}\n"
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml(text)["optim"] == {"lr": 0.2, "sizes": [64, 96]}
