"""Medical BERT: a chest CT report becomes 192 vectors of 768 numbers, f_text, which stage 1 attends to.
Paper sec. 4.1; fine-tuning from sec. 4.6: two tasks at once, masked words and paired sections.

    torchrun --nproc_per_node=4 text_encoder.py train --reports data/train --out runs/text
    python text_encoder.py embed data/train --model runs/text             # report.txt -> text.npy: training never runs BERT
"""
import argparse
import json
import os
import pickle
import re
import shutil
import sys
from collections import deque, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm
# transformers takes seconds to import; the functions that need it import it, so that importing this file stays cheap.

from data import cases, choose_device, exits, fast_bfloat16, read_report, write_atomic

CXR_BERT = "microsoft/BiomedVLP-CXR-BERT-specialized"     # the paper's start, 768 wide
TOKENS = 192                                              # N, the tokens of a report that the UNet sees (sec. 4.6)
MASKED = 0.15                                             # share of words hidden in training (sec. 4.6)
Report = namedtuple("Report", "subject findings impression")


# --- reports and their two sections ---

def split_sections(text):
    """'Findings: ... Impression: ...' -> (findings, impression) without the headings and what stands before them (history, technique);
    a plain prompt -> (prompt, '')."""
    findings, *impression = re.split(r"\b(?:impression|conclusion)s?\s*:", text, maxsplit=1, flags=re.I)
    findings = re.split(r"(?:^|[.\n])\s*findings?\s*:", findings, maxsplit=1, flags=re.I)[-1]
    return " ".join(findings.split()), " ".join(" ".join(impression).split())


def split_run_together(text):
    """CT-RATE's texts have no headings. Our rule: the Impression starts at the first `"` or bullet after the end of a sentence (43 and 7
    of the 60 reports looked at), else it is the last two sentences. The marks go, so that they cannot tell which Impression is whose."""
    parts = re.split(r'(?<=[.?!:])\s*["•]', text, maxsplit=1)
    if len(parts) == 1:
        sentences = re.split(r"(?<=[.?!])\s+", text.strip())
        parts = [" ".join(sentences[:-2]), " ".join(sentences[-2:])]
    return tuple(" ".join(re.sub('["•]', " ", part).split()) for part in parts)


def load_reports(paths):
    """Folders of cases (*/report.txt), folders of .txt, .txt files, .jsonl -> list of Report; those with one section are left out."""
    texts = []                                            # (subject, text)
    for path in map(Path, paths):
        if path.suffix == ".jsonl" and path.is_file():
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                try:
                    row = json.loads(line)
                    subject = row.get("subject", row.get("id", f"{path}:{number}"))
                    two = "impression" in row
                    texts.append((str(subject), "Findings: " + row["findings"] + "\nImpression: " + row["impression"] if two else "" + row["text"]))
                    texts[-1][1].encode()                 # JSON can hold halves of characters
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(f"{path}: line {number} is no report; a line has 'text', or 'findings' and 'impression'; mend it") from None
        else:
            files = [path] if not path.is_dir() else sorted(path.glob("*/report.txt")) or sorted(path.glob("[!.]*.txt"))
            if not files:
                raise ValueError(f"{path}: no */report.txt, no *.txt; training needs reports; try python phantom.py --out data/train --n 512")
            texts += [(f.parent.name.split("_text")[0] if f.name == "report.txt" else f.stem, read_report(f)) for f in files]
    pairs = [(subject, split_sections(text), text) for subject, text in texts]
    reports = [Report(subject, *(pair if pair[1] else split_run_together(text))) for subject, pair, text in pairs]
    whole = [r for r in reports if r.findings and r.impression]
    if len(whole) < len(reports):
        print(f"warning: {len(reports) - len(whole)} of {len(reports)} reports have one section only and are left out", file=sys.stderr)
    return whole


# --- from words to vectors ---

