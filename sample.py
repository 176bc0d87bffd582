"""Writes text with a trained model: samples to stdout, everything else to stderr.

    python sample.py --text "ROMEO:{64} the moon{32}"     # {n} is n unknown tokens, anywhere; {{ is a brace
    python sample.py --text "To be, or not"               # a text without unknown tokens is continued
    python sample.py --length 1000                        # in windows that overlap by half a block
    python sample.py --edit "To be, or not to be" --noise 0.4
    python sample.py --steps 300 --order confidence --temperature 0.8 --watch --svg moon.svg
"""
import inspect
import os
import re
import signal
import sys

import torch
from tqdm import tqdm

from config import SampleConfig, fail, hardware, load
from diffusion import load_model
from pictures import animation, show

sys.stdout.reconfigure(errors="replace")                # · or 世 where the terminal has no such character
for number in signal.SIGINT, getattr(signal, "SIGPIPE", signal.SIGINT):        # Windows lacks SIGPIPE
    signal.signal(number, signal.SIG_DFL)               # Ctrl-C and sample.py | head end it in silence
cfg = hardware(load(SampleConfig))
path = os.path.join(cfg.out_dir, "model.pt")
model, tokenizer, trained, about = load_model(path, device=cfg.device, dtype=cfg.dtype)
block, n_params = trained.block_size, sum(p.numel() for p in model.parameters())
print(f"{path}: {trained.process} diffusion, {n_params / 1e6:.2f} M parameters, {about}", file=sys.stderr)

names = "schedule", "guidance", "order", "threshold", "remask", "eta", "temperature", "top_k", "top_p"
settings = {name: getattr(cfg, name) for name in names}
for name in settings.keys() - inspect.signature(model.sample).parameters.keys():
    if settings.pop(name) != getattr(SampleConfig, name):
        fail(f"{name} is {getattr(cfg, name)!r}, but {trained.process} diffusion has no such setting")

# ---- what is known: the text between its {n}; when editing nothing is, but the text is where noise starts
if bool(cfg.text) + bool(cfg.prompt_file) + bool(cfg.edit) > 1:
    fail("text, prompt_file and edit each say what to start from: give one of them")
text, file = cfg.text or cfg.edit, cfg.prompt_file or (cfg.edit if os.path.isfile(cfg.edit) else "")
try:
    if file:
        with open(file, encoding="utf-8-sig", newline="") as f:         # \r stays: alphabets may have it
            text = re.sub(r"\r?\n\Z", "", f.read()) or fail(f"{file!r} is empty: nothing to start from")
    if cfg.svg:
        open(cfg.svg, "a").close()                      # now, not when all is sampled
except (OSError, UnicodeDecodeError) as e:
    fail(f"{getattr(e, 'filename', file)!r} can't be used: {getattr(e, 'strerror', e)}")
if cfg.edit:
    settings["noise"] = cfg.noise
    text = text.replace("{", "{{").replace("}", "}}")   # it is meant as it is
elif cfg.noise != SampleConfig.noise:
    fail("noise is for edit: give a text to rewrite")

# text, n, text, n, ..., text; meanwhile {{ is half a character, which no text has
parts = re.split(r"\{(\d{1,18})\}", text.replace("{{", "\ud800"))
pieces = [tokenizer.encode(part.replace("\ud800", "{").replace("}}", "}")) for part in parts[::2]]
gaps = [*map(int, parts[1::2]), 0]
total, length = sum(map(len, pieces)) + sum(gaps), cfg.length or block
if not cfg.edit and (cfg.length or not any(gaps)):      # unknown to the end, which is one token or more
    gaps[-1] = max(length - total, 0 if any(gaps) else 1)
    total += gaps[-1]
if total > length or cfg.edit and total < cfg.length:
    fail(f"this text needs {total} tokens with the unknown ones, and gets {length}: pass --length={total}")
ids = [i for piece, gap in zip(pieces, gaps) for i in piece + [tokenizer.V] * gap]
known = [i < tokenizer.V and not cfg.edit for i in ids]
if cfg.guidance and not any(known):
    fail("guidance follows what is known, and nothing is: give a text, or leave it out")

def write(x, known):
    """Fills x (B, L) in steps, yielding its certainty (B, L); a long x in windows, of which half is known."""
    certainty, last = known.float(), max(0, x.size(1) - block)
    for start in [*range(0, last, max(1, block // 2)), last]:
        window = slice(start, start + block)
        for tokens, sure in model.sample(x[:, window], known[:, window], cfg.steps, **settings):
            x[:, window], certainty[:, window] = tokens, sure
            yield certainty
        known[:, window] = True

# so many samples at once that they fit into a few GB
n_at_once = max(1, 2 ** 27 // (min(len(ids), block) * (tokenizer.V + 32 * trained.n_embd)))
watch = cfg.watch and sys.stderr.isatty() and "NO_COLOR" not in os.environ
film, every = [], 1         # of the first sample: the state at the start, each 2nd (4th, ...), the latest
bar = tqdm(desc="network calls", delay=0 if sys.stderr.isatty() and not watch else 1e9)    # it counts unseen
model.net.register_forward_hook(lambda *_: bar.update() and None)       # anything else would be its output
torch.manual_seed(-1 - cfg.seed)    # not as in training: the first noise would be the embeddings it drew
for done in range(0, cfg.num_samples, n_at_once):
    n = min(n_at_once, cfg.num_samples - done)
    x, given = torch.tensor([[ids] * n, [known] * n], device=cfg.device)
    for i, certainty in enumerate(write(x, given.bool())):
        if not done and (watch or cfg.svg):
            state = tokenizer.pieces(x[0].tolist()), certainty[0].tolist()
            if watch:
                show(film[-1] if film else state, state)
            film[-(-i // every):] = [state]
            if len(film) == 49:
                del film[1::2]
                every *= 2
    for n, row in enumerate(x.tolist(), done):
        print(("-" * 80 + "\n" if n else "") + tokenizer.decode(row), flush=True)
bar.close()
seconds, written = bar.format_dict["elapsed"], cfg.num_samples * known.count(False)
print(f"{written} tokens in {bar.n} network calls, {seconds:.2f} s: {written / seconds:.0f} tokens/s",
      file=sys.stderr)
if cfg.svg:
    with open(cfg.svg, "w", encoding="utf-8") as f:
        f.write(animation(film))
