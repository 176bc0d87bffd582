"""Writes text with a trained model: samples to stdout, everything else to stderr.

    python sample.py --steps 300
    python sample.py --text "ROMEO:{64} the moon{32}"     # {n} is n unknown tokens, anywhere
    python sample.py --text "To be, or not"               # a text without {n} is continued
    python sample.py --length 1000                        # in windows that overlap by half a block
    python sample.py --edit "To be, or not to be" --noise 0.4
    python sample.py --order confidence --temperature 0.8 --watch --svg moon.svg
"""
import inspect
import os
import re
import signal
import sys
import time

import torch
from tqdm import tqdm

from config import SampleConfig, fail, hardware, load
from data import load_model
from pictures import Film

sys.stdout.reconfigure(errors="replace")                # · or 世 where the terminal has no such character
if hasattr(signal, "SIGPIPE"):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # sample.py | head ends in silence
cfg = hardware(load(SampleConfig))

# ------------------------------------------------------------------------------------------------------------
# the model

path = os.path.join(cfg.out_dir, "model.pt")
model, tokenizer, trained, about = load_model(path, device=cfg.device, dtype=cfg.dtype)
block = trained.block_size
n_params = sum(p.numel() for p in model.parameters())
print(f"{path}: {trained.process} diffusion, {n_params / 1e6:.2f} M parameters, {about}", file=sys.stderr)

names = "schedule", "guidance", "order", "threshold", "remask", "eta", "temperature", "top_k", "top_p"
settings = {name: getattr(cfg, name) for name in names}
for name in settings.keys() - inspect.signature(model.sample).parameters.keys():
    if settings.pop(name) != getattr(SampleConfig, name):
        fail(f"{name} is {getattr(cfg, name)!r}, but {trained.process} diffusion has no such setting")

# ------------------------------------------------------------------------------------------------------------
# what is known: the pieces of the text between its {n}; when editing nothing is, but x matters


def read(file):
    try:
        with open(file, encoding="utf-8") as f:
            text = f.read().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as e:
        fail(f"{file!r} can't be read as UTF-8 text: {getattr(e, 'strerror', None) or e}")
    return text or fail(f"{file!r} is empty: there is no text to start from")


if bool(cfg.text) + bool(cfg.prompt_file) + bool(cfg.edit) > 1:
    fail("text, prompt_file and edit each say what to start from: give one of them")
longest = cfg.length or block
if cfg.edit:
    parts = [read(cfg.edit) if os.path.isfile(cfg.edit) else cfg.edit]
    settings["noise"] = cfg.noise
else:                                                   # text, n, text, n, ..., text
    parts = re.split(r"\{(\d{1,18})\}", read(cfg.prompt_file) if cfg.prompt_file else cfg.text)
pieces, gaps = [tokenizer.encode(part) for part in parts[::2]], [int(n) for n in parts[1::2]]
total = sum(map(len, pieces)) + sum(gaps)
if total > longest:
    fail(f"the text has {total} tokens, of which at most {longest} are written: pass --length={total} "
         f"for windows of {block}")
if not cfg.edit and (cfg.length or not gaps):           # unknown to the end
    gaps, pieces = [*gaps, longest - total], [*pieces, []]
ids, known = list(pieces[0]), [not cfg.edit] * len(pieces[0])
for gap, piece in zip(gaps, pieces[1:]):
    ids += [tokenizer.V] * gap + piece
    known += [False] * gap + [True] * len(piece)
if all(known):
    fail(f"the text has {len(ids)} tokens, none of them unknown: put {{n}} where n are to be written, or "
         "pass a larger --length")
if cfg.guidance and not any(known):
    fail("guidance follows what is known, and nothing is: give a text")
if cfg.noise != SampleConfig.noise and not cfg.edit:
    fail("noise is for edit: give a text to rewrite")
if cfg.edit and total < cfg.length:
    fail(f"length is {cfg.length}, but edit keeps the text's {total} tokens: leave it out")
if cfg.svg:
    try:
        open(cfg.svg, "a").close()                      # now, not when all is sampled
    except OSError as e:
        fail(f"svg {cfg.svg!r} can't be written: {e.strerror}")

# ------------------------------------------------------------------------------------------------------------
# the samples


def write(x, known):
    """Yields (tokens, certainty), (B, L) each, as the model does; longer texts a block at a time, of which at
    least half is known by then."""
    certainty = known.float()
    last = max(0, x.size(1) - block)
    for start in [*range(0, last, max(1, block // 2)), last]:
        window = slice(start, start + block)
        for tokens, sure in model.sample(x[:, window], known[:, window], cfg.steps, **settings):
            x, certainty = x.clone(), certainty.clone()
            x[:, window], certainty[:, window] = tokens, sure
            yield x, certainty
        known = known.clone()
        known[:, window] = True


def count(*_):
    global calls
    calls += 1
    bar.update()


# so many samples at once that they fit into a few GB
n_at_once = max(1, 2 ** 27 // (min(len(ids), block) * (tokenizer.V + 32 * trained.n_embd)))
watch = cfg.watch and sys.stderr.isatty() and "NO_COLOR" not in os.environ
film = Film(tokenizer, live=watch)                      # of the first sample
calls, interrupted = 0, False
bar = tqdm(desc="network calls", disable=True if watch else None)
model.net.register_forward_hook(count)
torch.manual_seed(-1 - cfg.seed)    # not as in training: the first noise would be the embeddings it drew
start, done = time.time(), 0
while done < cfg.num_samples and not interrupted:
    n = min(n_at_once, cfg.num_samples - done)
    tokens, given = torch.tensor([[ids] * n, [known] * n], device=cfg.device)
    try:
        for tokens, certainty in write(tokens, given.bool()):  # noqa: B020 (goes on from there)
            if not done and (watch or cfg.svg):
                film.add(tokens[0].tolist(), certainty[0].tolist())
        rows = tokens.tolist()                          # waits for the device
    except KeyboardInterrupt:
        interrupted, rows = True, tokens.tolist()
    for row in rows:
        print(("-" * 80 + "\n" if done else "") + tokenizer.decode(row), flush=True)
        done += 1
bar.close()
seconds = time.time() - start
written = done * (len(known) - sum(known))
print(f"{written} tokens in {calls} network calls, {seconds:.2f} s: {written / seconds:.0f} tokens/s"
      if not interrupted else f"interrupted after {calls} network calls: the last samples are not done",
      file=sys.stderr)
if cfg.svg and film.last:
    with open(cfg.svg, "w", encoding="utf-8") as f:
        f.write(film.svg())
