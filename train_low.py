"""Stage 1: a report becomes a 64^3 volume of four channels, CT + lobes + airway + vessels. And both stages' loop.
Paper sec. 4.2.1 and 4.3, eq. 7 and 9; numbers from sec. 4.6 unless a line says otherwise.

    torchrun --nproc_per_node=4 train_low.py --data data/train      # four GPUs
    python train_low.py --preset demo                               # two CPU cores: the same method, smaller

Running the same command again resumes exactly where it stopped (on a GPU up to rounding: cuDNN may choose other
algorithms). Every random number of a step belongs to the number of its sample, not to a process, so 1, 2 or 64
processes train the same network (up to the rounding of sums).
"""
import contextlib
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from data import FOV, SCALE, Cases, split_cases
from diffusion import ddim_sample, guided, loss, times
from support import runs
from support.checks import channels_of, check_levels, one_size
from support.cli import exits, keep_memory
from support.fast import compile_blocks, recompute
from support.options import arg, parse
from support.pictures import picture
from support.seeds import mixed
from support.weights import begin_from, describe, export
from unet3d import Block, Round, UNet3D

DEMO = dict(dim=16, levels=3, heads=4, batch=4, micro=4, lr=1e-3, steps=7000, ema=0.995, ema_start=1000, holdout=32,
            checkpointing="none", workers=1, save_every=100, show_every=500)


@dataclass
class Common:
    """What both stages can be told; the defaults are stage 1's."""
    data: str = arg("data/train", "folder of cases (data.py, phantom.py), their text embedded by text_encoder.py")
    out: str = arg("runs/low", "run folder: last.pt, low.safetensors, loss.csv, pictures")
    init: str = arg("", "exported weights of another run to begin from, instead of random ones")
    preset: str = arg("", "paper, or demo: 32^3 -> 128^3 on two CPU cores; default paper on a GPU, else demo")
    device: str = arg("", "cuda or cpu; default whichever is there")
    seed: int = arg(0, "decides the first weights, the order of cases and all noise", 0, 2**32 - 1)
    steps: int = arg(40_000, "optimizer updates", 1)
    batch: int = arg(64, "samples per optimizer step over all processes", 1)
    micro: int = arg(4, "samples per process at a time; the rest of the batch is accumulated", 1)
    lr: float = arg(1e-4, "learning rate of AdamW, betas (0.9, 0.999)")
    decay: float = arg(0.01, "weight decay; released code")
    clip: float = arg(1.0, "largest gradient norm", 1e-9)
    ema: float = arg(0.999, "decay of the running average; released code", 0, 1)
    ema_every: int = arg(1, "steps between updates of the running average; released code", 1)
    ema_start: int = arg(10_000, "before this step the running average is a copy of the weights; released code")
    amp: bool = arg(None, "bfloat16 autocast; default where the device multiplies in it: new GPUs, some CPUs")
    checkpointing: str = arg("norms", "recompute in the backward pass: none, norms (quick), blocks (least memory)")
    compile: bool = arg(None, "compile the Blocks: a minute at the start, then faster; default on a GPU")
    zero: bool = arg(False, "each process holds its share of the optimizer's state alone")
    dim: int = arg(160, "width of the first level (sec. 4.5)", 1)
    levels: int = arg(4, "levels of the UNet, each twice as wide", 1)
    heads: int = arg(8, "attention heads of 32 channels; released code", 1)
    channels: str = arg("ct,lobe,airway,vessel", "what is made; ct alone: eq. 7 and 8, table 1 without masks")
    holdout: int = arg(8, "held-out cases to look at; who is held out says split.json, at first the last by name")
    workers: int = arg(4, "loader processes per process")
    log_every: int = arg(10, "steps between lines of loss.csv", 1)
    save_every: int = arg(500, "steps between checkpoints", 1)
    show_every: int = arg(2000, "steps between pictures and validation losses", 1)
    validated: ClassVar = {}                     # options that the validation loss sets to these values

    def rate(self, step):
        """Learning rate of update step + 1: constant (sec. 4.6)."""
        return self.lr

    def multiples(self):
        """Volumes have D a multiple of the first number, H and W of the second."""
        return 1, 2 ** (self.levels - 1)


@dataclass
class Config(Common):
    drop: float = arg(0.1, "share of samples that train the learned null text; released code", 0, 1)
    kind: ClassVar = "low"
    presets: ClassVar = {"paper": {}, "demo": DEMO}

    def sampling(self):
        """How the weights want to be sampled: sampling.json."""
        return dict(low_steps=50, guidance=2.0)


# --- what makes stage 1: cases, a network, and the loss of a batch ---

def low_data(cfg):
    """-> Cases to train on, Cases held out or None"""
    folders, held_out = split_cases(cfg.data, cfg.holdout, cfg.out)
    dataset = Cases(folders, cfg.seed, channels=channels_of(cfg.channels, folders + held_out))
    check_levels(cfg, dataset.grid, SCALE)
    one_size(folders[:1] + held_out, ("low", "text"))
    return dataset, Cases(held_out, cfg.seed, channels=dataset.channels) if held_out else None


