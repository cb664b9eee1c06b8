# %% [markdown]
# # Text to a 3D chest by diffusion: an hour
# Nine figures by the project's own functions, whose code stands above each; the words to them: `docs/lesson.md`.
# %%
"""The lecture: nine figures, and whether an exercise is solved. Cells run in VS Code, in Spyder, and as a notebook.

    python lesson.py --out docs/lesson     # all figures, again after weights have changed: ten minutes on two cores
    python lesson.py --only 4 5            # these alone
    python lesson.py --check 3             # exercise 3: as the paper, solved, or what differs
"""
import inspect
import sys
import time
from argparse import Namespace
from functools import cache, partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(globals().get("__file__", "lesson.py")).resolve().parent))   # a notebook lies beside them
import numpy as np
import torch

import phantom
import text_encoder
from data import CHANNELS, FOV, HU, SCALE, decode, downsample, encode, upsample
from diffusion import alpha_bar, beside, ddim_sample, ddim_step, guided, held, loss, q_sample, times
from evaluate import dice, measure_phantom
from sample import stage
from support.cli import Parser, exits, keep_memory
from support.files import write_atomic
from support.lecture import bars, count, render, show, spectrum, usual
from support.sampling import settings
from support.weights import beyond, load_stages
from train_sr import augment_low
from unet3d import UNet3D

ROOT, FIGURES = Path(sys.path[0]), {}      # {number: (title, how it is drawn, the functions shown)}
ASKED = Namespace(model=str(ROOT / "checkpoints/demo"), seeds=3, cases=6, steps=12, training=300)
NOTEBOOK = "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None
SEED = 95_000                              # of the phantoms, on which no shipped weights were trained
CT, LOBE, AIRWAY = range(3)


def figure(title, *shown):
    """A figure below the code of the functions `shown`; it returns its caption. In a notebook it is drawn at once."""
    def register(draw):
        n = next((n for n, (_, f, _) in FIGURES.items() if f.__name__ == draw.__name__), len(FIGURES) + 1)
        FIGURES[n] = f"{n}. {title}", draw, shown
        if NOTEBOOK:
            from IPython.display import Image, Markdown, display
            display(Markdown(f"## {n}. {title}"))
            print(*map(inspect.getsource, shown), sep="\n")
            display(Image(render(*FIGURES[n])))
        return draw
    return register


@cache
def model():
    """-> both networks, the edge of stage 1's grid, how the weights want to be sampled, the text encoder, their name"""
    stages = load_stages(ASKED.model, UNet3D)
    how = Namespace(model=ASKED.model, plain=False, device="cpu", slab=0, amp=False, compile=False)
    (low, about), (sr, _) = stages["low"], stages["sr"]
    encoder = text_encoder.load(Path(ASKED.model) / "text", low.args["tokens"])
    return low.eval(), sr.eval(), about["grid"], settings(how, stages), encoder, Path(ASKED.model).name


@cache
def chest(i, effusion):
    """A phantom of stage 2's size, with a large effusion or none.   -> arrays by name, x0 (1,4,D,H,W), low of it"""
    size = None if effusion == "none" else "large"
    arrays = phantom.make(SEED + i, SCALE * model()[2], "held-out", effusion=effusion, effusion_size=size)
    x0 = np.stack([encode(c, arrays[c]) for c in CHANNELS])
    return arrays, torch.from_numpy(x0)[None], torch.from_numpy(downsample(arrays))[None]


def noise(x, seed=0):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def stage1(text, n, known=None, fixed=(), **changes):
    """Samples of seeds 0 to n - 1, as sample.py makes them but for `changes` of the settings.   -> (n,4,g,g,g)"""
    low, _, g, s, encoder, _ = model()
    context, s = text and encoder.encode([text])[0].expand(n, -1, -1), s | dict(low_steps=ASKED.steps) | changes
    eps = torch.cat([noise(torch.empty(1, 4, g, g, g), seed) for seed in range(n)])
    denoise, unguided = (guided(low, context, scale) for scale in (s["guidance"], 1))
    return stage("low", s, denoise, eps, known, fixed, unguided=unguided)


