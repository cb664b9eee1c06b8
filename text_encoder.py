"""Medical BERT: a chest CT report becomes f_text, 192 vectors of 768 numbers, which stage 1 attends to.
Paper sec. 4.1: BERT is fine-tuned by two tasks at once, masked words and paired sections; numbers from sec. 4.6.

    torchrun --nproc_per_node=4 text_encoder.py train --reports data/train --out runs/text
    python text_encoder.py embed data/train --model runs/text      # report.txt -> text.npy: stage 1 never runs BERT
"""
import os
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import cases
from support.bert import (
    check_identity,
    check_new,
    from_scratch,
    hold_out,
    identity,
    join,
    keep,
    options,
    read_model,
    resume,
    save,
    warn,
    write_text,
)
from support.checks import has
from support.cli import exits, fast_bfloat16
from support.reports import load_reports, read_report, split_sections
from support.seeds import mixed

CXR_BERT = "microsoft/BiomedVLP-CXR-BERT-specialized"     # the paper's start (sec. 4.1), 768 wide
TOKENS = 192              # N, the tokens of a report that the UNet sees; not in the paper, the released code's
MASKED = 0.15             # share of a report's tokens that is masked in fine-tuning (sec. 4.1)


# --- from words to vectors ---

def pack(tokenizer, pairs, tokens):
    """B (findings, impression) pairs -> ids, kinds, mask (B,N), and a list of the B lengths before cutting

    ids: [CLS] Findings [SEP] Impression [SEP] [PAD] ...   kinds: 1 on the Impression   mask: True on real tokens
    A prompt, whose Impression is '', is one text of kind 0, as in the released code.
    not in the paper: sections are a text pair in training and use; the released code joins them to one text for use."""
    split = partial(tokenizer, add_special_tokens=False, verbose=False)
    findings, impressions = (split(list(texts))["input_ids"] for texts in zip(*pairs))
    ids = torch.full((len(pairs), tokens), tokenizer.pad_token_id)
    kinds, mask, lengths = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool), []
    for row, (f, i) in enumerate(zip(findings, impressions)):
        room = tokens - (3 if i else 2)                   # [CLS], and one [SEP] a section
        lengths.append(len(f) + len(i) + tokens - room)
        i = i[:max(room // 2, room - len(f))]             # over-long: Findings go first, Impression keeps half
        f = f[:room - len(i)]
        line = [tokenizer.cls_token_id, *f, tokenizer.sep_token_id, *([*i, tokenizer.sep_token_id] if i else [])]
        ids[row, :len(line)] = torch.tensor(line)
        mask[row, :len(line)] = True
        kinds[row, len(f) + 2:len(line)] = 1
    return ids, kinds, mask, lengths


class TextEncoder:
    """A frozen BERT (sec. 4.1).   encode(texts) -> context (B,N,width) float, mask (B,N) bool, True = real token"""

    def __init__(self, bert, tokenizer, tokens=TOKENS, device="cpu"):
        self.bert = bert.to(device).eval().requires_grad_(False)
        self.tokenizer, self.tokens, self.device = tokenizer, tokens, device
        self.width = bert.config.hidden_size

    def tokenise(self, texts):
        """Reports or prompts -> ids, kinds, mask (B,N). What the network will not see or not know is said on stderr.
        ValueError if one is empty."""
        pairs = [split_sections(text or "") for text in texts]
        if not all(map(any, pairs)):
            raise ValueError("an empty report; a report is text, 'Findings: ... Impression: ...' or a prompt; "
                             "write one")
        pairs = [pair if pair[0] else pair[::-1] for pair in pairs]      # an Impression alone is a prompt
        ids, kinds, mask, lengths = pack(self.tokenizer, pairs, self.tokens)
        warn(ids, mask, lengths, self.tokenizer.unk_token_id)
        return ids, kinds, mask

    @torch.no_grad()
    def hidden(self, ids, kinds, mask):
        """f_text, the last hidden state.   (B,N) each -> (B,N,width)
        By the mask, padding changes no real token; padding's own states stay, as in the released code."""
        ids, kinds, mask = ids.to(self.device), kinds.to(self.device), mask.to(self.device)
        return self.bert(input_ids=ids, token_type_ids=kinds, attention_mask=mask).last_hidden_state

    def encode(self, texts):
        ids, kinds, mask = self.tokenise(texts)
        return self.hidden(ids, kinds, mask).float(), mask.to(self.device)


def load(source=CXR_BERT, tokens=TOKENS, device="cpu", known=None):
    """Folder in transformers layout or hub name -> TextEncoder. ValueError unless it is a whole BERT for N = tokens.
    known: the name of the encoder that other weights were trained with; another one is warned of"""
    encoder = TextEncoder(*read_model(source, tokens), tokens, device)
    check_identity(encoder, source, known)
    return encoder


# --- the two tasks (sec. 4.1) ---

def seeded(seed, step):
    """The random numbers of one step."""
    return torch.Generator().manual_seed(mixed(seed, step))


def mask_words(ids, tokenizer, generator, kept=0.0):
    """Task 1: 15 % of each report's tokens become [MASK].   ids (B,N) -> ids with holes, chosen (B,N) bool
    [CLS], [SEP], [PAD], [UNK] are never chosen.
    not in the paper: a share `kept` of the chosen stays as it is and is predicted too, so the state of a word must
    encode that word. If all were masked, nothing would make the states of "large" and "small" differ."""
    words = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    count = (MASKED * words.sum(1, keepdim=True)).round().clamp(min=1)
    score = torch.rand(ids.shape, generator=generator).masked_fill(~words, 2)
    chosen = (score.argsort(1).argsort(1) < count) & words               # the `count` lowest scores of each row
    holes = chosen & (torch.rand(ids.shape, generator=generator) >= kept) if kept else chosen
    return ids.masked_fill(holes, tokenizer.mask_token_id), chosen


def another_impression(report, pool, generator):
    """The Impression of another subject. One with the same words would be labelled 'not paired' wrongly, so it is drawn
    again. ValueError if there is no other."""
    for _ in range(1000):
        other = pool[torch.randint(len(pool), (), generator=generator)]
        if other.subject != report.subject and other.impression != report.impression:
            return other.impression
    raise ValueError(f"report {report.subject}: no other subject has another Impression; half are swapped; add reports")


def swap_sections(reports, pool, generator):
    """Task 2: about half of the reports get another subject's Impression, from the pool.
    -> B (findings, impression) pairs, paired (B,) float, 1 = its own"""
    paired = torch.rand(len(reports), generator=generator) < 0.5
    pairs = [(r.findings, r.impression if own else another_impression(r, pool, generator))
             for r, own in zip(reports, paired)]
    return pairs, paired.float()


def make_batch(pairs, tokenizer, tokens, generator, kept=0.0):
    """B (findings, impression) pairs -> holes, kinds, mask, chosen, ids (B,N'), N' the longest pair's tokens"""
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
        """(B,N) each -> logits of words (M,vocabulary), for the M chosen tokens alone, and of pairs (B,)"""
        h = self.bert.bert(input_ids=holes, token_type_ids=kinds, attention_mask=mask).last_hidden_state
        return self.bert.cls(h[chosen]), self.paired(h[:, 0]).squeeze(1)                       # h: (B,N,width)


def masked_word_loss(logits, words):
    """-log p(word | the rest of the report), mean over the M chosen tokens.   logits: (M,vocabulary)   words: (M,)"""
    return F.cross_entropy(logits.float(), words)


def paired_section_loss(logits, paired):
    """-log p(paired or not | [CLS]), mean over reports.   logits, paired: (B,)"""
    return F.binary_cross_entropy_with_logits(logits.float(), paired)


def figures(word_logits, words, pair_logits, paired):
    """-> loss and accuracy of masked words, loss and accuracy of pairs"""
    return [masked_word_loss(word_logits, words).item(), (word_logits.argmax(1) == words).float().mean().item(),
            paired_section_loss(pair_logits, paired).item(), ((pair_logits > 0) == paired).float().mean().item()]


@torch.no_grad()
def evaluate(net, tokenizer, held_out, tokens, batch, frequent):
    """Means over reports never trained on, each once with its own Impression and once with another held-out subject's.
    Chance for pairs is 0.5; for words it is the accuracy of always answering `frequent`, training's commonest.
    -> {"words": {loss, accuracy, chance}, "pairs": the same}"""
    net.eval()
    device, generator, rows = net.paired.weight.device, seeded(0, 0), []
    held_out = held_out * max(1, 200 // len(held_out))    # few reports: many masks and swaps of each
    for i in range(0, len(held_out), batch):
        part = held_out[i:i + batch]
        pairs = [(r.findings, r.impression) for r in part]
        pairs += [(r.findings, another_impression(r, held_out, generator)) for r in part]
        holes, kinds, mask, chosen, ids = (x.to(device) for x in make_batch(pairs, tokenizer, tokens, generator))
        words, paired = ids[chosen], torch.tensor([1.0, 0.0], device=device).repeat_interleave(len(part))
        word_logits, pair_logits = net(holes, kinds, mask, chosen)
        chance = (words == frequent).float().mean().item()
        rows.append(figures(word_logits, words, pair_logits, paired) + [chance, len(part)])
    means = np.average(rows, 0, weights=[row[-1] for row in rows]).tolist()
    return {"words": dict(loss=means[0], accuracy=means[1], chance=means[4]),
            "pairs": dict(loss=means[2], accuracy=means[3], chance=0.5)}


# --- fine-tuning (sec. 4.1, 4.6) ---

def rate(step, steps):
    """Share of --lr at a step.   not in the paper: up over a tenth of the steps, then linearly down, as BERT's own"""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def train(a):
    """Fine-tune a BERT on reports, in one process or in several by torchrun.   a: the options of `train`"""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out = Path(a.out)

    # the reports, those of some subjects held out; what cannot work is refused now, not after the training
    check_new(out)
    reports, held_out = hold_out(a, load_reports(a.reports), seeded(a.seed, 0), world)
    for r in held_out:
        another_impression(r, held_out, seeded(a.seed, 0))

    # the processes, the network, its optimizer
    device = join(a.device, world)
    torch.manual_seed(a.seed)
    if a.scratch:
        texts = [f"{r.findings} {r.impression}" for r in reports]
        bert, tokenizer = from_scratch(texts, a.tokens, a.width, a.layers, a.heads, a.vocab, a.dropout)
    else:
        bert, tokenizer = read_model(a.base, a.tokens, masked_words=True)
    net = model = TwoTasks(bert).to(device)
    if world > 1:
        model = DistributedDataParallel(net, device_ids=[device] if a.device == "cuda" else None)
    per_epoch = len(reports) // a.batch
    steps = a.steps or a.epochs * per_epoch
    opt = torch.optim.AdamW(net.parameters(), lr=a.lr or (1e-3 if a.scratch else 5e-5), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, partial(rate, steps=steps))

    model.train()
    state, recent = dict(net=net, opt=opt, schedule=schedule), deque(maxlen=50)
    begun = resume(out, a, reports, state, device)        # where it stopped, if it has begun
    bar = tqdm(range(begun, steps), initial=begun, total=steps, desc="train text", disable=rank > 0, mininterval=2)
    for step in bar:
        # a batch: order, swaps, masks and dropout depend on the step, not on the past
        epoch, i = divmod(step, per_epoch)
        order = torch.randperm(len(reports), generator=seeded(a.seed, 2 ** 31 + epoch))[i * a.batch:(i + 1) * a.batch]
        generator = seeded(a.seed, step)
        torch.manual_seed(mixed(a.seed, step * world + rank))
        pairs, paired = swap_sections([reports[j] for j in order], reports, generator)
        batch = (*make_batch(pairs, tokenizer, a.tokens, generator, a.kept), paired)
        holes, kinds, mask, chosen, ids, paired = (x[rank::world].to(device) for x in batch)
        words = ids[chosen]                               # (M,)

        # forward and backward, both tasks at once
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and fast_bfloat16("cuda")):
            word_logits, pair_logits = model(holes, kinds, mask, chosen)
        loss = masked_word_loss(word_logits, words) + paired_section_loss(pair_logits, paired)
        loss.backward()                                   # not in the paper: both losses weigh the same

        # the update
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if not torch.isfinite(norm):                      # after all-reduce: every process sees it alike
            raise RuntimeError(f"step {step + 1}: the gradient is not finite; nothing was written; "
                               "try again with a lower --lr")
        opt.step()
        opt.zero_grad()
        schedule.step()

        # what a person sees: losses and accuracies, means of the last 50 steps
        recent.append(figures(word_logits, words, pair_logits, paired))
        bar.set_postfix_str("words {:.2f} {:.0%}, pairs {:.2f} {:.0%}".format(*np.mean(recent, 0)), refresh=False)
        if rank == 0 and (step + 1) % a.save_every == 0:
            keep(out, a, reports, state, step + 1)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return

    # what it learned, on reports that it never saw, and the model
    ids = pack(tokenizer, [(r.findings, r.impression) for r in reports], a.tokens)[0]
    frequent = ids[~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))].mode().values
    result = evaluate(net, tokenizer, held_out, a.tokens, a.batch, frequent)
    save(out, bert, tokenizer, dict(arguments=vars(a), steps=steps, training_reports=len(reports),
                                    held_out_reports=len(held_out), held_out=result))
    for task, f in result.items():
        print(f"held-out {task}: loss {f['loss']:.3f}, accuracy {f['accuracy']:.1%}, chance {f['chance']:.1%}")
    print(f"wrote {out}: {steps} steps on {len(reports)} reports, {len(held_out)} held out; "
          f"a report becomes ({a.tokens},{bert.config.hidden_size})")


