"""Stage 2: the 64^3 volume of four channels becomes 256^3. Only what differs from stage 1; the loop is train_low.train.
Paper sec. 4.2.2, eq. 7 and 10; numbers from sec. 4.6 unless a line says otherwise.

    torchrun --nproc_per_node=4 train_sr.py --data data/train       # four GPUs
    python train_sr.py --preset demo                                # two CPU cores, 32^3 -> 128^3

The network sees [low, x_t] and no text. It is trained on crops and run on whole volumes: it has no position but what it sees.
"""
import torch
import torch.nn.functional as F
from dataclasses import dataclass
from typing import ClassVar

from data import SCALE, Cases, exits, one_size
from diffusion import augment_low, choose_given, ddim_sample, loss, times
from train_low import Common, all_folders, arg, begin_from, draw, enough, is_new, parse, run
from unet3d import UNet3D

DEMO = dict(dim=16, levels=3, windows=0.4, bullae=0.5, given=0.5, augment=0.1, batch=2, micro=2, lr=8e-4, cool=1.0, steps=2300, ema_start=100, ema=0.99, ema_every=1,
            crop="64,48,48", checkpointing="none", workers=1, save_every=100, show_every=500)


@dataclass
class Config(Common):
    out: str = arg("runs/sr", "run folder: last.pt, sr.safetensors, loss.csv, pictures")
    batch: int = arg(32, "samples per optimizer step over all processes")
    ema: float = arg(0.995, "decay of the running average; released code")
    ema_every: int = arg(10, "steps between its updates; released code")
    dim: int = arg(56, "width of the first level")
    heads: int = arg(4, "attention heads of 32 channels; released code")
    crop: str = arg("256,72,72", "D,H,W of the training crops; released code; up to 256,256,256")
    bottom: str = arg("plane", "self-attention at the bottom: plane (released weights) or depth (the paper's words)")
    augment: float = arg(0.4, "most noise on the low-resolution input, drawn anew from 0 to this for each sample; not in the paper, released code")
    kind: ClassVar = "sr"
    validated: ClassVar = dict(windows=0.0, given=0.0, augment=0.4)
    presets: ClassVar = {"paper": {}, "light": dict(patch=2, crop="256,80,80"), "demo": DEMO, "demo-256": DEMO | dict(patch=2, steps=1300, ema_start=50, crop="96,80,80")}


def sr_data(cfg):
    """Crops of the training cases and of those held out."""
    try:
        crop = tuple(int(n) for n in cfg.crop.split(","))
    except ValueError:
        crop = ()
    step = cfg.patch * 2 ** (cfg.levels - 1)
    if len(crop) != 3 or min(crop) < 1 or crop[0] % cfg.patch or crop[1] % step or crop[2] % step:
        raise ValueError(f"--crop {cfg.crop}; D,H,W with H and W multiples of {step} and D of {cfg.patch} are needed; write --crop 256,80,80")
    enough(min(crop), cfg.patch)
    folders, held = all_folders(cfg)
    dataset = Cases(folders, cfg.seed, crop)
    one_size(folders[:1] + held, ("low",))
    return dataset, Cases(held, cfg.seed, crop) if held else None


def sr_net(cfg, dataset):
    net = UNet3D(cfg.dim, in_channels=8, heads=cfg.heads, rounds=1, context_dim=0, levels=cfg.levels, bottom=cfg.bottom,
                 patch=cfg.patch, checkpointing=cfg.checkpointing)
    if cfg.init and is_new(cfg):
        begin_from(cfg.init, "sr", net)
    return net


def misplace(masks, by):
    """Masks of a low-resolution volume moved about as if stage 1 had put them elsewhere; lobes inside the lung only, so that its outline stays.
    Not in the paper.
    masks: (B,3,D,H,W) lobe, airway, vessel, on the full grid   by: (B,3,n,n,n) voxels of the low grid along D, H, W, interpolated between the n^3 places
    -> (B,3,D,H,W)
    """
    shift = SCALE * F.interpolate(by, masks.shape[2:], mode="trilinear", align_corners=True).round().long()      # (B,3,D,H,W)
    here = torch.stack(torch.meshgrid(*(torch.arange(n, device=masks.device) for n in masks.shape[2:]), indexing="ij"))
    last = torch.tensor(masks.shape[2:], device=masks.device).reshape(3, 1, 1, 1) - 1
    there = (here + shift).clamp(min=torch.zeros_like(last), max=last)
    moved = torch.stack([x[:, d, h, w] for x, (d, h, w) in zip(masks, there)])
    inside = (masks[:, :1] > -0.8) & (moved[:, :1] > -0.8)               # lobes are -0.6 to 1, nothing is -1
    return torch.cat([torch.where(inside, moved[:, :1], masks[:, :1]), moved[:, 1:]], dim=1)


def sr_loss(cfg, net, batch):
    """Eq. 10 for a batch (k, x0 (B,4,d,h,w), low (B,4,d,h,w)), with noise on the low-resolution input. Where the CT is given,
    the low-resolution masks are misplaced by up to 4 of their voxels, so that the network learns to find structures in the CT, which shows them better,
    instead of copying masks."""
    keys, x0, low = batch
    t, u, eps, v = draw(keys, (8,) + x0.shape[2:], x0.device, cfg.seed)
    given = None
    if cfg.given:
        given = choose_given(v[:, :4], cfg.given)
        masks = misplace(low[:, 1:], 8 * v[:, 4:].reshape(-1, 3, 3, 3, 3) - 4)
        low = torch.cat([low[:, :1], torch.where(given[:, :1, None, None, None], masks, low[:, 1:])], dim=1)
    return loss(net, x0, t, eps[:, :4], low=augment_low(low, cfg.augment * u, eps[:, 4:]), given=given, windows=cfg.windows, bullae=cfg.bullae)


def sr_samples(cfg, net, dataset, device):
    """For the picture: a held-out case (at most 128^3 of it), its low-resolution volume, and the sample made from that.   -> list of (4,...), their titles"""
    step = cfg.patch * 2 ** (cfg.levels - 1)
    key, x0, low = Cases(dataset.folders[:1], 0, (min(128, dataset.grid) // step * step,) * 3)[0]
    _, _, eps, _ = draw(torch.tensor([key]), x0.shape, device, cfg.seed)
    return [x0, low, ddim_sample(net, eps, times(10), low=low[None].to(device))[0].cpu()], ["held out", "its low resolution", "sample"]


def main(argv=None):
    with exits():
        run(parse(Config, __doc__, argv), sr_net, sr_data, sr_loss, sr_samples)


if __name__ == "__main__":
    main()
