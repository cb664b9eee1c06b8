"""What a BERT needs around it: a transformers folder or hub name is read and checked, a small random BERT is made with
a vocabulary of its own, a trained one is saved whole; checks of options and reports."""
import hashlib
import json
import os
import pickle
import re
import sys
import urllib.error
import urllib.request
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from support.checks import text_hash
from support.cli import Parser, choose_device
from support.files import digest, sha256, whole_folder, write_atomic
from support.splits import read_split, write_split

# transformers takes seconds to import: the functions that need it import it, so that importing this file stays cheap.

WAY_OUT = ("a text model has config.json, model.safetensors and tokenizer files, or is a hub name while online; "
           "pass a local folder")


# --- read ---

def read_model(source, tokens, masked_words=False):
    """Folder in transformers layout or hub name -> BertModel (masked_words: BertForMaskedLM) and its tokenizer.

    tokens: N that it is to take. ValueError unless all is there, and tokenizer, model and N fit each other.
    """
    if not Path(source).is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(source)):
        raise ValueError(f"text model {source}: no such folder; {WAY_OUT}")
    net, tokenizer, missing = from_pretrained(source, masked_words)
    lost = [key for key in missing if not key.startswith("cls.")]        # a word head that is missing can be trained
    if lost:
        raise ValueError(f"text model {source}: lacks {len(lost)} weights, such as {lost[0]}; it must be a whole BERT; "
                         "pass another")
    if len(tokenizer) != net.config.vocab_size:           # with no tokenizer files, transformers makes one of 5 tokens
        raise ValueError(f"text model {source}: {len(tokenizer)} tokens in the tokenizer, {net.config.vocab_size} in "
                         "the model; they must agree; put the model's own tokenizer files into the folder")
    if not 8 <= tokens <= net.config.max_position_embeddings:
        raise ValueError(f"--tokens {tokens}; {source} takes 8 to {net.config.max_position_embeddings}; change it")
    return net, tokenizer


def from_pretrained(source, masked_words):
    """-> model, tokenizer, names of the weights that the files lack. Code that a model brings along is never run."""
    import transformers
    from safetensors import SafetensorError
    transformers.logging.set_verbosity_error()            # else it lists the word head, which encoding does not use
    transformers.logging.disable_progress_bar()
    kind, options = transformers.BertModel, dict(add_pooling_layer=False)
    if masked_words:
        kind, options = transformers.BertForMaskedLM, {}
    unreadable = (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, SafetensorError,
                  pickle.UnpicklingError)
    local = Path(source).is_dir()
    files = dict(trust_remote_code=False, local_files_only=local or not hub_answers())
    try:
        tokenizer = transformers.BertTokenizer.from_pretrained(source, **files)
        net, info = kind.from_pretrained(source, output_loading_info=True, **files, **options)
    except unreadable as error:
        alone = ", and the hub does not answer" if files["local_files_only"] and not local else ""
        raise ValueError(f"text model {source}: not found or not readable ({type(error).__name__}){alone}; "
                         f"{WAY_OUT}") from None
    return net, tokenizer, info["missing_keys"]


def hub_answers():
    """Whether the hub can be asked. Its own client finds out by asking for minutes, file by file."""
    from huggingface_hub import constants
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True                                       # it does, if only to refuse
    except OSError:
        return False
    return True


# --- made ---

