"""A TCP store that listens at one address; PyTorch's own listen on all interfaces."""

from __future__ import annotations

import ipaddress
import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

LOOPBACK = "127.0.0.1"

_BACKLOG = 2048  # as PyTorch's stores


def listening_store(address: str, port: int, timeout: timedelta) -> TCPStore:
    """Return a store that this process serves, reachable at ``address`` only.

    Args:
        address: Name or address of an interface of this host.
        port: 0 takes a free one (``store.port``).
        timeout: Longest wait for a key.

    Raises:
        OSError: nothing can listen there.
    """
    listener = _listen(address, port)
    host, port = listener.getsockname()[:2]
    return TCPStore(
        host,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def is_own_address(address: str) -> bool:
    """Return whether ``address`` (or the one that this name resolves to) is one of this host's."""
    try:
        _listen(address, 0).close()
    except OSError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Return whether ``address`` (or the one that this name resolves to) is a loopback address."""
    try:
        (*_, place), *_ = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return ipaddress.ip_address(place[0]).is_loopback


def _listen(address: str, port: int) -> socket.socket:
    """Return a listening socket, which programs that this process starts do not inherit."""
    family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