def low_net(cfg, dataset):
    C, (tokens, width) = len(dataset.channels), dataset[0][2].shape
    net = UNet3D(cfg.dim, C, C, heads=cfg.heads, levels=cfg.levels, context_dim=width, tokens=tokens)
    if cfg.init and runs.is_new(cfg.out):
        begin_from(cfg.init, "low", net, dataset.channels)
    return net


def draw(keys, shape, device, seed):
    """Per sample, from a generator of the sample's own number: t ~ U[0,1], one more uniform number u, and noise eps.
    keys: (B,)   -> (B,), (B,), (B,*shape)"""
    tu, eps = [], []
    for k in keys.tolist():
        g = torch.Generator(device).manual_seed(mixed(seed, k))
        tu.append(torch.rand(2, generator=g, device=device))
        eps.append(torch.randn(shape, generator=g, device=device))
    t, u = torch.stack(tu).unbind(1)
    return t, u, torch.stack(eps)


def low_loss(cfg, net, batch):
    """Eq. 7 for x', all four channels, which is eq. 9: || G(x'_t, f_text) - x'_0 ||^2.   batch: k (B,), x0 (B,4,g,g,g),
    text (B,N,width), the learned null text with p = cfg.drop (released code), has (B,5) of incomplete Cases"""
    keys, x0, text, *has = batch
    t, u, eps = draw(keys, x0.shape[1:], x0.device, cfg.seed)
    null = (u < cfg.drop) | ~has[0][:, -1] if has else u < cfg.drop
    return loss(lambda xt, t: net(xt, t, text, null), x0, t, eps, *(it[:, :-1] for it in has))


def low_samples(cfg, net, dataset, device):
    """For the picture: two real cases and samples from their reports, guidance 2 (the released previews').
    -> list of (4,g,g,g), their titles"""
    _, x0, text, *has = next(iter(DataLoader(dataset, batch_size=min(2, len(dataset)))))
    text = net.text(text.to(device), ~has[0][:, -1].to(device) if has else None, len(x0))
    _, _, eps = draw(torch.arange(len(x0)), x0.shape[1:], device, cfg.seed)
    made = ddim_sample(guided(net, text, 2.0), eps, times(20)).cpu()
    return [*x0, *made], ["held out"] * len(x0) + ["sample"] * len(x0)


# --- the loop of both stages ---

