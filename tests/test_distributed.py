"""Two processes over gloo: a model with our activations trains as one with torch's, whatever it is spread by."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKERS = 2
pytestmark = pytest.mark.cpu_only("processes of the CPU, over gloo")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "tensor_parallel", "dtensor", "monitored"])
def test_two_processes(way: str) -> None:
    port = str(free_port())
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, way],
            env=os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(k), "WORLD_SIZE": str(WORKERS)},
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k in range(WORKERS)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output[-3000:]
        assert output.rstrip().endswith(f"{way}: as torch.nn"), output[-3000:]


# ---- What a process does ---------------------------------------------------------------------------------------------------


def main(way: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        ways = {"ddp": ddp, "fsdp2": fsdp2, "tensor_parallel": tensor_parallel, "dtensor": dtensor, "monitored": monitored}
        ways[way]()
    finally:
        dist.destroy_process_group()
    print(f"{way}: as torch.nn", flush=True)
    # Not by way of the interpreter's end: a thread of gloo that still has a tensor of the last collective to drop asks for the
    # GIL, is ended by an interpreter that is being torn down, and takes the process with it
    # (https://github.com/pytorch/pytorch/pull/179291).
    os._exit(0)


def twins():  # type: ignore[no-untyped-def]
    """The same weights under torch's activations and under ours; what one process computes with the whole batch."""
    import torch
    from torch import nn

    import fastact

    torch.manual_seed(0)
    # Not Hardsigmoid, whose gradient torch multiplies by 1/6 as a float32.
    layers = ["Sigmoid", "ReLU", "LeakyReLU", "Tanh", "ELU", "SiLU", "Softplus", "LogSigmoid", "PReLU"]
    models = []
    for library in (nn, fastact):
        parts: list[nn.Module] = []
        for name in layers:
            parts += [nn.Linear(8, 8), getattr(library, name)()]
        models.append(nn.Sequential(*parts, nn.Linear(8, 8), library.Softmax(dim=1)).double())
    models[1].load_state_dict(models[0].state_dict())
    return models, torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)


def close(actual, expected) -> None:  # type: ignore[no-untyped-def]
    import torch

    # Float64 through twenty layers.
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def whole(t):  # type: ignore[no-untyped-def]
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def ddp() -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    (plain, ours), x, dy = twins()
    half = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    (plain(x) * dy).sum().backward()
    model = DistributedDataParallel(ours)  # kept: its hooks die with it
    (model(x[half]) * dy[half]).sum().backward()
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        close(q.grad * WORKERS, p.grad)  # DDP takes the mean over the processes


def monitored() -> None:
    """What the ranks have counted of their halves is what one process counts of the whole."""
    import copy

    import numpy as np
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import fastact

    (_, ours), x, dy = twins()
    alone, half = copy.deepcopy(ours), slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    with fastact.monitor(alone, sample=None) as one:
        (alone(x) * dy).sum().backward()
    model = DistributedDataParallel(ours)
    with fastact.monitor(model, sample=None) as watch:
        (model(x[half]) * dy[half]).sum().backward()
        assert watch.report().history.ranks == 1
    history = watch.history()
    assert history.ranks == WORKERS
    for found, expected in zip(history.layers, one.history().layers, strict=True):
        assert (found.name, found.kind, found.steps.tolist()) == (expected.name, expected.kind, expected.steps.tolist())
        for side in ("output", "gradient_in", "gradient_out"):
            a, b = getattr(found, side), getattr(expected, side)
            for name, value in vars(b).items():
                np.testing.assert_allclose(getattr(a, name), value, rtol=1e-10, atol=1e-12, err_msg=f"{found.name} {name}")
        assert (found.units.active == expected.units.active).all()  # type: ignore[union-attr]


def fsdp2() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    (plain, ours), x, dy = twins()
    mesh = init_device_mesh("cpu", (WORKERS,))
    for layer in ours:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh)
    fully_shard(ours, mesh=mesh)
    half = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    (plain(x) * dy).sum().backward()
    (ours(x[half]) * dy[half]).sum().backward()
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        close(whole(q.grad) * WORKERS, p.grad)


def tensor_parallel() -> None:
    """The activation between a layer cut by columns and one cut by rows sees a shard of the features, as a DTensor."""
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    import fastact

    mesh = init_device_mesh("cpu", (WORKERS,))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)).double()
    ours = nn.Sequential(nn.Linear(8, 16), fastact.SiLU(), nn.Linear(16, 8)).double()
    ours.load_state_dict(plain.state_dict())
    parallelize_module(ours, mesh, {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()})
    x = torch.randn(4, 8, dtype=torch.float64)
    for model in (plain, ours):
        model(x).square().sum().backward()
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        close(whole(q.grad), p.grad)


def dtensor() -> None:
    """Every op: elementwise keeps any sharding; along a dim, one of another dim."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    import fastact
    from fastact import _registry

    mesh = init_device_mesh("cpu", (WORKERS,))
    torch.manual_seed(0)
    full = torch.randn(4, 6, dtype=torch.float64)
    for row in [*_registry.rows.values(), *_registry.variants.values()]:
        values = (1,) if row.along_dim else ()
        for placement in (Shard(0), Shard(1), Replicate()):
            x = distribute_tensor(full, mesh, [placement]).requires_grad_()
            y = row.function(x, *values)
            y.square().sum().backward()
            moved = row.along_dim and placement == Shard(1)
            assert y.placements == ((Replicate() if moved else placement),), (row.name, placement, y.placements)
            leaf = full.clone().requires_grad_()
            expected = row.reference(leaf, *values)
            expected.square().sum().backward()
            if row.name != "hardsigmoid":  # as above
                close(whole(x.grad), leaf.grad)
            close(whole(y), expected.detach())
        if not row.along_dim:
            x = distribute_tensor(full.clone(), mesh, [Shard(0)])
            row.inplace_op(x, *row.parameters.values())
            close(whole(x), row.reference(full, *row.parameters.values()))
    # What has parameters per channel is torch's there.
    x, weight = distribute_tensor(full, mesh, [Shard(0)]), distribute_tensor(torch.rand(6).double(), mesh, [Replicate()])
    close(whole(fastact.prelu(x, weight)), torch.prelu(full, whole(weight)))
    close(whole(fastact.maxout(x, 2)), fastact.maxout(full, 2))


if __name__ == "__main__":
    main(sys.argv[1])
