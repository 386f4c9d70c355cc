"""Network interface by which the processes of a run reach each other."""

import ipaddress
import socket
from typing import NamedTuple


class View(NamedTuple):
    """Addresses of a process and of the host where all ranks meet, as this process sees them."""

    own: str = ""
    meeting: str = ""


def view(host: str, port: int) -> View:
    """Find the address from which packets to `host` leave; empty where there is no way. Sends nothing."""
    try:
        targets = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError:
        return View()
    for family, kind, protocol, _, target in targets:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)  # of UDP: it chooses a route, and no more
                return View(probe.getsockname()[0], probe.getpeername()[0])
        except OSError:
            continue
    return View()


def interface(own: View, everyone: list[View]) -> str | None:
    """Name the interface whose address the other ranks can reach; None where that is not known.

    gloo takes the address that the host's own name stands for, which on Debian is 127.0.1.1: one that no other node can
    reach. The way to the meeting place is open, as all ranks have met there. Only its own host may know that place by a
    loopback address; then another rank says which of its addresses the others use.
    """
    import psutil  # here, so that a single process needs no more than torch

    address = own.own
    if _is_loopback(address):
        address = next((one.meeting for one in everyone if not _is_loopback(one.meeting)), address)
    for name, addresses in psutil.net_if_addrs().items():
        for there in addresses:
            if there.address == address or (_is_loopback(address) and _is_loopback(there.address)):
                return name
    return None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
