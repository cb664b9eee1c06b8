"""Pictures: planes of volumes with masks outlined, distributions, single values. matplotlib is imported where one is
drawn."""
import numpy as np

from support.files import write_atomic

OUTLINES = ((1, "gold"), (3, "red"), (2, "cyan"))                        # channel and its color: lobes, vessels, airway


def pyplot():
    """matplotlib's, for files and without a screen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save(fig, path, **options):
    write_atomic(path, lambda f: fig.savefig(f, format="png", dpi=100, **options))
    pyplot().close(fig)


def picture(path, volumes, titles, caption="", fov=(1, 1, 1)):
    """Rows of axial, coronal and sagittal planes through the middle of the airway (without one, of the volume), in the
    whole HU window, masks outlined: lobes yellow, airway cyan, vessels red.

    volumes: list of (4,D,H,W) in [-1,1]   titles: one a row   fov: mm of a volume along D, H, W.
    Radiological view: the patient's right is on the left.
    """
    size = (9, 3 * len(volumes) + 0.3 * bool(caption))
    fig, axes = pyplot().subplots(len(volumes), 3, figsize=size, squeeze=False, facecolor="black")
    for row, x, title in zip(axes, volumes, titles):
        x = np.asarray(x, np.float32)
        D, H, W = x.shape[1:]
        air = np.argwhere(x[2] > 0)
        d, h = np.median(air[:, :2], axis=0).astype(int) if len(air) else (D // 2, H // 2)
        w = W // 2
        aspects = [(fov[1] / H) / (fov[2] / W), (fov[0] / D) / (fov[2] / W), (fov[0] / D) / (fov[1] / H)]
        planes = [x[:, d, ::-1], x[:, ::-1, h], x[:, ::-1, :, w][..., ::-1]]   # anterior up; superior up; anterior left
        for ax, plane, aspect, name in zip(row, planes, aspects, ("axial", "coronal", "sagittal")):
            ax.imshow(plane[0], cmap="gray", vmin=-1, vmax=1, aspect=aspect)
            for m, color in OUTLINES:
                levels = [-0.8, -0.4, 0, 0.4, 0.8] if m == 1 else [0]
                if plane[m].max() > levels[0] > plane[m].min():
                    ax.contour(plane[m], levels, colors=color, linewidths=0.6)
            ax.set_axis_off()
            words = f"{title}, {name}" if ax is row[0] else name
            ax.set_title(words, color="white", fontsize=8, parse_math=False)   # a file's name may hold a $
    fig.text(0.01, 0.005, caption, color="white", fontsize=7, parse_math=False)
    fig.tight_layout()
    save(fig, path, facecolor="black")


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