def pack(tokenizer, pairs, tokens):
    """(findings, impression) pairs -> ids, kinds, mask (B,N), lengths (B) uncut:   [CLS] Findings [SEP] Impression [SEP] [PAD] ...
    kinds is 1 on the Impression, mask True on real tokens. A prompt, whose Impression is '', is one text, as in the released code.
    not in the paper: sections are a text pair in training and in use; the released code joins them to one text for use."""
    findings, impressions = [tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] for texts in zip(*pairs)]
    ids = torch.full((len(pairs), tokens), tokenizer.pad_token_id)
    kinds, mask, lengths = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool), []
    for row, (f, i) in enumerate(zip(findings, impressions)):
        room = tokens - (3 if i else 2)                   # [CLS], and one [SEP] a section
        lengths.append(len(f) + len(i) + tokens - room)
        i = i[:max(room // 2, room - len(f))]             # over-long: Findings are cut first, the Impression never below half
        f = f[:room - len(i)]
        line = [tokenizer.cls_token_id, *f, tokenizer.sep_token_id, *([*i, tokenizer.sep_token_id] if i else [])]
        ids[row, :len(line)], mask[row, :len(line)] = torch.tensor(line), True
        kinds[row, len(f) + 2:len(line)] = 1
    return ids, kinds, mask, lengths


def read_model(source, tokens, masked_words=False):
    """Folder in transformers layout or hub name -> BertModel (masked_words: BertForMaskedLM) and its tokenizer, both checked."""
    import transformers
    from safetensors import SafetensorError
    transformers.logging.set_verbosity_error()            # else it lists the word head, which encoding does not use
    transformers.logging.disable_progress_bar()
    kind, options = (transformers.BertForMaskedLM, {}) if masked_words else (transformers.BertModel, {"add_pooling_layer": False})
    way_out = "a text model has config.json, model.safetensors and tokenizer files, or is a hub name while online; pass a local folder"
    if not Path(source).is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(source)):
        raise ValueError(f"text model {source}: no such folder; {way_out}")
    try:
        tokenizer = transformers.BertTokenizer.from_pretrained(source, trust_remote_code=False)
        net, info = kind.from_pretrained(source, trust_remote_code=False, output_loading_info=True, **options)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"text model {source}: not found or not readable ({type(error).__name__}); {way_out}") from None
    lost = [key for key in info["missing_keys"] if not key.startswith("cls.")]     # a word head that is missing can be trained
    if lost:
        raise ValueError(f"text model {source}: lacks {len(lost)} weights, such as {lost[0]}; it must be a whole BERT; pass another")
    if len(tokenizer) != net.config.vocab_size:           # with no tokenizer files, transformers silently makes one of 5 tokens
        raise ValueError(f"text model {source}: {len(tokenizer)} tokens in the tokenizer, {net.config.vocab_size} in the model; "
                         "they must agree; put the model's own tokenizer files into the folder")
    if not 8 <= tokens <= net.config.max_position_embeddings:
        raise ValueError(f"--tokens {tokens}; {source} takes 8 to {net.config.max_position_embeddings}; change it")
    return net, tokenizer


