"""How cost grows: with the edge of the volume, with the batch, with the number of processes; and, on paper, to 4 and 64
GPUs. One plot, growth.png.

    python benchmarks/growth.py                          # CPU, some 10 minutes on two cores: width 16

Weak scaling: every process has its own sample, gradients are summed by gloo. More processes than cores share them,
which the plot says. The paper parts are arithmetic, not measurements: a ring all-reduce sends 2 (n-1)/n of the
gradients' bytes through each GPU's slowest link, and what a training step holds for its backward pass follows from
shapes alone.
"""
import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import weakref
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import clock, resident  # puts the repository's root on the path
from support import fast
from support.cli import Parser, exits, fast_bfloat16, keep_memory
from support.fast import recompute
from support.files import write_atomic
from support.pictures import pyplot, save
from support.slabs import by_slabs
from unet3d import Block, Round, UNet3D

G_BYTES = 4 * 716_215_684                                # float32 gradients of the paper's G
H = dict(dim=56, in_channels=8, heads=4, rounds=1, context_dim=0)
HELD = [("G 64x64x64", (64, 64, 64), dict(dim=160)), ("H 256x72x72", (256, 72, 72), H),
        ("H 256x256x256", (256, 256, 256), H)]
# bytes/s, about what is reached
LINKS = {"4 GPUs, PCIe 4": (4, 20e9), "4 GPUs, NVLink": (4, 400e9), "64 GPUs, 400 Gb/s a GPU": (64, 45e9)}


# --- memory, from shapes ---

class Ledger(TorchDispatchMode):
    """Remembers every tensor that an operation made, and can tell how many bytes of them are still alive; `peak` if it
    watches each operation."""

    def __init__(self, watch=False):
        super().__init__()
        self.made, self.watch, self.peak = [], watch, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(v) for v in tree_leaves(out) if isinstance(v, torch.Tensor)]
        if self.watch:
            self.peak = max(self.peak, self.held())
        return out

    def held(self):
        self.made = [r for r in self.made if r() is not None]
        storages = [v.untyped_storage() for r in self.made if (v := r()) is not None]
        return sum({s._cdata: s.nbytes() for s in storages}.values())


def held_for_backward(shape, checkpointing, batch=1, **net):
    """Bytes alive between the forward and the backward pass of a network in bf16, weights in bf16 among them; from
    shapes, in the form of a GPU."""
    gpus_norm = mock.patch.object(fast, "native_norm", fast.split_norm)
    with FakeTensorMode(), gpus_norm, torch.autocast("cpu", torch.bfloat16):
        net = UNet3D(**net)
        recompute(net, checkpointing, Block, (Round,))
        x, t = torch.randn(batch, net.args["in_channels"], *shape), torch.rand(batch)
        text = torch.randn(batch, net.args["tokens"], net.args["context_dim"])
        with Ledger() as ledger:
            y = net(x, t, text)                          # holds the graph
            gc.collect()
            return ledger.held() * bool(y.numel())


def peak_of_inference(shape, slab, **net):
    """Most bytes alive during one network call in bf16, its input and the bf16 copy of its weights included; from
    shapes. The float32 between the two ends of a norm, which compiled code keeps in registers, does not count: the norm
    is the native one here."""
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net = UNet3D(**net).eval()
        if slab:
            by_slabs(net, slab, Block)
        with Ledger(watch=True) as ledger:
            x = torch.randn(1, net.args["in_channels"], *shape)
            net(x, torch.rand(1), torch.randn(1, net.args["tokens"], net.args["context_dim"]))
            return ledger.peak


# --- seconds and memory, measured ---

def small():
    return UNet3D(16, heads=4, levels=3)


def step_of(net, batch, edge):
    recompute(net, "norms", Block)
    if dist.is_initialized():
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
    net.train()
    x, t, context = torch.randn(batch, 4, edge, edge, edge), torch.rand(batch), torch.randn(batch, 192, 768)
    drop = torch.arange(batch) > 0                       # some null text: DDP wants a gradient for every weight

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16("cpu")):
            value = net(x, t, context, drop).square().mean()
        value.backward()
        for p in net.parameters():
            p.grad = None
    return run


def forward_of(net, batch, edge):
    net.eval()
    x, t = torch.randn(batch, 4, edge, edge, edge), torch.rand(batch)

    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16("cpu")):
            net(x, t)
    return run


def one(edge, batch, step, repeats=3):
    """-> median seconds, peak MB above the process's own"""
    before = resident()[0]
    run = (step_of if step else forward_of)(small(), batch, edge)
    run()
    return statistics.median(clock(run, "cpu") for _ in range(repeats)), resident()[1] - before


