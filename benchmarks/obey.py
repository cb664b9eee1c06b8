"""Do weights obey? The paper's claims, asked of a model trained on phantoms: phantoms and sentences that it never saw, measured by evaluate.py.

    python benchmarks/obey.py --model checkpoints/demo               # an hour and a half on two cores; --parts text for one of the parts

reading       what stage 1 could know: findings of a report read off its text states by a small attention network, in the sentences of training
              and in others; beside it the states of the same BERT with random weights (table 7)
text          reports that ask for an effusion, a large heart, bullae, or say that there is none (tables 2 to 4), in the sentences of training and in
              others; measured on stage 1's volume, whose measures follow the truth of phantoms as the row of phantoms shows
full          the same in other sentences, measured on stage 2's volume
anatomy       airway, vessels, lobes fixed, alone and together (fig. 6): is the structure in the CT, by thresholds, where the mask says?
segmentation  the CT fixed (table 5): Dice of the masks that come out, with and without the report
detail        stage 2 on true low-resolution volumes: overlap with the truth, and FID from as many other phantoms, beside those of plain up-sampling;
              the FID of the phantoms themselves is the floor that so few volumes have
memory        distance from samples to their nearest training phantom, beside that from held-out phantoms
"""
import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import torch
from scipy.stats import ks_2samp, ttest_ind
from tqdm import tqdm

import phantom
import text_encoder
from data import CHANNELS, FOV, MASKS, SCALE, array_of, cases, choose_device, decode, encode, exits, fast_bfloat16, keep_memory, upsample, write_atomic
from diffusion import ddim_sample, times
from evaluate import UNITS, dice, dots, feature_net, frechet, measure_phantom
from sample import agrees, generate, load_stages, place, trained_given
from unet3d import TextPool


class Model:
    """A model folder, ready to sample as sample.py does."""

    def __init__(self, args):
        stages = load_stages(args.model)
        (self.low, about), (self.sr, sr_about) = stages["low"], stages.get("sr", (None, None))
        args.agree = self.sr is not None and agrees(args, sr_about)
        args.clean = {kind: trained_given(about) for kind, (_, about) in stages.items()}
        self.args, self.grid, self.step = args, about["grid"], about["step"]
        for net in filter(None, (self.low, self.sr)):
            place(net, args.device, args)
        self.encoder = text_encoder.load(args.text or Path(args.model) / "text", tokens=self.low.args["tokens"])

    def sample(self, seed, report=None, known=None, fixed=(), full=False):
        """-> {channel: (G,G,G) HU or labels}"""
        known = None if known is None else known.to(self.args.device)
        context = self.encoder.encode([report])[0].to(self.args.device) if report else None
        x = generate(self.low, self.sr if full else None, seed, self.grid, self.args, context, known, fixed)
        return {c: decode(c, v) for c, v in zip(CHANNELS, x.numpy())}


def stack(case):
    """A phantom as the clean channels (1,4,G,G,G)."""
    return torch.from_numpy(np.stack([encode(c, case[c]) for c in CHANNELS]))[None]


def every_fourth(case):
    return {c: case[c][::SCALE, ::SCALE, ::SCALE] for c in CHANNELS}


# --- reading (table 7) ---

FINDINGS = ("left effusion", "right effusion", "large", "cardiomegaly", "bullae", "consolidation")


def reports_and_findings(n, seed, wording):
    """-> n reports, which FINDINGS each has (n,findings) float"""
    texts, found = [], []
    for rng in (np.random.default_rng([seed, i]) for i in range(n)):
        f = phantom.draw_conditions(rng)
        truth = {**f, "ctr": rng.uniform(*phantom.CTR[f["cardiomegaly"]]), "nodule_mm": rng.uniform(8, 24, f["nodules"]).tolist(), "nodule_lobe": "RUL"}
        texts.append(phantom.write_report(rng, truth, wording))
        found.append([f["effusion"] in ("left", "both"), f["effusion"] in ("right", "both"), f["effusion_size"] == "large", f["cardiomegaly"], f["bullae"], f["consolidation"] is not None])
    return texts, torch.tensor(found).float()