# --- embedding a data folder ---

def embed(a):
    """Every report's text.npy, (N,width) float16. All are read and packed before the first is written."""
    folders = [case for case in cases(a.data) if "text" in has(case)]
    if not folders:
        raise ValueError(f"{a.data}: no cases with a report; a case is a folder with ct.npy and report.txt; "
                         "try python phantom.py --out data/train --n 512")
    texts = [read_report(folder / "report.txt") for folder in folders]
    locked = [folder for folder in folders if not os.access(folder, os.W_OK)]
    if locked:
        raise ValueError(f"{locked[0]}: cannot be written; text.npy lies beside report.txt; change its permissions")
    encoder = load(a.model, a.tokens, a.device)
    packed, name = encoder.tokenise(texts), identity(encoder)
    for i in tqdm(range(0, len(folders), a.batch), desc="embed", unit="batch", mininterval=2):
        f_text = encoder.hidden(*[x[i:i + a.batch] for x in packed]).half().cpu().numpy()      # (b,N,width)
        for folder, text, own in zip(folders[i:], texts[i:], f_text):
            write_text(folder, own, text, name)
    print(f"wrote text.npy, ({a.tokens},{encoder.width}) float16, in {len(folders)} cases of {a.data}")


# --- command line ---

def main(argv=None):
    with exits():
        a = options(argv, __doc__, CXR_BERT, TOKENS)
        {"train": train, "embed": embed}[a.command](a)


if __name__ == "__main__":
    main()