def train(cfg, net, dataset, held_out, loss_fn, samples_fn, machine, asked):
    """`cfg.steps` updates of `net` on `dataset` by `loss_fn(cfg, net, batch)`, or until `asked` holds a signal to
    stop.   machine: device, rank, world = how many processes train together"""
    # the network, its running average, the optimizer (sec. 4.6)
    out, (device, rank, world) = Path(cfg.out), machine
    net.to(device).train()
    ema = deepcopy(net).eval().requires_grad_(False)
    opt = optimizer(cfg, net, world)

    # where the run stopped, if it has begun
    about = describe(dataset.folders, dataset.channels)
    trained_on = dict(cases=[folder.name for folder in dataset.folders], grid=dataset.grid, args=net.args,
                      encoder=about["encoder"])
    step, state = 0, runs.load_checkpoint(cfg, trained_on)
    if state:
        step = state["step"]
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        runs.restore(opt, state["opt"], device)
        del state                                                        # 11 GB at the paper's size

    # speed and memory: compiled Blocks, recomputation (support/fast.py), several GPUs
    model = net
    compiled = cfg.compile and compile_blocks(net, Block)
    if not (compiled and cfg.checkpointing == "norms"):                  # a compiled Block recomputes its norms unasked
        recompute(net, cfg.checkpointing, Block, (Round,))
    if world > 1:
        model = DistributedDataParallel(net, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    # this process's samples, micro-batch by micro-batch: their numbers follow from the step alone
    accum = cfg.batch // (cfg.micro * world)
    first, stride = step * cfg.batch + rank * cfg.micro, cfg.micro * world
    numbers = [range(k, k + cfg.micro) for k in range(first, cfg.steps * cfg.batch, stride)]
    batches = iter(DataLoader(dataset, batch_sampler=numbers, num_workers=cfg.workers,
                              pin_memory=device.type == "cuda", worker_init_fn=runs.begin_worker))

    def backward(batch, scale):
        keys, *tensors = batch                           # keys stay on the CPU: to read them from a GPU would stall it
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp):
            value = loss_fn(cfg, model, [keys, *(x.to(device, non_blocking=True) for x in tensors)]) * scale
        value.backward()
        return value.detach()

    if world > 1:                                        # DDP regroups gradients after its first backward, and sums
        backward(default_collate([dataset[rank]] * cfg.micro), 0.0)
        opt.zero_grad()                                  # round otherwise: now, so that a resumed run adds alike

    log, smooth, last = runs.Log(out / "loss.csv", rank), None, step >= cfg.steps
    bar = tqdm(total=cfg.steps, initial=step, desc=f"train {cfg.kind}", disable=rank > 0, mininterval=2)
    weights = out / f"{cfg.kind}.safetensors"
    if last and rank == 0:                               # a run that was killed before its last export
        export(weights, cfg, ema, dataset.grid, step, about)

    while not last:
        # forward and backward, accumulated over micro-batches (sec. 4.6); GPUs sum their gradients at the last
        value = torch.zeros((), device=device)
        for i in range(accum):
            with contextlib.nullcontext() if world == 1 or i == accum - 1 else model.no_sync():
                value += backward(next(batches), 1 / accum)

        # the update (sec. 4.6): clip, AdamW, running average
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
        if not torch.isfinite(norm):                     # after all-reduce: every process sees it alike
            raise RuntimeError(f"step {step + 1}: the gradient is not finite; weights are left as they were; "
                               "begin anew in another --out with a lower --lr or --no-amp")
        for group in opt.param_groups:
            group["lr"] = cfg.rate(step)
        opt.step()
        opt.zero_grad()
        step += 1
        if step < cfg.ema_start or step % cfg.ema_every == 0:
            average(ema, net, 1.0 if step < cfg.ema_start else 1 - cfg.ema)

        # the loss over all processes; they stop after the same step, or none does
        agreed = runs.add_up(torch.stack([value / world, torch.tensor(float(len(asked)), device=device)]))
        value, last = agreed[0].item(), step == cfg.steps or agreed[1].item() > 0
        smooth = value if smooth is None else 0.98 * smooth + 0.02 * value

        # what a person sees: bar, log, checkpoint, picture
        bar.update()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        shown = held_out is not None and (step % cfg.show_every == 0 or step == cfg.steps)
        saving = step % cfg.save_every == 0 or last
        if step % cfg.log_every == 0 or shown:
            log.add(step, value, norm.item())
        if saving and cfg.zero and world > 1:
            runs.gather_shares(opt, rank, world)
        if rank == 0 and saving:                         # the checkpoint last: a run killed before it redoes the rest
            export(weights, cfg, ema, dataset.grid, step, about)
            log.write()
            state = dict(net=net.state_dict(), ema=ema.state_dict(), opt=opt.state_dict())
            runs.save_checkpoint(out, dict(kind=cfg.kind, step=step, config=asdict(cfg), **trained_on, **state))
        if shown:                                        # after the checkpoint: a held-out set may be large
            log.validated(validate(cfg, ema, held_out, loss_fn, machine))
        if rank == 0 and shown:
            with torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp):
                picture(out / f"samples_{step:06d}.png", *samples_fn(cfg, ema, held_out, device), f"step {step}", FOV,
                        dataset.channels)

    bar.close()
    if rank == 0:
        print(f"{'stopped' if step < cfg.steps else 'done'} at step {step} of {cfg.steps}: {weights} "
              f"({cfg.dim} wide, grid {dataset.grid}^3), {log.path}")


def optimizer(cfg, net, world):
    """AdamW (sec. 4.6), its state shared out among the processes with --zero."""
    adamw = dict(lr=cfg.lr, betas=(0.9, 0.999), weight_decay=cfg.decay, fused=True)
    if cfg.zero and world > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer
        return ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, **adamw)
    return torch.optim.AdamW(net.parameters(), **adamw)


@torch.no_grad()
def average(ema, net, weight):
    """ema += weight (net - ema), the running average of the weights; released code."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), weight)


@torch.no_grad()
def validate(cfg, net, dataset, loss_fn, machine):
    """Eq. 9 or 10 with the averaged weights, the mean over the held-out cases, 4 fixed draws of t and noise each; every
    process takes its share. `cfg.validated` sets options of the loss, so that runs compare that differ in them."""
    cfg, (device, rank, world) = replace(cfg, **cfg.validated), machine
    total = torch.zeros((), device=device, dtype=torch.float64)
    for item in range(rank, 4 * len(dataset), world):
        batch = [torch.as_tensor(x)[None].to(device) for x in dataset[item]]
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp):
            total += loss_fn(cfg, net, batch)
    return runs.add_up(total).item() / (4 * len(dataset))


def run(cfg, make_data, make_net, loss_fn, samples_fn):
    """Processes, cases, network, loop; stage 2 calls it too."""
    torch.manual_seed(cfg.seed)
    keep_memory()
    try:
        machine = runs.setup(cfg)
        if machine.rank == 0:
            print(f"preset {cfg.preset} on {machine.device}, {machine.world} process(es)")
        dataset, held_out = make_data(cfg)
        with runs.alone(Path(cfg.out), machine.rank) as asked:
            train(cfg, make_net(cfg, dataset), dataset, held_out, loss_fn, samples_fn, machine, asked)
    finally:
        runs.end_workers()
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv=None):
    with exits():
        run(parse(Config, __doc__, argv), low_data, low_net, low_loss, low_samples)


if __name__ == "__main__":
    main()
