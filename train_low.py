"""Stage 1: a report becomes a 64^3 volume of four channels, CT + lobes + airway + vessels. And the training loop of both stages.
Paper sec. 4.2.1 and 4.3, eq. 9; numbers from sec. 4.6 unless a line says otherwise.

    torchrun --nproc_per_node=4 train_low.py --data data/train      # four GPUs
    python train_low.py --preset demo                               # two CPU cores

Running the same command again resumes exactly where it stopped (on a GPU up to rounding: cuDNN may choose other algorithms). Every random number of a step belongs to the number of its
sample, not to a process, so 1, 2 or 64 processes train the same network (up to the rounding of sums).
"""
import argparse
import contextlib
import csv
import fcntl
import io
import json
import os
import pickle
import signal
import sys
import time
import zipfile
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import CHANNELS, SCALE, Cases, cases, choose_device, exits, fast_bfloat16, keep_memory, one_size, picture, read_safetensors, write_atomic
from diffusion import choose_given, ddim_sample, loss, times
from unet3d import UNet3D, folded


def arg(default, help):
    return field(default=default, metadata={"help": help})


DEMO = dict(dim=16, levels=3, heads=4, pooled=True, late=0.5, cool=0.35, windows=0.4, bullae=3.0, batch=4, micro=4, lr=1e-3, steps=7000,
            ema=0.995, ema_start=1000, holdout=32, checkpointing="none", workers=1, save_every=100, show_every=500)


@dataclass
class Common:
    """What both stages can be told; their defaults are stage 1's."""
    data: str = arg("data/train", "folder of cases (data.py, phantom.py), their text embedded by text_encoder.py")
    out: str = arg("runs/low", "run folder: last.pt, low.safetensors, loss.csv, pictures")
    init: str = arg("", "low.safetensors or sr.safetensors of another run to begin from, instead of random weights")
    preset: str = arg("", "paper; demo: 32^3 -> 128^3, one and a half hours on two cores; demo-256: 64^3 -> 256^3 on cubes of 2^3 voxels, to begin from the demo weights with --init; stage 2 also light; default paper on a GPU, demo without")
    device: str = arg("", "cuda or cpu; default whichever is there")
    seed: int = arg(0, "decides the first weights, the order of cases and all noise")
    steps: int = arg(40_000, "optimizer updates")
    batch: int = arg(64, "samples per optimizer step over all processes")
    micro: int = arg(4, "samples per process at a time; the rest of the batch is accumulated")
    lr: float = arg(1e-4, "AdamW, betas (0.9, 0.999)")
    cool: float = arg(0.0, "share of the steps, the last ones, over which lr falls linearly to 0; 0 is the paper's constant")
    decay: float = arg(0.01, "weight decay; released code")
    clip: float = arg(1.0, "largest gradient norm")
    windows: float = arg(0.0, "weight of the CT's error seen in narrow windows of HU, where faint differences show (diffusion.window_loss); 0 is the paper's")
    bullae: float = arg(0.0, "with --windows: how much more a voxel of empty lung counts there, of which there are few; 0 is the paper's")
    given: float = arg(0.0, "share of samples in which the CT (in half of these) or a random choice of the masks (in the other half) are shown without noise, as fixed ones are then while sampling; 0 is the paper's")
    ema: float = arg(0.999, "decay of the running average; released code")
    ema_every: int = arg(1, "steps between its updates; released code")
    ema_start: int = arg(10_000, "it copies the weights outright before this step; released code")
    amp: bool = arg(None, "bfloat16 autocast; default where the device multiplies in bfloat16: GPUs since Ampere, CPUs with AMX or AVX512-BF16")
    checkpointing: str = arg("norms", "recompute in the backward pass: none, norms (little time, a third of the memory), blocks (a third more time, an eighth)")
    compile: bool = arg(None, "compile the Blocks: a minute at the start, then faster; default on a GPU")
    zero: bool = arg(False, "each process holds its share of the optimizer's state alone (ZeroRedundancyOptimizer)")
    dim: int = arg(160, "width of the first level (sec. 4.5)")
    levels: int = arg(4, "levels of the UNet, each twice as wide")
    patch: int = arg(1, "2 runs the network on cubes of 2^3 voxels: a seventh of the arithmetic; not in the paper")
    heads: int = arg(8, "attention heads of 32 channels; released code")
    holdout: int = arg(8, "cases, the last by name, kept from training for the validation loss and the picture")
    workers: int = arg(4, "loader processes per process")
    log_every: int = arg(10, "steps between lines of loss.csv")
    save_every: int = arg(500, "steps between checkpoints")
    show_every: int = arg(2000, "steps between pictures and validation losses")


