"""The pool of large output blocks: its limit; threads, forks and the interpreter's end; and that nobody notices it."""

from __future__ import annotations

import gc
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SEED

import fastact
from fastact import memory

MIB = 1 << 20


@pytest.fixture(autouse=True)
def pool() -> Iterator[None]:
    """Empty, with room for 64 MiB; afterwards as it was."""
    before = memory.limit()
    gc.collect()
    memory.empty_cache()
    memory.limit(64 * MIB)
    yield
    memory.empty_cache()
    memory.limit(before)


def inputs(mebibytes: float, value: float = 1.0) -> torch.Tensor:
    return torch.full((int(mebibytes * MIB) // 4,), value)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def test_a_freed_block_is_the_next_output() -> None:
    x = inputs(8)
    before = memory.stats()
    y = fastact.relu(x)
    address = y.data_ptr()
    assert address % (2 * MIB) == 0
    assert memory.stats()["in_use"] - before["in_use"] == 8 * MIB
    del y
    assert memory.stats()["held"] == 8 * MIB
    y = fastact.tanh(inputs(7.9))  # nearly as large is as good
    assert y.data_ptr() == address
    after = memory.stats()
    assert (after["held"], after["blocks"]) == (0, 0)
    assert (after["hits"] - before["hits"], after["misses"] - before["misses"]) == (1, 1)


def test_small_outputs_do_not_come_from_it() -> None:
    before = memory.stats()
    fastact.relu(inputs(63 / 1024))
    assert memory.stats() == before


def test_blocks_of_the_c_library() -> None:
    """Below 1 MiB: kept like larger ones, and aligned as torch's memory is."""
    before = memory.stats()
    y = fastact.relu(inputs(64 / 1024))
    address = y.data_ptr()
    assert address % 64 == 0
    del y
    assert memory.stats()["held"] == MIB // 16
    assert fastact.tanh(inputs(63.99 / 1024)).data_ptr() != address
    assert fastact.tanh(inputs(64 / 1024)).data_ptr() == address
    assert memory.stats()["misses"] == before["misses"] + 1
    memory.empty_cache()
    assert memory.stats()["held"] == 0
    memory.limit(0)
    kept = [fastact.relu(inputs(0.5, value)) for value in range(3)]
    assert [int(y.max()) for y in kept] == [0, 1, 2]
    assert memory.stats()["in_use"] == before["in_use"]


@pytest.mark.parametrize(
    "make", [fastact.sigmoid, lambda x: fastact.softmax(x.view(-1, 128), 1), lambda x: fastact.relu(x.view(128, -1).t())]
)
def test_every_op_takes_it(make: object) -> None:
    x = inputs(4).requires_grad_()
    before = memory.stats()["misses"]
    y = make(x)  # type: ignore[operator]
    assert memory.stats()["misses"] == before + 1
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert memory.stats()["misses"] + memory.stats()["hits"] > before + 1
    assert torch.equal(dx, dx.clone())


def test_the_limit_holds(generator: torch.Generator) -> None:
    """The one freed longest ago goes first; and a lower limit acts at once."""
    kept = [fastact.relu(inputs(m)) for m in (16, 20, 24, 28)]
    addresses = [y.data_ptr() for y in kept]
    while kept:
        del kept[0]
        assert memory.stats()["held"] <= 64 * MIB
    assert memory.stats()["held"] == (24 + 28) * MIB
    again = fastact.relu(inputs(28))
    assert again.data_ptr() == addresses[3]
    del again
    assert memory.limit(30 * MIB) == 30 * MIB
    assert memory.stats()["held"] == 28 * MIB
    memory.limit(0)
    assert memory.stats()["held"] == 0
    fastact.relu(inputs(8))
    assert memory.stats()["held"] == 0
    memory.limit(10 * MIB)
    fastact.relu(inputs(12))  # alone too large
    assert memory.stats()["held"] == 0


def test_bad_limits() -> None:
    with pytest.raises(ValueError, match=r"limit.*bytes.*-1"):
        memory.limit(-1)
    with pytest.raises(TypeError):
        memory.limit(1.5)  # type: ignore[arg-type]
    assert memory.limit() == 64 * MIB
    assert memory.limit(1 << 70) == 2**63 - 1


def test_live_tensors_never_share_memory() -> None:
    """Many of random sizes, made and freed at random, each full of its own number."""
    draw = random.Random(SEED)
    live: dict[int, torch.Tensor] = {}
    for number in range(400):
        live[number] = fastact.relu(inputs(draw.choice([draw.uniform(0.05, 0.2), draw.uniform(1, 3)]), number + 1))
        if len(live) > 12:
            gone = draw.choice(list(live))
            assert (live.pop(gone) == gone + 1).all(), f"seed {SEED}"
    for number, y in live.items():
        assert (y == number + 1).all(), f"seed {SEED}"


def test_threads() -> None:
    memory.limit(20 * MIB)
    wrong: list[str] = []

    def work(value: int) -> None:
        draw = random.Random(value)
        for _ in range(150):
            y = fastact.relu(inputs(draw.uniform(1, 4), value))
            if (held := memory.stats()["held"]) > 20 * MIB:
                wrong.append(f"{held} bytes held")
            if not bool((y == value).all()):
                wrong.append("another thread's numbers")

    workers = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, wrong[:3]


FORK = """
import os, threading, torch, fastact
x = torch.ones(1 << 20)
y = fastact.relu(x)
stop = threading.Event()
def hammer():
    while not stop.is_set():
        fastact.relu(torch.ones(3_000_000))
        fastact.memory.empty_cache()  # gives pages back while it holds the lock: that takes long
threads = [threading.Thread(target=hammer) for _ in range(2)]
for t in threads: t.start()
for _ in range(30):
    child = os.fork()
    if child == 0:
        z = fastact.relu(x * 3)
        del z
        ok = bool((fastact.relu(x * 5) == 5).all()) and bool((y == 1).all())
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for t in threads: t.join()
assert bool((y == 1).all())
"""


def test_fork_while_others_use_it() -> None:
    done = run("import torch; torch.set_num_threads(1)\n" + FORK, FASTACT_HUGE_PAGES="0")
    assert done.returncode == 0, done.stderr


LATE = """
import atexit, threading, torch, fastact
kept = fastact.relu(torch.ones(1 << 20))
class Late:
    def __init__(self, y): self.y = y
    def __del__(self): self.y = None
late = Late(fastact.relu(torch.ones(1 << 20)))
atexit.register(lambda: fastact.relu(torch.ones(1 << 20)))
torch.kept = fastact.relu(torch.ones(1 << 20))
cycle = [fastact.relu(torch.ones(1 << 20))]; cycle.append(cycle)
threading.Thread(target=lambda y: None, args=(fastact.relu(torch.ones(1 << 20)),)).start()
"""


def test_tensors_outlive_the_interpreter() -> None:
    done = run(LATE)
    assert (done.returncode, done.stderr) == (0, "")


def test_tensors_freed_by_an_exit_handler_of_the_c_library() -> None:
    """By their DLPack deleters, when there is no interpreter any more."""
    code = """
import ctypes
libc = ctypes.CDLL(None)
import torch, fastact
y = fastact.relu(torch.ones(1 << 20))
small = fastact.relu(torch.ones(8))
from torch.utils import dlpack
capsules = [dlpack.to_dlpack(y), dlpack.to_dlpack(small)]
ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
ctypes.pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
for capsule in capsules:
    managed = ctypes.pythonapi.PyCapsule_GetPointer(capsule, b"dltensor")
    # DLManagedTensor: the deleter is its last member.
    deleter = ctypes.cast(managed + 56, ctypes.POINTER(ctypes.c_void_p))[0]
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(capsule))
    assert libc.__cxa_atexit(ctypes.c_void_p(deleter), ctypes.c_void_p(managed), None) == 0
del y, small
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "1e9", "99999999999999999999999"])
def test_a_bad_limit_in_the_environment(value: str) -> None:
    done = run("import fastact", FASTACT_POOL_LIMIT=value)
    assert done.returncode != 0
    assert f"ImportError: FASTACT_POOL_LIMIT is '{value}'; it must be a whole number from 0 to 9" in done.stderr


def test_a_fork_after_a_bad_limit() -> None:
    code = """
import os
try:
    import fastact
except ImportError:
    pass
child = os.fork()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = run(code, FASTACT_POOL_LIMIT="x")
    assert done.returncode == 0, done.stderr[-500:]


def test_limits_in_the_environment() -> None:
    code = """
import torch, fastact
y = fastact.relu(torch.ones(12 << 20)); del y
s = fastact.memory.stats(); print(s["limit"], s["held"], s["misses"])
"""
    assert run(code, FASTACT_POOL_LIMIT=str(64 * MIB)).stdout.split() == [str(64 * MIB), str(48 * MIB), "1"]
    assert run(code, FASTACT_POOL_LIMIT="0").stdout.split() == ["0", "0", "1"]  # on huge pages still
    assert run(code, FASTACT_POOL_LIMIT="0", FASTACT_HUGE_PAGES="0").stdout.split() == ["0", "0", "0"]
    assert run(code).stdout.split()[0] == str(min(1 << 30, memory.memory_there_is() // 8))


def test_the_memory_of_a_container(tmp_path: Path) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory.memory_there_is(tmp_path) == physical  # no control groups
    (tmp_path / "proc/self").mkdir(parents=True)
    groups = tmp_path / "proc/self/cgroup"

    def limited(directory: str, file: str, text: str) -> int:
        there = tmp_path / "sys/fs/cgroup" / directory
        there.mkdir(parents=True, exist_ok=True)
        (there / file).write_text(text + "\n")
        return memory.memory_there_is(tmp_path)

    groups.write_text("0::/outer/inner\n")
    assert limited("outer/inner", "memory.max", "max") == physical
    assert limited("outer", "memory.max", str(1 << 26)) == 1 << 26
    assert limited("outer/inner", "memory.max", str(1 << 25)) == 1 << 25
    assert limited("", "memory.max", str(1 << 24)) == 1 << 24
    groups.write_text("9:name=systemd:/\n4:cpu,memory:/not/seen\n3:cpuset:/outer\n")  # the first version
    assert limited("memory", "memory.limit_in_bytes", str(1 << 23)) == 1 << 23
    assert limited("memory/not/seen", "memory.limit_in_bytes", str(1 << 22)) == 1 << 22
    assert limited("memory", "memory.limit_in_bytes", "9223372036854771712") == 1 << 22


def test_what_torch_does_with_a_tensor() -> None:
    y = fastact.relu(inputs(2))
    assert torch.equal(pickle.loads(pickle.dumps(y)), y)
    array = y.numpy()
    twin = torch.from_dlpack(y)
    expected = y.clone()
    del y
    fastact.relu(inputs(2, 7.0))  # would write over freed memory
    assert np.array_equal(array, expected.numpy())
    assert torch.equal(twin, expected)

    y = fastact.relu(inputs(2))
    y.resize_(MIB)
    assert torch.equal(y[: MIB // 2], torch.ones(MIB // 2))
    y.untyped_storage().resize_(0)
    y = fastact.relu(inputs(2))
    y.share_memory_()
    assert y.is_shared()
    assert torch.equal(y, expected)
    y.set_(torch.ones(3).untyped_storage(), 0, (3,))
    assert y.tolist() == [1, 1, 1]


@pytest.mark.parametrize("mebibytes", [0.0001, 1 / 32, 0.5, 2])
def test_copy_on_write(mebibytes: float) -> None:
    """torch wraps the block in a context of its own, and frees it when the last copy is gone."""
    start = memory.stats()["in_use"]
    y = fastact.relu(inputs(mebibytes, 5.0))
    assert y.data_ptr() % 64 == 0
    twin = torch._lazy_clone(y)
    used = memory.stats()["in_use"]
    assert used == start + (int(mebibytes * MIB) if mebibytes >= 0.5 else 0)
    del y
    assert memory.stats()["in_use"] == used
    twin.add_(1)
    assert (twin == 6).all()
    del twin
    assert memory.stats()["in_use"] == start


def test_no_memory_left() -> None:
    """What is held is released first; where that is not enough, the error is torch's, and nothing is lost."""
    code = f"""
import resource, torch, fastact
torch.set_num_threads(1)
x = torch.ones(16 << 20)
fastact.memory.limit({256 * MIB})
y = fastact.relu(x[: 8 << 20])
del y
assert fastact.memory.stats()["held"] == 32 << 20
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (48 << 20), resource.RLIM_INFINITY))
y = fastact.relu(x)  # 64 MiB and a huge page: only without the 32 MiB that are held
assert fastact.memory.stats()["held"] == 0
before = fastact.memory.stats()
try:
    fastact.relu(x)
except RuntimeError as error:
    assert "can't allocate memory: you tried to allocate 67108864 bytes. Error code 12" in str(error), error
else:
    raise AssertionError
assert {{**fastact.memory.stats(), "misses": 0}} == {{**before, "misses": 0}}
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert bool((y == 1).all())
"""
    done = run(code)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_profiler_sees_it() -> None:
    x = inputs(8)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = fastact.relu(x)
        del y
    sizes = {e.name: e.cpu_memory_usage for e in profile.events()}
    assert sizes["fastact::relu"] == 8 * MIB
    assert sizes["[memory]"] == -8 * MIB
