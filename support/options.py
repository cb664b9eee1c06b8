"""Options of the trainers: a Config's fields are the command line, the checkpoint's record and what tests build."""
import re
import sys
from argparse import BooleanOptionalAction
from dataclasses import field, fields

from support.cli import Parser, choose_device, fast_bfloat16
from support.weights import BEYOND

GROUPS = {
    "data": "preset data out init seed holdout crop",
    "network": "dim levels heads channels bottom",
    "optimisation": "steps batch lr decay clip ema ema_every ema_start drop augment",
    "what a GPU holds": "device micro amp checkpointing compile zero workers",
    "log": "log_every save_every show_every",
}
OTHERS = "not in the paper"       # the group of all other fields
OF_STAGE_1 = ("pooled", "late", "warm-up")


def arg(default, help, least=0, most=float("inf")):
    """One knob of a Config: its default, its meaning with the paper's section, and its range."""
    return field(default=default, metadata=dict(help=help, least=least, most=most))


def parse(config, doc, argv=None):
    """The command line of a Config: one option a field, the preset's values as defaults.   -> Config"""
    argv = sys.argv[1:] if argv is None else list(argv)
    first = parser(config, doc, {}).parse_args(argv)
    device = choose_device(first.device)
    preset = first.preset or ("paper" if device.startswith("cuda") else "demo")
    if preset not in config.presets:
        also = "" if "demo-256" in config.presets else f" (python -m beyond.train_{config.kind} has others)"
        raise ValueError(f"--preset {preset}; presets are {', '.join(config.presets)}{also}; choose one")

    cfg = config(**vars(parser(config, doc, config.presets[preset]).parse_args(argv)))
    cfg.device, cfg.preset = device, preset
    cfg.amp = fast_bfloat16(device) if cfg.amp is None else cfg.amp
    cfg.compile = device.startswith("cuda") if cfg.compile is None else cfg.compile
    for f in fields(cfg):
        value, least, most = getattr(cfg, f.name), f.metadata["least"], f.metadata["most"]
        if f.type in (int, float) and not (least <= value <= most and value < float("inf")):
            limit = f"at most {most}" if most < float("inf") else "finite"
            raise ValueError(f"--{hyphened(f.name)} {value}; a number of at least {least:g}, {limit}, is needed; "
                             "change it")
    return cfg


def parser(config, doc, preset):
    """An option a field, in groups.   preset: name -> value, what differs from the fields' defaults"""
    p, groups = TrainerParser(description=doc), {}
    p.kind = config.kind
    for f in fields(config):
        title = next((title for title, names in GROUPS.items() if f.name in names.split()), OTHERS)
        if title not in groups:
            groups[title] = p.add_argument_group(title)
        kind = dict(type=f.type, metavar=f.type.__name__.upper())
        if f.type is bool:
            kind = dict(action=BooleanOptionalAction)
        groups[title].add_argument(f"--{hyphened(f.name)}", default=preset.get(f.name, f.default),
                                   help=f.metadata["help"] + defaults(config, f), **kind)
    return p


def defaults(config, f):
    """What --help says of a field's default, by preset where they differ."""
    values = {name: preset.get(f.name, f.default) for name, preset in config.presets.items()}
    if len(set(values.values())) > 1:
        return f" ({', '.join(f'{name} {value}' for name, value in values.items())})"
    value = next(iter(values.values()))
    return "" if value in (None, "") else f" (default {value})"


def hyphened(name):
    return name.replace("_", "-")


class TrainerParser(Parser):
    """An option of beyond/'s trainers, typed in the method's, names the command that has it."""

    def error(self, message):
        names = [name.removeprefix("no-") for name in re.findall(r"--([a-z-]+)", message)]
        known = [name for name in names if name.replace("-", "_") in BEYOND]
        if message.startswith("unrecognized") and known:
            kind = "low" if known[0] in OF_STAGE_1 else self.kind
            message = (f"--{known[0]}; it is not in the paper, nor in this trainer; "
                       f"run python -m beyond.train_{kind} with the same options")
        super().error(message)