def worker():
    """One process of the weak scaling; rank 0 prints its median seconds."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    run = step_of(small(), 1, 32)
    run()
    run()
    seconds = statistics.median(clock(run, "cpu") for _ in range(5))
    if dist.get_rank() == 0:
        print(seconds)
    dist.destroy_process_group()


def child(*args, n=0, **env):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n else []
    command = [sys.executable, *launch, __file__, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, args))}: failed: {done.stderr.strip().splitlines()[-1:]}")
    return [float(v) for v in done.stdout.split()]


def measure(edges):
    """-> {what: rows}"""
    found = {"edge": [[e, *child("--one", e, 1, 0), *child("--one", e, 1, 1)] for e in edges],
             "batch": [[b, *child("--one", 32, b, 1)] for b in (1, 2, 4, 8)],
             "processes": [[n, *child("--worker", n=n, OMP_NUM_THREADS="1")] for n in (1, 2, 4)]}
    found["held, GiB"] = {f"{name} {how}": held_for_backward(shape, how, **net) / 2**30
                          for name, shape, net in HELD for how in ("none", "norms", "blocks")}
    found["inference, GB"] = {f"H 256x256x256, {name}": peak_of_inference((256,) * 3, slab, **H) / 1e9
                              for name, slab in (("whole", 0), ("slabs of 16", 16))}
    found["on paper"] = {name: 2 * (n - 1) / n * G_BYTES / rate for name, (n, rate) in LINKS.items()}
    return found


# --- the plot ---

def draw(path, found):
    fig, (a, b, c) = pyplot().subplots(1, 3, figsize=(12, 3.6))
    e, forward, forward_mb, step, step_mb = zip(*found["edge"])
    a.loglog(e, forward, "o-", label="forward, s")
    a.loglog(e, step, "s-", label="training step, s")
    a.loglog(e, [m / 1000 for m in forward_mb], "o:", label="forward, GB")
    a.loglog(e, [m / 1000 for m in step_mb], "s:", label="training step, GB")
    a.loglog(e, [step[0] * (v / e[0]) ** 3 for v in e], "k--", lw=0.8, label="edge^3")
    a.minorticks_off()
    a.set_xticks(e, e)
    a.set(title="G, width 16, batch 1", xlabel="edge of the volume, voxels")

    n, s, _ = zip(*found["batch"])
    b.plot(n, [v / k for v, k in zip(s, n)], "o-")
    b.set(title="training step at 32^3", xlabel="batch", ylabel="s a sample", ylim=(0, None))

    n, s = zip(*found["processes"])
    c.plot(n, [s[0] / v for v in s], "o-", label="measured, gloo, 1 thread each")
    limit = [min(1, found["cores"] / k) for k in n]
    c.plot(n, limit, "k--", lw=0.8, label=f"limit of {found['cores']} cores")
    c.set(title="weak scaling, a sample a process", xlabel="processes", ylabel="efficiency", ylim=(0, 1.15), xticks=n)
    a.legend(fontsize=7)
    c.legend(fontsize=7)
    links = ", ".join(f"{name} {1000 * v:.0f} ms" for name, v in found["on paper"].items())
    fig.text(0.01, 0.01, f"on paper, summing G's gradients takes: {links}", fontsize=7)
    fig.tight_layout(rect=(0, 0.05, 1, 1))
    save(fig, path)


def main(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--edges", type=int, nargs="+", default=[32, 48, 64, 96, 128],
                   help="up to 256, with memory and patience")
    p.add_argument("--out", type=Path, default=Path(__file__).parent, help="where growth.json and growth.png appear")
    p.add_argument("--one", nargs=3, type=int, metavar=("EDGE", "BATCH", "STEP"), help=argparse.SUPPRESS)
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    with exits():
        keep_memory()
        args.out.mkdir(parents=True, exist_ok=True)
        if args.worker:
            return worker()
        if args.one:
            return print(*one(*args.one))
        found = measure(args.edges)
        for name, rows in found.items():
            print(name, *(f"  {row}" for row in (rows.items() if isinstance(rows, dict) else rows)), sep="\n")
        found["cores"] = os.cpu_count()
        write_atomic(args.out / "growth.json", (json.dumps(found, indent=1) + "\n").encode())
        draw(args.out / "growth.png", found)
        print(f"wrote {args.out / 'growth.json'} and growth.png")


if __name__ == "__main__":
    main()
