"""The lesson's twelve exercises: what `python lesson.py --check N` tells, and that it tells it.

A, break it: the check compares the tree with the paper; nothing to tell on the untouched one.
B, build it: the check compares docs/exercises/NN_name.py with an answer known in closed form.
docs/solutions.md is where each change and solution stands; the tests below make every one of them in a copy.
"""
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = {1: ("A", "Noise of the wrong size"), 2: ("A", "Without the clamp"), 3: ("A", "The same text twice"),
             4: ("A", "Two channels swapped"), 5: ("B", "Guidance that fades"), 6: ("A", "Anatomy held too late"),
             7: ("B", "A box held"), 8: ("B", "v beside x_0"), 9: ("A", "One time for the whole batch"),
             10: ("A", "Stage 2 that sees no stage 1"), 11: ("B", "The random step of eq. 2 and 3"),
             12: ("B", "A step of second order")}
STUBS = {5: "05_fading", 7: "07_box", 8: "08_velocity", 11: "11_ancestral", 12: "12_second_order"}
TIMES = (0.9, 0.5, 0.1)
SHAPE = (1, 4, 4, 8, 8)


def check(n):
    """What differs from the paper (A) or is not solved (B), a line each; [] where nothing does. An exception of the
    student's code is such a line too."""
    lines = []
    try:
        for where, what in CHECKS[n]():
            lines.append(f"{where}: {what}")
    except NotImplementedError as e:
        lines.append(f"not solved yet: {place(e)}")
    except Exception as e:                               # whatever a changed file may raise, while it is read or run
        lines.append(f"{place(e)}: {type(e).__name__}: {e}; while this was checked: {CHECKS[n].__doc__}")
    return lines


