"""Rendezvous backends of torchrun whose stores listen at one address only.

PyTorch's own listen on all interfaces. Besides, its c10d rendezvous keeps its state as a pickle in
a store without authentication: anyone who can connect can run code in the agents. torchrun finds
these two by the entry points ``torchrun.handlers`` in pyproject.toml:

* ``--rdzv-backend=loopback``: all ranks are on this host, and nothing listens beyond 127.0.0.1.
* ``--rdzv-backend=bound``: c10d's rendezvous. The stores listen at ``--local-addr``, and a state
  that names anything but the classes of a rendezvous is rejected before it is unpickled.

Both run in torchrun's process, where they also handle its signals and its last message.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import (
    DEFAULT_PORT,
    C10dRendezvousBackend,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
    Token,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from jepa_dist.process.agent import print_without_traceback
from jepa_dist.process.dist_env import identify_agent
from jepa_dist.process.signals import OF_TERMINALS
from jepa_dist.process.store import LOOPBACK, is_own_address, listening_store

Creator = Callable[[RendezvousParameters], RendezvousHandler]

_TIMEOUT = timedelta(minutes=5)
# About 200 bytes per host.
_MOST_STATE_BYTES = 1 << 24
_STATE_MODULE = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_STATE_CLASSES = {
    *((_STATE_MODULE, name) for name in ("_RendezvousState", "_NodeDesc")),
    *(("datetime", name) for name in ("datetime", "timedelta", "timezone")),
}


def loopback() -> Creator:
    """Return the function that creates the handler of ``--rdzv-backend=loopback``."""
    if "--rdzv-backend=loopback" in sys.argv:
        # torchrun warns about all backends but its own, unless they are given an endpoint.
        logging.getLogger("torch.distributed.run").addFilter(_is_not_about_endpoint)
        sys.excepthook = print_without_traceback
    return LoopbackRendezvous


def bound() -> Creator:
    """Return the function that creates the handler of ``--rdzv-backend=bound``."""
    return _bound_rendezvous


def _is_not_about_endpoint(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("master_addr is only used for static rdzv_backend")


def set_signals() -> None:
    """Choose the signals that torchrun forwards to its ranks before it exits.

    SIGUSR1 is included: by default it ends torchrun immediately, and thereby its ranks. Signals
    that nohup ignores are excluded: torchrun would handle them again.
    """
    if _SIGNALS not in os.environ:  # not in torchrun
        return
    names = [name.strip() for name in os.environ[_SIGNALS].split(",")]
    ignored = [number.name for number in OF_TERMINALS if signal.getsignal(number) is signal.SIG_IGN]
    wanted = dict.fromkeys([*names, signal.SIGUSR1.name])
    os.environ[_SIGNALS] = ",".join(name for name in wanted if name not in ignored)


class LoopbackRendezvous(RendezvousHandler):
    """Rendezvous of one agent with itself: each start of its ranks gets a new store.

    Args:
        params: As torchrun gives them; the endpoint is not used.

    Raises:
        ValueError: several hosts.
    """

    def __init__(self, params: RendezvousParameters) -> None:
        if params.max_nodes != 1:
            raise ValueError(
                f"--rdzv-backend=loopback: --nnodes allows {params.max_nodes} hosts; expected 1; "
                "start several hosts by launch/multinode.sh"
            )
        set_signals()
        identify_agent(os.environ)
        self._run_id = params.run_id
        self._store: TCPStore | None = None
        self._is_closed = False

    def get_backend(self) -> str:
        """Return the backend's name."""
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        """Whether the agent serves the ranks' store."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return a new store; that of the previous start closes."""
        self._store = listening_store(LOOPBACK, 0, _TIMEOUT)
        address = RendezvousStoreInfo(LOOPBACK, self._store.port)
        return RendezvousInfo(PrefixStore("agent", self._store), 0, 1, address)

    def is_closed(self) -> bool:
        """Return whether ``set_closed`` was called."""
        return self._is_closed

    def set_closed(self) -> None:
        """Record that there will be no other start."""
        self._is_closed = True

    def num_nodes_waiting(self) -> int:
        """Return 0: no other host can join."""
        return 0

    def get_run_id(self) -> str:
        """Return the job's id."""
        return self._run_id

    def shutdown(self) -> bool:
        """Close the store."""
        self._store = None
        return True