@dataclass
class Config(Common):
    drop: float = arg(0.1, "share of samples that train the null text; released code")
    late: float = arg(0.0, "share of samples whose t is drawn from [0.8,1], where the text decides; 0 is the paper's")
    pooled: bool = arg(False, "the text is also pooled into the time embedding, with which small networks obey sooner; not in the paper")
    warm_up: int = arg(1200, "with --pooled: steps in which the pooling learns to read, before the network hears it")
    kind: ClassVar = "low"
    validated: ClassVar = dict(windows=0.0, given=0.0)
    presets: ClassVar = {"paper": {}, "demo": DEMO, "demo-256": DEMO | dict(patch=2, lr=8e-4, cool=1.0, steps=1300, ema_start=150)}


FREE = {"data", "out", "init", "device", "amp", "steps", "micro", "checkpointing", "compile", "zero", "lr", "cool", "late", "windows", "bullae", "augment", "ema", "ema_every", "ema_start",
        "workers", "log_every", "save_every", "show_every"}              # may change on resume


def parse(config, doc, argv=None):
    """The command line of a Config: one option a field, the preset's values as defaults."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def by_preset(f):
        values = {name: preset.get(f.name, f.default) for name, preset in config.presets.items()}
        if len(set(values.values())) > 1:
            return f" ({', '.join(f'{name} {value}' for name, value in values.items())})"
        return "" if f.default in (None, "") else f" (default {f.default})"

    for f in fields(config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        p.add_argument("--" + f.name, default=f.default, help=f.metadata["help"] + by_preset(f), **kind)
    first = p.parse_args(argv)
    device = choose_device(first.device)
    preset = first.preset or ("paper" if device.startswith("cuda") else "demo")
    if preset not in config.presets:
        raise ValueError(f"--preset {preset}; presets are {', '.join(config.presets)}; choose one")
    p.set_defaults(**config.presets[preset])
    cfg = config(**{**vars(p.parse_args(argv)), "device": device, "preset": preset})
    if cfg.amp is None:
        cfg.amp = fast_bfloat16(device)
    if cfg.compile is None:
        cfg.compile = device.startswith("cuda")
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if f.type in (int, float) and not (value >= 0 and value < float("inf")):
            raise ValueError(f"--{f.name} {value}; a finite number, not negative, is needed; change it")
        if f.name in ("steps", "batch", "micro", "log_every", "save_every", "show_every", "ema_every", "dim", "levels", "heads", "patch") and value < 1:
            raise ValueError(f"--{f.name} {value}; at least 1 is needed; change it")
        if f.name in ("drop", "ema", "late", "cool", "augment", "given") and value > 1 or f.name == "clip" and value == 0 or f.name == "seed" and value >= 2**23:
            raise ValueError(f"--{f.name} {value}; drop, ema, late, cool, augment and given are at most 1, clip is more than 0, a seed below 2^23; change it")
    return cfg


# --- what makes stage 1: a network, cases, and the loss of a batch ---

def draw(keys, shape, device, seed):
    """Per sample: t ~ U[0,1], one more uniform number, noise eps, and uniform numbers v for `--given`: 4 for `choose_given`,
    3^4 for stage 2's `misplace`. All come from a generator of the sample's own number.   keys: (B,)
    """
    t, u, eps, v = [], [], [], []
    for k in keys.tolist():
        g = torch.Generator(device).manual_seed((seed << 40) + k)
        tu = torch.rand(2, generator=g, device=device)
        t.append(tu[0]), u.append(tu[1])
        eps.append(torch.randn(shape, generator=g, device=device))
        v.append(torch.rand(len(CHANNELS) + 3**4, generator=g, device=device))
    return torch.stack(t), torch.stack(u), torch.stack(eps), torch.stack(v)


def low_loss(cfg, net, batch):
    """Eq. 9 for a batch (k, x0 (B,4,g,g,g), text (B,N,width)); the text is dropped with p = cfg.drop."""
    keys, x0, text = batch
    t, u, eps, v = draw(keys, x0.shape[1:], x0.device, cfg.seed)
    t = torch.where(u > 1 - cfg.late, 0.8 + 0.2 * t, t)                  # u < cfg.drop drops the text: not of these, unless late > 1 - drop
    given = choose_given(v[:, :4], cfg.given) if cfg.given else None
    return loss(net, x0, t, eps, context=text, drop=u < cfg.drop, given=given, windows=cfg.windows, bullae=cfg.bullae)


def low_samples(cfg, net, dataset, device, n=2):
    """For the picture: real cases and samples from their reports, guidance 2 (the released previews').   -> list of (4,g,g,g), their titles"""
    _, x0, text = next(iter(DataLoader(dataset, batch_size=min(n, len(dataset)))))
    _, _, eps, _ = draw(torch.arange(len(x0)), x0.shape[1:], device, cfg.seed)
    made = ddim_sample(net, eps, times(20), text.to(device), guidance=2.0).cpu()
    return [*x0, *made], ["held out"] * len(x0) + ["sample"] * len(x0)


# --- the loop of both stages ---

def setup(cfg):
    """Processes and device.   -> device, rank, world"""
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cfg.device.startswith("cuda") else "gloo", timeout=timedelta(minutes=10))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device(cfg.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if cfg.batch % (cfg.micro * world):
        raise ValueError(f"--batch {cfg.batch} with {world} processes of --micro {cfg.micro}; batch must be a multiple of their product; change one")
    return device, rank, world


def all_folders(cfg):
    """-> folders to train on, folders held out"""
    folders = cases(cfg.data)
    chest = lambda folder: folder.name.split("_text")[0]                 # phantom.py --texts makes several cases of one chest
    held_out = folders[max(0, len(folders) - cfg.holdout):]
    kept = {chest(f) for f in held_out}
    training = [f for f in folders if chest(f) not in kept]
    if not training:
        raise ValueError(f"{cfg.data}: {len(folders)} cases, {cfg.holdout} to be held out, with all of their chests; a trainer needs cases; make some with "
                         f"`python phantom.py --out {cfg.data} --n 512` or `python data.py prepare ...`, or lower --holdout")
    return training, held_out


def load_checkpoint(out, cfg, trained_on):
    """The newest readable checkpoint of a run, or None. ValueError if it belongs to another configuration or was `trained_on` other cases."""
    for path in (out / "last.pt", out / "previous.pt"):
        if not path.exists():
            continue
        try:
            with zipfile.ZipFile(path) as z:                             # torch.load itself notices no bit rot
                bad = z.testzip()
            if bad:
                raise ValueError(f"{bad} fails its check sum")
            state = torch.load(path, map_location="cpu", weights_only=True)
            kinds = dict(kind=str, step=int, config=dict, net=dict, ema=dict, opt=dict)
            if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()) or not state["opt"].get("param_groups"):
                raise ValueError("no checkpoint of these trainers")
        except (zipfile.BadZipFile, pickle.UnpicklingError, ValueError, RuntimeError, OSError, EOFError) as e:
            print(f"warning: {path} is not readable ({type(e).__name__}: {e}); trying the one before it", file=sys.stderr)
            continue
        now = asdict(cfg)
        differing = [f"{k} {v!r} -> {now[k]!r}" for k, v in state["config"].items() if k in now and k not in FREE and now[k] != v]
        if state["kind"] != cfg.kind or differing:
            raise ValueError(f"{path}: a run of kind {state['kind']} that differs in {', '.join(differing) or 'kind'}; a run keeps its "
                             "configuration; repeat its options or choose another --out")
        differing = [k for k, v in trained_on.items() if state.get(k, v) != v]
        if differing:
            raise ValueError(f"{cfg.data}: {len(trained_on['cases'])} cases to train on, which differ in {', '.join(differing)} from those that {out} began with; the order of its "
                             "samples, and what is held out, would change; put the same cases there, or begin anew in another --out with --init")
        return state
    if (out / "last.pt").exists() or (out / "previous.pt").exists():
        raise ValueError(f"{out}: no checkpoint is readable; a run is never restarted silently; remove the folder to begin anew")
    return None