def stage2(low, known=None, fixed=(), **changes):
    """The same of stage 2.   low: (1,4,d,h,w) -> (1,4,4d,4h,4w)"""
    sr, s, low = model()[1], model()[3] | dict(sr_steps=min(4, ASKED.steps)) | changes, upsample(low)
    return stage("sr", s, beside(sr, low), noise(low), known, fixed, low=low)
# %%
@figure("A case: four channels on one grid", encode)
def case(fig):
    arrays, x0, _ = chest(0, "left")
    axes, g = fig.subplots(2, 4, height_ratios=[3, 2]), x0.shape[-1]
    ticks = dict(ct=(-1024, -860, 0, 600), lobe=range(6), airway=(0, 1), vessel=(0, 1))
    for (top, below), c in zip(axes.T, CHANNELS):
        span = dict(vmin=ticks[c][0], vmax=ticks[c][-1], cmap="gray" if c == "ct" else "viridis")
        fig.colorbar(show(top, arrays[c], c + ", HU" * (c == "ct"), **span), ax=top, ticks=ticks[c], shrink=0.7)
        top.axhline(g - 1 - int(0.55 * g), color="orange")
        below.plot(encode(c, arrays[c][int(0.55 * g), int(0.45 * g)]), color="orange")
        below.set(ylim=(-1.1, 1.1), xlabel="voxel, right to left", yticks=encode(c, ticks[c]).round(2))
    wrong = [f"{c} {np.ptp(decode(c, encode(c, arrays[c])) - arrays[c].clip(*HU).astype(int))}" for c in CHANNELS]
    return (f"Phantom {SEED}, {g}^3 voxels over {FOV[2]:.0f} x {FOV[1]:.0f} x {FOV[0]:.0f} mm, a large left effusion. "
            f"Errors of decode after encode: {', '.join(wrong)}.")
