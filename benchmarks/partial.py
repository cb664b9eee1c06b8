"""Cases without an airway mask: do they help, and what is the network best fed in a channel that is missing?

    python benchmarks/partial.py                         # half an hour of one core

Stage 1 without text, at 16^3, on phantoms: with all cases; with half of them without airway, the channel fed as 0 under
the noise of its t or as noise alone; with the half that has airways. Same steps, three seeds.   -> error of the airway
channel and of all four on held-out cases, averaged weights, at t = 0.2, 0.5, 0.8
"""
import json
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from tqdm import tqdm

import phantom
from data import cases
from diffusion import loss, q_sample
from support.cli import Parser, exits
from support.files import write_atomic
from train_low import average, draw
from unet3d import UNet3D

TIMES = (0.2, 0.5, 0.8)
AIRWAY = 2


def train(x0, present, seed, steps, fed, batch=4):
    """-> averaged weights of a network trained on volumes (n,4,16,16,16), of which `present` (n,4) is known"""
    torch.manual_seed(seed)
    net = UNet3D(16, heads=4, levels=3, context_dim=0)
    ema, opt = deepcopy(net).eval().requires_grad_(False), torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    rng = np.random.default_rng(seed)
    for step in tqdm(range(steps), leave=False):
        rows = torch.from_numpy(rng.choice(len(x0), batch, replace=False))
        keys, there = step * batch + torch.arange(batch), present[rows]
        t, _, eps = draw(keys, x0.shape[1:], torch.device("cpu"), seed)
        lacks = ~there[..., None, None, None]

        def denoise(xt, t, lacks=lacks, eps=eps):
            return net(torch.where(lacks, eps, xt) if fed == "noise" else xt, t)

        loss(denoise, x0[rows].masked_fill(lacks, 0), t, eps, there).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in opt.param_groups:
            group["lr"] = 1e-3 * min(1, 2 * (1 - step / steps))
        opt.step()
        opt.zero_grad()
        average(ema, net, 1.0 if step < 50 else 0.02)
    return ema


@torch.no_grad()
def errors(net, x0):
    """-> {t: (airway, all four)} mean squared errors on whole cases"""
    found = {}
    for t in TIMES:
        _, _, eps = draw(torch.arange(len(x0)), x0.shape[1:], torch.device("cpu"), 1)
        times = torch.full((len(x0),), t)
        wrong = (net(q_sample(x0, times, eps), times) - x0).square()
        found[t] = wrong[:, AIRWAY].mean().item(), wrong.mean().item()
    return found


def main(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--n", type=int, default=200, help="phantoms to train on (default 200)")
    p.add_argument("--steps", type=int, default=400, help="default 400")
    p.add_argument("--seeds", type=int, default=3, help="default 3")
    p.add_argument("--out", type=Path, default=Path(__file__).parent, help="where partial.json appears")
    args = p.parse_args(argv)
    with exits(), tempfile.TemporaryDirectory() as folder:
        phantom.main(["--out", f"{folder}/data", "--n", str(args.n + 40), "--grid", "64", "--workers", "1"])
        x0 = torch.stack([torch.from_numpy(np.load(c / "low.npy").astype(np.float32)) for c in cases(f"{folder}/data")])
        x0, held_out = x0[:args.n], x0[args.n:]
        whole, partial = torch.ones(args.n, 4, dtype=torch.bool), torch.ones(args.n, 4, dtype=torch.bool)
        partial[1::2, AIRWAY] = False
        arms = {"all cases": (x0, whole, ""), "half without airway, fed 0 under noise": (x0, partial, ""),
                "half without airway, fed noise": (x0, partial, "noise"),
                "half of the cases": (x0[::2], whole[::2], "")}
        rows = {name: [errors(train(*arm[:2], seed, args.steps, arm[2]), held_out) for seed in range(args.seeds)]
                for name, arm in arms.items()}
        print("| trained on | " + " | ".join(f"t = {t}: airway, all four" for t in TIMES) + " |")
        print("|---" * (1 + len(TIMES)) + "|")
        for name, found in rows.items():
            cells = [" ".join(f"{f[t][0]:.4f}" for f in found) + f"; {np.mean([f[t][1] for f in found]):.4f}"
                     for t in TIMES]
            print(f"| {name} | {' | '.join(cells)} |")
        write_atomic(args.out / "partial.json", (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
