"""What an exercise's change does, in figures: run it before the change and after.

    python docs/exercises/look.py 6

With the small weights (checkpoints/demo: 32^3, then 128^3, trained on phantoms), on made-up chests, without a network.
Volumes that it makes are in out/look/N-1.png, the next time in N-2.png.
"""
import importlib
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

import phantom
from data import CHANNELS, FOV, decode, downsample, encode, upsample
from diffusion import alpha_bar, beside, ddim_sample, ddim_step, guided, held, loss, q_sample, times
from support.cli import Parser, exits
from support.pictures import picture
from support.weights import load_stages
from unet3d import UNet3D

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "checkpoints/demo"
ORDER = ("ct", "lobe", "airway", "vessel")       # of the weights, whatever data.CHANNELS says


def network(kind="low"):
    return load_stages(MODEL, UNet3D)[kind][0].eval()


def chest(**found):
    """A phantom with this found and nothing else.   -> (1,4,32,32,32) and (1,4,128,128,128) in [-1,1]"""
    well = dict(effusion="none", cardiomegaly=False, bullae=False, consolidation=None, nodules=0)
    case = phantom.make(5_000_000, 128, **well | found)
    full = torch.stack([torch.from_numpy(encode(c, case[c])) for c in CHANNELS])
    return torch.from_numpy(downsample(case))[None], full[None]


def words(text):
    import text_encoder
    return text_encoder.load(MODEL / "text", tokens=network().args["tokens"]).encode([text])[0]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(denoise, n=12, seed=0):
    return ddim_sample(denoise, randn(1, 4, 32, 32, 32, seed=seed), times(n))


def tell(name, x):
    """Contents of a volume (1,4,g,g,g), one line."""
    mm3, masks = torch.tensor(FOV).prod().item() / x[0, 0].numel(), {c: decode(c, v) for c, v in zip(ORDER, x[0])}
    hu = masks["ct"][masks["lobe"] > 0]
    print(f"{name}: lungs {(masks['lobe'] > 0).sum() * mm3 / 1e6:.2f} L of mean {hu.mean() if hu.size else 0:.0f} HU, "
          f"airways {masks['airway'].sum() * mm3 / 1e3:.0f} mL, vessels {masks['vessel'].sum() * mm3 / 1e3:.0f} mL; "
          f"from voxel to voxel the CT changes by {x[0, 0].diff(dim=-1).abs().mean():.4f}")


def show(n, *volumes):
    path = next(p for i in range(1, 1000) if not (p := ROOT / f"out/look/{n}-{i}.png").exists())
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(path, [x[0] for _, x in volumes], [name for name, _ in volumes], "", FOV)
    print(f"wrote {path.relative_to(ROOT)}")


# --- one function an exercise ---

def look_1():
    """Noise of the wrong size: x_t, and a sample."""
    low, _ = chest()
    unit = randn(*low.shape, seed=1)
    for t in (0.2, 0.5, 0.8):
        xt = q_sample(unit, torch.full((1,), t), randn(*low.shape))
        print(f"t = {t}: data of variance 1.00 become x_t of variance {xt.var():.2f}")
    net = network()
    with torch.no_grad():
        for t in (0.2, 0.5, 0.8):
            print(f"t = {t}: loss {loss(lambda x, t: net(x, t), low, torch.full((1,), t), randn(*low.shape)):.4f}")
    x = sample(guided(net, None, 1))
    tell("a phantom", low)
    tell("a sample", x)
    show(1, ("phantom", low), ("sample", x))


def look_2():
    """Without the clamp: what the sampler is told, guidance 8."""
    said, net, context = [], network(), words("Large left pleural effusion.")
    denoise = guided(net, context, 8)

    def noted(xt, t):
        x0_hat = denoise(xt, t)
        said.append((t.item(), x0_hat.abs().max().item(), (x0_hat.abs() > 1).float().mean().item()))
        return x0_hat
    x = sample(noted, 8)
    for t, most, share in said:
        print(f"t = {t:.2f}: largest |x0_hat| {most:.2f}, beyond [-1,1] {100 * share:.1f} %")
    print(f"the sample: from {x.min():.2f} to {x.max():.2f}, mean {x[0, 0].mean():.3f} of the CT")
    tell("the sample", x)
    show(2, ("guidance 8", x))


