"""Quality against steps: both stages of a model trained on phantoms, by DDIM and by DPM-Solver++(2M), as tables and
steps.png.

    python benchmarks/steps.py --model checkpoints/demo          # both stages: half an hour on one core
    python benchmarks/steps.py --model checkpoints/demo-256      # two hours; it goes on where it was stopped

stage 1       requests in sentences never seen (`obey.py --parts text`), at the model's own guidance; and how far the
              sample is from the one that 100 steps of DDIM make of the same noise: root mean square over the four
              channels, means over 4 requests
stage 2       true low-resolution volumes of held-out phantoms (`obey.py --parts detail`), by DPM-Solver++ alone, whose
              times are the squares of even ones there

Students (beyond/distill.py) are measured in their own steps.
"""
import json
import sys
from argparse import Namespace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
from tqdm import tqdm

import detail
import obey
import phantom
from data import CHANNELS, decode
from evaluate import measure_phantom
from sample import generate
from support.cli import Parser, choose_device, exits, keep_memory
from support.files import write_atomic
from support.pictures import pyplot, save

ROOT = Path(__file__).parent.parent
SOLVERS = {"stage 1": ("ddim", "dpm"), "stage 2": ("dpm",)}
STEPS = {"stage 1": (2, 4, 6, 8, 12, 24), "stage 2": (1, 2, 3, 4, 8, 20)}
LIMIT, COMPARED = 100, 4                 # steps of the limit, requests that are compared with it


def way(model, solver, **steps):
    """The model's settings with a solver and numbers of steps."""
    s = model.s | dict(solver=solver, **steps)
    return s | dict(beyond=[*{*s["beyond"], "solver"}])


def obeyed(model, requests, s, limits):
    """Samples of stage 1 by settings `s`, measured.   requests: [(conditions, report)]   limits: [(4,g,g,g)], samples
    of the first requests at the limit   -> {measure: number}"""
    rows, away = [], []
    for i, (request, report) in enumerate(requests):
        x = generate(model.low, None, model.grid, [model.seed + i], s, model.encoder.encode([report])[0])[0]
        away += [distance(x, limits[i])] if i < len(limits) else []
        rows.append((request, measure_phantom(*(decode(c, x[CHANNELS.index(c)].numpy()) for c in ("ct", "lobe")))))
    return obey.compare(rows) | ({"from the limit": float(np.mean(away))} if away else {})


def distance(x, limit):
    """Root mean square over all channels."""
    return (x - limit).square().mean().sqrt().item()


def measure(model, stage, n, found, keep, part):
    """Fills `found`, {"SOLVER STEPS": measures}, with what it lacks, and calls `keep` after each.   part: file for
    `detail.detail`"""
    kind = dict(zip(STEPS, ("low", "sr")))[stage]
    student = kind in model.s["students"]                # it makes its own steps alone
    ways = {f"{solver} {k}": (solver, k) for k in STEPS[stage] for solver in SOLVERS[stage]}
    ways = {f"ddim {model.s[f'{kind}_steps']}": ("ddim", model.s[f"{kind}_steps"])} if student else ways
    ways = {name: v for name, v in ways.items() if name not in found}
    if stage == "stage 2" and ways:
        settings = {name: way(model, solver, sr_steps=k) for name, (solver, k) in ways.items()}
        found |= detail.detail(model, n, settings, part)
        keep()
        part.unlink(missing_ok=True)
    elif ways:
        requests = [(r, phantom.make(seed, 64, "held-out", **r)["report"])
                    for seed, r in enumerate(obey.conditions(-(-n // 3)), model.seed)]
        limit = way(model, "ddim", low_steps=LIMIT)
        compared = requests[:0 if student else COMPARED]
        limits = [generate(model.low, None, model.grid, [model.seed + i], limit, model.encoder.encode([report])[0])[0]
                  for i, (_, report) in enumerate(tqdm(compared, desc="limit", leave=False))]
        for name, (solver, k) in tqdm(ways.items(), desc=stage, leave=False):
            found[name] = obeyed(model, requests, way(model, solver, low_steps=k), limits)
            keep()


DRAWN = {"stage 1": ("effusion none, mL", "effusion large, mL"), "stage 2": ("dice airway", "dice vessel")}


def draw(path, found):
    fig, axes = pyplot().subplots(max(1, len(found)), 2, figsize=(9, 3.2 * max(1, len(found))), squeeze=False)
    for row, (model, stages) in zip(axes, found.items()):
        for ax, (stage, names) in zip(row, DRAWN.items()):
            rows = stages.get(stage, {}).get("table", {})
            if not rows:
                ax.set_axis_off()
                continue
            for solver, style in zip(SOLVERS[stage][::-1], ("o-", "x:")):
                for name, color in zip(names, ("C0", "C1")):
                    ns = [n for n in STEPS[stage] if f"{solver} {n}" in rows]
                    values = [rows[f"{solver} {n}"][name] for n in ns]
                    ax.plot(ns, values, style, color=color, label=f"{name}, {solver}")
            ax.set(xscale="log", title=f"{model}, {stage}", xlabel="steps")
            ax.minorticks_off()
            ax.set_xticks(STEPS[stage], STEPS[stage])
            ax.legend(fontsize=6)
    fig.tight_layout()
    save(fig, path)


def main(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--model", default=str(ROOT / "checkpoints/demo"))
    p.add_argument("--stages", nargs="+", choices=STEPS, default=list(STEPS))
    p.add_argument("--n", type=int, default=33, help="requests of stage 1")
    p.add_argument("--n-full", type=int, default=12, help="chests of stage 2")
    p.add_argument("--guidance", type=float, help="default the model's own, as its sampling.json says")
    p.add_argument("--guidance-interval", dest="interval", type=float, nargs=2, metavar=("FROM", "TO"))
    p.add_argument("--seed", type=int, default=90_000, help="of the first held-out phantom")
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="where steps.json and steps.png appear")
    args = p.parse_args(argv)
    with exits():
        if min(args.n, args.n_full) < 3:
            raise ValueError(f"--n {args.n}, --n-full {args.n_full}; at least 3 each are needed; raise them")
        keep_memory()
        args.out.mkdir(parents=True, exist_ok=True)
        store, name = args.out / "steps.json", Path(args.model).name
        found = json.loads(store.read_text()) if store.exists() else {}
        model = obey.Model(Namespace(**vars(args), device=choose_device(None), text=None, plain=False, amp=None,
                                     compile=None, slab=0))
        for stage in args.stages:
            n = args.n if stage == "stage 1" else args.n_full
            arguments = dict(n=n, seed=args.seed, guidance=model.s["guidance"], interval=model.s.get("interval"),
                             weights=model.sha256["low" if stage == "stage 1" else "sr"])
            mine = found.setdefault(name, {}).get(stage, {})
            if mine.get("arguments") != arguments:
                mine = found[name][stage] = dict(arguments=arguments, date=date.today().isoformat(), table={})
            measure(model, stage, n, mine["table"],
                    lambda: write_atomic(store, (json.dumps(found, indent=1, default=float) + "\n").encode()),
                    args.out / f"steps-{name}.part")
            obey.print_columns(f"{name}, {stage}", mine["table"])
        teachers = {name: stages for name, stages in found.items() if max(len(v["table"]) for v in stages.values()) > 1}
        draw(args.out / "steps.png", teachers)
        print(f"wrote {store} and steps.png")


if __name__ == "__main__":
    main()
