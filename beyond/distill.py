"""A student that samples in few steps, taught by a trained network. Not in the paper, which leaves few steps to others.
Progressive distillation, Salimans & Ho 2022 (arXiv 2202.00512): one DDIM step of the student stands for several of its
teacher; the teacher's guidance is in it (Meng et al. 2023, arXiv 2210.03142), so that a step is one call. The loop is
train_low.train.

    python -m beyond.distill --teacher checkpoints/demo --calls 8 --each 3 --out runs/student8/low    # 24 steps -> 8
    python -m beyond.distill --teacher runs/student8 --calls 4 --out runs/student4/low                # 8 -> 4
    python -m beyond.distill --kind sr --teacher checkpoints/demo --calls 2 --out runs/student4/sr    # stage 2: 4 -> 2
"""
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.utils.data import DataLoader

import train_low
from beyond.losses import choose_given, draw_given
from beyond.train_sr import placed_data
from diffusion import alpha_bar, ddim_sample, ddim_step, q_sample, times
from support.cli import exits
from support.options import arg, parse
from support.sampling import how_to_sample
from support.weights import describe, load_stages
from train_low import draw, low_data, run
from train_sr import augment_low
from unet3d import UNet3D

DEMO = dict(batch=4, micro=4, lr=3e-4, steps=600, ema=0.98, ema_start=50, holdout=32, checkpointing="none", workers=1,
            save_every=100, show_every=600)


@dataclass
class Config(train_low.Common):
    teacher: str = arg("", "folder of weights; the student begins as a copy")
    kind: str = arg("low", "which stage: low or sr")
    calls: int = arg(4, "steps of the student, one call of its network each, evenly spaced", 1)
    each: int = arg(2, "steps of the teacher that one of them stands for; 0: no teacher, the data at these times", 0)
    out: str = arg("runs/student/low", "run folder: last.pt, the weights, loss.csv, pictures")
    lr: float = arg(1e-4, "learning rate at first; it falls linearly to 0")
    drop: float = arg(0.1, "stage 1: share of samples without text", 0, 1)
    given: float = arg(0.3, "share of samples in which the CT, or some masks, are held fixed (sec. 4.4)", 0, 1)
    crop: str = arg("", "stage 2: D,H,W of the training crops; default the teacher's")
    augment: float = arg(0.1, "stage 2: most noise on the low-resolution input", 0, 1)
    presets: ClassVar = {"paper": {}, "demo": DEMO}
    # no options here: the teacher's, which `Teacher` sets
    channels: ClassVar = ""
    dim: ClassVar = 0
    levels: ClassVar = 0
    patch: ClassVar = 1
    asked: ClassVar = {}
    # nor these, which a copy of the teacher does not need
    heads: ClassVar = 0
    init: ClassVar = ""

    def rate(self, step):
        return self.lr * (1 - step / self.steps)

    def multiples(self):
        return self.patch, self.patch * 2 ** (self.levels - 1)

    def sampling(self):
        """The student's sampling.json: the teacher's, in its own steps."""
        others = {k: v for k, v in self.asked.items() if k in ("agree", "tidy")}
        others |= dict(shown=[self.kind]) if self.kind in self.asked.get("shown", ()) else {}
        return others | {f"{self.kind}_steps": self.calls} | (dict(guidance=1.0) if self.kind == "low" else {})

    def distilled(self):
        """What the weights say of it."""
        return dict(times=times(self.calls).tolist(), teacher=self.teacher)


# --- what the student is to say ---

def one_for_many(denoise, xt, t, s, each):
    """What a denoiser has to say at t, for its one DDIM step to s to end where `each` steps of `denoise` do (Salimans &
    Ho 2022, appendix):   x0 = (x_s - r x_t) / (sqrt(abar_s) - r sqrt(abar_t)),   r = sqrt((1 - abar_s) / (1 - abar_t))

    denoise(xt, t) -> x0_hat, as for `diffusion.ddim_sample`, whose last step ends at its estimate: so does that to
    s = 0.   xt: (B,C,D,H,W)   t, s: (B,), s < t   -> (B,C,D,H,W)
    """
    x, here = xt, t
    for i in range(each):
        before, here = here, t + (s - t) * (i + 1) / each
        x0_hat = denoise(x, before)
        x = ddim_step(x, x0_hat, before, here)
    abar_t, abar_s = alpha_bar(t), alpha_bar(s)
    r = ((1 - abar_s) / (1 - abar_t)).sqrt()
    x0 = (x - r * xt) / (abar_s.sqrt() - r * abar_t.sqrt())
    return torch.where((s > 0).reshape(-1, 1, 1, 1, 1), x0, x0_hat)


def distill_loss(cfg, student, teacher, x0, t, eps, given, shown):
    """|| student(x_t, t) - x0~ ||^2 at the student's times, x0~ of `one_for_many`, or x_0 where nobody teaches.
    student, teacher: denoisers   t: (B,) uniform   given: (B,4) bool, the channels held fixed   shown: whether the
    networks see these without noise"""
    given = given[..., None, None, None]

    def held(denoise):
        return lambda xt, t: torch.where(given, x0, denoise(torch.where(given, x0, xt) if shown else xt, t))

    i = (t * cfg.calls).long().clamp(max=cfg.calls - 1)
    t, s = (1 - (i + k) / cfg.calls for k in (0, 1))
    xt, target = q_sample(x0, t, eps), x0
    if cfg.each:
        with torch.no_grad():
            target = one_for_many(held(teacher), xt, t, s, cfg.each)
    return (held(student)(xt, t) - target).square().mean()


