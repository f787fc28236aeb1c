"""torchrun's rendezvous by this package: where it listens, and states that would run code."""

from __future__ import annotations

import base64
import os
import pickle
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from jepa_dist.parallel.meeting import launcher_store
from jepa_dist.process.agent import print_without_traceback
from jepa_dist.process.dist_env import listen_on_loopback
from jepa_dist.process.rendezvous import CheckedBackend
from tests.support.commands import listening

SOON = timedelta(seconds=20)


def handler_of(backend: str, **changes: Any) -> RendezvousHandler:
    """Create a handler as torchrun does."""
    known = {"endpoint": "", "run_id": "job", "min_nodes": 1, "max_nodes": 1}
    return get_rendezvous_handler(RendezvousParameters(backend, **known | changes))


def listening_here() -> set[str]:
    return listening([psutil.Process()])


def write_as_a_rank(start: RendezvousInfo, key: str) -> TCPStore:
    """Connect as ranks do, and write."""
    at = start.bootstrap_store_info
    assert at is not None
    store = TCPStore(at.master_addr, at.master_port, is_master=False, timeout=SOON)
    store.set(key, "x")
    return store


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def ranks_environment(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in {**environ, "MASTER_PORT": str(free_port)}.items():
        monkeypatch.setenv(name, value)


def test_loopback_gives_each_start_a_store_on_loopback() -> None:
    handler = handler_of("loopback")
    first = handler.next_rendezvous()
    assert (first.rank, first.world_size) == (0, 1)
    assert handler.use_agent_store
    assert listening_here() == {"127.0.0.1"}
    assert write_as_a_rank(first, "stale").check(["stale"])
    again = handler.next_rendezvous()
    assert not write_as_a_rank(again, "fresh").check(["stale"])
    assert handler.num_nodes_waiting() == 0
    assert handler.shutdown()


def test_signals_that_torchrun_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT")
    now = dict.fromkeys((signal.SIGINT, signal.SIGQUIT), signal.SIG_DFL)  # in any shell
    now[signal.SIGHUP] = signal.SIG_IGN  # as nohup
    before = {number: signal.signal(number, handler) for number, handler in now.items()}
    try:
        handler_of("loopback")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] == "SIGTERM,SIGINT,SIGQUIT,SIGUSR1"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SignalException("x", signal.SIGTERM), "the ranks were stopped (SIGTERM)"),
        (RendezvousConnectionError("no store"), "no store"),
        (ValueError("bad"), "ValueError: bad"),
    ],
)
def test_exits_of_torchrun_have_no_traceback(
    error: Exception, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_without_traceback(type(error), error, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(message)


def test_loopback_is_for_one_host() -> None:
    with pytest.raises(ValueError, match=r"--nnodes allows 2 hosts; expected 1; start several"):
        handler_of("loopback", max_nodes=2)


def test_bound_listens_at_the_local_address_alone(free_port: int) -> None:
    address = {"endpoint": f"localhost:{free_port}", "local_addr": "127.0.0.1"}
    handler = handler_of("bound", **address)
    start = handler.next_rendezvous()
    write_as_a_rank(start, "x")
    assert listening_here() == {"127.0.0.1"}
    with pytest.raises(RendezvousConnectionError, match=rf"cannot listen at 127.0.0.1:{free_port}"):
        handler_of("bound", is_host=True, **address)
    assert handler.shutdown()


def test_bound_gives_each_start_a_store_that_all_agents_agree_on(free_port: int) -> None:
    """The host of rank 0 may differ from that of the previous start."""
    settings = {"endpoint": f"localhost:{free_port}", "local_addr": "127.0.0.1"}
    agents = [handler_of("bound", **settings, min_nodes=2, max_nodes=2) for _ in range(2)]
    ports = []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            starts = list(pool.map(lambda agent: agent.next_rendezvous(), agents))
            assert sorted(start.rank for start in starts) == [0, 1]
            places = {start.bootstrap_store_info.master_port for start in starts}
            assert len(places) == 1
            ports += places
            write_as_a_rank(starts[0], "x")
    assert len(set(ports)) == 2
    for agent in agents:
        agent.shutdown()


def test_bound_needs_an_address() -> None:
    with pytest.raises(ValueError, match="--local-addr is missing"):
        handler_of("bound", endpoint="localhost:1")


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_an_untrusted_state_runs_no_code(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    states = [pickle.dumps(Evil(trace), protocol) for protocol in (0, 2, 5)]
    for state in [*states, b"", b"garbage", bytes(2**24 + 1), pickle.dumps(os.path.join)]:
        store = HashStore()
        backend = CheckedBackend(store, "job")
        store.set("torch.rendezvous.job", base64.b64encode(state).decode())
        with pytest.raises(RendezvousStateError, match=r"^rendezvous: .* see SECURITY\.md$"):
            backend.get_state()
        with pytest.raises(RendezvousStateError):
            backend.set_state(b"mine", b"token")
    assert not trace.exists()


@pytest.mark.usefixtures("ranks_environment")
def test_a_store_that_rank_0_serves_listens_at_its_address() -> None:
    store = launcher_store(SOON)
    assert listening_here() == {"127.0.0.1"}
    store.set("x", "1")


@pytest.mark.usefixtures("ranks_environment")
def test_an_address_of_another_host_is_served_as_pytorch_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For example, behind address translation."""
    monkeypatch.setattr("jepa_dist.parallel.meeting.is_own_address", lambda address: False)
    store = launcher_store(SOON)
    assert listening_here() & {"::", "0.0.0.0"}
    store.set("x", "1")


def test_gloo_and_nccl_stay_on_loopback_if_all_ranks_are_here() -> None:
    one_host = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h"}
    by_address = {**one_host, "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for environ in ({}, dict(one_host), by_address):
        listen_on_loopback(environ)
        loopback = environ["GLOO_SOCKET_IFNAME"]
        addresses = {each.address for each in psutil.net_if_addrs()[loopback]}
        assert "127.0.0.1" in addresses
        assert environ["NCCL_SOCKET_IFNAME"] == loopback
    chosen = {**one_host, "GLOO_SOCKET_IFNAME": "ib0"}
    listen_on_loopback(chosen)
    assert chosen["GLOO_SOCKET_IFNAME"] == "ib0"
    several = {**one_host, "LOCAL_WORLD_SIZE": "1"}
    listen_on_loopback(several)
    assert "GLOO_SOCKET_IFNAME" not in several
