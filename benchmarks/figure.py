"""The README's first picture: a held-out phantom, what the weights make of its report and airway mask, as the first
command does, and of four other sentences, all from one seed.

    python benchmarks/figure.py                                                                  # some minutes
    python benchmarks/figure.py --model checkpoints/demo --out examples/figure-128.png
"""
import sys
from argparse import Namespace
from pathlib import Path
from textwrap import fill

sys.path.insert(0, str(Path(__file__).parent.parent))
from tqdm import tqdm

import obey
import phantom
from copying import stack
from data import CHANNELS, FOV, SCALE
from evaluate import measure_phantom
from support.cli import Parser, choose_device, exits, keep_memory
from support.pictures import planes, pyplot, save

ROOT = Path(__file__).parent.parent
FOUND = dict(effusion="left", effusion_size="moderate", cardiomegaly=False, bullae=False, consolidation=None, nodules=0)
SENTENCES = ("No pleural effusion. The heart is normal in size. No bullae.", "Large right pleural effusion.",
             "The heart is enlarged. Cardiomegaly.", "There are bullous changes in both upper lobes.")


def coded(volume):
    """{channel: HU or labels} -> (4,G,G,G) in [-1,1]"""
    return stack(volume)[0].numpy()


def draw(path, above, sentences):
    """above: {title: (4,G,G,G)}, a row of three planes each   sentences: {sentence: (4,G,G,G)}, a column of two"""
    fig = pyplot().figure(figsize=(9, 3 * len(above) + 4.2), facecolor="black", layout="constrained")
    top, below = fig.subfigures(2, 1, height_ratios=(3 * len(above), 4.2), facecolor="black")
    for row, (title, x) in zip(top.subplots(len(above), 3), above.items()):
        planes(row, x, title, FOV)
    for column, (sentence, x) in zip(below.subplots(2, len(sentences)).T, sentences.items()):
        planes(column, x, "", FOV)
        column[0].set_title(fill(sentence, 30), color="white", fontsize=8)
        column[1].set_title("")
    save(fig, path, facecolor="black")


def main(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--model", default=str(ROOT / "checkpoints/demo-256"))
    p.add_argument("--out", type=Path, default=ROOT / "examples/figure.png")
    args = p.parse_args(argv)
    with exits():
        keep_memory()
        model = obey.Model(Namespace(**vars(args), seed=0, device=choose_device(None), text=None, plain=False, amp=None,
                                     compile=None, slab=0, guidance=None, interval=None))
        case = phantom.make(77, SCALE * model.grid, **FOUND)
        report = (ROOT / "examples/report.txt").read_text()
        made = model.sample(0, report, stack(case), [CHANNELS.index("airway")], full=True)
        others = {s: coded(model.sample(0, s, full=True)) for s in tqdm(SENTENCES, leave=False)}
        draw(args.out, {"held-out phantom": coded(case), "sample": coded(made)}, others)
        fluid, asked = (measure_phantom(x["ct"], x["lobe"])["effusion"] for x in (made, case))
        print(f"wrote {args.out}; effusion {fluid:.0f} mL, {asked:.0f} of the phantom")


if __name__ == "__main__":
    main()