def save_checkpoint(out, state):
    """last.pt becomes previous.pt, the new one appears whole."""
    if (out / "last.pt").exists():
        os.replace(out / "last.pt", out / "previous.pt")
    write_atomic(out / "last.pt", lambda f: torch.save(state, f))


def export(path, cfg, ema, grid, step, n):
    """EMA weights for sample.py: safetensors in float16, with the constructor's arguments and provenance in the metadata."""
    about = dict(kind=cfg.kind, args=ema.args, grid=grid, step=step,
                 provenance=dict(command=" ".join(["python", *map(os.path.basename, sys.argv[:1]), *sys.argv[1:]]), cases=n, config=asdict(cfg)))
    weights = {k: v.detach().half().cpu().contiguous() for k, v in ema.state_dict().items()}
    write_atomic(path, save(weights, metadata={"medsyn": json.dumps(about)}))


def is_new(cfg):
    """Whether the run has no checkpoint yet."""
    return not any((Path(cfg.out) / name).exists() for name in ("last.pt", "previous.pt"))


def begin_from(path, kind, net):
    """The weights that `export` wrote, into `net`, to train on from there.   -> names of what was not there: of text pooling, or nothing"""
    try:
        state, about = read_safetensors(path)
    except ValueError as e:
        raise ValueError(f"--init {e}") from None
    state, args = {k: v.float() for k, v in state.items()}, about.get("args", {})
    differing = {k: v for k, v in args.items() if v != net.args.get(k) and k != "pooled" and not (k == "patch" and v == 1)}
    if about.get("kind") != kind or differing:
        raise ValueError(f"--init {path}: kind {about.get('kind')}, {differing} there; this run is {kind} and has others; pass the options of that network")
    try:
        if net.patch > args.get("patch", 1):
            state = folded(state, net)
        new, excess = net.load_state_dict(state, strict=False)
    except (KeyError, RuntimeError) as e:                                # lacks what is folded, or has other shapes
        raise ValueError(f"--init {path}: the weights do not fit the network that it describes ({str(e)[:200]}); weights that a trainer wrote are needed; name another file") from None
    if excess or any(not k.startswith("pool.") for k in new):
        raise ValueError(f"--init {path}: lacks {', '.join(new) or 'nothing'}, has besides {', '.join(excess) or 'nothing'}; the same network is needed, "
                         "or one without pooled text; pass its options or name another file")
    return new


