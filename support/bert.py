"""What a BERT needs around it: a transformers folder or hub name is read and checked, a small random BERT is made with
a vocabulary of its own, a trained one is saved whole; checks of options and reports."""
import json
import os
import pickle
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import torch
import torch.distributed as dist

from support.files import whole_folder

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
    """ValueError unless the folder `out` is not there yet and can be made."""
    above = next(p for p in out.absolute().parents if p.exists())
    if out.exists() or not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--out {out} exists already, or its parent cannot be written; a model is a new folder; "
                         "choose another")


def save(out, bert, tokenizer, record):
    """A folder in transformers layout, whole or not at all; `record`, a dict, becomes its text_training.json."""
    with whole_folder(out) as part:
        bert.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "text_training.json").write_text(json.dumps(record, indent=1))


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


def hold_out(reports, share, generator, batch, world):
    """A share of the subjects, drawn, is held out, so that nobody is on both sides.   -> to train on, held out
    ValueError if either are too few."""
    subjects = sorted({r.subject for r in reports})
    order = torch.randperm(len(subjects), generator=generator)
    apart = {subjects[i] for i in order[:round(share * len(subjects))]}
    held_out = [r for r in reports if r.subject in apart]
    reports = [r for r in reports if r.subject not in apart]
    if len(apart) < 2 or len(reports) < batch or batch % world:
        raise ValueError(f"{len(reports)} reports to train on, {len(apart)} subjects held out, --batch {batch}, "
                         f"{world} processes; a batch is a multiple of the processes and not more than the reports, "
                         "2 subjects or more are held out; add reports or change --batch, --held-out")
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