# %%
@figure("Noise: eq. 1", alpha_bar, q_sample)
def noised(fig):
    x0 = chest(0, "left")[1][:, [CT]]
    left, right = fig.subfigures(1, 2, width_ratios=[5, 3])
    g, (strong, drowned) = x0.shape[-1], right.subplots(2, 1)
    f, power, share = spectrum(x0[0, 0], FOV)            # of white noise the power is 1 at all f
    strong.semilogy(f, power, "k")
    for t, (top, below) in zip((0, 0.2, 0.5, 0.8, 0.95), left.subplots(2, 5).T):
        xt, abar = q_sample(x0, torch.tensor([t]), noise(x0)), alpha_bar(torch.tensor([t])).item()
        show(top, xt[0, 0], f"t = {t}\nabar = {abar:.3f}", vmin=-1.5, vmax=1.5)
        show(below, torch.nn.functional.avg_pool3d(xt, SCALE)[0, 0], f"means of {SCALE}^3", vmin=-1.5, vmax=1.5)
        strong.axhline((1 - abar) / abar, ls=":", color="r")
        strong.text(0.2, (1 - abar) / abar, f"noise, t = {t}" * bool(t), color="r", ha="right", fontsize=8)
    strong.set(xlabel="cycles/mm", ylabel="power of the CT", ylim=(3e-3, 1e5))
    abar = alpha_bar(torch.linspace(0, 1, 101))
    below = power < ((1 - abar) / abar).reshape(-1, 1).numpy()                             # (t, f)
    drowned.plot(np.linspace(0, 1, 101), [f[row.argmax() if row.any() else -1] for row in below], "k")
    for grid in (g // SCALE, 2 * g // SCALE, g):
        drowned.axhline(grid / 2 / max(FOV), ls=":", color="r")
        drowned.text(0.99, grid / 2 / max(FOV), f"{grid}^3 voxels hold", color="r", ha="right", va="top", fontsize=8)
    drowned.set(xlabel="t", ylabel="drowned from, cycles/mm", xlim=(0, 1))
    return (f"Phantom {SEED}, its CT alone. Of its variance {share(g / SCALE / 2 / max(FOV)):.1%} lies at "
            f"frequencies that {g // SCALE}^3 voxels hold.\nNoise is as strong at all, the chest is not.")
# %%
@figure("What the network says", loss)
@torch.no_grad()
def answers(fig):
    net, encoder = model()[0], model()[4]
    cases, _, lows = zip(*(chest(i, ("left", "none", "right")[i % 3]) for i in range(ASKED.cases)))
    x0, own = torch.cat(lows), encoder.encode([it["report"] for it in cases])[0]
    left, right = fig.subfigures(1, 2, width_ratios=[5, 3])
    axes, ax, words = left.subplots(3, 5), right.subplots(), []
    for a in axes[:, 0]:
        show(a, x0[0, CT], "x0", 0)
    for t, column in zip((0.95, 0.8, 0.5, 0.2), axes[:, 1:].T):
        xt = q_sample(x0[:1], when := torch.tensor([t]), noise(x0[:1]))
        shown = {f"xt, t = {t}": xt, "its report": net(xt, when, own[:1]), "no text": net(xt, when)}
        for a, (title, x) in zip(column, shown.items()):
            show(a, x[0, CT], title, 0)
    ts = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 0.99)
    for way, context in {"its report": own, "no text": None, "another's report": own.roll(1, 0)}.items():
        values = [loss(guided(net, context, 1), x0, torch.full((len(x0),), t), noise(x0)).item() for t in ts]
        ax.semilogy(ts, values, dict(its="o-", no="s--").get(way.split()[0], "^:"), label=way)
        words.append(f"{way} {values[-2]:.4f}")
    ax.set(xlabel="t", title="loss")
    ax.legend()
    return (f"Below xt: x0_hat. {model()[5]} weights; phantom {SEED}, in the loss {len(x0)} from this on.\n"
            f"Loss at t = {ts[-2]}: {', '.join(words)}.")
# %%
def filmed(denoise, film):
    """A denoiser that is looked at."""
    def seen(xt, t):
        film.append((t[0].item(), xt, denoise(xt, t)))
        return film[-1][2]
    return seen


def gaussian(mu, s):
    """Data N(mu, s^2): the best denoiser is known, and where DDIM of many steps takes each noise.   -> both"""
    def denoise(xt, t):
        abar = alpha_bar(t)
        return mu + abar.sqrt() * s**2 / (abar * s**2 + 1 - abar) * (xt - abar.sqrt() * mu)
    abar = alpha_bar(torch.ones(1))
    return denoise, lambda xt: mu + s * (xt - abar.sqrt() * mu) / (abar * s**2 + 1 - abar).sqrt()


@figure("The way back: DDIM", ddim_step, ddim_sample)
def way_back(fig):
    asked, film, words = "Large left pleural effusion.", [], []
    solvers = {"DDIM": ddim_sample} | ({"DPM-Solver++": beyond("solvers").dpm_sample} if beyond("solvers") else {})
    net, eps = guided(model()[0], model()[4].encode([asked])[0], 1), noise(chest(0, "left")[2])
    ddim_sample(filmed(net, film), eps, times(12))
    strip, below = fig.subfigures(2, 1, height_ratios=[3, 2])
    for (t, xt, x0_hat), (a, b) in zip(film[::2] + film[-1:], strip.subplots(2, 7).T):
        show(a, xt[0, CT], f"xt, t = {t:.2f}", 0)
        show(b, x0_hat[0, CT], "x0_hat", 0)
    (best, end), limit = gaussian(0.1, 0.25), ddim_sample(net, eps, times(4 * ASKED.steps))
    tasks = {"a Gaussian: rms from the answer": (best, noise(eps), end(noise(eps)), (2, 4, 8, 16, 32, 64)),
             f"the network: rms from DDIM in {4 * ASKED.steps}": (net, eps, limit, (2, 4, 8, 16, 2 * ASKED.steps))}
    for ax, (title, (denoise, z, right, counts)) in zip(below.subplots(1, 2), tasks.items()):
        for name, solve in solvers.items():
            errors = [(solve(denoise, z, times(n)) - right).square().mean().sqrt().item() for n in counts]
            ax.loglog(counts, errors, "o-", label=name)
            words.append(f"{name} {errors[3]:.4f}")
        ax.set_xticks(counts, counts)
        ax.minorticks_off()
        ax.set(xlabel="steps", title=title)
        ax.legend()
    return (f'{model()[5]} weights, "{asked}", no guidance; seven of 12 steps of DDIM.\n'
            f"In 16 steps, of the Gaussian and then of the network: {', '.join(words)}.")