def gather_shares(opt, rank, world):
    """Adam's shares of a ZeroRedundancyOptimizer, on the CPU of rank 0, where `opt.state_dict()` then has them all. `consolidate_state_dict` does the
    same, but turns bytes into a tensor one by one: minutes for the paper's G."""
    mine = opt.optim.state_dict()
    mine["state"] = {i: {k: v.cpu() for k, v in state.items()} for i, state in mine["state"].items()}
    shares = [None] * world if rank == 0 else None
    dist.gather_object(mine, shares)
    opt._all_state_dicts = shares or []


def ignore_signals(_):
    """For loader workers: when to stop is the training process's to decide."""
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)


@torch.no_grad()
def validate(cfg, net, dataset, loss_fn, device):
    """Eq. 9 or 10, the mean over the held-out cases at 4 fixed draws of t and noise each, for the averaged weights.   -> float
    Options that change the training's loss are set to the values of `cfg.validated`, so that runs compare if their --seed, --late, --drop and --crop,
    which decide the draws, are the same. With --windows, --given or --augment it is therefore another measure than the training's loss.
    """
    cfg, total = replace(cfg, **cfg.validated), 0.0
    for item in range(4 * len(dataset)):
        batch = [torch.as_tensor(x)[None].to(device) for x in dataset[item]]
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp):
            total += loss_fn(cfg, net, batch).item()
    return total / (4 * len(dataset))