def reading(model, n):
    """Accuracy over n reports of a TextPool, which reads as stage 1 does, trained on 3,000 others."""
    sets = [reports_and_findings(*which) for which in ((3000, model.args.seed, "train"), (n, model.args.seed + 1, "train"), (n, model.args.seed + 1, "held-out"))]
    table = {"commonest answer": {f"{w}, {name}": max(m, 1 - m) for w, (_, y) in zip(("training", "held-out"), sets[1:]) for name, m in zip(FINDINGS, y.mean(0).tolist())}}
    for who in ("this text model", "random weights"):
        torch.manual_seed(0)
        if who == "random weights":
            bert = model.encoder.bert
            model.encoder.bert = type(bert)(bert.config, add_pooling_layer=False).to(model.encoder.device).eval()      # as before its training
        states = [torch.cat([model.encoder.encode(texts[i:i + 100])[0].cpu() for i in range(0, len(texts), 100)]) for texts, _ in sets]
        reader = TextPool(states[0].shape[-1], len(FINDINGS))
        opt = torch.optim.AdamW(reader.parameters(), 2e-3)
        for _ in tqdm(range(700), desc=who, leave=False):
            pick = torch.randint(len(states[0]), (64,))
            torch.nn.functional.binary_cross_entropy_with_logits(reader(states[0][pick]), sets[0][1][pick]).backward()
            opt.step(), opt.zero_grad()
        with torch.no_grad():
            right = [((reader(h) > 0) == (y > 0)).float().mean(0).tolist() for h, (_, y) in zip(states[1:], sets[1:])]
        table[who] = {f"{w}, {name}": v for w, r in zip(("training", "held-out"), right) for name, v in zip(FINDINGS, r)}
    print_columns("reading", table)
    return table


# --- text (tables 2 to 4) ---