# %%
@figure("Text: guidance, left and right, no", guided)
def text(fig):
    sentences = large, right, none, no = ("Large left pleural effusion.", "Large right pleural effusion.",
                                          "No pleural effusion.", "No large left pleural effusion.")
    ways, found = {str(k): dict(guidance=k, interval=[0, 1]) for k in (0, 1, 2, 4)} | {"as shipped": {}}, {}
    top, below = fig.subfigures(2, 1, height_ratios=[2, 3])
    (dots, sides), strip, s = below.subplots(1, 2), dict(zip(ways, top.subplots(1, 5))), model()[3]
    for way, asked in [*product(ways, (large, none)), ("as shipped", right), ("as shipped", no)]:
        x = stage1(None if way == "0" else asked, ASKED.seeds, **ways[way]).numpy()
        found[way, asked] = [measure_phantom(decode("ct", v[CT]), decode("lobe", v[LOBE])) for v in x]
        if asked == large:
            show(strip[way], x[0, CT], f"guidance {way}", 0)
    mL = {asked: np.array([[m["effusion"] for m in found[way, asked]] for way in ways]) for asked in (large, none)}
    for (asked, values), color in zip(mL.items(), "rb"):
        dots.plot(values, color + "o", alpha=0.4)
        dots.plot(values.mean(1), color, label=asked)
    dots.set(xticks=range(5), xticklabels=ways, xlabel="guidance", ylabel="effusion, mL")
    for i, asked in enumerate(sentences):
        for side, color, y in (("right", "go", i - 0.1), ("left", "ro", i + 0.1)):
            mL_of = [m[side] for m in found["as shipped", asked]]
            sides.plot(mL_of, [y] * ASKED.seeds, color, alpha=0.5, label=None if i else f"{side} side")
    sides.set(yticks=range(4), yticklabels=[v.replace(" pl", "\npl") for v in sentences], xlabel="as shipped: mL")
    sides.invert_yaxis()
    dots.legend(fontsize=8)
    sides.legend(fontsize=8)
    means = "; ".join(f"{way}: {a:.0f}, {b:.0f}" for way, a, b in zip(ways, mL[large].mean(1), mL[none].mean(1)))
    return (f"{model()[5]} weights, {ASKED.seeds} seeds, above seed 0 and the first sentence. As shipped: guidance "
            f"{s['guidance']:g} for t in {s.get('interval', [0, 1])}.\nMean mL, large and none, by guidance {means}.")
