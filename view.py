"""Volumes become one HTML file, which any browser opens from disk: three planes with a crosshair, HU windows, masks on
and off, several folders with linked cursors. It is drawn by NiiVue, of support/niivue; nothing is fetched.

    python view.py out/report                          # out/report/view.html
    python view.py out/report real/case_0003           # side by side, in the first
"""
import base64
import gzip
import html
import json
import re
from pathlib import Path

import numpy as np

from support.checks import FULL
from support.cli import Parser, exits
from support.files import write_atomic
from support.nifti import load_nifti

PARTS = Path(__file__).parent / "support/niivue"
NIIVUE = PARTS / "niivue-0.69.0.umd.js.gz"
WINDOW = (-1024, 600)             # HU that are kept, the paper's (sec. 5.1), rounded to even: a fifth less to keep
EDGE = 384                        # voxels along an axis; of longer ones every second, third ... is shown


def write(path, folders, titles=None, channels=FULL):
    """Folders with ct.nii.gz or masks -> one HTML file, which appears whole. Of their names it holds the titles alone.

    titles: one a folder (default the folders' names)   channels: which volumes are shown
    """
    titles = titles or [Path(folder).resolve().name for folder in folders]
    cases = [read(Path(folder), channels) for folder in folders]
    center(cases)
    packed = [dict(title=title, volumes={name: pack(name, *volume) for name, volume in case.items()})
              for title, case in zip(titles, cases)]
    parts = dict(titles=html.escape(", ".join(titles)), licence=(PARTS / "LICENSE").read_text(),
                 niivue=gzip.decompress(NIIVUE.read_bytes()).decode(),
                 folders=json.dumps(packed).replace("<", "\\u003c"))     # a title ends no script
    page = re.sub(r"\{(titles|licence|niivue|folders)\}", lambda m: parts[m[1]],
                  (PARTS / "view.html").read_text(encoding="utf-8"))
    write_atomic(path, page.encode())


def read(folder, channels=FULL):
    """A folder's volumes.   -> {channel: (array (X,Y,Z) int16 HU or uint8 labels, affine)}, the ground first: the CT,
    or without one an empty volume called "nothing" """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no folder; one with ct.nii.gz or masks is needed; check the path")
    volumes = {}
    for name in (c for c in FULL if c in channels and (folder / f"{c}.nii.gz").is_file()):
        array, affine = load_nifti(folder / f"{name}.nii.gz")
        step = -(-max(array.shape) // EDGE)
        array = array[::step, ::step, ::step]
        if name == "ct":
            array = 2 * np.rint(array.clip(*WINDOW) / 2).astype(np.int16)
        else:
            array = np.rint(array.clip(0, 255)).astype(np.uint8)
        volumes[name] = array, affine @ np.diag([step, step, step, 1])
    if not volumes:
        raise ValueError(f"{folder}: no {', '.join(f'{c}.nii.gz' for c in channels)} in it; a folder that sample.py or "
                         "data.py export wrote is needed; check the path")
    if "ct" in volumes:
        return volumes
    array, affine = next(iter(volumes.values()))
    return dict(nothing=(np.full(array.shape, WINDOW[0], np.int16), affine.copy())) | volumes


def center(cases):
    """Cursors are linked by place. Volumes on grids of one size are laid on each other, wherever in the world they were
    taken, and what is shown does not tell where.   cases: list of what `read` gives, changed in place"""
    grids = [next(iter(case.values())) for case in cases]
    if not all(a.shape == grids[0][0].shape and np.allclose(m[:3, :3], grids[0][1][:3, :3], atol=1e-3)
               for a, m in grids):
        return
    for case, (array, affine) in zip(cases, grids):
        middle = affine[:3] @ [*(np.array(array.shape) - 1) / 2, 1]
        for _, own in case.values():
            own[:3, 3] -= middle


def pack(name, array, affine):
    """A volume as NIfTI, compressed, in base64."""
    import nibabel
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    if name not in ("ct", "nothing"):
        image.header.set_intent("label")                 # NiiVue outlines these
    return base64.b64encode(gzip.compress(image.to_bytes(), 1, mtime=0)).decode()


def main(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="has ct.nii.gz, lobe, airway, vessel, or some of them")
    p.add_argument("--out", metavar="FILE", help="the HTML file (default FOLDER/view.html, of the first)")
    args = p.parse_args(argv)
    with exits():
        out = Path(args.out or Path(args.folders[0]) / "view.html")
        if out.suffix != ".html":
            raise ValueError(f"--out {out}: would be replaced; a name that ends in .html is needed; change it")
        write(out, args.folders)
        print(f"wrote {out}, {out.stat().st_size / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    main()
