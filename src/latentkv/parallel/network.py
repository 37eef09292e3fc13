"""Which address of this machine the other ranks reach it by: gloo lets in whoever finds its ports."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path

from latentkv.errors import ConfigError

INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
"""Names the network interface that gloo uses (torch reads it)."""

_LOOPBACK = "lo"
_SIOCGIFADDR = 0x8915
_IPV6 = Path("/proc/net/if_inet6")


def choose_interface(*, on_one_machine: bool, trust_network: bool) -> None:
    """Have gloo use the loopback interface where all ranks are on this machine, else hold it to private addresses.

    Raises:
        ConfigError: the address that it would use can be reached from anywhere.
    """
    named = os.environ.get(INTERFACE_VARIABLE)
    if named is None and on_one_machine and _address_of(_LOOPBACK) is not None:
        os.environ[INTERFACE_VARIABLE] = _LOOPBACK
        return
    if trust_network:
        return
    names = [name.strip() for name in named.split(",")] if named else []
    for address in [each for name in names for each in _addresses_of(name)] if names else _own_addresses():
        if not _is_private(address):
            raise ConfigError(
                f"The ranks would talk over {address}, which is no private address, and what they say is neither "
                f"secret nor proven to come from them: name another interface by {INTERFACE_VARIABLE}, or say "
                "--trust-network."
            )


def _is_private(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return parsed.is_private or parsed.is_loopback or parsed.is_link_local


def _own_addresses() -> list[str]:
    """Those of this machine's name, of which gloo takes one where no interface is named."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return []  # gloo takes the loopback interface then
    return [str(address[0]).partition("%")[0] for *_, address in found]


def _addresses_of(interface: str) -> list[str]:
    """The address that gloo would take of an interface: its IPv4 address, or those of IPv6 where it has none."""
    address = _address_of(interface)
    if address is not None:
        return [address]
    try:
        rows = [line.split() for line in _IPV6.read_text().splitlines()]
    except OSError:
        return []
    return [str(ipaddress.IPv6Address(bytes.fromhex(row[0]))) for row in rows if row[-1] == interface]


def _address_of(interface: str) -> str | None:
    """The IPv4 address of an interface; None where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = array.array("B", struct.pack("256s", interface.encode()[:15]))
        try:
            fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request, True)
        except OSError:
            return None
        return socket.inet_ntoa(bytes(request[20:24]))