def place(error):
    """The repository's innermost file and function that an exception went through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if ROOT in Path(f.filename).resolve().parents]
    return f"{Path(frames[-1].filename).resolve().relative_to(ROOT)}, {frames[-1].name}"


def stub(n):
    """The student's file of exercise n, read anew."""
    spec = importlib.util.spec_from_file_location(STUBS[n], ROOT / f"docs/exercises/{STUBS[n]}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- what checks compare with: the paper's formulas written once more, and networks whose answer is known ---

def abar(t):
    """Sec. 3, of a float."""
    return min(max(math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, 1e-4), 1 - 1e-4)


def noised(x0, t, eps):
    """Eq. 1, t a float."""
    return abar(t) ** 0.5 * x0 + (1 - abar(t)) ** 0.5 * eps


def at(t, n=1):
    return torch.full((n,), t, dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def far(a, b):
    """Largest difference; shapes must agree, and nothing be missing."""
    if not isinstance(a, torch.Tensor):
        raise TypeError(f"a tensor is expected, {type(a).__name__} came")
    if a.shape != b.shape:
        raise ValueError(f"shape {tuple(a.shape)} where {tuple(b.shape)} is expected")
    return torch.nan_to_num(a - b, nan=math.inf).abs().max().item() if a.numel() else 0.0


def speaks(text, null, heard=None):
    """A network that says `text` where it hears some and `null` where not, and notes which."""
    def net(xt, t, context=None, drop=None):
        if heard is not None:
            heard.append("null" if context is None else "text")
        return (null if context is None else text) * torch.ones_like(xt)
    return net


def gaussian(xt, t, mean=0.2, std=0.1):
    """The exact x_0 predictor of data ~ N(mean, std^2): a denoiser whose flow is known."""
    a = torch.tensor([abar(v) for v in t.tolist()], dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    return mean + a.sqrt() * std**2 / (a * std**2 + 1 - a) * (xt - a.sqrt() * mean)


def flow(xt, t, s, mean=0.2, std=0.1):
    """Where DDIM with infinitely many steps takes x_t: (x - sqrt(abar) mean) / spread is constant."""
    spread = [(abar(v) * std**2 + 1 - abar(v)) ** 0.5 for v in (t, s)]
    return abar(s) ** 0.5 * mean + (xt - abar(t) ** 0.5 * mean) / spread[0] * spread[1]


# --- A, break it: each yields where, what; its docstring is what it looks at ---

def noise_of_the_wrong_size():
    """alpha_bar, q_sample, ddim_step of diffusion.py"""
    import diffusion
    one, nil = torch.ones(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64)
    found = False
    for t in TIMES:
        seen = diffusion.alpha_bar(at(t)).item()
        if abs(seen - abar(t)) > 1e-6:
            found = True
            yield "alpha_bar", f"abar({t}) is {seen:.4f} where sec. 3 gives {abar(t):.4f}"
    for t in TIMES:
        data, noise = (far(diffusion.q_sample(a, at(t), b), nil) for a, b in ((one, nil), (nil, one)))
        if far(diffusion.q_sample(one, at(t), nil), noised(one, t, nil)) > 1e-6:
            found = True
            yield "q_sample", f"x_0 has the weight {data:.2f} in x_t at t = {t} where eq. 1 gives {abar(t) ** 0.5:.2f}"
        if far(diffusion.q_sample(nil, at(t), one), noised(nil, t, one)) > 1e-6:
            found = True
            yield "q_sample", (f"variance of x_t of data of variance 1 is {data**2 + noise**2:.2f} at t = {t} where "
                               f"eq. 1 gives 1.00; the noise has the weight {noise:.2f}, not {(1 - abar(t)) ** .5:.2f}")
    if not found:                                        # its step goes through both
        x0, eps = randn(2, *SHAPE)
        for t, s in zip(TIMES, TIMES[1:]):
            off = far(diffusion.ddim_step(noised(x0, t, eps), x0, at(t), at(s)), noised(x0, s, eps))
            if off > 1e-6:
                yield "ddim_step", f"told the true x_0, it ends {off:.2f} from x_s, from t = {t} to s = {s}; 0 is right"


def without_the_clamp():
    """guided, beside, ddim_sample of diffusion.py"""
    import diffusion
    xt, context = torch.zeros(SHAPE), torch.zeros(1, 3, 2)
    for scale, told in ((1, context), (2, context), (2, None)):
        most = diffusion.guided(speaks(3.0, 0.5 if told is not None else 3.0), told, scale)(xt, torch.ones(1)).max()
        if most.item() != 1:
            yield "guided", (f"scale {scale}{'' if told is not None else ', no text'}: an estimate of {most:.1f}; "
                             "CT and masks end at 1.0")
    most = diffusion.beside(lambda x, t: 3 * x[:, 4:], torch.zeros(SHAPE))(torch.ones(SHAPE), torch.ones(1)).max()
    if most.item() != 1:
        yield "beside", f"an estimate of {most:.1f}; CT and masks end at 1.0"
    most = diffusion.ddim_sample(lambda xt, t: 3 * torch.ones_like(xt), torch.zeros(SHAPE), [1, 0.5]).max()
    if most.item() != 1:
        yield "ddim_sample", f"a network that says 3.0 is sampled to {most:.1f}; CT and masks end at 1.0"


def the_same_text_twice():
    """guided of diffusion.py"""
    import diffusion
    xt, context = torch.zeros(SHAPE), torch.zeros(1, 3, 2)
    for scale, right in ((0, 0.1), (1, 0.2), (3, 0.4)):
        heard = []
        said = diffusion.guided(speaks(0.2, 0.1, heard), context, scale)(xt, torch.ones(1))
        if scale == 3 and sorted(heard) != ["null", "text"]:
            yield "guided", f"the network hears {', '.join(heard) or 'nothing'} where guidance needs text, null"
        if far(said, torch.full_like(xt, right)) > 1e-6:
            yield "guided", (f"text says 0.20, null 0.10: at scale {scale} the estimate is {said.flatten()[0]:.2f} "
                             f"where null + scale (text - null) is {right:.2f}")
    heard = []
    diffusion.guided(speaks(0.2, 0.1, heard), None, 3)(xt, torch.ones(1))
    if heard != ["null"]:
        yield "guided", f"without a text the network hears {', '.join(heard) or 'nothing'} where null once is enough"


def two_channels_swapped():
    """CHANNELS, encode, decode, downsample of data.py"""
    import numpy as np

    import data
    order = ("ct", "lobe", "airway", "vessel")
    if tuple(data.CHANNELS) != order:
        yield "data.CHANNELS", (f"{', '.join(data.CHANNELS)}; the weights learned {', '.join(order)}")
    value = dict(ct=-1024, lobe=3, airway=1, vessel=0)
    right = dict(ct=-1.0, lobe=0.2, airway=1.0, vessel=-1.0)
    for name, v in value.items():
        seen = float(data.encode(name, np.full(1, v))[0])
        if abs(seen - right[name]) > 1e-5:
            yield "encode", f"{name} {v} becomes {seen:.2f} where sec. 5.1's coding gives {right[name]:.2f}"
        elif (back := data.decode(name, np.full(1, right[name]))[0]) != v:
            yield "decode", f"{name} {right[name]:.2f} becomes {back}, not {v}"
    low = data.downsample({name: np.full((4, 4, 4), v) for name, v in value.items()})
    for i, name in enumerate(order):
        if abs(low[i].mean() - right[name]) > 1e-5:
            yield "downsample", (f"channel {i} of a case is {low[i].mean():.2f}, of a made-up case whose {name} is "
                                 f"{right[name]:.2f}")


def anatomy_held_too_late():
    """held, ddim_sample of diffusion.py"""
    import diffusion
    known, said = randn(2, *SHAPE).clamp(-1, 1)
    keep = said.clone()
    denoise = diffusion.held(lambda xt, t: said, known, [1, 3])
    for t in (1.0, *TIMES, 0.02):
        x0_hat = denoise(torch.zeros(SHAPE), at(t))
        if off := far(x0_hat[:, [1, 3]], known[:, [1, 3]]):
            yield "held", (f"at t = {t} the held channels of the estimate are {off:.2f} from the given anatomy; "
                           "sec. 4.4 holds them at every step")
        if off := far(x0_hat[:, [0, 2]], keep[:, [0, 2]]):
            yield "held", f"at t = {t} channels that are not held differ by {off:.2f} from what the denoiser said"
    if far(said, keep):
        yield "held", "the denoiser's own tensor is written into"
    seen = []
    diffusion.ddim_sample(diffusion.held(lambda xt, t: (seen.append(xt), said)[1], known, [1, 3]), randn(*SHAPE),
                          [0.9, 0.5, 0.1])
    off = far(seen[2][:, [1, 3]], flow_to(known[:, [1, 3]], seen[0][:, [1, 3]], 0.9, 0.1))
    if off > 1e-5:
        yield "held, ddim_sample", f"the network sees held channels at t = 0.1 that are {off:.2f} from those of eq. 1"


def flow_to(x0, xt, t, s):
    """DDIM from t to s by the formula, x_0 known."""
    return noised(x0, s, (xt - abar(t) ** 0.5 * x0) / (1 - abar(t)) ** 0.5)


def one_time_for_the_whole_batch():
    """draw of train_low.py"""
    import train_low
    keys = torch.arange(100, 164)
    t, u, eps = train_low.draw(keys, (1, 2, 2, 2), torch.device("cpu"), 0)
    for name, x, of in (("t", t, "times"), ("u", u, "numbers u"), ("eps", eps, "noises")):
        different = len(torch.as_tensor(x).flatten(1).unique(dim=0) if x.dim() > 1 else x.unique())
        if different < 60 or len(x) != 64:
            yield "draw", f"{len(x)} of 64 samples have {name}, {different} different {of}; every sample draws its own"
    if not (0.38 < t.mean() < 0.62 and t.min() >= 0 and t.max() <= 1 and t.std() > 0.2):
        yield "draw", (f"t from {t.min():.2f} to {t.max():.2f}, mean {t.mean():.2f}, std {t.std():.2f}; uniform on "
                       "[0,1] has mean 0.50, std 0.29")
    alone = train_low.draw(keys[5:6], (1, 2, 2, 2), torch.device("cpu"), 0)
    for name, x, own in zip(("t", "u", "eps"), (t, u, eps), alone):
        if off := far(x[5:6], own):
            yield "draw", f"{name} of one sample is {off:.2f} apart, alone and in a batch; it belongs to its number"


def stage_2_that_sees_no_stage_1():
    """sr_loss, augment_low of train_sr.py, beside of diffusion.py"""
    import diffusion
    import train_sr
    x0, low, xt = randn(3, 2, *SHAPE[1:], seed=3)
    seen = dict(sr_loss=[], beside=[])
    train_sr.sr_loss(train_sr.Config(augment=0.0, seed=0), lambda x, t, *_: (seen["sr_loss"].append(x), x[:, 4:])[1],
                     [torch.arange(2), x0.float(), low.float()])
    diffusion.beside(lambda x, t, *_: (seen["beside"].append(x), x[:, 4:])[1], low)(xt, at(0.5, 2))
    for where, calls in seen.items():
        if len(calls) != 1 or calls[0].shape != (2, 8, *SHAPE[2:]):
            yield where, (f"the network sees {[tuple(x.shape) for x in calls]} where [low, xt] is "
                          f"[{(2, 8, *SHAPE[2:])}]")
        elif off := far(calls[0][:, :4], low.to(calls[0].dtype)):
            yield where, (f"the first four channels that the network sees are {off:.2f} from low (their std is "
                          f"{calls[0][:, :4].std():.2f}, low's {low.std():.2f}); eq. 8 gives it [low, xt]")
        elif where == "beside" and (off := far(calls[0][:, 4:], xt)):
            yield where, f"the last four channels that the network sees are {off:.2f} from xt"
    low = train_sr.augment_low(torch.ones(SHAPE), torch.full((1,), 0.4), torch.zeros(SHAPE))
    if abs(low.mean().item() - 0.6) > 1e-6:
        yield "augment_low", f"0.4 of noise leaves {low.mean():.2f} of the volume where 0.60 is left"


# --- B, build it: the same ---

def guidance_that_fades():
    """fading"""
    fading, xt, context = stub(5).fading, torch.zeros(3, *SHAPE[1:]), torch.zeros(3, 3, 2)
    t, heard = torch.tensor([1.0, 0.5, 0.0]), []
    said = fading(speaks(0.2, 0.1, heard), context, 5)(xt, t)
    for v, x, right in zip(t.tolist(), said, (0.6, 0.4, 0.2)):
        if far(x, torch.full_like(x, right)) > 1e-6:
            yield "fading", (f"text says 0.20, null 0.10: scale 5 at t = {v} gives {x.flatten()[0]:.2f} where "
                             f"null + (1 + 4 t) (text - null) is {right:.2f}")
    if sorted(heard) != ["null", "text"]:
        yield "fading", f"the network hears {', '.join(heard) or 'nothing'}, not text and null"
    if (most := fading(speaks(3.0, 0.5), context, 2)(xt, t).max().item()) != 1:
        yield "fading", f"an estimate of {most:.1f}; clamp to [-1,1]"


def a_box_held():
    """held_box"""
    import diffusion
    held_box, box = stub(7).held_box, (slice(1, 3), slice(0, 4), slice(5, 8))
    known, said = randn(2, *SHAPE).clamp(-1, 1)
    inside = torch.zeros(SHAPE, dtype=torch.bool)
    inside[:, :, 1:3, 0:4, 5:8] = True
    keep, right = said.clone(), torch.where(inside, known, said)
    denoise = held_box(lambda xt, t: said, known, box)
    for t in TIMES:
        if off := far(torch.where(inside, denoise(torch.zeros(SHAPE), at(t)), right), right):
            yield "held_box", f"inside the box the estimate is {off:.2f} from what is known, at t = {t}"
        if off := far(torch.where(inside, right, denoise(torch.zeros(SHAPE), at(t))), right):
            yield "held_box", f"outside the box the estimate is {off:.2f} from what the denoiser said, at t = {t}"
    if far(said, keep):
        yield "held_box", "the denoiser's own tensor is written into; clone it first"
    made = diffusion.ddim_sample(held_box(gaussian, known, box), randn(*SHAPE, seed=1), [1, 0.5, 0.1])
    if off := far(torch.where(inside, made, known), known):
        yield "held_box", f"a whole sample is {off:.2f} from what is known, inside the box"


def v_beside_x0():
    """velocity, x0_of, v_loss"""
    own, (x0, eps, wrong) = stub(8), randn(3, 3, *SHAPE[1:])
    t = torch.tensor(TIMES, dtype=torch.float64)
    a = torch.tensor([abar(v) for v in TIMES], dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
    xt, right = a.sqrt() * x0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * x0
    if (off := far(own.velocity(x0, eps, t), right)) > 1e-6:
        yield "velocity", f"{off:.2f} from sqrt(abar) eps - sqrt(1 - abar) x_0"
    if (off := far(own.x0_of(right, xt, t), x0)) > 1e-6:
        yield "x0_of", f"{off:.2f} from the x_0 that v and x_t were made of"
    seen = []
    loss = own.v_loss(lambda xt, t: (seen.append(xt), right + wrong)[1], x0, t, eps)
    if abs(float(loss) - wrong.square().mean().item()) > 1e-6:
        yield "v_loss", (f"{float(loss):.3f} for a network whose v is wrong by {wrong.square().mean():.3f}, "
                         "in the mean square")
    if not seen or far(seen[0], xt) > 1e-6:
        yield "v_loss", "the network is not shown x_t of eq. 1"
    off = own.x0_of(right + wrong, xt, t) - x0           # the same error, as one of x_0
    ratio = (off.square().mean((1, 2, 3, 4)) / wrong.square().mean((1, 2, 3, 4)) / (1 - a.flatten())).tolist()
    if max(abs(r - 1) for r in ratio) > 1e-6:
        yield "x0_of", "an error of v is not sqrt(1 - abar) times as large in x_0"


def the_random_step():
    """ancestral_step"""
    step, nil, one = stub(11).ancestral_step, torch.zeros(SHAPE, dtype=torch.float64), torch.ones(SHAPE)
    for t, s in zip(TIMES, TIMES[1:]):
        of_xt, of_x0, of_z = (step(*(one.double() if i == j else nil for j in (0, 1)), at(t), at(s),
                                   one.double() if i == 2 else nil).mean().item() for i in range(3))
        kept = abar(t) / abar(s)
        right = (kept**0.5 * (1 - abar(s)) / (1 - abar(t)), abar(s) ** 0.5 * (1 - kept) / (1 - abar(t)),
                 ((1 - abar(s)) / (1 - abar(t)) * (1 - kept)) ** 0.5)
        for name, seen, r in zip(("x_t", "x0_hat", "z"), (of_xt, of_x0, of_z), right):
            if abs(seen - r) > 1e-6:
                yield "ancestral_step", (f"from t = {t} to s = {s}, {name} has the weight {seen:.3f} where eq. 2, 3 "
                                         f"give {r:.3f}")
        variance = of_xt**2 * (1 - abar(t)) + of_z**2
        if abs(variance - (1 - abar(s))) > 1e-6:
            yield "ancestral_step", (f"noise of variance {variance:.3f} is in x_s, s = {s}, where eq. 1 has "
                                     f"{1 - abar(s):.3f}")
    x = step(*randn(2, 3, *SHAPE[1:]), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.5, 0.4, 0.3]),
             randn(3, *SHAPE[1:]))
    if x.shape != (3, *SHAPE[1:]):
        yield "ancestral_step", f"shape {tuple(x.shape)} of a batch whose samples have different times"


def a_step_of_second_order():
    """second_order_step"""
    step = stub(12).second_order_step
    xt, errors = randn(*SHAPE), {}
    for n in (10, 20):
        x, path = xt, [0.9 - 0.7 * i / n for i in range(n + 1)]
        for t, s in zip(path, path[1:]):
            x = step(gaussian, x, at(t), at(s))
        errors[n] = far(x, flow(xt, 0.9, path[-1]))
    if not errors[20] or not 3.2 < errors[10] / errors[20] < 4.8:
        yield "second_order_step", (f"errors {errors[10]:.5f} in 10 steps and {errors[20]:.5f} in 20, the "
                                    f"{errors[10] / max(errors[20], 1e-12):.1f}th part; the second order's is the 4th")
    calls = []
    x = step(lambda xt, t: (calls.append(t), torch.full_like(xt, 0.3))[1], xt, at(0.9), at(0.5))
    if (off := far(x, flow_to(torch.full_like(xt, 0.3), xt, 0.9, 0.5))) > 1e-6:
        yield "second_order_step", f"{off:.3f} from DDIM's step where the estimate is the same at every t"
    if len(calls) != 2:
        yield "second_order_step", f"{len(calls)} call(s) of the denoiser where two are allowed"


CHECKS = dict(enumerate((noise_of_the_wrong_size, without_the_clamp, the_same_text_twice, two_channels_swapped,
                         guidance_that_fades, anatomy_held_too_late, a_box_held, v_beside_x0,
                         one_time_for_the_whole_batch, stage_2_that_sees_no_stage_1, the_random_step,
                         a_step_of_second_order), 1))


# --- every change and every solution of docs/solutions.md, and what its check tells ---

NEEDED = ("data.py", "diffusion.py", "unet3d.py", "train_low.py", "train_sr.py", "tests/test_exercises.py", "support",
          "docs/exercises")
NAMED = {1: ["q_sample"], 2: ["guided", "ddim_sample"], 3: ["guided"], 4: ["data.CHANNELS", "downsample"], 6: ["held"],
         9: ["draw"], 10: ["sr_loss", "beside"]}


def solutions():
    """docs/solutions.md.   -> {n: text between the fences of its one diff or python block}"""
    parts = re.split(r"^## (\d+)\. ", (ROOT / "docs/solutions.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {}
    for n, part in zip(parts[1::2], parts[2::2]):
        kind = "diff" if EXERCISES[int(n)][0] == "A" else "python"
        assert part.startswith(EXERCISES[int(n)][1] + "\n")
        (found[int(n)],) = re.findall(rf"^```{kind}\n(.*?)^```$", part, flags=re.MULTILINE | re.DOTALL)
    return found


def patched(folder, diff):
    """Makes a diff without context in `folder`: `--- FILE`, then runs of - lines, there once, with their + lines."""
    for name, body in re.findall(r"^--- (\S+)\n((?:[-+].*\n)+?)(?=--- |\Z)", diff, flags=re.MULTILINE):
        path = folder / name
        text = path.read_text(encoding="utf-8")
        for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)*)", body, flags=re.MULTILINE):
            old, new = ("".join(line[1:] for line in part.splitlines(keepends=True)) for part in (old, new))
            assert ("\n" + text).count("\n" + old) == 1, f"{name} has not once: {old}"
            text = ("\n" + text).replace("\n" + old, "\n" + new)[1:]
        path.write_text(text, encoding="utf-8")


def told(house, numbers):
    """What the checks tell in copies house/N of the repository, all by one process.   -> {name of the copy: lines}"""
    code = """if True:
        import importlib, json, sys
        top, out = list(sys.path), {}
        for name, n in json.loads(sys.argv[1]).items():
            sys.path[:] = [f"{name}", f"{name}/tests", *top]
            for module in ("test_exercises", "data", "diffusion", "unet3d", "train_low", "train_sr"):
                sys.modules.pop(module, None)
            exercises = importlib.import_module("test_exercises")
            assert str(exercises.ROOT).endswith(name)
            out[name] = exercises.check(n)
        print(json.dumps(out))"""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(numbers)], cwd=house, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def copied(folder):
    for name in NEEDED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """What each check tells where its own change or solution is made, and of a tree whose student mistyped."""
    house, numbers = tmp_path_factory.mktemp("house"), {}
    for n, text in solutions().items():
        copied(house / f"{n}")
        numbers[f"{n}"] = n
        if EXERCISES[n][0] == "A":
            patched(house / f"{n}", text)
        else:
            (house / f"{n}/docs/exercises/{STUBS[n]}.py").write_text(text, encoding="utf-8")
    copied(house / "mistyped")
    numbers["mistyped"] = 1
    (house / "mistyped/diffusion.py").write_text("def q_sample(x0, t, eps:\n    return x0\n")
    return told(house, numbers)


def test_there_is_a_solution_of_every_exercise_and_a_line_in_the_sheet():
    sheet = (ROOT / "docs/exercises/README.md").read_text(encoding="utf-8")
    assert sorted(solutions()) == sorted(CHECKS) == sorted(EXERCISES) == list(range(1, 13))
    assert re.findall(r"^## (\d+)\. (.*) \(([AB])\)$", sheet, flags=re.MULTILINE) == \
        [(str(n), title, mark) for n, (mark, title) in EXERCISES.items()]
    for n in EXERCISES:
        assert f"python lesson.py --check {n}\n" in sheet and f"python docs/exercises/look.py {n}\n" in sheet


@pytest.mark.parametrize("n", EXERCISES)
def test_the_untouched_tree_is_as_the_paper_and_nothing_is_solved(n):
    lines = check(n)
    if EXERCISES[n][0] == "A":
        assert lines == []
    else:
        assert len(lines) == 1 and lines[0].startswith(f"not solved yet: docs/exercises/{STUBS[n]}.py, ")


@pytest.mark.parametrize("n", EXERCISES)
def test_the_change_is_told_and_the_solution_passes(n, changed):
    lines = changed[f"{n}"]
    if EXERCISES[n][0] == "B":
        assert lines == []
    else:
        assert {line.split(":")[0] for line in lines} >= set(NAMED[n]) and any(re.search(r"\d\.\d", x) for x in lines)


def test_what_cannot_be_read_is_told_as_a_line(changed):
    (line,) = changed["mistyped"]
    assert "SyntaxError" in line and "diffusion.py, line 1" in line


FUNCTIONS = {1: ("diffusion", "q_sample"), 2: ("diffusion", "guided"), 3: ("diffusion", "guided"),
             4: ("data", "downsample"), 6: ("diffusion", "held"), 9: ("train_low", "draw"), 10: ("diffusion", "beside")}


@pytest.mark.parametrize("n", FUNCTIONS)
def test_whatever_is_broken_is_told_and_no_check_ends_in_a_traceback(n, monkeypatch):
    module, name = FUNCTIONS[n]
    module = importlib.import_module(module)

    def raises(*args, **more):
        raise KeyError("of the student")
    for broken in (raises, lambda *args: None, lambda *args: torch.zeros(3), lambda *args: lambda *more: None):
        monkeypatch.setattr(module, name, broken)
        assert any(name in line for line in check(n)), (check(n), broken)


@pytest.mark.parametrize("n, name, old, new", [
    (1, "ddim_step", "(1 - abar).sqrt()\n    return", "(1 - abar)\n    return"), (1, "alpha_bar", "0.008", "0.08"),
    (2, "ddim_sample", "denoise(xt, t).clamp(-1, 1)", "denoise(xt, t)"), (2, "beside", ".clamp(-1, 1)", ""),
    (6, "held", ".clone()", ""), (10, "beside", "[low, xt]", "[xt, low]")])
def test_a_neighbouring_mistake_is_told_too(n, name, old, new, monkeypatch):
    import inspect

    import diffusion
    source = inspect.getsource(getattr(diffusion, name))
    assert old in source
    scope = dict(vars(diffusion))
    exec(source.replace(old, new), scope)
    monkeypatch.setattr(diffusion, name, scope[name])
    assert any(line.startswith(name) for line in check(n))


WRONG = {5: ("(scale - 1) * t", "scale * t"), 7: (".clone()", ""), 8: ("(1 - abar).sqrt() * v", "(1 - abar) * v"),
         11: ("(1 - kept) / (1 - at)).sqrt()", "(1 - kept)).sqrt()"), 12: ("(first + second) / 2", "first")}


@pytest.mark.parametrize("n", WRONG)
def test_a_wrong_solution_does_not_pass(n, monkeypatch, tmp_path):
    text, (old, new) = solutions()[n], WRONG[n]
    assert old in text
    (tmp_path / "docs/exercises").mkdir(parents=True)
    (tmp_path / f"docs/exercises/{STUBS[n]}.py").write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert any(re.search(r"\d|own tensor|not sqrt", line) for line in check(n))