# %%
@figure("Anatomy: held channels", held)
def anatomy(fig):
    (arrays, x0, low), film, n = chest(1, "none"), [], 2 * ASKED.seeds
    net, inside = guided(model()[0], None, 1), low[0, AIRWAY] > 0
    ddim_sample(filmed(held(net, low, [AIRWAY]), film), noise(low), times(12))
    top, below = fig.subfigures(2, 1)
    spot = dict(at=np.median(np.argwhere(arrays["airway"])[:, 1]) / x0.shape[-1])             # the main bronchi's
    for ax, (t, _, x0_hat) in zip(top.subplots(1, 6), [(0, 0, low), *film[::2]]):
        show(ax, x0_hat[0, CT], f"x0_hat, t = {t:.2f}" if t else "its phantom", outline=low[0, AIRWAY], **spot)
    axes, words = below.subplots(1, 5), []
    for ax, (name, fixed) in zip(axes, {"nothing held": [], "airway held": [AIRWAY]}.items()):
        x = stage1(None, n, low.expand(n, -1, -1, -1, -1), fixed)[:, CT]
        sd = decode("ct", x).astype(np.float32).std(0, ddof=1)
        image = show(ax, sd, f"{name}: sd of {n}", vmin=0, vmax=500, cmap="magma", **spot)
        words.append(f"{name} {sd[inside].mean():.0f} and {sd[~inside].mean():.0f}")
    below.colorbar(image, ax=axes[:2], shrink=0.7, label="HU")
    x = stage2(stage1(arrays["report"], 1, low, [CT]), x0, [CT])[0].numpy()
    made, labels = dict(zip(CHANNELS, map(decode, CHANNELS, x))), dict(lobe=range(1, 6), airway=[1], vessel=[1])
    show(axes[2], x0[0, CT], "the CT held", **spot)
    for ax, title, masks in ((axes[3], "masks made", made), (axes[4], "masks drawn", arrays)):
        show(ax, np.where(masks["airway"] > 0, 6, masks["lobe"]), title, vmin=0, vmax=6, cmap="nipy_spectral", **spot)
    found = [f"{c} {np.mean([dice(made[c] == k, arrays[c] == k) for k in labels[c]]):.2f}" for c in labels]
    return (f"{model()[5]} weights; phantom {SEED + 1}, no text. sd of the CT, HU, in the airway and elsewhere: "
            f"{'; '.join(words)}.\nThe CT held instead, and its report: Dice of the masks {', '.join(found)}.")
# %%
def hu(x, y):
    """Mean absolute difference of two CTs, HU."""
    return (x - y)[:, CT].abs().mean().item() * (HU[1] - HU[0]) / 2


@figure("Stage 2: from low to full", upsample, augment_low)
def stage_two(fig):
    _, x0, low = chest(2, "right")
    made, amounts, k = stage2(low), (0, 0.05, 0.1, 0.2, 0.4), low.shape[-1] // 4
    top, below = fig.subfigures(2, 1, height_ratios=[3, 2])
    columns = {"low": low, "low, up-sampled": upsample(low), "the sample": made, "the truth": x0}
    for ax, (name, x) in zip(top.subplots(1, 4), columns.items()):
        show(ax, x[0, CT], f"{name}, {x.shape[-1]}^3")
    box, truth = (x[(..., *[slice(n * k, 3 * n * k)] * 3)] for n, x in ((1, low), (SCALE, x0)))
    given = [augment_low(box, torch.tensor([a]), noise(box, 1)) for a in amounts]
    boxes = [stage2(x, agree=False, tidy=False) for x in given]
    plot, *axes = below.subplots(1, 4, width_ratios=[2, 1, 1, 1])
    for name, xs in (("up-sampled", map(upsample, given)), ("sample", boxes)):
        errors = [hu(x, truth) for x in xs]
        plot.plot(amounts, errors, "o-", label=name)
    plot.set(xlabel="noise a on low", title="error of the CT, HU")
    plot.legend(fontsize=8)
    for ax, i in zip(axes, (0, 2, 4)):
        show(ax, boxes[i][0, CT], f"sample, a = {amounts[i]}")
    return (f"{model()[5]} weights; phantom {SEED + 2}; below, its middle box. Mean error of the CT, HU: up-sampled "
            f"{hu(upsample(low), x0):.0f}, sample {hu(made, x0):.0f};\nof the box's sample, by a: "
            f"{', '.join(f'{a}: {e:.0f}' for a, e in zip(amounts, errors))}.")