def look_3():
    """The same text twice: one noise, guidance 0, 1 and 4."""
    net, context = network(), words("Large left pleural effusion.")
    made = [(f"guidance {scale}", sample(guided(net, context, scale), 6)) for scale in (0, 1, 4)]
    for name, x in made:
        tell(name, x)
        print(f"  mean difference from guidance 1: {(x - made[1][1])[0, 0].abs().mean():.4f} of the CT, in [-1,1]")
    show(3, *made)


def look_4():
    """Two channels swapped: the loss of the weights on a case, channel by channel."""
    low, _ = chest()
    net, t = network(), torch.tensor([0.5])
    with torch.no_grad():
        error = (net(q_sample(low, t, randn(*low.shape)), t) - low).square().mean((0, 2, 3, 4))
    for i, (name, e) in enumerate(zip(ORDER, error)):
        print(f"channel {i}, {name} to the weights, {CHANNELS[i]} to data.py: loss {e:.4f} at t = 0.5")
    print(f"all: {error.mean():.4f}")


def look_5():
    """Guidance that fades: one noise, constant and fading."""
    fading = importlib.import_module("05_fading").fading
    net, context = network(), words("Large left pleural effusion.")
    made = [("8, fading", sample(fading(net, context, 8), 8)), ("guidance 8", sample(guided(net, context, 8), 8)),
            ("guidance 1", sample(guided(net, context, 1), 8))]
    for name, x in made:
        tell(name, x)
    show(5, *made)


def look_6():
    """Anatomy held too late: a phantom's airway, held while others are sampled."""
    low, _ = chest()
    net, mask = network(), low[0, 2] > 0
    x = sample(held(guided(net, None, 1), low, [2]))
    free = sample(guided(net, None, 1))
    print(f"voxels of the airway mask that differ from the given one: {((x[0, 2] > 0) != mask).sum()} of {mask.sum()}")
    for name, v in (("the phantom", low), ("the sample", x), ("one with nothing held", free)):
        hu = decode("ct", v[0, 0])[mask]
        print(f"{name}: CT inside the given airway {hu.mean():.0f} HU, {100 * (hu < -700).mean():.0f} % of it air")
    show(6, ("given", low), ("airway held", x))


def look_7():
    """A box held: the right half of a phantom with a large effusion there, the left half sampled."""
    held_box = importlib.import_module("07_box").held_box
    low, _ = chest(effusion="right", effusion_size="large")
    box = (slice(None), slice(None), slice(0, 16))
    x = sample(held_box(guided(network(), None, 1), low, box))
    print(f"inside the box: largest difference from the phantom {(x - low)[..., :16].abs().max():.4f}")
    for name, v in (("the phantom", low), ("the sample", x)):
        jump = v[0, 0].diff(dim=-1).abs().mean((0, 1))
        print(f"{name}: from slice to slice along W the CT changes by {jump.mean():.3f}, at the border {jump[15]:.3f}")
    show(7, ("phantom", low), ("half of it held", x))


def says(estimate, xt, t):
    return estimate


def look_8():
    """v beside x_0: the same estimates, their loss by either."""
    own, (low, _), net = importlib.import_module("08_velocity"), chest(), network()
    with torch.no_grad():
        for t in (0.05, 0.2, 0.5, 0.8, 0.95):
            t, eps = torch.tensor([t]), randn(*low.shape)
            xt = q_sample(low, t, eps)
            x0_hat, a = net(xt, t), alpha_bar(t)
            v_hat = (a.sqrt() * xt - x0_hat) / (1 - a).sqrt()
            of_x0, of_v = (x0_hat - low).square().mean(), own.v_loss(partial(says, v_hat), low, t, eps)
            print(f"t = {t.item():.2f}: loss of x_0 {of_x0:.4f}, of v {of_v:.4f}, of v by x_0 {of_v / of_x0:.2f}")


def look_9():
    """One time for the whole batch: losses of batches that differ by their draw alone."""
    from train_low import draw
    (x0, _), net = chest(), network()
    values, drawn = [], []
    with torch.no_grad():
        for i in range(10):
            t, _, eps = draw(torch.arange(4 * i, 4 * i + 4), x0.shape[1:], torch.device("cpu"), 0)
            values.append(loss(lambda x, t: net(x, t), x0.expand(4, -1, -1, -1, -1), t, eps))
            drawn.append(t.unique().numel())
    values = torch.stack(values)
    print(f"10 batches of 4: {sum(drawn) / 10:.1f} different times a batch; loss {values.mean():.4f}, from batch to "
          f"batch +- {values.std():.4f}, from {values.min():.4f} to {values.max():.4f}")


