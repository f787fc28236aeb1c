"""This process's node and network interface, and settings that would make the rendezvous hang."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping

import psutil

_INTERFACE_SWITCHES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def num_nodes(environ: Mapping[str, str]) -> int:
    """Return the launcher's number of nodes; 1 without a launcher."""
    if "RANK" not in environ:
        return 1
    names = ("GROUP_WORLD_SIZE", "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    return int(next((environ[name] for name in names if name in environ), "1"))


def node_name(environ: Mapping[str, str]) -> str:
    """Return SLURM's name of this node, or the host name."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def is_loopback(host: str) -> bool:
    """Return whether a name or address resolves to a loopback address."""
    address = _resolve(host)
    return address is not None and ipaddress.ip_address(address).is_loopback


def obstacles(environ: Mapping[str, str], same_machine: bool) -> Iterable[str]:
    """Yield reasons why this node could not reach the others, or not be reached by them.

    Args:
        environ: The launcher's environment variables.
        same_machine: All "nodes" are one machine, where loopback addresses are valid.
    """
    for switch in _INTERFACE_SWITCHES:
        if switch in environ and not _names_interface(environ[switch], psutil.net_if_addrs()):
            yield (
                f"{switch}={environ[switch]}: no such interface on this host; expected one of "
                f"{', '.join(sorted(psutil.net_if_addrs()))}"
            )
    if num_nodes(environ) == 1 or same_machine:
        return
    master = environ["MASTER_ADDR"]
    if _resolve(master) is None:
        yield f"rendezvous at {master}: this name does not resolve here; use an address"
    if is_loopback(master):
        yield (
            f"rendezvous at {master}: a loopback address, which on each of the "
            f"{num_nodes(environ)} nodes is that node itself; use the first node's network address "
            "(torchrun: --rdzv-endpoint, and --local-addr where host names resolve to loopback; "
            "srun: MASTER_ADDR)"
        )
    host = socket.gethostname()
    if "GLOO_SOCKET_IFNAME" not in environ and (_resolve(host) is None or is_loopback(host)):
        yield (
            f"host name {host}: resolves to {_resolve(host) or 'nothing'}, where other nodes "
            "cannot reach gloo; set GLOO_SOCKET_IFNAME to the network's interface"
        )


def interface_to(host: str, port: int) -> tuple[str, str]:
    """Return name and address of the interface through which this node reaches ``host``."""
    with socket.socket(*_route(host, port)[:2]) as probe:
        probe.connect(_route(host, port)[4])  # on a datagram socket, connect sends nothing
        address = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == address for found in addresses):
            return name, address
    return "?", address


def _route(host: str, port: int) -> tuple:
    return socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]


def _resolve(host: str) -> str | None:
    try:
        return str(_route(host, 0)[4][0]).partition("%")[0]
    except OSError:
        return None


def _names_interface(value: str, interfaces: Iterable[str]) -> bool:
    """Return whether ``value`` selects an interface, in NCCL's syntax (gloo's is a subset): name
    prefixes, ``=`` exact names, ``^`` all except."""
    if value.startswith("^"):
        return True
    names = value.removeprefix("=").split(",")
    return any(interface.startswith(name) for interface in interfaces for name in names)
