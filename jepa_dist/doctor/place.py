"""Where this process is among the nodes, before it meets the others; what would make it hang."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping

import psutil

_INTERFACE_SWITCHES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def num_nodes(environ: Mapping[str, str]) -> int:
    """How many nodes take part, as the launcher says; 1 without one."""
    if "RANK" not in environ:
        return 1
    names = ("GROUP_WORLD_SIZE", "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    return int(next((environ[name] for name in names if name in environ), "1"))


def node_name(environ: Mapping[str, str]) -> str:
    """SLURM's name of this node, or the host's."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def is_loopback(host: str) -> bool:
    """Whether a name or address leads back to the machine that asks."""
    address = _resolve(host)
    return address is not None and ipaddress.ip_address(address).is_loopback


def obstacles(environ: Mapping[str, str], same_machine: bool) -> Iterable[str]:
    """Why this node would not reach the others, or not be reached: to be mended first.

    Args:
        environ: RANK and the like.
        same_machine: The "nodes" are one machine, where loopback addresses are right.
    """
    for switch in _INTERFACE_SWITCHES:
        if switch in environ and not _names_interface(environ[switch], psutil.net_if_addrs()):
            yield (
                f"{switch}={environ[switch]}: no such interface here; there are "
                f"{', '.join(sorted(psutil.net_if_addrs()))}"
            )
    if num_nodes(environ) == 1 or same_machine:
        return
    master = environ["MASTER_ADDR"]
    if _resolve(master) is None:
        yield f"the rendezvous is at {master}, a name that does not resolve here; give an address"
    if is_loopback(master):
        yield (
            f"the rendezvous is at {master}, which is each node itself (loopback), and there are "
            f"{num_nodes(environ)} nodes; name the first one's real address (torchrun: "
            "--rdzv-endpoint, and --local-addr where host names resolve to loopback; srun: "
            "MASTER_ADDR)"
        )
    host = socket.gethostname()
    if "GLOO_SOCKET_IFNAME" not in environ and (_resolve(host) is None or is_loopback(host)):
        yield (
            f"the host name {host} resolves to {_resolve(host) or 'nothing'}: gloo would listen "
            "where no other node reaches it; set GLOO_SOCKET_IFNAME to the network's interface"
        )


def interface_to(host: str, port: int) -> tuple[str, str]:
    """Name and address of the interface through which this node reaches ``host``."""
    with socket.socket(*_route(host, port)[:2]) as probe:
        probe.connect(_route(host, port)[4])  # of a datagram socket: sends nothing
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
    """NCCL's syntax, of which gloo's is a part: names or beginnings, ``=`` exact, ``^`` all but."""
    if value.startswith("^"):
        return True
    names = value.removeprefix("=").split(",")
    return any(interface.startswith(name) for interface in interfaces for name in names)