def from_scratch(texts, tokens, width, layers, heads, vocab, dropout):
    """A small random BertForMaskedLM for N = tokens, and a WordPiece tokenizer of up to `vocab` tokens, lower case,
    learned from the texts. Weights are drawn from torch's global generator; all processes get rank 0's vocabulary."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer
    texts = [text.lower() for text in texts]
    # Pieces are named here: else their order, and then all merges, would differ every run.
    pieces = ["##" + c for c in sorted(set("".join(texts)) - {" "})]
    learned = BertTokenizer().train_new_from_iterator(texts, vocab, new_special_tokens=pieces, show_progress=False)
    vocabulary = [learned.get_vocab()]
    if dist.is_initialized():
        dist.broadcast_object_list(vocabulary)            # the same numbers for the same tokens on all ranks
    config = BertConfig(
        vocab_size=len(vocabulary[0]),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=max(512, tokens),
        initializer_range=width ** -0.5,                  # BERT's 0.02 suits 768; narrower, it learns word counts only
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout)
    return BertForMaskedLM(config), BertTokenizer(vocab=vocabulary[0])


# --- written ---

def check_new(out):
    """ValueError unless the folder `out` is not there yet and can be made, or holds a training that was stopped."""
    above = next(p for p in out.absolute().parents if p.exists())
    stopped = (out / "last.pt").is_file() and not (out / "config.json").exists()
    if out.exists() and not stopped or not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--out {out} exists already, or its parent cannot be written; a model is a new folder; "
                         "choose another")


def save(out, bert, tokenizer, record):
    """A folder in transformers layout, whole or not at all; `record`, a dict, becomes its text_training.json."""
    with whole_folder(out, overwrite=True) as part:       # of this training's checkpoints
        bert.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "text_training.json").write_text(json.dumps(record, indent=1))


def key(a, reports):
    """What a checkpoint of a training belongs to.   -> dict"""
    asked = {k: v for k, v in vars(a).items() if k not in ("device", "save_every", "out")}
    return dict(arguments=asked, reports=hashlib.sha256(str(reports).encode()).hexdigest())


def keep(out, a, reports, state, step):
    """last.pt.   state: {name: what has a state_dict}"""
    out.mkdir(parents=True, exist_ok=True)
    parts = {name: part.state_dict() for name, part in state.items()}
    write_atomic(out / "last.pt", lambda f: torch.save(dict(step=step, key=key(a, reports), **parts), f))


def resume(out, a, reports, state, device):
    """Puts last.pt into `state`.   -> the step to go on from, 0 without one. ValueError if it is another training's."""
    if not (out / "last.pt").is_file():
        return 0
    try:
        kept = torch.load(out / "last.pt", map_location=device, weights_only=True)
        if kept["key"] != key(a, reports):
            raise ValueError(f"{out}: holds a training with other options or reports, that was stopped; "
                             "give the same again, or choose another --out")
        for name, part in state.items():
            part.load_state_dict(kept[name])
    except (RuntimeError, KeyError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as e:
        raise ValueError(f"{out}/last.pt: not readable ({type(e).__name__}); a training goes on from it; "
                         "remove the folder to begin anew") from None
    return kept["step"]


# --- which encoder made a text.npy ---

def identity(encoder):
    """What makes an encoder's numbers, as a name: weights, vocabulary, N.   -> 16 hex digits"""
    words = json.dumps([sorted(encoder.tokenizer.get_vocab().items()), encoder.tokens,
                        bool(getattr(encoder.tokenizer, "do_lower_case", True))])
    return hashlib.sha256((digest(encoder.bert.state_dict(), names=False) + words).encode()).hexdigest()[:16]


def check_identity(encoder, source, known):
    """Warns if an encoder is not the `known` one."""
    if known and (its := identity(encoder)) != known:
        print(f"warning: text model {source} is not the one that these weights were trained with "
              f"({its}, {known}): they will not understand it; pass the right --text", file=sys.stderr)


def write_text(folder, array, text, name):
    """text.npy, and beside it text.json: which encoder made it, and of what."""
    write_atomic(folder / "text.npy", partial(np.save, arr=array))
    about = dict(encoder=name, report=text_hash(text), sha256={"text.npy": sha256(folder / "text.npy")})
    write_atomic(folder / "text.json", json.dumps(about).encode())


# --- the command line ---

def option(group, name, kind, default, help):
    group.add_argument(f"--{name}", type=kind, default=default, help=f"{help} (default %(default)s)")


def options(argv, doc, base, tokens):
    """The command line of text_encoder.py.   base, tokens: its defaults"""
    p = Parser(description=doc)
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("train", help="fine-tune on reports (sec. 4.1, 4.6)", description="Fine-tune on reports.")
    titles = "what goes in and out", "tasks and optimisation", "the BERT from scratch", "machine"
    files, tasks, scratch, machine = map(c.add_argument_group, titles)
    files.add_argument("--reports", action="append", required=True,
                       help="folder of cases, folder of .txt, .txt or .jsonl; may be repeated")
    files.add_argument("--out", required=True, help="new folder for the model, in transformers layout")
    start = files.add_mutually_exclusive_group()
    option(start, "base", str, base, "where to start: hub name or local folder (sec. 4.1)")
    start.add_argument("--scratch", action="store_true", help="a small random BERT with its own vocabulary, for toys")
    option(tasks, "epochs", int, 5, "passes over the reports (sec. 4.6)")
    option(tasks, "steps", int, 0, "optimizer steps; 0: what --epochs makes")
    option(tasks, "lr", float, 0, "highest learning rate; 0: 5e-5, or 1e-3 from scratch; not in the paper")
    option(tasks, "kept", float, 0.0, "share of the masked words that stay as they are; 0 is the paper's")
    option(tasks, "held-out", float, 0.1, "share of subjects set apart for the final figures, where no split says it")
    files.add_argument("--split", metavar="FILE",
                       help="split.json: the patients who are held out; default that of the folder of cases")
    option(tasks, "seed", int, 0, "decides held-out subjects, order, swaps, masks and first weights")
    for name, default in dict(width=128, layers=4, heads=4, vocab=2000, dropout=0.1).items():
        option(scratch, name, type(default), default, f"{name} of the BERT from scratch")

    e = commands.add_parser("embed", help="report.txt -> text.npy", description="Every case's report.txt -> text.npy.")
    read, used = map(e.add_argument_group, (titles[0], titles[-1]))
    read.add_argument("data", help="folder of cases")
    read.add_argument("--model", required=True, help="text model: folder or hub name")
    option(machine, "save-every", int, 100, "steps between checkpoints; the same command goes on from the last one")
    for given, work, held in (files, tasks, machine), (read, used, used):
        option(given, "tokens", int, tokens, "N, tokens of a report; released code")
        option(work, "batch", int, 32, "reports a step, over all processes; not in the paper")
        held.add_argument("--device", choices=("cuda", "cpu"), help="default whichever is there")
    a = p.parse_args(argv)
    a.device = choose_device(a.device)
    check_options(a)
    return a


# --- around them ---

# At least, and below: what an option may be. All others are at least 1.
LIMITS = dict(steps=(0, 2 ** 31), tokens=(8, 2 ** 31), seed=(0, 2 ** 31), lr=(0, 1), held_out=(0, 1), kept=(0, 1),
              dropout=(0, 1))


def check_options(a):
    """ValueError if a number of the command line is out of its range."""
    for name, value in vars(a).items():
        low, high = LIMITS.get(name, (1, 2 ** 31))
        if type(value) in (int, float) and not low <= value < high:
            raise ValueError(f"--{name.replace('_', '-')} {value}; it is at least {low} and below {high}; change it")
    if a.command == "train" and a.width % a.heads:
        raise ValueError(f"--width {a.width}, --heads {a.heads}; heads divide the width; change one")


def hold_out(a, reports, generator, world):
    """Subjects are held out, so that nobody is on both sides: those of --split or of the folder's split.json, else a
    share, drawn, which then becomes the folder's split.   -> to train on, held out. ValueError if either are too
    few."""
    subjects, batch = sorted({r.subject for r in reports}), a.batch
    folders = [Path(p) for p in a.reports if any(Path(p).glob("*/report.txt"))]
    splits = [Path(a.split)] if a.split else [f / "split.json" for f in folders if (f / "split.json").is_file()]
    if splits:
        apart = set(subjects) & {name for path in splits for name in read_split(path)}
    else:
        order = torch.randperm(len(subjects), generator=generator)
        apart = {subjects[i] for i in order[:round(a.held_out * len(subjects))]}
    held_out = [r for r in reports if r.subject in apart]
    reports = [r for r in reports if r.subject not in apart]
    if len(apart) < 2 or len(reports) < batch or batch % world:
        raise ValueError(f"{len(reports)} reports to train on, {len(apart)} subjects held out, --batch {batch}, "
                         f"{world} processes; a batch is a multiple of the processes and not more than the reports, "
                         "2 subjects or more are held out; add reports or change --batch, --held-out")
    if len(folders) == len(a.reports) == 1 and not splits:
        write_split(folders[0], apart, a.seed)
    return reports, held_out


def join(name, world):
    """This process and its device, "cuda" or "cpu", among `world` processes.   -> torch.device"""
    device = torch.device(name)
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
    return device


def warn(ids, mask, lengths, unknown):
    """Say on stderr what a network will not see, or not know, of packed reports.
    ids, mask: (B,N)   lengths: B ints, tokens before cutting   unknown: the id of [UNK]"""
    tokens = ids.shape[1]
    over = sum(n > tokens for n in lengths)
    if over:
        print(f"warning: {over} of {len(ids)} reports are longer than {tokens} tokens (up to {max(lengths)}); "
              "the end of Findings is cut first; put first what matters", file=sys.stderr)
    share = (ids == unknown).sum(1) / (mask.sum(1) - 2).clamp(min=1)
    if (share > 0.3).any():
        print(f"warning: {(share > 0.3).sum()} of {len(ids)} reports have up to {share.max():.0%} unknown words; "
              "the network cannot read these; is the report English, and the model the right one?", file=sys.stderr)
