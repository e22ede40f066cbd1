"""The stand-in for a GPU (tests/cuda_stand_in) shows what it is there to show. Only `make cuda-dry-run` has one."""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from conftest import STAND_IN

if not STAND_IN:
    pytest.skip("needs the stand-in of tools/cuda_dry_run.py", allow_module_level=True)


@pytest.fixture
def errors_on_synchronisation() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def asleep(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Behind a sleep of the stream."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1000)
        event = torch.cuda.Event()
        event.record()
    return event


@pytest.mark.parametrize("wait", ["stream", "event", "device", "item"])
def test_a_stream_stands_still_until_the_host_waits(wait: str) -> None:
    x = torch.zeros(3)
    stream = torch.cuda.Stream()
    event = asleep(stream)
    with torch.cuda.stream(stream):
        x.add_(1)
        done = torch.cuda.Event()
        done.record()
    assert not event.query()
    assert x.sum().item() == 0, "what is behind the sleep has run"
    with torch.cuda.stream(stream):
        if wait == "item":
            assert x[0].item() == 1
        else:
            {"stream": stream, "event": done, "device": torch.cuda}[wait].synchronize()
    assert event.query()
    assert x.sum().item() == 3


def test_a_result_in_a_sleeping_stream_is_no_wait() -> None:
    """Torch's ops that make a tensor have run when they return, as if the host had been slow; events say it did not wait."""
    stream = torch.cuda.Stream()
    event = asleep(stream)
    with torch.cuda.stream(stream):
        y = torch.ones(3) * 2
    assert not event.query()
    stream.synchronize()
    assert event.query()
    assert y.tolist() == [2, 2, 2]


def test_what_an_op_is_to_write_is_returned_at_once() -> None:
    x, y, stream = torch.ones(3), torch.zeros(3), torch.cuda.Stream()
    asleep(stream)
    with torch.cuda.stream(stream):
        assert torch.add(x, 1, out=y) is y
        assert x.copy_(y.expand(2, 3)[:, 0][:1].double()) is x
    assert y.tolist() == [0, 0, 0]
    stream.synchronize()
    assert x.tolist() == y.tolist() == [2, 2, 2]


def test_a_stream_waits_for_another() -> None:
    x = torch.zeros(3)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    asleep(first)
    with torch.cuda.stream(first):
        x.add_(1)
    second.wait_stream(first)
    with torch.cuda.stream(second):
        x.mul_(10)
    assert x.sum().item() == 0
    second.synchronize()
    assert x.tolist() == [10, 10, 10]


@pytest.mark.usefixtures("errors_on_synchronisation")
@pytest.mark.parametrize("name", ["item", "tolist", "cpu", "nonzero", "equal", "mask"])
def test_torch_notices_synchronisations(name: str) -> None:
    x = torch.ones(3)
    waits = {
        "item": lambda: x.sum().item(),
        "tolist": x.tolist,
        "cpu": x.cpu,
        "nonzero": x.nonzero,
        "equal": lambda: torch.equal(x, x),
        "mask": lambda: x[x > 0],
    }
    x.add_(1).sum()
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        waits[name]()


def test_a_graph_runs_only_when_it_is_replayed() -> None:
    x = torch.zeros(3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
    assert x.tolist() == [0, 0, 0]
    for _ in range(3):
        graph.replay()
    assert x.tolist() == [3, 3, 3]


def in_a_new_process(code: str) -> subprocess.CompletedProcess[str]:
    program = f"import ctypes, torch; x = torch.ones(3, device='cuda'); torch.cuda.synchronize(); {code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_memory_is_nan_before_it_is_written() -> None:
    made = in_a_new_process("assert torch.empty(1 << 20, device='cuda').isnan().all()")
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("code", ["ctypes.string_at(x.data_ptr(), 1)", "ctypes.memset(x.data_ptr(), 0, 1)"])
def test_the_host_cannot_touch_the_memory_of_a_gpu(code: str) -> None:
    made = in_a_new_process(code)
    assert made.returncode == -signal.SIGSEGV, made.stderr


def test_a_kernel_that_is_not_there_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not have that kernel"):
        x.to_dense()
    assert "the stand-in for CUDA's runtime has no kernel _Z" in capfd.readouterr().err
