"""The interface by which ranks reach each other; `tests.stress.shaped` has them on real hosts of a kind, in namespaces."""

import socket

import psutil
import pytest

from trainer.node.network import View, interface, view

LOOPBACK = next(
    name for name, there in psutil.net_if_addrs().items() if any(one.address == "127.0.0.1" for one in there)
)
OUTSIDE = [
    (name, one.address)
    for name, there in psutil.net_if_addrs().items()
    for one in there
    if one.family == socket.AF_INET and not one.address.startswith("127.")
]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "localhost"])
def test_one_machine(host: str) -> None:
    """Also where a name stands for 127.0.1.1, as Debian has it."""
    own = view(host, 29500)
    assert interface(own, [own, own]) == LOOPBACK


@pytest.mark.skipif(not OUTSIDE, reason="there is no network")
def test_several_machines() -> None:
    """The host where ranks meet may know itself by 127.0.1.1 alone; the others say by which address they reach it."""
    name, address = OUTSIDE[0]
    assert view(address, 29500) == View(address, address)
    others = [View("192.0.2.77", address), View("192.0.2.78", address)]
    assert interface(View(address, address), others) == name
    assert interface(View("127.0.0.1", "127.0.1.1"), [View("127.0.0.1", "127.0.1.1"), *others]) == name
    assert interface(View("203.0.113.9", address), others) is None, "no address of this machine"


def test_no_way() -> None:
    own = view("no such host.invalid", 29500)
    assert own == View() and interface(own, [own, own]) is None