class TextEncoder:
    """A frozen BERT.   encode(texts) -> context (B,N,width) float, mask (B,N) bool, True = real token"""

    def __init__(self, bert, tokenizer, tokens=TOKENS, device="cpu"):
        self.bert, self.tokenizer, self.tokens, self.device = bert.to(device).eval().requires_grad_(False), tokenizer, tokens, device
        self.width = bert.config.hidden_size

    def tokenise(self, texts):
        """Reports or prompts -> ids, kinds, mask (B,N). What the network will not see or not know is said on stderr."""
        pairs = [split_sections(text or "") for text in texts]
        if not all(map(any, pairs)):
            raise ValueError("an empty report; a report is text, 'Findings: ... Impression: ...' or a prompt; write one")
        pairs = [pair if pair[0] else pair[::-1] for pair in pairs]                # an Impression alone is a prompt
        ids, kinds, mask, lengths = pack(self.tokenizer, pairs, self.tokens)
        over = sum(n > self.tokens for n in lengths)
        if over:
            print(f"warning: {over} of {len(texts)} reports are longer than {self.tokens} tokens (up to {max(lengths)}); "
                  "the end of Findings is cut first; put first what matters", file=sys.stderr)
        unknown = (ids == self.tokenizer.unk_token_id).sum(1) / (mask.sum(1) - 2).clamp(min=1)
        if (unknown > 0.3).any():
            print(f"warning: {(unknown > 0.3).sum()} of {len(texts)} reports have up to {unknown.max():.0%} unknown words; "
                  "the network cannot read these; is the report English, and the model the right one?", file=sys.stderr)
        return ids, kinds, mask

    @torch.no_grad()
    def hidden(self, ids, kinds, mask):
        """Last hidden state (B,N,width). By the mask, padding changes no real token; padding's own states stay, as in the released code."""
        ids, kinds, mask = ids.to(self.device), kinds.to(self.device), mask.to(self.device)
        return self.bert(input_ids=ids, token_type_ids=kinds, attention_mask=mask).last_hidden_state

    def encode(self, texts):
        ids, kinds, mask = self.tokenise(texts)
        return self.hidden(ids, kinds, mask).float(), mask.to(self.device)


def load(source=CXR_BERT, tokens=TOKENS, device="cpu"):
    return TextEncoder(*read_model(source, tokens), tokens, device)


# --- the two tasks (sec. 4.6) ---

def seeded(seed, step):
    return torch.Generator().manual_seed((seed << 32) + step)


def mask_words(ids, tokenizer, generator, kept=0.0):
    """15 % of a report's words become [MASK], but for a share `kept` of these -> ids with holes, chosen (B,N) bool. [CLS], [SEP], [PAD], [UNK] are never chosen.

    Kept words are predicted too, so the state of a word must encode that word. If all were masked, nothing would make the states of "large" and "small" differ."""
    words = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    count = (MASKED * words.sum(1, keepdim=True)).round().clamp(min=1)
    score = torch.rand(ids.shape, generator=generator).masked_fill(~words, 2)
    chosen = (score.argsort(1).argsort(1) < count) & words                         # the `count` lowest scores of each row
    holes = chosen & (torch.rand(ids.shape, generator=generator) >= kept) if kept else chosen
    return ids.masked_fill(holes, tokenizer.mask_token_id), chosen


def another_impression(report, pool, generator):
    """The Impression of another subject. One with the same words would be labelled 'not paired' wrongly, so it is drawn again."""
    for _ in range(1000):
        other = pool[torch.randint(len(pool), (), generator=generator)]
        if other.subject != report.subject and other.impression != report.impression:
            return other.impression
    raise ValueError(f"report {report.subject}: no other subject has another Impression; half are swapped; add reports")


def swap_sections(reports, pool, generator):
    """About half of the reports get another subject's Impression -> (findings, impression) pairs, paired (B,), 1 = its own."""
    paired = torch.rand(len(reports), generator=generator) < 0.5
    return [(r.findings, r.impression if own else another_impression(r, pool, generator)) for r, own in zip(reports, paired)], paired.float()


def make_batch(pairs, tokenizer, tokens, generator, kept=0.0):
    ids, kinds, mask, _ = pack(tokenizer, pairs, tokens)
    used = mask.any(0)                                    # columns of padding alone change nothing and cost time
    ids, kinds, mask = ids[:, used], kinds[:, used], mask[:, used]
    holes, chosen = mask_words(ids, tokenizer, generator, kept)
    return holes, kinds, mask, chosen, ids


class TwoTasks(nn.Module):
    """BERT with its word head, and a linear classifier on [CLS]. Of these only BERT is used afterwards."""

    def __init__(self, bert):
        super().__init__()
        self.bert, self.paired = bert, nn.Linear(bert.config.hidden_size, 1)

    def forward(self, holes, kinds, mask, chosen):
        h = self.bert.bert(input_ids=holes, token_type_ids=kinds, attention_mask=mask).last_hidden_state           # (B,N,width)
        return self.bert.cls(h[chosen]), self.paired(h[:, 0]).squeeze(1)           # (M,vocabulary) for the M holes alone, (B,)