def look_10():
    """Stage 2 that sees no stage 1: a phantom's low-resolution volume, 4 steps on the middle 64 x 64 x 64 of 128^3."""
    low, full = chest()
    box = (..., slice(32, 96), slice(32, 96), slice(32, 96))
    low, truth = upsample(low)[box], full[box]
    x = ddim_sample(beside(network("sr"), low), randn(*truth.shape), times(4))
    for name, v in (("low, up-sampled", low), ("the sample", x)):
        error = [(v - truth)[0, i].square().mean().item() for i in range(4)]
        print(f"{name}: mean square from the truth " + ", ".join(f"{c} {e:.3f}" for c, e in zip(ORDER, error)))
    show(10, ("low", low), ("sample", x), ("truth", truth))


def exact(xt, t, mean=0.2, std=0.1):
    """The x_0 predictor of data ~ N(0.2, 0.1^2): what a network would say that had learned them all."""
    a = alpha_bar(t)
    return mean + a.sqrt() * std**2 / (a * std**2 + 1 - a) * (xt - a.sqrt() * mean)


def look_11():
    """The random step: data ~ N(0.2, 0.1^2) by DDIM and by eq. 2 and 3; then one start, three ways on."""
    step = importlib.import_module("11_ancestral").ancestral_step

    def ancestral(denoise, xt, n, seed=1):
        path = times(n).tolist()
        for i, (t, s) in enumerate(zip(path, path[1:])):
            t, s = (torch.full((len(xt),), v) for v in (t, s))
            xt = step(xt, denoise(xt, t), t, s, randn(*xt.shape, seed=1000 * seed + i))
        return denoise(xt, torch.full((len(xt),), path[-1]))
    noise = randn(1, 4, 32, 32, 32)
    for n in (5, 10, 50, 500):
        a, b = ddim_sample(exact, noise, times(n)), ancestral(exact, noise, n)
        print(f"{n} steps: DDIM {a.mean():.3f} +- {a.std():.4f}, eq. 2 and 3 {b.mean():.3f} +- {b.std():.4f}; "
              "data 0.200 +- 0.1000")
    denoise = guided(network(), None, 1)
    with torch.no_grad():
        made = torch.cat([ancestral(denoise, noise, 12, seed) for seed in (1, 2, 3)])
    print(f"one start, three ways on: the CT differs by {made[:, 0].std(0).mean():.3f}; by DDIM by 0")


def look_12():
    """A step of second order: its error and DDIM's, from t = 0.9 to 0.2, for data ~ N(0.2, 0.1^2)."""
    step = importlib.import_module("12_second_order").second_order_step
    xt, (t, s) = randn(1, 4, 8, 8, 8).double(), (torch.tensor([v]).double() for v in (0.9, 0.2))
    spread = [(0.01 * alpha_bar(v) + 1 - alpha_bar(v)).sqrt() for v in (t, s)]
    right = alpha_bar(s).sqrt() * 0.2 + (xt - alpha_bar(t).sqrt() * 0.2) / spread[0] * spread[1]
    for n in (5, 10, 20, 40):
        ways = {}
        for name, steps in (("DDIM", 2 * n), ("second order", n)):       # for 2 n calls each
            x, path = xt, torch.linspace(0.9, 0.2, steps + 1).double().split(1)
            for a, b in zip(path, path[1:]):
                x = step(exact, x, a, b) if name != "DDIM" else ddim_step(x, exact(x, a), a, b)
            ways[name] = (x - right).abs().max().item()
        print(f"{2 * n} calls of the network: " + ", ".join(f"{k} {v:.1e}" for k, v in ways.items()))


def main(argv=None):
    looks = {int(name[5:]): f for name, f in globals().items() if name.startswith("look_")}
    p = Parser(description=__doc__)
    p.add_argument("number", type=int, help="of the exercise, 1 to 12")
    n = p.parse_args(argv).number
    with exits():
        if n not in looks:
            raise ValueError(f"{n}; there are exercises 1 to {len(looks)}; choose one")
        print(looks[n].__doc__)
        try:
            looks[n]()
        except NotImplementedError:
            raise ValueError(f"exercise {n}: not solved yet; look.py shows what the solution does; fill in its file in "
                             "docs/exercises") from None


if __name__ == "__main__":
    main()
