"""Do weights obey? The paper's claims, asked of a model trained on phantoms: phantoms and sentences that it never saw,
measured by evaluate.py.

    python benchmarks/obey.py --model checkpoints/demo    # an hour and a half on two cores; --parts text for one part
    sh benchmarks/tables.sh                               # of both shipped models, as docs/measuring.md has them

What was measured with these weights, on this seed and in these steps, stands, and is not measured again.


reading       what stage 1 could know: findings of a report read off its text states by a small attention network, in
              the sentences of training and in others; beside it the states of the same BERT with random weights (table
              7)
text          reports that ask for an effusion, a large heart, bullae, or say that there is none (tables 2 to 4), in the
              sentences of training and in others; measured on stage 1's volume, whose measures follow the truth of
              phantoms as the row of phantoms shows
full          the same in other sentences, measured on stage 2's volume
anatomy       airway, vessels, lobes fixed, alone and together (sec. 4.4): is the structure in the CT, by thresholds,
              where the mask says?
segmentation  the CT fixed (table 5): Dice of the masks that come out, with and without the report
detail        is stage 2 sharp, given true low-resolution volumes (detail.py)
copy          can the networks copy what they see at little noise, and are stage 1's samples sharp (copying.py)
memory        distance from samples to their nearest training phantom, beside that from held-out phantoms
"""
import argparse
import json
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import ks_2samp, ttest_ind
from tqdm import tqdm

import phantom
import text_encoder
from beyond.nets import TextPool
from copying import copy, stack
from data import CHANNELS, FOV, MASKS, SCALE, cases, decode, encode
from detail import detail
from evaluate import UNITS, dice, measure_phantom
from sample import generate, settings
from support.checks import array_of
from support.cli import Parser, choose_device, exits, keep_memory
from support.files import write_atomic
from support.pictures import dots
from support.sampling import OF_STAGE_2, SAMPLING, check_sampling, ready
from support.weights import load_stages
from unet3d import Block, UNet3D

ROOT = Path(__file__).parent.parent
PARTS = ("copy", "text", "full", "anatomy", "segmentation", "detail", "memory", "reading")   # reading harms the encoder
OF_STAGE_1 = ("text", "memory", "reading")                               # these stand when stage 2 changes


class Model:
    """A model folder, ready to sample as sample.py does."""

    def __init__(self, args):
        stages = load_stages(args.model, UNet3D)
        (self.low, about), (self.sr, _) = stages["low"], stages.get("sr", (None, None))
        self.s, self.device, self.seed = settings(args, stages), args.device, args.seed
        self.grid, self.step = about["grid"], about["step"]
        self.sha256 = {kind: about.get("sha256") for kind, (_, about) in stages.items()}
        if tuple(about["channels"]) != CHANNELS:
            raise ValueError(f"--model {args.model}: makes {', '.join(about['channels'])}; all four are measured; name "
                             "other weights")
        for net, _ in stages.values():
            ready(net, self.s, Block)
        self.encoder = text_encoder.load(args.text or Path(args.model) / "text", tokens=self.low.args["tokens"])

    def sample(self, seed, report=None, known=None, fixed=(), full=False):
        """-> {channel: (G,G,G) HU or labels}"""
        known = None if known is None else known.to(self.device)
        context = self.encoder.encode([report])[0].to(self.device) if report else None
        x = generate(self.low, self.sr if full else None, self.grid, [seed], self.s, context, known, fixed)[0]
        return {c: decode(c, v) for c, v in zip(CHANNELS, x.numpy())}

    def phantom(self, i, wording="held-out", **conditions):
        return phantom.make(self.seed + i, SCALE * self.grid, wording, **conditions)


def means(table):
    return {who: {k: float(np.mean(v)) for k, v in row.items()} for who, row in table.items()}


# --- reading (table 7) ---

FINDINGS = ("left effusion", "right effusion", "large", "cardiomegaly", "bullae", "consolidation")


def reports_and_findings(n, seed, wording):
    """-> n reports, which FINDINGS each has (n,findings) float"""
    texts, found = [], []
    for rng in (np.random.default_rng([seed, i]) for i in range(n)):
        f = phantom.draw_conditions(rng)
        ctr, nodules = rng.uniform(*phantom.CTR[f["cardiomegaly"]]), rng.uniform(8, 24, f["nodules"]).tolist()
        truth = {**f, "ctr": ctr, "nodule_mm": nodules, "nodule_lobe": "RUL"}
        texts.append(phantom.write_report(rng, truth, wording))
        found.append([f["effusion"] in ("left", "both"), f["effusion"] in ("right", "both"),
                      f["effusion_size"] == "large", f["cardiomegaly"], f["bullae"], f["consolidation"] is not None])
    return texts, torch.tensor(found).float()