# --- the two stages ---

class Teacher:
    """A trained network, how it is sampled, and the losses that it teaches by. It tells `cfg` what both are."""

    def __init__(self, cfg):
        if cfg.kind not in ("low", "sr"):
            raise ValueError(f"--kind {cfg.kind}; the stages are low and sr; choose one")
        stages = load_stages(cfg.teacher, UNet3D)
        if cfg.kind not in stages:
            raise ValueError(f"--teacher {cfg.teacher}: no stage-2 weights; the student begins as a copy of them; name "
                             "a whole model")
        self.net, self.about = stages[cfg.kind]
        about = self.about
        self.net.eval().requires_grad_(False)
        cfg.asked = self.asked = how_to_sample({cfg.kind: stages[cfg.kind]})
        cfg.channels, cfg.patch = ",".join(about["channels"]), self.net.args.get("patch", 1)
        cfg.dim, cfg.levels = self.net.args["dim"], self.net.args["levels"]
        cfg.crop = cfg.crop or about["provenance"]["config"].get("crop", "")
        self.shown = cfg.kind in self.asked.get("shown", ())
        steps = len(about["distilled"]["times"]) if "distilled" in about else None
        if cfg.each and steps not in (None, cfg.calls * cfg.each):
            raise ValueError(f"--calls {cfg.calls} --each {cfg.each}: {cfg.calls * cfg.each} steps of a teacher that "
                             f"is itself a student, of {steps}; their product must be that; change one")

    def student(self, cfg, dataset):
        if not dataset.whole:
            raise ValueError(f"{cfg.data}: some cases lack a mask or a report; all are needed; name another folder")
        args, there, taught = self.net.args, dict(grid=dataset.grid), dict(grid=self.about["grid"])
        if cfg.kind == "low":
            there |= dict(text=tuple(dataset[0][2].shape), encoder=describe(dataset.folders)["encoder"])
            taught |= dict(text=(args["tokens"], args["context_dim"]), encoder=self.about.get("encoder"))
        if any(None not in (v, taught[k]) and v != taught[k] for k, v in there.items()):     # None: not known
            raise ValueError(f"{cfg.data}: {there}, where --teacher {cfg.teacher} was trained with {taught}; both must "
                             "agree; name its cases, embedded by its text encoder")
        return deepcopy(self.net).requires_grad_(True)

    def guided(self, context, null):
        """`diffusion.guided` within the interval, sample by sample, for the samples that have a text."""
        scale, interval = self.asked.get("guidance", 2.0), self.asked.get("interval", (0, 1))

        def denoise(xt, t):
            x0_hat = self.net(xt, t, context, null)
            more = (t >= interval[0]) & (t <= interval[1]) & ~null
            if scale != 1 and more.any():
                without = self.net(xt[more], t[more], None)
                x0_hat[more] = without + scale * (x0_hat[more] - without)
            return x0_hat.clamp(-1, 1)
        return denoise

    def low_loss(self, cfg, net, batch):
        keys, x0, text = batch
        self.net.to(x0.device)
        t, u, eps = draw(keys, x0.shape[1:], x0.device, cfg.seed)
        given, null = choose_given(draw_given(keys, x0.shape[1:], x0.device, cfg.seed)[0], cfg.given), u < cfg.drop
        return distill_loss(cfg, lambda xt, t: net(xt, t, text, null), self.guided(text, null), x0, t, eps, given,
                            self.shown)

    def sr_loss(self, cfg, net, batch):
        keys, x0, low = batch
        self.net.to(x0.device)
        shape = (8,) + x0.shape[2:]
        t, u, eps = draw(keys, shape, x0.device, cfg.seed)
        given = choose_given(draw_given(keys, shape, x0.device, cfg.seed)[0], cfg.given)
        low = augment_low(low, cfg.augment * u, eps[:, 4:])
        student, teacher = (lambda xt, t, m=m: m(torch.cat([low, xt], 1), t) for m in (net, self.net))
        return distill_loss(cfg, student, lambda xt, t: teacher(xt, t).clamp(-1, 1), x0, t, eps[:, :4], given,
                            self.shown)


def samples(cfg, net, dataset, device):
    """For the picture: a held-out case and what the student makes of its report, or of its low-resolution volume."""
    keys, x0, told = (x.to(device) for x in next(iter(DataLoader(dataset, batch_size=1))))
    _, _, eps = draw(keys.cpu(), x0.shape[1:], device, cfg.seed)
    made = ddim_sample(lambda xt, t: net(xt, t, told) if cfg.kind == "low" else net(torch.cat([told, xt], 1), t), eps,
                       times(cfg.calls))
    return [x0[0].cpu(), made[0].cpu()], ["held out", f"student, {cfg.calls} steps"]


def main(argv=None):
    with exits():
        cfg = parse(Config, __doc__, argv)
        teacher = Teacher(cfg)
        data, loss = dict(low=(low_data, teacher.low_loss), sr=(placed_data, teacher.sr_loss))[cfg.kind]
        run(cfg, data, teacher.student, loss, samples)


if __name__ == "__main__":
    main()