def masked_word_loss(logits, words):
    """-log p(word | the rest of the report), mean over the M holes.   logits: (M,vocabulary)   words: (M,)"""
    return F.cross_entropy(logits.float(), words)


def paired_section_loss(logits, paired):
    """-log p(paired or not | [CLS]), mean over reports.   logits, paired: (B,)"""
    return F.binary_cross_entropy_with_logits(logits.float(), paired)


def figures(word_logits, words, pair_logits, paired):
    return [masked_word_loss(word_logits, words).item(), (word_logits.argmax(1) == words).float().mean().item(),
            paired_section_loss(pair_logits, paired).item(), ((pair_logits > 0) == paired).float().mean().item()]


@torch.no_grad()
def evaluate(net, tokenizer, held_out, tokens, batch, frequent):
    """Means over reports never trained on, each once with its own Impression and once with another held-out subject's.
    Chance for pairs is 0.5; for words it is the accuracy of always answering `frequent`, the commonest word of the training."""
    net.eval()
    device, generator, rows = net.paired.weight.device, torch.Generator().manual_seed(0), []
    held_out = held_out * max(1, 200 // len(held_out))    # few reports: many masks and swaps of each, for steadier figures
    for i in range(0, len(held_out), batch):
        part = held_out[i:i + batch]
        pairs = [r[1:] for r in part] + [(r.findings, another_impression(r, held_out, generator)) for r in part]
        holes, kinds, mask, chosen, ids = (x.to(device) for x in make_batch(pairs, tokenizer, tokens, generator))
        paired, words = torch.tensor([1.0, 0.0], device=device).repeat_interleave(len(part)), ids[chosen]
        word_logits, pair_logits = net(holes, kinds, mask, chosen)
        rows.append(figures(word_logits, words, pair_logits, paired) + [(words == frequent).float().mean().item(), len(part)])
    word_loss, word_accuracy, pair_loss, pair_accuracy, word_chance, _ = np.average(rows, 0, weights=[row[-1] for row in rows]).tolist()
    return {"words": dict(loss=word_loss, accuracy=word_accuracy, chance=word_chance), "pairs": dict(loss=pair_loss, accuracy=pair_accuracy, chance=0.5)}


# --- fine-tuning ---

def from_scratch(a, reports):
    """A small random BERT with a WordPiece vocabulary of its own, lower case, from the training reports."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer
    texts = [f"{r.findings} {r.impression}".lower() for r in reports]
    pieces = ["##" + c for c in sorted(set("".join(texts)) - {" "})]               # named here, else their order, and then all merges, differ every run
    vocabulary = [BertTokenizer().train_new_from_iterator(texts, a.vocab, new_special_tokens=pieces, show_progress=False).get_vocab()]
    if dist.is_initialized():
        dist.broadcast_object_list(vocabulary)            # the same numbers for the same tokens on all ranks
    config = BertConfig(vocab_size=len(vocabulary[0]), hidden_size=a.width, num_hidden_layers=a.layers, num_attention_heads=a.heads,
                        intermediate_size=4 * a.width, max_position_embeddings=max(512, a.tokens),
                        initializer_range=a.width ** -0.5,                         # BERT's 0.02 suits 768; narrower, it learns word counts only
                        hidden_dropout_prob=a.dropout, attention_probs_dropout_prob=a.dropout)
    return BertForMaskedLM(config), BertTokenizer(vocab=vocabulary[0])


def train(a):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out, reports = Path(a.out), load_reports(a.reports)
    subjects = sorted({r.subject for r in reports})       # held out by subject, so that nobody is on both sides
    apart = {subjects[i] for i in torch.randperm(len(subjects), generator=seeded(a.seed, 0))[:round(a.held_out * len(subjects))]}
    held_out, reports = [r for r in reports if r.subject in apart], [r for r in reports if r.subject not in apart]
    if len(apart) < 2 or len(reports) < a.batch or a.batch % world:
        raise ValueError(f"{len(reports)} reports to train on, {len(apart)} subjects held out, --batch {a.batch}, {world} processes; a batch is a multiple "
                         "of the processes and not more than the reports, 2 subjects or more are held out; add reports or change --batch, --held-out")
    for r in held_out:
        another_impression(r, held_out, seeded(a.seed, 0))                         # refuses now, not after the training, if there is none
    above = next(p for p in out.absolute().parents if p.exists())
    if out.exists() or not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--out {out} exists already, or its parent cannot be written; a model is a new folder; choose another")

    device = torch.device(a.device, int(os.environ.get("LOCAL_RANK", 0)) if a.device == "cuda" else None)
    if a.device == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if a.device == "cuda" else "gloo")
    torch.manual_seed(a.seed)
    bert, tokenizer = from_scratch(a, reports) if a.scratch else read_model(a.base, a.tokens, masked_words=True)
    net = TwoTasks(bert).to(device)
    model = nn.parallel.DistributedDataParallel(net, device_ids=[device] if a.device == "cuda" else None) if world > 1 else net

    per_epoch = len(reports) // a.batch
    steps = a.steps or a.epochs * per_epoch
    warmup = max(1, steps // 10)                          # not in the paper: warm-up over a tenth of the steps, then linear decay, as BERT's own
    opt = torch.optim.AdamW(net.parameters(), lr=a.lr or (1e-3 if a.scratch else 5e-5), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup)))
    recent = deque(maxlen=50)
    bar = tqdm(range(steps), desc="train text", disable=rank > 0, mininterval=2)
    for step in bar:
        model.train()
        epoch, i = divmod(step, per_epoch)                # order, swaps, masks and dropout depend on the step, not on the past
        order = torch.randperm(len(reports), generator=seeded(a.seed, 2 ** 31 + epoch))[i * a.batch:(i + 1) * a.batch]
        generator = seeded(a.seed, step)
        torch.manual_seed((a.seed << 32) + step * world + rank)
        pairs, paired = swap_sections([reports[j] for j in order], reports, generator)
        batch = (*make_batch(pairs, tokenizer, a.tokens, generator, a.kept), paired)
        holes, kinds, mask, chosen, ids, paired = (x[rank::world].to(device) for x in batch)
        words = ids[chosen]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and fast_bfloat16("cuda")):
            word_logits, pair_logits = model(holes, kinds, mask, chosen)
        loss = masked_word_loss(word_logits, words) + paired_section_loss(pair_logits, paired)      # not in the paper: equal weights
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if not torch.isfinite(norm):                      # after all-reduce: every process sees it alike
            raise RuntimeError(f"step {step + 1}: the gradient is not finite; nothing was written; try again with a lower --lr")
        opt.step()
        opt.zero_grad()
        schedule.step()
        recent.append(figures(word_logits, words, pair_logits, paired))
        bar.set_postfix_str("words {:.2f} {:.0%}, pairs {:.2f} {:.0%}".format(*np.mean(recent, 0)), refresh=False)   # losses, accuracies
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        ids = pack(tokenizer, [r[1:] for r in reports], a.tokens)[0]
        frequent = ids[~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))].mode().values
        result = evaluate(net, tokenizer, held_out, a.tokens, a.batch, frequent)
        record = dict(arguments=vars(a), steps=steps, training_reports=len(reports), held_out_reports=len(held_out), held_out=result)
        save(out, bert, tokenizer, record)
        for task, f in result.items():
            print(f"held-out {task}: loss {f['loss']:.3f}, accuracy {f['accuracy']:.1%}, chance {f['chance']:.1%}")
        print(f"wrote {out}: {steps} steps on {len(reports)} reports, {len(held_out)} held out; a report becomes ({a.tokens},{bert.config.hidden_size})")


def save(out, bert, tokenizer, record):
    """Transformers layout, whole or not at all."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)               # left by a killed run
    part.mkdir(parents=True)
    try:
        bert.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "text_training.json").write_text(json.dumps(record, indent=1))
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# --- embedding a data folder ---