def reading(model, n):
    """Accuracy over n reports of a TextPool, which reads as stage 1 does, trained on 3,000 others."""
    learned = reports_and_findings(3000, model.seed, "train")
    asked = {w: reports_and_findings(n, model.seed + 1, w) for w in ("train", "held-out")}

    def row(found):
        """{wording: numbers by finding} -> a column of the table"""
        names = {"train": "training", "held-out": "held-out"}
        return {f"{names[w]}, {name}": v for w, values in found.items() for name, v in zip(FINDINGS, values.tolist())}

    shares = {w: y.mean(0).double() for w, (_, y) in asked.items()}
    table = {"commonest answer": row({w: torch.maximum(share, 1 - share) for w, share in shares.items()})}
    for who in ("this text model", "random weights"):
        torch.manual_seed(0)
        if who == "random weights":                      # as before its training
            bert, encoder = model.encoder.bert, model.encoder
            encoder.bert = type(bert)(bert.config, add_pooling_layer=False).to(encoder.device).eval()

        def states(texts):
            return torch.cat([model.encoder.encode(texts[i:i + 100])[0].cpu() for i in range(0, len(texts), 100)])

        h, y = states(learned[0]), learned[1]
        unread = {w: (states(texts), truth) for w, (texts, truth) in asked.items()}
        reader = TextPool(h.shape[-1], len(FINDINGS))
        opt = torch.optim.AdamW(reader.parameters(), 2e-3)
        for _ in tqdm(range(700), desc=who, leave=False):
            pick = torch.randint(len(h), (64,))
            F.binary_cross_entropy_with_logits(reader(h[pick]), y[pick]).backward()
            opt.step()
            opt.zero_grad()
        with torch.no_grad():
            table[who] = row({w: ((reader(h) > 0) == (y > 0)).float().mean(0) for w, (h, y) in unread.items()})
    print_columns("reading", table)
    return table


# --- text (tables 2 to 4) ---

