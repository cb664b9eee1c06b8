"""Weights on disk: written by the trainers, read by them and by sample.py.

Weights that want what the paper does not have name it in their metadata; only for these `beyond` is opened.
"""
import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from safetensors.torch import save

from support.checks import FULL
from support.files import read_json, read_safetensors, seal, write_atomic
from support.released import from_released, read_released

# Options and arguments of networks that the paper does not have, at the values where they do nothing.
BEYOND = dict(pooled=False, patch=1, late=0.0, cool=0.0, windows=0.0, bullae=0.0, given=0.0, sharp=False, fine=0,
              warm_up=None)


def tricks(options):
    """Those of the options or arguments that the paper does not have and that do something."""
    return {k: v for k, v in options.items() if k in BEYOND and k != "warm_up" and v not in (None, BEYOND[k])}


def without_idle(options):
    """The options or arguments but those that the paper does not have and that do nothing."""
    return {k: v for k, v in options.items() if k not in BEYOND or k in tricks(options)}


def beyond(name):
    """The one door to what the paper does not have: a file of beyond/, imported when it is asked for; None where that
    folder is deleted."""
    try:
        return import_module(f"beyond.{name}")
    except ModuleNotFoundError as e:
        if e.name.split(".")[0] != "beyond":
            raise
        return None


# --- written ---

def export(path, cfg, ema, grid, step, trained_on):
    """EMA weights for sample.py: safetensors in float16, with the constructor's arguments and provenance in the
    metadata; beside them, in sampling.json, how they want to be sampled.   trained_on: `describe` of the cases"""
    program = Path(sys.argv[0])
    program = f"-m beyond.{program.stem}" if program.parent.name == "beyond" else program.name
    command = " ".join(["python", program, *sys.argv[1:]])
    weights = {k: v.detach().half().cpu().contiguous() for k, v in ema.state_dict().items()}
    about = dict(kind=cfg.kind, args=ema.args, grid=grid, step=step, source=trained_on["source"],
                 encoder=trained_on["encoder"], channels=trained_on["channels"],
                 provenance=dict(command=command, cases=trained_on["cases"], config=asdict(cfg)))
    if hasattr(cfg, "distilled"):                                        # a student's times, and its teacher
        about["distilled"] = cfg.distilled()
    about = json.loads(json.dumps(about))                                # as it will be read: tuples are lists
    about["sha256"] = seal(weights, about)
    write_atomic(path, save(weights, metadata={"medsyn": json.dumps(about)}))
    write_atomic(path.with_name("sampling.json"), (json.dumps(cfg.sampling()) + "\n").encode())


def describe(folders, channels=FULL):
    """Cases, by what lies beside their arrays, of which `channels` are used.   -> dict: channels; cases, how many;
    source, "phantom" or "patient" or both; encoder, the hash of the text encoder that embedded them, None if none says.
    ValueError if it is not one"""
    metas = [read_json(case / "case.json") for case in folders]
    told = [case for case, meta in zip(folders, metas) if meta.get("report", True)]
    encoders = {read_json(case / "text.json").get("encoder"): case for case in told}
    if len(encoders) > 1:
        seen = " and ".join(f"{case} by {name or 'one without a name'}" for name, case in list(encoders.items())[:2])
        raise ValueError(f"text embedded by different encoders, {seen}; one is needed; embed all again")
    return dict(cases=len(folders), encoder=next(iter(encoders), None), channels=list(channels),
                source=sorted({"phantom" if meta.get("source") == "phantom" else "patient" for meta in metas}))


# --- read ---

def build(args, UNet3D):
    """The network that its arguments describe: the method's, or where they ask for more one of beyond/nets.py."""
    if tricks(args):
        nets = beyond("nets")
        if nets is None:
            raise ValueError(f"a network with {', '.join(tricks(args))}, which the paper does not have; beyond/nets.py "
                             "builds it and is not there; use other weights or restore that folder")
        UNet3D = nets.form(args)
    return UNet3D(**without_idle(args))


def read_own(path, kind, UNet3D):
    """A file that `export` wrote -> net, about: kind, grid, step, channels, args, provenance."""
    state, about = read_safetensors(path)
    about.setdefault("channels", list(FULL))
    if about.get("kind") != kind:
        raise ValueError(f"{path}: weights of kind {about.get('kind')}, not {kind}; each stage has its own; "
                         "put the right file there")
    try:
        net = build(about["args"], UNet3D)
        net.load_state_dict({k: v.float() for k, v in state.items()})
    except (TypeError, RuntimeError) as e:
        raise ValueError(f"{path}: the weights do not fit the network that it describes ({str(e)[:200]}); "
                         "a trainer of this version wrote another form; train or fetch it again") from None
    return net, about


