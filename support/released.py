"""The authors' released weights: their checkpoint folders, their names of layers and ours."""
import re

import torch

from support.files import read_safetensors

HEAD_DIM = 32   # of every attention head

# Patterns in order of substitution, and our names for what they match.
RELEASED = [
    (r"init_conv0?\.", "stem."),
    (r"null_cond_emb", "null_text"),
    (r"time_mlp\.1", "time.0"),
    (r"time_mlp\.3", "time.2"),
    (r"final_conv0?\.0", "head"),
    (r"final_conv0?\.1", "out"),
    (r"mid_block1\.", "first."),
    (r"mid_block2\.", "last."),
    (r"mid_spatial_attn(\d?)\.fn\.norm\.gamma", r"rounds.\1.self_norm.gain"),
    (r"mid_spatial_attn\d?\.fn\.fn\.fn\.to_", "attend."),
    (r"mid_cross_attn(\d)\.fn\.norm\.gamma", r"rounds.\1.cross_norm.gain"),
    (r"mid_cross_attn(\d)\.fn\.fn\.to_", r"rounds.\1.cross."),
    (r"mid_temporal_(?:attn|conv)(\d?)\.", r"rounds.\1.volume."),
    (r"((?:down|up)s\.\d)\.0\.", r"\1.slice1."),
    (r"((?:down|up)s\.\d)\.1\.", r"\1.slice2."),
    (r"((?:down|up)s\.\d)\.[24]\.", r"\1.volume."),
    (r"((?:down|up)s\.\d)\.[35]\.", r"\1.resize."),
    (r"\.mlp\.1\.", ".time."),
    (r"\.block([12])\.proj\.", r".conv\1."),
    (r"\.block([12])\.norm\.", r".norm\1."),
    (r"\.res_conv\.", ".skip."),
]


def rename(key):
    """A released key -> ours. Rounds count from 1 there (or carry no number), from 0 here."""
    for pattern, ours in RELEASED:
        key = re.sub("^" + pattern if pattern[0].isalpha() else pattern, ours, key)
    return re.sub(r"^rounds\.(\d?)\.", lambda m: f"rounds.{int(m[1] or 1) - 1}.", key)


def from_released(state, UNet3D, **options):
    """A state dict of the authors' networks -> UNet3D with those weights, its arguments read off the shapes.

    state: name -> tensor, with or without the prefix `denoise_fn.`; the diffusion schedule's own buffers are ignored.
    options: bottom.   ValueError names every key that is missing, left over or of another shape.
    """
    new = renamed(state)
    missing = [k for k in ("stem.weight", "out.weight", "attend.q.weight") if k not in new]
    if missing:
        raise ValueError(f"weights without {', '.join(missing)}; these are not a MedSyn network's; "
                         "name the authors' checkpoint")
    cross = new.get("rounds.0.cross.kv.weight")
    net = UNet3D(
        dim=len(new["stem.weight"]), in_channels=new["stem.weight"].shape[1], out_channels=len(new["out.weight"]),
        heads=len(new["attend.q.weight"]) // HEAD_DIM,
        rounds=len({k.split(".")[1] for k in new if k.startswith("rounds.")}),
        context_dim=0 if cross is None else cross.shape[1],
        tokens=new["null_text"].shape[1] if "null_text" in new else 192,
        levels=len({k.split(".")[1] for k in new if k.startswith("downs.")}), **options)

    ours = net.state_dict()
    wrong = [f"missing {k}" for k in ours.keys() - new.keys()] + [f"left over {k}" for k in new.keys() - ours.keys()]
    wrong += [f"{k} {tuple(new[k].shape)} for {tuple(ours[k].shape)}" for k in ours.keys() & new.keys()
              if new[k].numel() != ours[k].numel()]
    if wrong:
        raise ValueError(f"released weights: {'; '.join(sorted(wrong))}; every layer must be there once; "
                         "use an unmodified checkpoint")
    net.load_state_dict({k: v.reshape(ours[k].shape) for k, v in new.items()})   # (o,i,1,3,3) -> (o,i,3,3) and the like
    return net


def renamed(state):
    """The weights under our names, the shared self-attention once."""
    if any(k.startswith("denoise_fn.") for k in state):
        state = {k.removeprefix("denoise_fn."): v for k, v in state.items() if k.startswith("denoise_fn.")}
    new, shared = {}, {}
    for key, value in state.items():
        name = rename(key)
        if name.startswith("attend."):                                   # stored once per round: they must agree
            if not torch.equal(shared.setdefault(name, value), value):
                raise ValueError(f"{key}: differs from the other rounds; all share one self-attention; "
                                 "use whole released weights")
        if name.endswith("attend.qkv.weight"):
            q, k, v = value.chunk(3)
            new["attend.q.weight"], new["attend.kv.weight"] = q, torch.cat([k, v])
        else:
            new[name] = value
    return new


def read_released(folder):
    """The authors' checkpoint folder -> state dict. The second model of a folder is its running average."""
    for name in ("model_1.safetensors", "pytorch_model_1.bin", "model.safetensors", "pytorch_model.bin"):
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix == ".safetensors":
            return read_safetensors(path)[0]
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v)
                                                      for k, v in state.items()):
                raise TypeError("no names of tensors")
            return state
        except Exception as e:                                           # whatever a hostile or broken pickle raises
            raise ValueError(f"{path}: refused ({type(e).__name__}); only plain tensors are read from a pickle; "
                             "convert it to safetensors where you trust it") from None
    raise ValueError(f"{folder}: no model_1.safetensors or pytorch_model_1.bin; a released checkpoint folder has one; "
                     "download it whole")
