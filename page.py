"""A page in the browser, on this machine alone: report and masks in, a sample out, to look at and to download. It is
drawn by Gradio (pip install gradio); what it does, sample.py does.

    python page.py                                     # http://127.0.0.1:7860
    python page.py --model checkpoints/demo --port 8000
"""
import contextlib
import importlib.util
import io
import os
import shutil
import socket
import tempfile
from pathlib import Path

import sample
from support.checks import MASKS
from support.cli import Parser, choose_device, exits

HOST = "127.0.0.1"
MOST = "64mb"                     # of an uploaded mask
WAITING = 8                       # samples that are asked for; one is made at a time


def make(root, model, device, text, masks, seed, low_steps, sr_steps):
    """One sample by sample.py, whose line is raised where it refuses.   root: a folder of its own appears in it
    masks: {channel: file or None}   seed, steps: None for sample.py's   -> the sample's folder, view.html in it"""
    work = Path(tempfile.mkdtemp(dir=root))
    given = dict(model=model, device=device, out=work, seed=seed, low_steps=low_steps, sr_steps=sr_steps) | masks
    if text.strip():
        given["report"] = work / "report.txt"
        given["report"].write_text(text, encoding="utf-8")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            sample.main(["--view", *(f"--{name}={value}" for name, value in given.items() if value is not None)])
    except SystemExit:
        raise ValueError(said.getvalue().splitlines()[-1].removeprefix("error: ")) from None
    return work / ("report" if text.strip() else "sample")


def page(root, model, device):
    """The page.   root: folder for what it makes   -> an app for a server"""
    import gradio
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import FileResponse
    app, made = FastAPI(), {}

    @app.get("/view/{name}")
    def view(name: str):
        if name not in made:
            raise HTTPException(404)
        return FileResponse(made[name] / "view.html")

    bars = gradio.Progress(track_tqdm=True)              # those of sample.py

    def run(text, lobe, airway, vessel, seed, low_steps, sr_steps, progress=bars):
        masks = dict(zip(MASKS, (lobe, airway, vessel)))
        try:
            folder = make(root, model, device, text, masks, seed, low_steps or None, sr_steps or None)
        except ValueError as e:
            raise gradio.Error(f"error: {e}", duration=None, print_exception=False) from None
        name = folder.parent.name
        made[name] = folder
        packed = shutil.make_archive(folder.parent / folder.name, "zip", folder.parent, folder.name)
        style = "width: 100%; height: 75vh; border: 0"
        frame = f'<iframe src="/view/{name}" sandbox="allow-scripts" style="{style}"></iframe>'
        return frame, gradio.DownloadButton(value=packed, interactive=True)

    with gradio.Blocks(title="MedSyn", analytics_enabled=False) as blocks:
        gradio.Markdown(f"Weights: {Path(model).name}. Not for clinical use.")
        with gradio.Row():
            text = gradio.Textbox(label="Report", lines=6, placeholder="Findings: ...\nImpression: ...", scale=2)
            with gradio.Column():
                seed = gradio.Number(0, label="Seed", precision=0)
                steps = [gradio.Number(0, label=f"Steps of stage {i} (0: the weights' own)", precision=0)
                         for i in (1, 2)]
        with gradio.Row():
            masks = [gradio.File(label=f"{name} mask to keep (NIfTI)", file_types=[".nii", ".gz"], height=120)
                     for name in MASKS]
        with gradio.Row():
            button = gradio.Button("Make a sample", variant="primary")
            download = gradio.DownloadButton("Download", interactive=False)
        result = gradio.HTML(min_height=80)
        button.click(run, [text, *masks, seed, *steps], [result, download], concurrency_limit=1)
    blocks.queue(max_size=WAITING, api_open=False)
    theme = gradio.themes.Default(font="sans-serif", font_mono="monospace")          # others are fetched
    return gradio.mount_gradio_app(app, blocks, "/", server_name=HOST, max_file_size=MOST, theme=theme,
                                   footer_links=[])


def serve(model, device, port):
    """Serves the page until Ctrl-C; what was made is then removed."""
    import uvicorn
    try:
        listening = socket.create_server((HOST, port))
    except (OSError, OverflowError) as e:
        raise ValueError(f"--port {port}: {e}; a free port is needed; choose another") from None
    with tempfile.TemporaryDirectory(prefix="medsyn_") as root, listening:
        os.environ["GRADIO_TEMP_DIR"] = root             # uploads too
        server = uvicorn.Server(uvicorn.Config(page(root, model, device), log_level="warning"))
        print(f"http://{HOST}:{listening.getsockname()[1]} (Ctrl-C ends it, and removes what was not downloaded)",
              flush=True)
        server.run(sockets=[listening])


def main(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--model", default=sample.DEMO, help=f"folder of weights (default {sample.DEMO})")
    p.add_argument("--port", type=int, default=7860, help="on this machine; 0 any that is free (default 7860)")
    p.add_argument("--device", help="cuda or cpu; default whichever is there")
    args = p.parse_args(argv)
    with exits():
        if not importlib.util.find_spec("gradio"):
            raise ValueError("gradio: not installed; it draws the page; pip install gradio")
        serve(args.model, choose_device(args.device), args.port)


if __name__ == "__main__":
    main()
