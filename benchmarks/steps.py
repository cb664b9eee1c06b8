"""Quality against network evaluations: DDIM and DPM-Solver++(2M), both stages of a model trained on phantoms, as a
table and steps.png.

    python benchmarks/steps.py --model checkpoints/demo

A sample is a function of its noise; more steps approach one limit. For each solver (at the times of sample.py: evenly
spaced, but for dpm in stage 2 at their squares) and number of steps: how far the sample is from that limit (DDIM in 250
steps from the same noise; root mean square over the four channels, and 1 - Dice of lobes and airway), means over
reports of held-out phantoms. Stage 2 starts from the true low-resolution volume of one phantom, on its lower half, and
is compared with 100 steps.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from tqdm import tqdm

import phantom
import text_encoder
from beyond.solvers import dpm_sample
from data import CHANNELS, SCALE, decode, encode, upsample
from diffusion import beside, ddim_sample, guided, times
from evaluate import dice
from support.cli import Parser, exits, fast_bfloat16, keep_memory
from support.files import write_atomic
from support.pictures import pyplot, save
from support.weights import load_stages
from unet3d import UNet3D

ROOT = Path(__file__).parent.parent
SOLVERS = {"ddim": ddim_sample, "dpm": dpm_sample}


def distance(x, limit):
    """-> RMS over all channels, 1 - Dice of the lungs (any lobe), 1 - Dice of the airway"""
    masks = [[decode(name, v[0, CHANNELS.index(name)].numpy()) > 0 for v in (x, limit)] for name in ("lobe", "airway")]
    return [(x - limit).square().mean().sqrt().item(), *(1 - dice(*pair) for pair in masks)]


def curve(run, counts, limit_steps, seeds):
    """run(seed, steps, solver) -> sample.   -> {solver: [[steps, RMS, lungs, airway], ...]}"""
    found = {solver: {n: [] for n in counts} for solver in SOLVERS}
    for seed in tqdm(seeds, leave=False):
        limit = run(seed, limit_steps, "ddim")
        for solver, by_count in found.items():
            for n, rows in by_count.items():
                rows.append(distance(run(seed, n, solver), limit))
    return {solver: [[n, *np.mean(rows, 0).tolist()] for n, rows in f.items()] for solver, f in found.items()}


def noise(seed, *shape):
    return torch.randn(1, len(CHANNELS), *shape, generator=torch.Generator().manual_seed(seed))


def measure(args):
    """-> {stage: curve}, steps of training"""
    stages = load_stages(args.model, UNet3D)
    if "sr" not in stages:
        raise ValueError(f"{args.model}: no stage-2 weights; both stages are measured; name a whole model")
    (low, about), (sr, _) = stages["low"], stages["sr"]
    low.eval()
    sr.eval()
    grid, encoder = about["grid"], text_encoder.load(Path(args.model) / "text", tokens=low.args["tokens"])
    cases = {seed: phantom.make(seed, SCALE * grid, "held-out") for seed in range(90_000, 90_000 + args.n)}
    texts = dict(zip(cases, encoder.encode([case["report"] for case in cases.values()])[0].split(1)))

    def stage_1(seed, steps, solver):
        denoise = guided(low, texts[seed], args.guidance)
        return SOLVERS[solver](denoise, noise(seed, grid, grid, grid), times(steps))

    def stage_2(seed, steps, solver):
        half = np.stack([encode(c, cases[seed][c][:SCALE * grid // 2]) for c in CHANNELS])
        seen = upsample(torch.from_numpy(half[:, ::SCALE, ::SCALE, ::SCALE].copy())[None])
        at = times(steps) ** 2 if solver == "dpm" else times(steps)
        return SOLVERS[solver](beside(sr, seen), noise(seed, *seen.shape[2:]), at)

    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16("cpu")):
        return {"stage 1": curve(stage_1, (5, 8, 10, 15, 20, 30, 50), 250, cases),
                "stage 2": curve(stage_2, (3, 5, 7, 10, 20), 100, list(cases)[:1])}, about["step"]


def draw(path, result):
    fig, axes = pyplot().subplots(1, len(result), figsize=(9, 3.4))
    for ax, (stage, solvers) in zip(axes, result.items()):
        for solver, rows in solvers.items():
            n, rms, _, airway = zip(*rows)
            line, = ax.plot(n, rms, "o-", label=f"{solver}, RMS")
            ax.plot(n, airway, "x:", color=line.get_color(), label=f"{solver}, 1 - Dice of the airway")
        ax.set(xscale="log", yscale="log", title=stage, xlabel="network evaluations (doubled by guidance)",
               ylabel="distance from the limit")
        ax.minorticks_off()
        ax.set_xticks(n, n)
        ax.legend(fontsize=7)
    fig.tight_layout()
    save(fig, path)


def main(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--model", default=str(ROOT / "checkpoints/demo"))
    p.add_argument("--n", type=int, default=4, help="reports, each with its own noise")
    p.add_argument("--guidance", type=float, default=2.0)
    p.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="where steps.json and steps.png appear")
    args = p.parse_args(argv)
    with exits():
        if args.n < 1:
            raise ValueError(f"--n {args.n}; at least 1 report is needed; change it")
        keep_memory()
        args.out.mkdir(parents=True, exist_ok=True)
        result, step = measure(args)
        for stage, solvers in result.items():
            print(f"{stage}: distance from the limit\n{'solver':8}{'steps':>6}{'RMS':>9}{'lungs':>9}{'airway':>9}")
            for solver, rows in solvers.items():
                for row in rows:
                    print(f"{solver:8}{row[0]:6d}" + "".join(f"{v:9.4f}" for v in row[1:]))
        arguments = dict(model=Path(args.model).name, n=args.n, guidance=args.guidance)
        found = dict(arguments=arguments, low_step=step, result=result)
        write_atomic(args.out / "steps.json", (json.dumps(found, indent=1) + "\n").encode())
        draw(args.out / "steps.png", result)
        print(f"wrote {args.out / 'steps.json'} and steps.png: {args.n} reports, model {args.model}")


if __name__ == "__main__":
    main()
