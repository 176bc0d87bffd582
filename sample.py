"""Writes text with a trained model: samples to stdout, everything else to stderr.

    python sample.py --steps 300
    python sample.py --text "ROMEO:{64} the moon{32}"     # {n} is n unknown tokens, anywhere
    python sample.py --text "To be, or not"               # a text without {n} is continued
    python sample.py --order confidence --temperature 0.8 --watch
"""
import inspect
import os
import re
import sys
import time

import torch

from config import Config, SampleConfig, fail, hardware, load, replace
from data import Tokenizer, load_weights
from data import load as load_checkpoint
from diffusion import PROCESSES

cfg = hardware(load(SampleConfig))

# ------------------------------------------------------------------------------------------------------------
# the model

path = os.path.join(cfg.out_dir, "model.pt")
ckpt = load_checkpoint(path)
trained = replace(Config(**ckpt["config"]), device=cfg.device, dtype=cfg.dtype)
tokenizer = Tokenizer(ckpt["meta"])
model = PROCESSES[trained.process](trained, tokenizer.V)
load_weights(model, ckpt["model"], path)
model.to(cfg.device).eval()
n_params = sum(p.numel() for p in model.parameters())
print(f"{path}: {trained.process} diffusion, {n_params / 1e6:.2f} M parameters, "
      f"step {ckpt['step']}, bound {ckpt['nelbo']:.4f} nats/token, trained on {ckpt['meta']['source']}",
      file=sys.stderr)

names = "schedule", "order", "eta", "temperature", "top_k", "top_p"
settings = {name: getattr(cfg, name) for name in names}
for name in settings.keys() - inspect.signature(model.sample).parameters.keys():
    if settings.pop(name) != getattr(SampleConfig, name):
        fail(f"{name} is {getattr(cfg, name)!r}, but {trained.process} diffusion has no such setting")

# ------------------------------------------------------------------------------------------------------------
# what is known: the pieces of --text between its {n}

pieces = re.split(r"\{(\d+)\}", cfg.text)               # text, n, text, n, ..., text
ids, known = [], []
if sum(map(int, pieces[1::2])) > trained.block_size:
    fail(f"text asks for {sum(map(int, pieces[1::2]))} unknown tokens: this model writes up to "
         f"{trained.block_size} at a time")
for i, piece in enumerate(pieces):
    new = tokenizer.encode(piece) if i % 2 == 0 else [0] * int(piece)
    ids += new
    known += [i % 2 == 0] * len(new)
if len(pieces) == 1:                                    # no {n}: unknown to the end of the block
    rest = trained.block_size - len(ids)
    ids, known = ids + [0] * rest, known + [False] * rest
if len(ids) > trained.block_size or all(known):
    fail(f"text has {len(ids)} tokens, {len(known) - sum(known)} of them unknown: this model writes up to "
         f"{trained.block_size} at a time, and at least one must be unknown")
x = torch.tensor([ids] * cfg.num_samples, device=cfg.device)
known = torch.tensor([known] * cfg.num_samples, device=cfg.device)

# ------------------------------------------------------------------------------------------------------------
# the samples


def show(tokens, before, certainty):
    """Draws a state in the terminal: dim where it is noise, green where it just changed, plain elsewhere."""
    frame = []
    for new, old, sure in zip(tokens.tolist(), before.tolist(), certainty.tolist()):
        style = "2" if sure < 0.5 else "32" if new != old else "0"
        frame.append(f"\033[{style}m{tokenizer.decode([new]) if new < tokenizer.V else '·'}")
    print("\033[H\033[2J" + "".join(frame) + "\033[0m", file=sys.stderr, flush=True)
    time.sleep(0.05)


watch = cfg.watch and sys.stderr.isatty() and "NO_COLOR" not in os.environ
torch.manual_seed(cfg.seed)
start, calls, before = time.time(), -1, None            # the first state costs no network call
for tokens, certainty in model.sample(x, known, cfg.steps, **settings):
    calls += 1
    if watch:
        show(tokens[0], tokens[0] if before is None else before, certainty[0])
        before = tokens[0]
tokens = tokens.tolist()
seconds = time.time() - start
written = int((~known).sum())
print(f"{written} tokens in {calls} network calls, {seconds:.2f} s: {written / seconds:.0f} tokens/s",
      file=sys.stderr)
print(("\n" + "-" * 80 + "\n").join(tokenizer.decode(row) for row in tokens))