def train(cfg, net, dataset, held_out, loss_fn, samples_fn, device, rank, world, asked):
    """The loop: `cfg.steps` updates of `net` on `dataset` by `loss_fn(cfg, net, batch)`, or until `asked` holds a signal to stop."""
    out = Path(cfg.out)
    net.to(device).train()
    ema = deepcopy(net).eval().requires_grad_(False)
    if cfg.compile:
        net.compile_blocks()
    adamw = dict(lr=cfg.lr, betas=(0.9, 0.999), weight_decay=cfg.decay, fused=True)
    if cfg.zero and world > 1:
        opt = ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, **adamw)
    else:
        opt = torch.optim.AdamW(net.parameters(), **adamw)
    trained_on = dict(cases=[folder.name for folder in dataset.folders], grid=dataset.grid, args=net.args)
    step, state = 0, load_checkpoint(out, cfg, trained_on)
    if state:
        step = state["step"]
        net.load_state_dict(state["net"]), ema.load_state_dict(state["ema"]), opt.load_state_dict(state["opt"])
        if cfg.zero and world > 1:
            opt.state.clear()                                            # ZeroRedundancyOptimizer's second, unused copy of its share
            for s in opt.optim.state.values():                           # and it puts this on the CPU, where a fused AdamW on a GPU fails
                s["step"] = s["step"].to(device)
        del state                                                        # 11 GB at the paper's size
    model = net if world == 1 else DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    accum = cfg.batch // (cfg.micro * world)
    first, stride = step * cfg.batch + rank * cfg.micro, cfg.micro * world
    numbers = [range(k, k + cfg.micro) for k in range(first, cfg.steps * cfg.batch, stride)]       # this process's samples, micro-batch by micro-batch
    loader = DataLoader(dataset, batch_sampler=numbers, num_workers=cfg.workers, pin_memory=device.type == "cuda",
                        worker_init_fn=ignore_signals)
    batches = iter(loader)

    def backward(batch, scale):
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp):
            keys, *tensors = batch                                       # keys stay: `draw` wants them as numbers, and a GPU would be waited for
            value = loss_fn(cfg, model, [keys, *(x.to(device, non_blocking=True) for x in tensors)]) * scale
        value.backward()
        return value.detach()

    if world > 1:                                                        # DDP re-buckets after its first backward, which would
        backward(torch.utils.data.default_collate([dataset[rank]] * cfg.micro), 0.0)  # change sums once after every start
        opt.zero_grad()
    rows = io.StringIO()
    log = csv.writer(rows)
    bar = tqdm(total=cfg.steps, initial=step, desc=f"train {cfg.kind}", disable=rank > 0, mininterval=2)
    began, smooth, last = time.time(), None, step >= cfg.steps
    if last and rank == 0:                                               # a run that was killed before its last export
        export(out / f"{cfg.kind}.safetensors", cfg, ema, dataset.grid, step, len(dataset))
    while not last:
        value = torch.zeros((), device=device)
        for i in range(accum):
            with contextlib.nullcontext() if world == 1 or i == accum - 1 else model.no_sync():    # all-reduce once per step
                value += backward(next(batches), 1 / accum)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
        if not torch.isfinite(norm):                                     # after all-reduce: every process sees it alike
            raise RuntimeError(f"step {step + 1}: the gradient is not finite; weights are left as they were; begin anew in another --out with a lower --lr or --no-amp")
        for group in opt.param_groups:
            group["lr"] = cfg.lr * min(1, (cfg.steps - step) / max(1, cfg.cool * cfg.steps))       # not in the paper
        opt.step()
        opt.zero_grad()
        step += 1
        if step < cfg.ema_start or step % cfg.ema_every == 0:
            weight = 1.0 if step < cfg.ema_start else 1 - cfg.ema
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), weight)
        agreed = torch.stack([value / world, torch.tensor(float(len(asked)), device=device)])
        if world > 1:
            dist.all_reduce(agreed)                                      # all stop after the same step, or none does
        value, last = agreed[0].item(), step == cfg.steps or agreed[1].item() > 0
        smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
        bar.update()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        shown = held_out is not None and (step % cfg.show_every == 0 or step == cfg.steps)
        if rank == 0 and (step % cfg.log_every == 0 or shown):
            val = f"{validate(cfg, ema, held_out, loss_fn, device):.6f}" if shown else ""
            log.writerow([step, f"{value:.6f}", val, f"{norm.item():.4f}", f"{time.time() - began:.1f}"])
        saving = step % cfg.save_every == 0 or last
        if saving and cfg.zero and world > 1:
            gather_shares(opt, rank, world)
        if rank == 0 and saving:                                         # the checkpoint last: a run killed before it makes the rest anew
            export(out / f"{cfg.kind}.safetensors", cfg, ema, dataset.grid, step, len(dataset))
            append_log(out / "loss.csv", rows, step)
            save_checkpoint(out, dict(kind=cfg.kind, step=step, config=asdict(cfg), **trained_on, net=net.state_dict(), ema=ema.state_dict(), opt=opt.state_dict()))
        if rank == 0 and shown:
            with torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp):
                volumes, titles = samples_fn(cfg, ema, held_out, device)
            picture(out / f"samples_{step:06d}.png", volumes, titles, f"step {step}")
    bar.close()
    if rank == 0:
        print(f"{'stopped' if step < cfg.steps else 'done'} at step {step} of {cfg.steps}: {out / (cfg.kind + '.safetensors')} ({cfg.dim} wide, grid {dataset.grid}^3), {out / 'loss.csv'}")


