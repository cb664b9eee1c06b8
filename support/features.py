"""The network of FID and MMD, MedicalNet's 3D ResNet-50 (Med3D), and the features of a folder of CTs, by it or another
network, kept beside them."""
import hashlib
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from support.files import write_atomic
from support.segment import case_folders, file_of


class Bottleneck(nn.Module):
    """1x1x1 -> 3x3x3 -> 1x1x1 with batch norms, plus the input through a 1x1x1 (shortcut B) where shapes change."""

    def __init__(self, cin, width, stride, dilation):
        super().__init__()
        cout = 4 * width
        self.conv1 = nn.Conv3d(cin, width, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, cout, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(cout)
        self.downsample = nn.Identity()
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv3d(cin, cout, 1, stride, bias=False), nn.BatchNorm3d(cout))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.downsample(x))


class ResNet50(nn.Module):
    """Layers 3 and 4 keep the resolution, with dilations 2 and 4.   (B,1,D,H,W) -> (B,2048)"""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv3d(1, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.layer1 = stage(64, 64, blocks=3)
        self.layer2 = stage(256, 128, blocks=4, stride=2)
        self.layer3 = stage(512, 256, blocks=6, dilation=2)
        self.layer4 = stage(1024, 512, blocks=3, dilation=4)

    def forward(self, x):
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3, 4))


def stage(cin, width, blocks, stride=1, dilation=1):
    """Bottlenecks in a row; the first one strides."""
    first = Bottleneck(cin, width, stride, dilation)
    return nn.Sequential(first, *[Bottleneck(4 * width, width, 1, dilation) for _ in range(blocks - 1)])


def feature_net(weights):
    """-> network, its name. Without weights, a seeded random network: good for tests and demos, no figure to compare
    with the paper's."""
    torch.manual_seed(0)
    net = ResNet50().eval()
    if weights is None:
        return net, "random"

    state = read_state(weights, "MedicalNet's resnet_50.pth")
    fill(net, state, weights, "MedicalNet's ResNet-50")
    return net, hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:12]


def read_state(path, what):
    """A file of weights, read as plain tensors.   what: is asked for if it is none   -> state dict"""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                                 # whatever a broken or hostile pickle raises
        raise ValueError(f"{path}: not readable as plain tensors ({type(e).__name__}); "
                         f"{what} is needed; download it again") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {str(k).removeprefix("module."): v for k, v in state.items()} if isinstance(state, dict) else {}


def fill(net, state, path, what):
    """A state dict into its network. ValueError unless every weight fits."""
    state, own = without_unused(state), without_unused(net.state_dict())
    wrong = [k for k in own.keys() | state.keys()
             if k not in own or not torch.is_tensor(state.get(k)) or state[k].shape != own[k].shape]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} weights missing, unknown or of another shape, such as {min(wrong)}; "
                         f"{what} is needed; name that file")
    net.load_state_dict(state, strict=False)


def without_unused(state):
    """A state dict but the head of another task and what only training needs."""
    return {k: v for k, v in state.items() if not k.startswith("conv_seg") and not k.endswith("num_batches_tracked")}


@torch.no_grad()
def features(folder, net, name, edge, device, read_ct):
    """The CTs of a folder -> (n,2048), or (n,3,F) of slices, kept in features_<name>_<edge>.npz beside them, by path,
    size and time of change.   read_ct: case folder -> (1,1,D,H,W) in [-1,1]

    Protocol of HA-GAN's evaluation: [-1,1] of the HU window, edge^3 (256), no z-normalisation.
    """
    store = Path(folder) / f"features_{name}_{edge}.npz"
    try:
        known = dict(np.load(store)) if store.exists() else {}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(f"{store}: not readable ({e}); it only saves time; remove it") from None

    out, new = [], 0
    for case in tqdm(case_folders(folder), desc=f"features of {folder}", leave=False):
        path, key = file_of(case, "ct"), None
        if path:
            key = f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}"
        if key not in known:
            ct = read_ct(case)                             # where there is none, this says so
            if ct.shape[2:] != (edge,) * 3:
                ct = F.interpolate(ct, (edge,) * 3, mode="trilinear")
            known[key] = net(ct.to(device))[0].cpu().numpy()
            new += 1
        out.append(known[key])

    if new:
        try:
            write_atomic(store, lambda f: np.savez(f, **known))
        except OSError as e:
            print(f"warning: {store}: cannot be written ({e.strerror}); next time the features are computed anew",
                  file=sys.stderr)
    return np.stack(out)