def conditions(n):
    """3 n requests: a third each for no effusion, a large left, a large right one; half of each with a large heart, half (crossed) with bullae."""
    return [dict(effusion=side, effusion_size=None if side == "none" else "large", cardiomegaly=bool(i % 2), bullae=bool(i // 2 % 2), consolidation=None, nodules=0)
            for side in ("none", "left", "right") for i in range(n)]


def compare(rows):
    """rows: [(request, measures)].   -> the paper's comparisons as {name: number}"""
    pick = lambda name, **want: np.array([m[name] for r, m in rows if all(r[k] == v for k, v in want.items())])
    none, left, right = (pick("effusion", effusion=s) for s in ("none", "left", "right"))
    large = np.concatenate([left, right])
    sides = np.concatenate([pick("left", effusion="left") > pick("right", effusion="left"), pick("right", effusion="right") > pick("left", effusion="right")])
    small_heart, large_heart = (pick("ctr", cardiomegaly=b) for b in (False, True))
    clean, bullous = (pick("laa", bullae=b) for b in (False, True))
    ratios = {f"{name} ratio": b.mean() / a.mean() for name, a, b in (("effusion", none, large), ("laa", clean, bullous)) if a.mean() != 0}     # phantoms without an effusion have none at all
    return {"effusion none, mL": none.mean(), "effusion none, sd": none.std(ddof=1), "effusion large, mL": large.mean(), "effusion large, sd": large.std(ddof=1),
            "effusion highest none, mL": none.max(), "effusion lowest large, mL": large.min(), "side right": sides.mean(),
            "ctr normal": small_heart.mean(), "ctr cardiomegaly": large_heart.mean(), "ctr p": ttest_ind(large_heart, small_heart, equal_var=False, alternative="greater").pvalue,
            "laa none, %": clean.mean(), "laa bullae, %": bullous.mean(), "laa p": ttest_ind(bullous, clean, equal_var=False, alternative="greater").pvalue, **ratios}


ASKED = {"effusion": lambda r: r["effusion_size"] or "none", "laa": lambda r: "bullae" if r["bullae"] else "none", "ctr": lambda r: "cardiomegaly" if r["cardiomegaly"] else "normal"}


def text(model, n, who=("phantoms", "training sentences", "held-out sentences"), full=False):
    """n requests of each kind, measured on stage 1's volume, or on stage 2's, of which 128^3 voxels are enough.
    -> {who: {name: number}}, single values for evaluate.dots"""
    table, values, edge = {}, [], min(128, SCALE * model.grid)
    asked = conditions(n)
    for name in who:
        rows = []
        for i, request in enumerate(tqdm(asked, desc=name, leave=False)):
            case = phantom.make(model.args.seed + i, edge, "train" if "training" in name else "held-out", **request)
            x = model.sample(model.args.seed + i, case["report"], full=full) if name != "phantoms" else case
            ct, lobe = (x[c][(slice(None, None, len(x[c]) // (edge if full else model.grid)),) * 3] for c in ("ct", "lobe"))
            rows.append((request, measure_phantom(ct, lobe)))
        table[name] = compare(rows)
        values += [dict(folder=f"{ask(r)}, {name}", measure=m, value=got[m], unit=UNITS[m]) for m, ask in ASKED.items() for r, got in rows]
        print_columns("full" if full else "text", table)
    return table, values


# --- anatomy (fig. 6), segmentation (table 5), detail ---

def seen_in(ct, lobe):
    """Structures of a phantom's CT by thresholds: what a mask is compared with.   -> {mask: bool (G,G,G)}"""
    airway = phantom.segment(ct, lobe, [f / len(ct) for f in FOV])["airway"]
    return {"airway": airway, "vessel": (ct > -300) & (lobe > 0) & ~airway, "lobe": (ct < -500) & (lobe > 0)}


def anatomy(model, n):
    table = {"phantoms": {}}
    for i in tqdm(range(n), desc="anatomy", leave=False):
        case = phantom.make(model.args.seed + 1000 + i, SCALE * model.grid, "held-out", consolidation=None, effusion="none")
        true = seen_in(case["ct"], case["lobe"])
        for c in MASKS:
            table["phantoms"].setdefault(c, []).append(dice(true[c], case[c] > 0))
        for fixed in (("airway",), ("vessel",), ("lobe",), MASKS):
            x = model.sample(i, case["report"], stack(case), [CHANNELS.index(c) for c in fixed], full=True)
            found = seen_in(x["ct"], x["lobe"])
            for c in fixed:
                table.setdefault("fixed: " + ", ".join(fixed), {}).setdefault(c, []).append(dice(found[c], case[c] > 0))
    # What is not fixed still varies: 4 seeds with one airway and no text; standard deviation of the CT over seeds.
    airway = torch.from_numpy(case["airway"][::SCALE, ::SCALE, ::SCALE] > 0)
    cts = np.stack([model.sample(seed, None, stack(case), [CHANNELS.index("airway")])["ct"] for seed in range(4)]).astype(np.float32)
    sd = cts.std(0, ddof=1)
    table = {who: {f"dice {c}": float(np.mean(v)) for c, v in row.items()} for who, row in table.items()}
    table["sd over seeds, HU"] = {"in the airway": float(sd[airway].mean()), "elsewhere": float(sd[~airway].mean())}
    print_columns("anatomy", table)
    return table


def segmentation(model, n):
    rows = {"without report": {}, "with report": {}}
    for i in tqdm(range(n), desc="segmentation", leave=False):
        case = phantom.make(model.args.seed + 2000 + i, SCALE * model.grid, "held-out")
        for who, report in zip(rows, (None, case["report"])):
            x = model.sample(i, report, stack(case), [0], full=True)
            lobes = np.mean([dice(x["lobe"] == k, case["lobe"] == k) for k in range(1, 6)])
            for name, v in (("airway", dice(x["airway"] > 0, case["airway"] > 0)), ("lung", dice(x["lobe"] > 0, case["lobe"] > 0)), ("lobe", lobes),
                            ("vessel", dice(x["vessel"] > 0, case["vessel"] > 0))):
                rows[who].setdefault(f"dice {name}", []).append(v)
    table = {who: {k: float(np.mean(v)) for k, v in row.items()} for who, row in rows.items()}
    print_columns("segmentation", table)
    return table


def sharpness(ct):
    """Mean length of the CT's gradient, HU a voxel."""
    return float(np.sqrt(sum(np.square(g) for g in np.gradient(ct.astype(np.float32)))).mean())


@torch.no_grad()
def detail(model, n):
    rows, seen, net = {"up-sampled": {}, "stage 2": {}}, {}, feature_net(None)[0]
    features = lambda who, x0: seen.setdefault(who, []).append(net(x0[:, :1])[0].numpy())         # of the CT, by a random network
    for i in tqdm(range(n), desc="detail", leave=False):
        case = phantom.make(model.args.seed + 3000 + i, SCALE * model.grid, "held-out")
        x0 = stack(case)
        features("phantoms", x0)
        features("others", stack(phantom.make(model.args.seed + 6000 + i, SCALE * model.grid, "held-out")))
        low = upsample(x0[..., ::SCALE, ::SCALE, ::SCALE])
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(i))
        with torch.autocast(torch.device(model.args.device).type, torch.bfloat16, enabled=model.args.amp):
            made = ddim_sample(model.sr, noise.to(model.args.device), times(model.args.sr_steps, model.order), low=low.to(model.args.device), agreeing=model.args.agree, order=model.order)
        smooth = torch.nn.functional.interpolate(x0[..., ::SCALE, ::SCALE, ::SCALE], scale_factor=SCALE, mode="trilinear")
        for who, x in zip(rows, (smooth, made.float().cpu())):
            features(who, x)
            got = {c: decode(c, v) for c, v in zip(CHANNELS, x[0].numpy())}
            row = rows[who]
            for c in ("airway", "vessel"):
                row.setdefault(f"dice {c}", []).append(dice(got[c] > 0, case[c] > 0))
            row.setdefault("CT error, HU", []).append(float(np.abs(got["ct"].astype(np.float32) - case["ct"].clip(-1024, 600)).mean()))
            row.setdefault("sharpness of the CT / true", []).append(sharpness(got["ct"]) / sharpness(case["ct"].clip(-1024, 600)))
    table = {who: {k: float(np.mean(v)) for k, v in row.items()} for who, row in {**rows, "phantoms": {}}.items()}
    for who, row in table.items():
        row["FID, random features"] = frechet(np.stack(seen[who]), np.stack(seen["others"]))
    print_columns("detail", table)
    return table


# --- nothing memorised ---

def nearest(x, training):
    """Root mean square distance over the CT channel to the nearest of `training`.   x: (n,V)   training: (m,V)   -> (n,)"""
    return np.sqrt(((x**2).sum(1)[:, None] + (training**2).sum(1) - 2 * x @ training.T).clip(0).min(1) / x.shape[1])


def training_cts(folder, grid):
    """The CTs of the training's low-resolution volumes.   -> (m,grid^3)"""
    found = [array_of(c, "low")[0] for c in cases(folder) if "_text" not in c.name]
    if not found or any(ct.shape != (grid,) * 3 for ct in found):
        raise ValueError(f"--data {folder}: {len(found)} chests{f', {found[0].shape}' if found else ''}; the training's are needed, whose low-resolution volumes are {grid}^3; "
                         "name their folder or leave `memory` out of --parts")
    return np.stack([ct.ravel().astype(np.float32) for ct in found])


def memory(model, n, training):
    held, made = [], []
    for i in tqdm(range(n), desc="memory", leave=False):
        case = phantom.make(model.args.seed + 4000 + i, SCALE * model.grid, "train")
        held.append(encode("ct", every_fourth(case)["ct"]).ravel())
        made.append(encode("ct", model.sample(i, case["report"])["ct"]).ravel())
    held, made = nearest(np.stack(held), training), nearest(np.stack(made), training)
    table = {"held-out phantoms": {"nearest, mean": held.mean(), "lowest": held.min()}, "samples": {"nearest, mean": made.mean(), "lowest": made.min()},
             "same distribution": {"Kolmogorov-Smirnov p": ks_2samp(held, made).pvalue}}
    print_columns("memory", table)
    return {who: {k: float(v) for k, v in row.items()} for who, row in table.items()}


# --- the table ---

def print_columns(title, table):
    names = list(dict.fromkeys(k for row in table.values() for k in row))
    wide = max(22, 2 + max(map(len, table)))
    print(f"\n{title:28}" + "".join(f"{who:>{wide}}" for who in table))
    for name in names:
        print(f"{name:28}" + "".join(f"{row[name]:{wide}.4g}" if name in row else " " * wide for row in table.values()), flush=True)


def main(argv=None):
    parts = ("text", "full", "anatomy", "segmentation", "detail", "memory", "reading")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--model", default=str(ROOT / "checkpoints/demo"))
    p.add_argument("--text", help="another text encoder (default MODEL/text)")
    p.add_argument("--parts", nargs="+", choices=parts, default=parts)
    p.add_argument("--n", type=int, default=32, help="samples a prompt; distances")
    p.add_argument("--n-full", type=int, default=8, help="phantoms, or samples a prompt, in the parts that need stage 2")
    p.add_argument("--data", default="data/train", help="the phantoms of the training, for `memory`")
    p.add_argument("--guidance", type=float, default=4.0)
    p.add_argument("--guidance-interval", nargs=2, type=float, default=(0.8, 1.0), metavar=("FROM", "TO"), help="times t at which it is applied")
    p.add_argument("--solver", choices=("ddim", "dpm"), default="dpm")
    p.add_argument("--low-steps", type=int, default=20)
    p.add_argument("--sr-steps", type=int, default=8)
    p.add_argument("--agree", action=argparse.BooleanOptionalAction, help="as in sample.py")
    p.add_argument("--seed", type=int, default=90_000, help="of the first held-out phantom, far from those of the training; choose options on one, report another")
    p.add_argument("--device", help="cuda or cpu; default whichever is there")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="where obey.json, obey.png and obey_full.png appear")
    args = p.parse_args(argv)
    with exits():
        if min(args.n, args.n_full, args.low_steps, args.sr_steps) < 3:
            raise ValueError(f"--n {args.n}, --n-full {args.n_full}, --low-steps {args.low_steps}, --sr-steps {args.sr_steps}; at least 3 each, so that every finding is asked for; raise them")
        if args.seed < 0 or not (0 <= args.guidance < float("inf") and args.guidance_interval[0] <= args.guidance_interval[1]):
            raise ValueError(f"--seed {args.seed}, --guidance {args.guidance}, --guidance-interval {args.guidance_interval}; a seed and a finite guidance are not negative, FROM <= TO; change them")
        keep_memory()
        args.out.mkdir(parents=True, exist_ok=True)
        args.device = choose_device(args.device)
        args.amp, args.slab, args.one_stage, args.compile, args.tidy = fast_bfloat16(args.device), 0, False, args.device.startswith("cuda"), True
        model = Model(args)
        model.order = 2 if args.solver == "dpm" else 1
        if model.sr is None and {"full", "anatomy", "segmentation", "detail"} & set(args.parts):
            raise ValueError(f"--model {args.model}: no stage-2 weights; these are measured too; train them with train_sr.py or pass --parts text memory reading")
        training = training_cts(args.data, model.grid) if "memory" in args.parts else None      # complains now, not after hours
        store = args.out / "obey.json"
        found = json.loads(store.read_text()) if store.exists() else {}   # parts may be run one by one
        for part in (p for p in parts if p in args.parts):
            if part == "text":
                table, values = text(model, args.n)
                dots(args.out / "obey.png", values)
            elif part == "full":
                table, values = text(model, args.n_full, ("phantoms", "held-out sentences"), full=True)
                dots(args.out / "obey_full.png", values)
            elif part == "reading":                                       # last: it spoils the model's text encoder
                table = reading(model, 300)
            elif part == "memory":
                table = memory(model, args.n, training)
            else:
                table = {"anatomy": anatomy, "segmentation": segmentation, "detail": detail}[part](model, args.n_full)
            found[part] = dict(table=table, step=model.step, arguments={k: v for k, v in vars(args).items() if k != "out"})
            write_atomic(store, (json.dumps(found, indent=1, default=float) + "\n").encode())
        print(f"wrote {', '.join(args.parts)} to {store}")


if __name__ == "__main__":
    main()