def embed(a):
    """Every case's text.npy, (N,width) float16. All reports are read and packed before the first is written."""
    folders = cases(a.data)
    if not folders:
        raise ValueError(f"{a.data}: no cases; a case is a folder with ct.npy and report.txt; try python phantom.py --out data/train --n 512")
    texts = [read_report(folder / "report.txt") for folder in folders]
    locked = [folder for folder in folders if not os.access(folder, os.W_OK)]
    if locked:
        raise ValueError(f"{locked[0]}: cannot be written; text.npy lies beside report.txt; change its permissions")
    encoder = load(a.model, a.tokens, a.device)
    packed = encoder.tokenise(texts)
    for i in tqdm(range(0, len(folders), a.batch), desc="embed", unit="batch", mininterval=2):
        hidden = encoder.hidden(*[x[i:i + a.batch] for x in packed]).half().cpu().numpy()                          # (b,N,width)
        for folder, f_text in zip(folders[i:], hidden):
            write_atomic(folder / "text.npy", lambda f: np.save(f, f_text))
    print(f"wrote text.npy, ({a.tokens},{encoder.width}) float16, in {len(folders)} cases of {a.data}")


def main(argv=None):
    show = dict(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("train", help="fine-tune on reports", **show)
    c.add_argument("--reports", action="append", required=True, help="folder of cases, folder of .txt, .txt or .jsonl; may be repeated")
    c.add_argument("--out", required=True, help="new folder for the model, in transformers layout")
    start = c.add_mutually_exclusive_group()
    start.add_argument("--base", default=CXR_BERT, help="where to start: hub name or local folder (sec. 4.1)")
    start.add_argument("--scratch", action="store_true", help="start from a small random BERT with its own vocabulary, for toy runs")
    c.add_argument("--epochs", type=int, default=5, help="passes over the reports (sec. 4.6)")
    c.add_argument("--steps", type=int, default=0, help="optimizer steps; 0: what --epochs makes")
    c.add_argument("--lr", type=float, default=0, help="highest learning rate; 0: 5e-5, or 1e-3 from scratch (not in the paper)")
    c.add_argument("--kept", type=float, default=0.0, help="share of the masked words that stay as they are, so that their states tell them; 0 is the paper's")
    c.add_argument("--held-out", type=float, default=0.1, help="share of subjects set apart for the final figures")
    c.add_argument("--seed", type=int, default=0, help="decides held-out subjects, order, swaps, masks and first weights")
    for name, default in dict(width=128, layers=4, heads=4, vocab=2000, dropout=0.1).items():
        c.add_argument(f"--{name}", type=type(default), default=default, help=f"{name} of the BERT from scratch")
    e = commands.add_parser("embed", help="report.txt -> text.npy", **show)
    e.add_argument("data", help="folder of cases")
    e.add_argument("--model", required=True, help="text model: folder or hub name")
    for c in c, e:
        c.add_argument("--tokens", type=int, default=TOKENS, help="N, tokens of a report (sec. 4.6)")
        c.add_argument("--batch", type=int, default=32, help="reports a step, over all processes")
        c.add_argument("--device", choices=("cuda", "cpu"), help="default whichever is there")
    with exits():
        a = p.parse_args(argv)
        a.device = choose_device(a.device)
        for name, value in vars(a).items():
            low, high = dict(steps=(0, 2 ** 31), tokens=(8, 2 ** 31), seed=(0, 2 ** 31), lr=(0, 1), held_out=(0, 1), kept=(0, 1), dropout=(0, 1)).get(name, (1, 2 ** 31))
            if type(value) in (int, float) and not low <= value < high:
                raise ValueError(f"--{name.replace('_', '-')} {value}; it is at least {low} and below {high}; change it")
        if a.command == "train" and a.width % a.heads:
            raise ValueError(f"--width {a.width}, --heads {a.heads}; heads divide the width; change one")
        {"train": train, "embed": embed}[a.command](a)


if __name__ == "__main__":
    main()