# %%
@figure("The UNet: why 716 M parameters fit", usual)
def unet(fig):
    forms = {"ours": lambda net: net, "3x3x3 everywhere": usual, "... and D halved": partial(usual, halve=True),
             "... and attention at every level": partial(usual, halve=True, attend=True)}
    shapes = (1, 4, 64, 64, 64), (1,), (1, 192, 768)
    counts = {name: count(lambda form=form: form(UNet3D(160)), *shapes) for name, form in forms.items()}
    deep = bars(fig, counts)
    return (f"Counted on meta tensors: G at the paper's size, 64^3, one sample. Of our parameters {deep:.0%} lie where "
            "slices have 8 x 8 voxels.\nKept is what the backward pass needs; attention never holds its products.")
# %%
def learn(x0, steps, looks):
    """-> the loss at every step, samples of one noise after `looks` steps"""
    torch.manual_seed(0)
    net = UNet3D(16, heads=2, rounds=1, levels=2, context_dim=0)
    opt, losses, samples = torch.optim.AdamW(net.parameters(), 2e-3), [], []
    for step in range(steps + 1):
        if step in looks:
            samples.append(ddim_sample(net, noise(x0[:1], 1), times(20)))
        pick = torch.randint(len(x0), (4,))
        value = loss(net, x0[pick], torch.rand(4), torch.randn_like(x0[pick]))
        value.backward()
        opt.step()
        opt.zero_grad()
        losses.append(value.item())
    return losses, samples


@figure("Training from nothing", learn)
def training(fig):
    cases = [phantom.make(SEED + 100 + i, 16) for i in range(12)]
    x0 = torch.from_numpy(np.stack([[encode(c, arrays[c]) for c in CHANNELS] for arrays in cases]))
    looks = [ASKED.training * k // 16 for k in (0, 1, 4, 16)]
    losses, samples = learn(x0, ASKED.training, looks)
    (top, below), away = fig.subfigures(2, 1), (x0 - samples[-1]).square().mean((1, 2, 3, 4))
    top.subplots().semilogy(losses)
    titles = [*(f"step {look}" for look in looks), "nearest of the 12"]
    for ax, title, x in zip(below.subplots(1, 5), titles, [*samples, x0[away.argmin()][None]]):
        show(ax, x[0, CT], title)
    return (f"12 phantoms of 16^3, no text. Loss {losses[0]:.2f}, in the last 20 steps {np.mean(losses[-20:]):.3f}.\n"
            f"Mean square from the last sample to the nearest phantom {away.min():.3f}, to all {away.mean():.3f}.")
# %%
def main(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--out", default="out/lesson", help="folder for the figures (default out/lesson)")
    p.add_argument("--only", type=int, nargs="+", choices=FIGURES, metavar="N", help="these figures alone")
    p.add_argument("--model", default=ASKED.model, help="folder of weights (default checkpoints/demo)")
    p.add_argument("--quick", action="store_true", help="few steps and seeds: shows that all runs, no more")
    p.add_argument("--check", type=int, choices=range(1, 13), metavar="N", help="an exercise, 1 to 12")
    args = p.parse_args(argv)
    with exits():
        if args.check:
            sys.path.insert(0, str(ROOT / "tests"))
            import test_exercises
            (mark, title), lines = test_exercises.EXERCISES[args.check], test_exercises.check(args.check)
            found = title if lines else dict(A="as the paper", B="solved")[mark]
            print(f"exercise {args.check} ({mark}): {found}", *lines, sep="\n")
            raise SystemExit(int(bool(lines)))
        vars(ASKED).update(dict(seeds=1, cases=2, steps=2, training=2) if args.quick else {}, model=args.model)
        keep_memory()
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for n in args.only or FIGURES:
            began, path = time.time(), Path(args.out) / f"{n:02}_{FIGURES[n][1].__name__}.png"
            write_atomic(path, render(*FIGURES[n]))
            print(f"{path}: {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__" and not NOTEBOOK:
    main()