def append_log(path, rows, step):
    """Rows of loss.csv; lines beyond the step of the checkpoint, from a run that died after writing them, are dropped first."""
    old = [line for line in path.read_text().splitlines()[1:] if line.strip()] if path.exists() else []
    new = rows.getvalue().splitlines()
    first = int(new[0].split(",")[0]) if new else step + 1
    old = [line for line in old if int(line.split(",")[0]) < first]
    write_atomic(path, ("\n".join(["step,loss,validation,gradient_norm,seconds", *old, *new]) + "\n").encode())
    rows.seek(0), rows.truncate()


@contextlib.contextmanager
def alone(out, rank):
    """The run folder, for this run only, and a list that gathers the signals which ask to stop once the step is done."""
    out.mkdir(parents=True, exist_ok=True)
    asked = []
    with open(out / "lock", "w") as lock:
        try:
            if rank == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another training writes here; one run a folder; wait for it or choose another --out") from None
        before = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield asked
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def run(cfg, make_net, make_data, loss_fn, samples_fn):
    """Processes, network, data, loop; stage 2 calls it too."""
    torch.manual_seed(cfg.seed)
    keep_memory()
    device, rank, world = setup(cfg)
    try:
        if rank == 0:
            print(f"preset {cfg.preset} on {device}, {world} process(es)")
        dataset, held_out = make_data(cfg)
        with alone(Path(cfg.out), rank) as asked:
            train(cfg, make_net(cfg, dataset), dataset, held_out, loss_fn, samples_fn, device, rank, world, asked)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def low_data(cfg):
    folders, held = all_folders(cfg)
    dataset, step = Cases(folders, cfg.seed), cfg.patch * 2 ** (cfg.levels - 1)
    if dataset.grid % step:
        raise ValueError(f"{cfg.data}: its low-resolution volumes are {dataset.grid}^3, and {cfg.levels} levels halve them to whole voxels only from multiples of {step}; "
                         f"make cases on a grid that is a multiple of {SCALE * step}, or lower --levels")
    enough(dataset.grid, cfg.patch)
    one_size(folders[:1] + held, ("low", "text"))
    return dataset, Cases(held, cfg.seed) if held else None


