"""The small classifier of table 6: does it gain by synthetic samples?"""
import csv
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from support.checks import load_channel


class SmallCNN(nn.Sequential):
    """Four strided convolutions and a mean.   (B,1,32,32,32) -> (B,classes)"""

    def __init__(self, classes):
        layers, widths = [], (1, 16, 32, 64, 64)
        for cin, cout in zip(widths, widths[1:]):
            layers += [nn.Conv3d(cin, cout, 3, 2, 1), nn.GroupNorm(8, cout), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, classes))


def labelled(path, encode):
    """CSV of `file,label` (files relative to it) -> (n,1,32,32,32) in [-1,1], (n,) labels as strings
    encode: `data.encode`"""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:            # spreadsheets put a mark first
            rows = list(csv.DictReader(f))
    except (csv.Error, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: no CSV in UTF-8 ({e}); a line names a CT and its class; save it again") from None
    if not rows or not all(r.get("file") and r.get("label") for r in rows):
        raise ValueError(f"{path}: no columns file,label, or a line without one; a line names a CT and its class; "
                         "mend it")
    volumes = []
    for r in tqdm(rows, desc=str(path), leave=False):
        ct, _ = load_channel("ct", Path(path).parent / r["file"])
        ct = torch.from_numpy(encode("ct", ct))[None, None]
        volumes.append(F.interpolate(ct, (32, 32, 32), mode="trilinear"))
    return torch.cat(volumes), [r["label"] for r in rows]


def classify(x, y, x_test, y_test, classes, seed, epochs=30):
    """Trains a SmallCNN.   -> of the test part: accuracy, F1 of every class"""
    torch.manual_seed(seed)
    net = SmallCNN(classes)
    steps = epochs * -(-len(x) // 16)
    opt = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=steps)
    for _ in range(steps):
        pick = torch.randint(len(x), (16,))
        batch = x[pick] + 0.05 * torch.randn(16, 1, 1, 1, 1)
        batch = torch.roll(batch, tuple(torch.randint(-2, 3, (3,)).tolist()), (2, 3, 4))
        F.cross_entropy(net(batch), y[pick]).backward()
        opt.step()
        opt.zero_grad()
        schedule.step()

    with torch.no_grad():
        guess = net.eval()(x_test).argmax(1)
    f1 = []
    for c in range(classes):
        hits, named, there = (guess == c) & (y_test == c), guess == c, y_test == c
        f1.append(2 * hits.sum() / (named.sum() + there.sum()).clamp(min=1))
    return (guess == y_test).float().mean().item(), torch.stack(f1).tolist()