class CheckedBackend(C10dRendezvousBackend):
    """c10d's backend that rejects a state that would run code when it is unpickled."""

    @property
    def name(self) -> str:
        """The backend's name."""
        return "bound"

    def get_state(self) -> tuple[bytes, Token] | None:
        """Return the state, checked, and its token.

        Raises:
            RendezvousStateError: it is not the state of a rendezvous.
        """
        found = super().get_state()
        if found is not None:
            check_state(found[0])
        return found

    def set_state(
        self, state: bytes, token: Token | None = None
    ) -> tuple[bytes, Token, bool] | None:
        """Write the state if ``token`` is current; return what the store holds now, checked.

        Raises:
            RendezvousStateError: it is not the state of a rendezvous.
        """
        found = super().set_state(state, token)
        if found is not None:
            check_state(found[0])
        return found


def check_state(state: bytes) -> None:
    """Check that a pickled state names no other classes than those of a rendezvous.

    Raises:
        RendezvousStateError: it does, or it cannot be read.
    """
    advice = "; another program writes to the store: stop the job, and see SECURITY.md"
    if len(state) > _MOST_STATE_BYTES:
        raise RendezvousStateError(
            f"rendezvous: a state of {len(state)} bytes; expected at most {_MOST_STATE_BYTES}"
            + advice
        )
    try:
        _StateReader(io.BytesIO(state)).load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise RendezvousStateError(f"rendezvous: not a state: {error}{advice}") from None


class _StateReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STATE_CLASSES:
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return super().find_class(module, name)


class _BoundRendezvous(DynamicRendezvousHandler):
    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other agents; the ranks of each start get a new store.

        PyTorch's agents keep the address of the first one, and disagree on it as soon as another
        host takes rank 0.
        """
        self._bootstrap_store_info = None
        self._shared_tcp_store_server = None
        return super().next_rendezvous()

    def _create_tcp_store_server(self, master_addr: str, master_port: int) -> TCPStore:
        """Return the store for the ranks (PyTorch's would listen on all interfaces)."""
        return listening_store(master_addr, master_port, _TIMEOUT)


def _bound_rendezvous(params: RendezvousParameters) -> RendezvousHandler:
    if not params.local_addr:
        raise ValueError(
            "--rdzv-backend=bound: --local-addr is missing; expected the address of this host's "
            "interface to the others (launch/multinode.sh finds it)"
        )
    set_signals()
    identify_agent(os.environ)
    store = _store_of_agents(params, params.local_addr)
    seconds = [params.get_as_int(f"{name}_timeout") for name in ("join", "last_call", "close")]
    limits = [None if each is None else timedelta(seconds=each) for each in seconds]
    return _BoundRendezvous.from_backend(
        params.run_id,
        store,
        CheckedBackend(store, params.run_id),
        params.min_nodes,
        params.max_nodes,
        params.local_addr,
        RendezvousTimeout(*limits),
        keep_alive_interval=params.get_as_int("keep_alive_interval", 5) or 5,
        keep_alive_max_attempt=params.get_as_int("keep_alive_max_attempt", 3) or 3,
    )


def _store_of_agents(params: RendezvousParameters, own_address: str) -> Store:
    """Return the store in which the agents meet; the one at the endpoint serves it.

    Without ``is_host`` in ``--rdzv-conf`` this is the first agent on the endpoint's host.
    """
    host, port = parse_rendezvous_endpoint(params.endpoint, default_port=DEFAULT_PORT)
    timeout = timedelta(seconds=params.get_as_int("read_timeout", 60) or 60)
    is_host = params.get_as_bool("is_host")
    if is_host or (is_host is None and is_own_address(host)):
        try:
            return listening_store(own_address, port, timeout)
        except OSError as error:
            if is_host or error.errno != errno.EADDRINUSE:
                raise RendezvousConnectionError(
                    f"rendezvous: cannot listen at {own_address}:{port}: {error.strerror}"
                ) from None
    return TCPStore(host, port, is_master=False, timeout=timeout)
