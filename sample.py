"""Writes text with a trained model: samples to stdout, everything else to stderr.

    python sample.py --text "ROMEO:{64} the moon{32}"     # {n} is n unknown tokens, anywhere; {{ is a brace
    python sample.py --text "To be, or not"               # a text without unknown tokens is continued
    python sample.py --text scene.txt --length 1000       # in windows that overlap by half a block
    python sample.py --edit "To be, or not to be" --noise 0.4
    python sample.py --steps 300 --order confidence --temperature 0.8 --watch --svg moon.svg
"""
import inspect
import os
import re
import signal
import sys
from string import Formatter

import torch
from tqdm import tqdm

from config import SampleConfig, fail, hardware, load
from diffusion import load_model
from pictures import animation, show

sys.stdout.reconfigure(errors="replace")                # · or 世 where the terminal has no such character
# Ctrl-C and sample.py | head end it without a traceback; Windows has no SIGPIPE
for number in signal.SIGINT, getattr(signal, "SIGPIPE", signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)

cfg = hardware(load(SampleConfig))
path = f"{cfg.out_dir}/model.pt"
model, tokenizer, trained, ckpt = load_model(path, device=cfg.device, dtype=cfg.dtype)
block = trained.block_size
print(f"{path}: {trained.process} diffusion, step {ckpt['step']}, "
      f"bound {ckpt['nelbo']:.4f} nats/token, trained on {ckpt['meta']['source']}", file=sys.stderr)

# ---- how to sample: the settings that this process has; those of the other one must be left alone

has = inspect.signature(model.sample).parameters
settings = {name: value for name, value in vars(cfg).items() if name in has}
for name in "order", "threshold", "remask", "eta":
    value = getattr(cfg, name)
    if name not in has and value != getattr(SampleConfig, name):
        fail(f"{name} is {value!r}, but {trained.process} diffusion has no such setting")

# ---- what to start from: ids, and which of them are known


def read(text):
    """A text itself, or if it is the name of a file, what the file holds, without the last line's end."""
    if not os.path.isfile(text):
        return text
    try:
        with open(text, encoding="utf-8-sig", newline="") as f:                 # \r stays: alphabets may have it
            content = re.sub(r"\r?\n\Z", "", f.read())
    except (OSError, UnicodeDecodeError) as e:
        fail(f"{text!r} can't be read as UTF-8 text: {e}")
    return content or fail(f"{text!r} is empty: there is nothing to start from")


def parse(text):
    """The ids of a text and which are known, two lists; {n} stands for n unknown tokens, {{ and }} for braces."""
    ids, known = [], []
    try:
        for plain, n, _, _ in Formatter().parse(text):  # "a{3}b" is ("a", "3"), ("b", None)
            new = tokenizer.encode(plain)
            blanks = int(n or 0) * [tokenizer.V]
            ids += new + blanks
            known += len(new) * [True] + len(blanks) * [False]
    except (ValueError, MemoryError) as e:
        fail(f"{text[:80]!r} can't be read ({e}): {{9}} is 9 unknown tokens, and a brace is doubled")
    return ids, known


if cfg.text and cfg.edit:
    fail("text and edit each say what to start from: give one of them")
if cfg.edit:                # nothing is known, but the noise starts from this text, in which braces are braces
    ids = tokenizer.encode(read(cfg.edit))
    known = len(ids) * [False]
elif cfg.noise != SampleConfig.noise:
    fail("noise is for edit: give a text to rewrite")
else:                       # what lacks to the length is unknown; a text without blanks is continued
    settings["noise"] = 1.0
    ids, known = parse(read(cfg.text))
    length = cfg.length or (block if all(known) else 0)
    ids += (length - len(ids)) * [tokenizer.V]
    known += (length - len(known)) * [False]
if all(known) or cfg.length and cfg.length != len(ids):
    fail(f"this text has {len(ids)} tokens with the unknown ones: pass --length={len(ids) + all(known)}")
try:
    svg = open(cfg.svg or os.devnull, "w", encoding="utf-8")    # noqa: SIM115 (now, not when all is sampled)
except OSError as e:
    fail(f"{cfg.svg!r} can't be written: {e.strerror}")

# ---- sampling


def write(x, known):
    """Fills x (B, L) in steps, yielding its certainty; a long x in windows, of which half is known."""
    certainty = known.float()
    last = max(0, x.size(1) - block)
    for start in [*range(0, last, max(1, block // 2)), last]:
        window = slice(start, start + block)
        for tokens, sure in model.sample(x[:, window], known[:, window], **settings):
            x[:, window] = tokens
            certainty[:, window] = sure
            yield certainty
        known[:, window] = True


# as many samples at once as fit into a few GB
n_at_once = max(1, 2 ** 27 // (block * (tokenizer.V + 32 * trained.n_embd)))
in_terminal = sys.stderr.isatty()
watch = cfg.watch and in_terminal
film = []                               # the states of the first sample, for --watch and --svg
torch.manual_seed(-1 - cfg.seed)        # not as in training: the first noise would be the embeddings it drew
for done in range(0, cfg.num_samples, n_at_once):
    n = min(n_at_once, cfg.num_samples - done)
    x = torch.tensor([ids] * n, device=cfg.device)
    given = torch.tensor([known] * n, device=cfg.device)
    states = write(x, given)
    for certainty in tqdm(states, unit=" steps", leave=False, disable=watch or not in_terminal):
        if done == 0 and (watch or cfg.svg):
            texts = tokenizer.pieces(x[0].tolist())
            film.append((texts, certainty[0].tolist()))
            if watch:
                show(film[-2:][0], film[-1])
    for i, row in enumerate(x.tolist(), done):
        if i:
            print("-" * 80)
        print(tokenizer.decode(row), flush=True)
if film:
    every = len(film) // 48 + 1         # so many pictures are enough
    svg.write(animation(film[:-1:every] + film[-1:]))