def conditions(n):
    """3 n requests: a third each for no effusion, a large left, a large right one; half of each with a large heart,
    half (crossed) with bullae."""
    return [dict(effusion=side, effusion_size=None if side == "none" else "large", cardiomegaly=bool(i % 2),
                 bullae=bool(i // 2 % 2), consolidation=None, nodules=0)
            for side in ("none", "left", "right") for i in range(n)]


def compare(rows):
    """rows: [(request, measures)].   -> the paper's comparisons as {name: number}"""
    def pick(name, **want):
        return np.array([m[name] for r, m in rows if all(r[k] == v for k, v in want.items())])

    def above(a, b):                                     # one-tailed
        return ttest_ind(a, b, equal_var=False, alternative="greater").pvalue

    none, left, right = (pick("effusion", effusion=s) for s in ("none", "left", "right"))
    large = np.concatenate([left, right])
    sides = np.concatenate([pick(s, effusion=s) > pick(other, effusion=s)
                            for s, other in (("left", "right"), ("right", "left"))])
    small_heart, large_heart = (pick("ctr", cardiomegaly=b) for b in (False, True))
    clean, bullous = (pick("laa", bullae=b) for b in (False, True))
    found = {"effusion none, mL": none.mean(), "effusion none, sd": none.std(ddof=1),
             "effusion large, mL": large.mean(), "effusion large, sd": large.std(ddof=1),
             "effusion highest none, mL": none.max(), "effusion lowest large, mL": large.min(),
             "side right": sides.mean(),
             "ctr normal": small_heart.mean(), "ctr cardiomegaly": large_heart.mean(),
             "ctr p": above(large_heart, small_heart),
             "laa none, %": clean.mean(), "laa bullae, %": bullous.mean(), "laa p": above(bullous, clean)}
    for name, a, b in (("effusion", none, large), ("laa", clean, bullous)):
        if a.mean() != 0:                                # phantoms without an effusion have none at all
            found[f"{name} ratio"] = b.mean() / a.mean()
    return found


ASKED = {"effusion": lambda r: r["effusion_size"] or "none", "laa": lambda r: "bullae" if r["bullae"] else "none",
         "ctr": lambda r: "cardiomegaly" if r["cardiomegaly"] else "normal"}


def text(model, n, who=("phantoms", "training sentences", "held-out sentences"), full=False):
    """n requests of each kind, measured on stage 1's volume, or on stage 2's, of which 128^3 voxels are enough.
    -> {who: {name: number}}, single values for pictures.dots"""
    table, values, edge = {}, [], min(128, SCALE * model.grid)
    for name in who:
        rows = []
        for seed, request in enumerate(tqdm(conditions(n), desc=name, leave=False), model.seed):
            case = phantom.make(seed, edge, "train" if "training" in name else "held-out", **request)
            x = model.sample(seed, case["report"], full=full) if name != "phantoms" else case
            every = len(x["ct"]) // (edge if full else model.grid)
            rows.append((request, measure_phantom(*(x[c][::every, ::every, ::every] for c in ("ct", "lobe")))))
        table[name] = compare(rows)
        values += [dict(folder=f"{ask(r)}, {name}", measure=m, value=got[m], unit=UNITS[m])
                   for m, ask in ASKED.items() for r, got in rows]
        print_columns("full" if full else "text", table)
    return table, values


# --- anatomy (sec. 4.4), segmentation (table 5), detail ---

def seen_in(ct, lobe):
    """Structures of a phantom's CT by thresholds: what a mask is compared with.   -> {mask: bool (G,G,G)}"""
    airway = phantom.segment(ct, lobe, [f / len(ct) for f in FOV])["airway"]
    return {"airway": airway, "vessel": (ct > -300) & (lobe > 0) & ~airway, "lobe": (ct < -500) & (lobe > 0)}


def anatomy(model, n):
    table = {}

    def add(who, names, x, case):
        found = seen_in(x["ct"], x["lobe"])
        for c in names:
            table.setdefault(who, {}).setdefault(f"dice {c}", []).append(dice(found[c], case[c] > 0))

    for i in tqdm(range(n), desc="anatomy", leave=False):
        case = model.phantom(1000 + i, consolidation=None, effusion="none")
        add("phantoms", MASKS, case, case)
        for fixed in (("airway",), ("vessel",), ("lobe",), MASKS):
            x = model.sample(i, case["report"], stack(case), [CHANNELS.index(c) for c in fixed], full=True)
            add(f"fixed: {', '.join(fixed)}", fixed, x, case)
    table = means(table)

    # What is not fixed still varies: 4 seeds with one airway and no text; standard deviation of the CT over seeds.
    airway = torch.from_numpy(case["airway"][::SCALE, ::SCALE, ::SCALE] > 0)
    cts = [model.sample(seed, None, stack(case), [CHANNELS.index("airway")])["ct"] for seed in range(4)]
    sd = np.stack(cts).astype(np.float32).std(0, ddof=1)
    table["sd over seeds, HU"] = {"in the airway": float(sd[airway].mean()), "elsewhere": float(sd[~airway].mean())}
    print_columns("anatomy", table)
    return table


def segmentation(model, n):
    rows = {"without report": {}, "with report": {}}
    for i in tqdm(range(n), desc="segmentation", leave=False):
        case = model.phantom(2000 + i)
        for who, report in zip(rows, (None, case["report"])):
            x = model.sample(i, report, stack(case), [CHANNELS.index("ct")], full=True)
            found = {name: dice(x[c] > 0, case[c] > 0)
                     for name, c in (("airway", "airway"), ("lung", "lobe"), ("vessel", "vessel"))}
            found["lobe"] = np.mean([dice(x["lobe"] == k, case["lobe"] == k) for k in range(1, 6)])
            for name in ("airway", "lung", "lobe", "vessel"):
                rows[who].setdefault(f"dice {name}", []).append(found[name])
    table = means(rows)
    print_columns("segmentation", table)
    return table


# --- nothing memorised ---

def nearest(x, training):
    """Root mean square distance over the CT channel to the nearest of `training`.   x: (n,V)   training: (m,V)
    -> (n,)"""
    squares = (x**2).sum(1)[:, None] + (training**2).sum(1) - 2 * x @ training.T
    return np.sqrt(squares.clip(0).min(1) / x.shape[1])


def training_cts(folder, grid):
    """The CTs of the training's low-resolution volumes.   -> (m,grid^3)"""
    found = [array_of(c, "low")[0] for c in cases(folder) if "_text" not in c.name]
    if not found or any(ct.shape != (grid,) * 3 for ct in found):
        shape = f", {found[0].shape}" if found else ""
        raise ValueError(f"--data {folder}: {len(found)} chests{shape}; the training's are needed, whose "
                         f"low-resolution volumes are {grid}^3; name their folder or leave `memory` out of --parts")
    return np.stack([ct.ravel().astype(np.float32) for ct in found])


def memory(model, n, training):
    found = {"held-out phantoms": [], "samples": []}
    for i in tqdm(range(n), desc="memory", leave=False):
        case = model.phantom(4000 + i, "train")
        for cts, ct in zip(found.values(), (case["ct"][::SCALE, ::SCALE, ::SCALE],
                                            model.sample(i, case["report"])["ct"])):
            cts.append(encode("ct", ct).ravel())
    found = {who: nearest(np.stack(cts), training) for who, cts in found.items()}
    table = {who: {"nearest, mean": float(d.mean()), "lowest": float(d.min())} for who, d in found.items()}
    table["same distribution"] = {"Kolmogorov-Smirnov p": float(ks_2samp(*found.values()).pvalue)}
    print_columns("memory", table)
    return table


# --- the table ---

def print_columns(title, table):
    names = list(dict.fromkeys(k for row in table.values() for k in row))
    wide = max(22, 2 + max(map(len, table)))
    print(f"\n{title:28}" + "".join(f"{who:>{wide}}" for who in table))
    for name in names:
        numbers = (f"{row[name]:{wide}.4g}" if name in row else " " * wide for row in table.values())
        print(f"{name:28}" + "".join(numbers), flush=True)


def run(args):
    args.out.mkdir(parents=True, exist_ok=True)
    args.device = choose_device(args.device)
    model = Model(args)
    if model.sr is None and {"full", "anatomy", "segmentation", "detail"} & set(args.parts):
        raise ValueError(f"--model {args.model}: no stage-2 weights; these are measured too; "
                         "train them with train_sr.py or pass --parts text memory reading")
    training = training_cts(args.data, model.grid) if "memory" in args.parts else None   # errors now, not after hours
    store = args.out / "obey.json"
    found = json.loads(store.read_text()) if store.exists() else {}      # parts may be run one by one
    for part in (p for p in PARTS if p in args.parts):
        weights, sampling = dict(model.sha256), {k: model.s.get(k) for k in SAMPLING}
        if part in OF_STAGE_1:
            weights.pop("sr", None)
            sampling = {k: v for k, v in sampling.items() if k not in OF_STAGE_2}
        asked = dict(weights=weights, sampling=sampling, seed=args.seed, n=args.n, n_full=args.n_full)
        if found.get(part, {}).get("asked") == json.loads(json.dumps(asked)):
            print(f"{part}: was measured so already; it stands in {store}")
            continue
        if part == "text":
            table, values = text(model, args.n)
            dots(args.out / "obey.png", values)
        elif part == "full":
            table, values = text(model, args.n_full, ("phantoms", "held-out sentences"), full=True)
            dots(args.out / "obey_full.png", values)
        elif part == "copy":
            table = copy(model, args.n, args.n_full)
            for title, columns in table.items():
                print_columns(f"copy, {title}", columns)
        elif part == "reading":
            table = reading(model, 300)
        elif part == "memory":
            table = memory(model, args.n, training)
        elif part == "detail":
            table = detail(model, args.n_full)
            print_columns("detail", table)
        else:
            table = {"anatomy": anatomy, "segmentation": segmentation}[part](model, args.n_full)
        arguments = {k: v for k, v in vars(args).items() if k != "out"}
        found[part] = dict(table=table, step=model.step, asked=asked, arguments=arguments, sampling=model.s,
                           date=date.today().isoformat())
        write_atomic(store, (json.dumps(found, indent=1, default=float) + "\n").encode())
    print(f"wrote {', '.join(args.parts)} to {store}")


def main(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--model", default=str(ROOT / "checkpoints/demo"))
    p.add_argument("--text", help="another text encoder (default MODEL/text)")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    p.add_argument("--n", type=int, default=32, help="samples a prompt; distances")
    p.add_argument("--n-full", type=int, default=8,
                   help="phantoms, or samples a prompt, in the parts that need stage 2")
    p.add_argument("--data", default="data/train", help="the phantoms of the training, for `memory`")
    p.add_argument("--guidance", type=float, help="this and what follows: default the model's own, as its "
                                                  "sampling.json says")
    p.add_argument("--guidance-interval", dest="interval", nargs=2, type=float, metavar=("FROM", "TO"),
                   help="times t at which it is applied")
    p.add_argument("--solver", choices=("ddim", "dpm"))
    p.add_argument("--low-steps", type=int)
    p.add_argument("--sr-steps", type=int)
    p.add_argument("--agree", action=argparse.BooleanOptionalAction, help="as in sample.py")
    p.add_argument("--seed", type=int, default=90_000,
                   help="of the first held-out phantom, far from those of the training; "
                        "choose options on one, report another")
    p.add_argument("--device", help="cuda or cpu; default whichever is there")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks",
                   help="where obey.json, obey.png and obey_full.png appear")
    p.set_defaults(plain=False, amp=None, compile=None, slab=0)          # as sample.py's
    args = p.parse_args(argv)
    with exits():
        if min(args.n, args.n_full) < 3:
            raise ValueError(f"--n {args.n}, --n-full {args.n_full}; at least 3 each, so that every finding is asked "
                             "for; raise them")
        if args.seed < 0:
            raise ValueError(f"--seed {args.seed}; a seed is not negative; change it")
        check_sampling(vars(args))
        keep_memory()
        run(args)


if __name__ == "__main__":
    main()