def enough(edge, patch):
    """ValueError if the first convolution spans more than a volume of this edge; bfloat16 gradients of torch 2.13 then write beyond their memory (4 voxels)."""
    if edge // patch < 7:
        raise ValueError(f"volumes with an edge of {edge // patch} voxels{f' (of cubes of {patch}^3)' if patch > 1 else ''}; the first convolution spans 7; use larger cases, crops, or a lower --patch")


def warm_up(cfg, pool, dataset, batch=64, edge=8):
    """Teach the pooled text to say what a chest looks like before the UNet listens: with one linear layer behind it, it predicts x_0 on an 8^3 grid
    from the text alone, which is eq. 5 at t = 1. Each voxel's error is divided by its standard deviation over the cases, or an outline a little wider
    would outweigh lungs a little darker. A minute of this saves thousands of steps in which a UNet tells no left from right.   -> its last loss
    """
    see = torch.nn.Linear(pool.read[-1].out_features, len(CHANNELS) * edge**3)
    opt = torch.optim.AdamW([*pool.parameters(), *see.parameters()], lr=2e-3)
    small = lambda x0: F.adaptive_avg_pool3d(x0, edge).flatten(1)
    first = DataLoader(dataset, batch, sampler=range(20 * batch))
    seen = torch.cat([small(x0) for _, x0, _ in first])
    mean, spread = seen.mean(0), seen.std(0).clamp(min=0.01)
    batches = DataLoader(dataset, batch, sampler=range(batch * cfg.warm_up), num_workers=cfg.workers, worker_init_fn=ignore_signals)
    for _, x0, text in tqdm(batches, desc="warm up text", leave=False, mininterval=2, disable=int(os.environ.get("RANK", 0)) > 0):
        value = (see(F.silu(pool(text))) - (small(x0) - mean) / spread).square().mean()
        value.backward()
        opt.step()
        opt.zero_grad()
    with torch.no_grad():                                                # mean 0 and spread 1 over the reports: codes much smaller than the time embedding are learned slowly
        codes = torch.cat([pool(text) for *_, text in first])
        size = codes.std(0).clamp(min=1e-3)
        pool.read[-1].weight /= size[:, None]
        pool.read[-1].bias.sub_(codes.mean(0)).div_(size)
    return value.item()


def low_net(cfg, dataset):
    tokens, width = dataset[0][2].shape
    net = UNet3D(cfg.dim, heads=cfg.heads, levels=cfg.levels, context_dim=width, tokens=tokens, pooled=cfg.pooled, patch=cfg.patch, checkpointing=cfg.checkpointing)
    if is_new(cfg):
        untaught = not cfg.init or begin_from(cfg.init, "low", net)
        if cfg.pooled and cfg.warm_up and untaught:
            warm_up(cfg, net.pool, dataset)
    return net


def main(argv=None):
    with exits():
        run(parse(Config, __doc__, argv), low_net, low_data, low_loss, low_samples)


if __name__ == "__main__":
    main()
