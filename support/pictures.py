"""Pictures: planes of volumes with masks outlined, distributions, single values. matplotlib is imported where one is
drawn."""
import numpy as np

from support.checks import FULL
from support.files import write_atomic

OUTLINES = dict(lobe="gold", vessel="red", airway="cyan")


def pyplot():
    """matplotlib's, for files and without a screen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save(fig, path, **options):
    write_atomic(path, lambda f: fig.savefig(f, format="png", dpi=100, **options))
    pyplot().close(fig)


def picture(path, volumes, titles, caption="", fov=(1, 1, 1), channels=FULL):
    """Rows of planes, one a volume.   volumes: list of (C,D,H,W) in [-1,1]   titles: one a row   others: `planes`"""
    size = (9, 3 * len(volumes) + 0.3 * bool(caption))
    fig, axes = pyplot().subplots(len(volumes), 3, figsize=size, squeeze=False, facecolor="black")
    for row, x, title in zip(axes, volumes, titles):
        planes(row, x, title, fov, channels)
    fig.text(0.01, 0.005, caption, color="white", fontsize=7, parse_math=False)
    fig.tight_layout()
    save(fig, path, facecolor="black")


def planes(axes, x, title, fov=(1, 1, 1), channels=FULL):
    """Axial, coronal and sagittal plane through the middle of the airway (without one, of the volume), as many as there
    are axes, in the whole HU window, masks outlined: lobes yellow, airway cyan, vessels red.

    x: (C,D,H,W) in [-1,1]   fov: mm of the volume along D, H, W   channels: what the C are. Radiological view: the
    patient's right is on the left.
    """
    x = np.asarray(x, np.float32)
    D, H, W = x.shape[1:]
    air = np.argwhere(x[channels.index("airway")] > 0) if "airway" in channels else ()
    d, h = np.median(air[:, :2], axis=0).astype(int) if len(air) else (D // 2, H // 2)
    w = W // 2
    aspects = [(fov[1] / H) / (fov[2] / W), (fov[0] / D) / (fov[2] / W), (fov[0] / D) / (fov[1] / H)]
    cuts = [x[:, d, ::-1], x[:, ::-1, h], x[:, ::-1, :, w][..., ::-1]]     # anterior up; superior up; anterior left
    for ax, plane, aspect, name in zip(axes, cuts, aspects, ("axial", "coronal", "sagittal")):
        seen = dict(zip(channels, plane))
        ax.imshow(plane[0], cmap="gray", vmin=-1, vmax=1, aspect=aspect)
        for mask, color in OUTLINES.items():
            levels = [-0.8, -0.4, 0, 0.4, 0.8] if mask == "lobe" else [0]
            if mask in seen and seen[mask].max() > levels[0] > seen[mask].min():
                ax.contour(seen[mask], levels, colors=color, linewidths=0.6)
        ax.set_axis_off()
        words = f"{title}, {name}" if ax is axes[0] else name
        ax.set_title(words, color="white", fontsize=8, parse_math=False)   # a file's name may hold a $


def histogram(path, groups, label):
    """Distributions side by side.   groups: name -> values"""
    fig, ax = pyplot().subplots(figsize=(6, 3.5))
    edges = np.histogram_bin_edges(np.concatenate([np.ravel(v) for v in groups.values()]), 20)
    for name, values in groups.items():
        words = f"{name} (n={len(values)})".replace("$", r"\$")
        ax.hist(values, edges, alpha=0.5, density=True, label=words)
    ax.set_xlabel(label)
    ax.set_ylabel("density")
    ax.legend()
    save(fig, path, bbox_inches="tight")


def dots(path, rows):
    """Every value of a table as a dot: a panel for each unit, in it a column for each measure and folder.
    rows: dicts with unit, measure, folder, value"""
    panels = {}
    for r in rows:
        panels.setdefault(r["unit"], {}).setdefault((r["measure"], r["folder"]), []).append(r["value"])
    widths = [max(3, 0.8 * len(groups)) for groups in panels.values()]
    fig, axes = pyplot().subplots(1, len(panels), figsize=(sum(widths), 4), width_ratios=widths, squeeze=False,
                                  layout="constrained")
    for ax, (unit, groups) in zip(axes[0], panels.items()):
        for i, values in enumerate(groups.values()):
            ax.plot([i] * len(values), values, "o", alpha=0.5)
            ax.plot([i - 0.2, i + 0.2], [np.mean(values)] * 2, "k-")
        ax.set_ylabel(unit)
        names = [f"{measure}\n{folder[-36:]}" for measure, folder in groups]
        ax.set_xticks(range(len(groups)), names, rotation=60, ha="right", fontsize=7, parse_math=False)
    save(fig, path)


def sheet(path, volumes, names, fov, columns=5):
    """A page of cases: three planes of each through the middle of the lobes, masks outlined.
    volumes: list of (4,D,H,W) in [-1,1], 0 where a channel is missing   fov: mm along D, H, W"""
    tiles = [np.concatenate(tile(np.asarray(x, np.float32), fov), 1) for x in volumes]
    rows = -(-len(tiles) // columns)
    height, width = tiles[0].shape[:2]
    fig, axes = pyplot().subplots(rows, columns, figsize=(columns * width / 90, rows * (height / 90 + 0.25)),
                                  squeeze=False, facecolor="black", layout="constrained")
    for i, ax in enumerate(axes.flat):
        ax.set_axis_off()
        if i < len(tiles):
            ax.imshow(tiles[i])
            ax.set_title(names[i][-40:], color="white", fontsize=7, parse_math=False)
    save(fig, path, facecolor="black")


def tile(x, fov):
    """Axial, coronal and sagittal plane of a volume, each 128 pixels high, RGB."""
    lungs = np.argwhere(x[1] > -0.9) if x[1].min() < -0.9 else np.argwhere(x[0] > -1)
    d, h, w = np.median(lungs, 0).astype(int) if len(lungs) else np.array(x.shape[1:]) // 2
    planes = []
    for plane, tall, wide in ((x[:, d, ::-1], fov[1], fov[2]), (x[:, ::-1, h], fov[0], fov[2]),
                              (x[:, ::-1, :, w][..., ::-1], fov[0], fov[1])):
        ys, xs = (np.arange(size) * n // size for size, n in zip((128, round(128 * wide / tall)), plane.shape[1:]))
        plane = plane[:, ys][:, :, xs]
        rgb = np.repeat((plane[0, ..., None] + 1) / 2, 3, -1)
        for m, color in ((1, (1, 0.8, 0)), (3, (1, 0, 0)), (2, (0, 1, 1))):
            on = np.rint(plane[m] * 5)
            edge = (on != np.roll(on, 1, 0)) | (on != np.roll(on, 1, 1))
            rgb[edge] = color
        planes.append(rgb.clip(0, 1))
    return planes


def bars(ax, values, **options):
    """A histogram, of values that may be all the same too."""
    if len(values):
        middle, half = (max(values) + min(values)) / 2, max(np.ptp(values) / 2, 0.1)
        ax.hist(values, np.linspace(middle - half, middle + half, 31), **options)


def cohort(path, cases):
    """Distributions over a cohort: HU, what masks fill, the scans' slices, where the centres lie.
    cases: list of (CT (D,H,W) in [-1,1], what case.json says)"""
    fig, axes = pyplot().subplots(2, 2, figsize=(10, 7), layout="constrained")
    edges = np.linspace(-1, 1, 82)
    shares = np.array([np.histogram(ct, edges)[0] / ct.size for ct, _ in cases])
    hu = (edges[1:] + edges[:-1]) / 2 * 812 - 212
    for level, style in ((5, ":"), (50, "-"), (95, ":")):
        axes[0, 0].plot(hu, np.percentile(shares, level, 0), "k" + style, label=f"{level} % of the cases")
    axes[0, 0].set(xlabel="HU", ylabel="share of voxels", yscale="log")
    axes[0, 0].legend()
    for name in ("lobe", "airway", "vessel"):
        filled = [100 * meta["voxels"][name] / meta["grid"] ** 3 for _, meta in cases if name in meta.get("voxels", {})]
        if filled:
            bars(axes[0, 1], np.log10(np.maximum(filled, 1e-3)), alpha=0.6, label=f"{name} (n={len(filled)})")
            axes[0, 1].legend()
    axes[0, 1].set(xlabel="mask, log10 of % of the field of view", ylabel="cases")
    affines = [np.array(meta["scan_affine"]) for _, meta in cases if "scan_affine" in meta]
    bars(axes[1, 0], [np.abs(a[:3, :3])[2].max() for a in affines])
    axes[1, 0].set(xlabel="distance of slices, mm", ylabel="cases")
    bars(axes[1, 1], [np.median(ct[ct < -0.5]) * 812 - 212 for ct, _ in cases])
    axes[1, 1].set(xlabel="median of air and lung, HU", ylabel="cases")
    save(fig, path)
