"""Stage 1 with what the paper does not have; the loop is train_low.train. The shipped demonstration weights were made
so.

    python -m beyond.train_low --preset demo                        # two CPU cores, 32^3
    python -m beyond.train_low --preset demo-256 --init checkpoints/demo/low.safetensors --data data/train256
"""
import os
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import train_low
from beyond.losses import choose_given, draw_given, loss
from beyond.nets import Extended, Sharp, begin_from, statistics
from data import CHANNELS
from support.cli import exits
from support.options import arg, parse
from support.runs import begin_worker, is_new
from train_low import draw, low_data, low_samples, run


@dataclass
class Tricks:
    """What both stages can be told besides."""
    cool: float = arg(0.0, "share of the steps, the last ones, over which lr falls linearly to 0", 0, 1)
    windows: float = arg(0.0, "weight of the CT's error in narrow windows of HU, where faint differences show")
    bullae: float = arg(0.0, "with --windows: how much more a voxel of empty lung counts there")
    given: float = arg(0.0, "share of samples in which the CT, or some masks, are shown without noise", 0, 1)
    patch: int = arg(1, "2 runs the network on cubes of 2^3 voxels: a seventh of the arithmetic", 1)
    sharp: bool = arg(False, "with --patch 2: a network that copies what it sees where there is little noise")
    fine: int = arg(0, "with --sharp: width of a last Block on voxels; 0 for none")

    def rate(self, step):
        return self.lr * min(1, (self.steps - step) / max(1, self.cool * self.steps))

    def multiples(self):
        return self.patch, self.patch * 2 ** (self.levels - 1)

    def shown(self):
        return {"shown": [self.kind]} if self.given else {}


DEMO = train_low.DEMO | dict(pooled=True, late=0.5, cool=0.35, windows=0.4, bullae=3.0)


@dataclass
class Config(Tricks, train_low.Config):
    late: float = arg(0.0, "share of samples whose t is drawn from [0.8,1], where the text decides", 0, 1)
    pooled: bool = arg(False, "the text is also pooled into the time embedding, with which small networks obey sooner")
    warm_up: int = arg(1200, "with --pooled: steps in which the pooling learns to read, before the network hears it")
    validated: ClassVar = dict(windows=0.0, given=0.0)
    presets: ClassVar = {"paper": {}, "demo": DEMO,
                         "demo-256": DEMO | dict(patch=2, lr=8e-4, cool=1.0, steps=1300, ema_start=150)}

    def sampling(self):
        return super().sampling() | self.shown()


def make_net(cfg, dataset, **args):
    """The form of network that the options ask for."""
    if not dataset.whole:
        raise ValueError(f"{cfg.data}: some cases lack a mask or a report; the losses here need all; train with "
                         f"train_{cfg.kind}.py, or on a folder of whole cases")
    if dataset.channels != CHANNELS:
        raise ValueError(f"--channels {cfg.channels}; the losses here need all four; train with train_{cfg.kind}.py")
    if not cfg.sharp:
        if cfg.fine:
            raise ValueError(f"--fine {cfg.fine} without --sharp; it is a part of those networks; pass --sharp")
        return Extended(cfg.dim, patch=cfg.patch, **args)
    if cfg.patch == 1:
        raise ValueError("--sharp with --patch 1; it is a network on cubes; pass --patch 2")
    return Sharp(cfg.dim, fine=cfg.fine, std=statistics(dataset, cfg.patch), patch=cfg.patch, **args)


def low_net(cfg, dataset):
    tokens, width = dataset[0][2].shape
    net = make_net(cfg, dataset, heads=cfg.heads, levels=cfg.levels, context_dim=width, tokens=tokens,
                   pooled=cfg.pooled)
    if is_new(cfg.out):
        untaught = not cfg.init or begin_from(cfg.init, "low", net)
        if cfg.pooled and cfg.warm_up and untaught:
            warm_up(cfg, net.pool, dataset)
    return net


def warm_up(cfg, pool, dataset, batch=64, edge=8):
    """Teach the pooled text to say what a chest looks like before the UNet listens: with one linear layer behind it, it
    predicts x_0 on an 8^3 grid from the text alone, which is eq. 5 at t = 1. Each voxel's error is divided by its
    standard deviation over the cases, or an outline a little wider would outweigh lungs a little darker. A minute of
    this saves thousands of steps in which a UNet tells no left from right.   -> its last loss
    """
    def small(x0):
        return F.adaptive_avg_pool3d(x0, edge).flatten(1)

    see = torch.nn.Linear(pool.read[-1].out_features, len(CHANNELS) * edge**3)
    opt = torch.optim.AdamW([*pool.parameters(), *see.parameters()], lr=2e-3)
    first = DataLoader(dataset, batch, sampler=range(20 * batch))
    seen = torch.cat([small(x0) for _, x0, _ in first])
    mean, spread = seen.mean(0), seen.std(0).clamp(min=0.01)

    batches = DataLoader(dataset, batch, sampler=range(batch * cfg.warm_up), num_workers=cfg.workers,
                         worker_init_fn=begin_worker)
    quiet = int(os.environ.get("RANK", 0)) > 0
    for _, x0, text in tqdm(batches, desc="warm up text", leave=False, mininterval=2, disable=quiet):
        value = (see(F.silu(pool(text))) - (small(x0) - mean) / spread).square().mean()
        value.backward()
        opt.step()
        opt.zero_grad()

    # mean 0 and spread 1 over the reports: codes much smaller than the time embedding are learned slowly
    with torch.no_grad():
        codes = torch.cat([pool(text) for *_, text in first])
        size = codes.std(0).clamp(min=1e-3)
        pool.read[-1].weight /= size[:, None]
        pool.read[-1].bias.sub_(codes.mean(0)).div_(size)
    return value.item()


def low_loss(cfg, net, batch):
    """`train_low.low_loss` with more samples at late times, channels shown without noise, and narrow windows of HU."""
    keys, x0, text = batch
    t, u, eps = draw(keys, x0.shape[1:], x0.device, cfg.seed)
    t = torch.where(u > 1 - cfg.late, 0.8 + 0.2 * t, t)             # u < drop drops the text: others, if both are small
    given = None
    if cfg.given:
        given = choose_given(draw_given(keys, x0.shape[1:], x0.device, cfg.seed)[0], cfg.given)
    return loss(lambda xt, t: net(xt, t, text, u < cfg.drop), x0, t, eps, given, cfg.windows, cfg.bullae)


def main(argv=None):
    with exits():
        run(parse(Config, __doc__, argv), low_data, low_net, low_loss, low_samples)


if __name__ == "__main__":
    main()