def read_init(path, kind, net, free=(), channels=FULL):
    """--init: weights to train on from.   free: arguments in which they may differ from `net`   channels: of the run
    -> state dict, arguments"""
    try:
        state, about = read_safetensors(path)
    except ValueError as e:
        raise ValueError(f"--init {e}") from None
    args = without_idle(about.get("args", {}))
    differing = {k: v for k, v in args.items() if v != net.args.get(k) and k not in free}
    if about.get("channels", list(FULL)) != list(channels):
        differing["channels"] = ",".join(about.get("channels", FULL))
    if about.get("kind") != kind or differing:
        way = f"run python -m beyond.train_{kind}"
        if "tokens" in differing:                        # no option of a trainer's: text.npy has them
            way = f"embed the reports anew, text_encoder.py embed --tokens {differing['tokens']}"
        raise ValueError(f"--init {path}: kind {about.get('kind')}, {differing} there; this run is {kind} and has "
                         f"others; pass the options of that network; where --help has none of these, {way}")
    return {k: v.float() for k, v in state.items()}, args


def begin_from(path, kind, net, channels):
    """The weights of --init, into `net`."""
    state, _ = read_init(path, kind, net, channels=channels)
    try:
        net.load_state_dict(state)
    except RuntimeError as e:
        raise ValueError(f"--init {path}: the weights do not fit the network that it describes ({str(e)[:200]}); "
                         "weights that a trainer wrote are needed; name another file") from None


def load_stages(model, UNet3D):
    """A model folder, a runs/ folder, or the authors' *_ckpt folders -> {"low": (net, about), "sr": (net, about)},
    those that are there.   about: kind, grid (edge of what the stage makes), channels, file; of our own weights also
    step and provenance
    """
    model, stages = Path(model), {}
    if not model.is_dir():
        raise ValueError(f"--model {model}: no such folder; it holds low.safetensors and sr.safetensors; "
                         "check the path")
    for kind in ("low", "sr"):
        places = (model / f"{kind}.safetensors", model / kind / f"{kind}.safetensors")
        path = next((p for p in places if p.is_file()), None)
        if path is not None:
            net, about = read_own(path, kind, UNet3D)
            stages[kind] = net, {**about, "file": str(path)}
    if not stages:
        for folder in sorted(model.glob("*_ckpt")):
            net = from_released(read_released(folder), UNet3D)
            kind = "sr" if net.args["in_channels"] == 8 else "low"
            stages[kind] = net, dict(kind=kind, grid=256 if kind == "sr" else 64, file=str(folder),
                                     channels=list(FULL), provenance="released weights, CC-BY-NC")
    if "low" not in stages:
        raise ValueError(f"--model {model}: neither low.safetensors nor released *_ckpt folders in it; "
                         "stage 1 is always needed; train it with train_low.py or name another folder")
    return stages


def sources(model):
    """What the weights of a model folder were trained on, as their files say: "phantom", "patient", "unknown".
    -> sorted list"""
    found = set()
    for kind in ("low", "sr"):
        places = (Path(model) / f"{kind}.safetensors", Path(model) / kind / f"{kind}.safetensors")
        path = next((p for p in places if p.is_file()), None)
        if path is not None:
            found |= set(read_safetensors(path)[1].get("source", ["unknown"]))
    return sorted(found)


def check_pair(stages, model, scale):
    """ValueError unless both stages are there and the second begins where the first ends."""
    if "sr" not in stages:
        raise ValueError(f"--model {model}: no stage-2 weights; the full grid needs them; "
                         "train them with train_sr.py or pass --stop-at-low")
    first, second = (", ".join(stages[kind][1]["channels"]) for kind in ("low", "sr"))
    if first != second:
        raise ValueError(f"--model {model}: stage 1 makes {first}, stage 2 {second}; the two belong together; train "
                         "both with the same --channels or pass --stop-at-low")
    low, sr = (stages[kind][1]["grid"] for kind in ("low", "sr"))
    if sr != scale * low:
        raise ValueError(f"--model {model}: stage 1 makes {low}^3, stage 2 {sr}^3 where {scale * low}^3 is next; "
                         "the two belong together; put weights of one size there or pass --stop-at-low")
