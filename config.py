"""Every setting: defaults here, then a config file of plain assignments, then flags; --help lists them all.

    python train.py config/shakespeare_masked.py --max_iters=2000 --seed 7
"""
import argparse
import inspect
import os
import re
import runpy
from dataclasses import dataclass, fields

import torch

# The type of a setting is a function from text to its value; it raises ValueError for what it must not be.

def number(convert, low, high=1e15):
    def read(text):
        if not low <= convert(text) <= high:            # nan, too
            raise ValueError
        return convert(text)
    read.must = f"a {'whole ' * (convert is int)}number from {low:g} to {high:g}"
    return read

def choice(*values):
    def read(text):
        return values[[*map(str, values)].index(text)]  # index() raises ValueError, too
    read.must = f"one of {', '.join(map(str, values))}"
    return read

positive, count, amount = number(int, 1), number(int, 0), number(float, 0)
share, not_all, not_none = number(float, 0, 1), number(float, 0, 1 - 1e-6), number(float, 1e-6, 1)
truth, maybe, floats = choice(True, False), choice(True, False, None), choice("auto", "bfloat16", "float32")

class Checked:
    def __post_init__(self):
        for f in fields(self):
            try:
                setattr(self, f.name, f.type(str(getattr(self, f.name))))
            except ValueError:
                raise ValueError(f"{f.name} is {getattr(self, f.name)!r}: it must be {f.type.must}") from None

@dataclass
class Config(Checked):
    """Settings of train.py."""
    out_dir: str = "out"                        # where ckpt.pt, model.pt and log.csv go
    dataset: str = "shakespeare"                # data/<dataset>/ holds train.bin, val.bin and meta.json
    init_from: str = "scratch"                  # scratch, resume (from ckpt.pt), or a model.pt to start from
    eval_only: truth = False                    # print the bound and the table by noise level, and stop
    eval_interval: positive = 1000              # steps between evaluations; each also writes the checkpoints
    eval_iters: number(int, 2) = 64             # batches of an evaluation, the same ones each time
    log_interval: positive = 10                 # steps between updates of the progress bar
    process: choice("masked", "embed") = "masked"   # which diffusion; the names are those in diffusion.py
    embed_dim: positive = 16                    # of embed: width of the noised embeddings
    batch_size: positive = 32                   # sequences in a micro-batch on one device; even
    gradient_accumulation_steps: positive = 1   # micro-batches of an optimizer step, over all devices
    block_size: positive = 128                  # tokens in a sequence
    n_layer: positive = 3
    n_head: positive = 3
    n_embd: positive = 192                      # channels: an even number for each head
    dropout: not_all = 0.0
    learning_rate: amount = 0.01                # of Muon, for the matrices of the blocks
    adam_lr: amount = 0.005                     # of AdamW, for everything else
    weight_decay: amount = 0.1                  # of Muon only
    grad_clip: amount = 1.0                     # the gradient's greatest norm; 0: no limit
    max_iters: count = 3000                     # optimizer steps
    warmup_iters: count = 50                    # linear warm-up; the last 60 % decay linearly to zero
    ema_decay: not_all = 0.99                   # running average of the weights, which is what is evaluated
    device: str = "auto"                        # cuda, cuda:1, mps, cpu; auto: the first of these there is
    dtype: floats = "auto"                      # auto: bfloat16 where the chip has it, else float32
    compile: maybe = None                       # torch.compile; None: on CUDA only
    seed: count = 1337                          # of weights, crops, times and noise

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % (pairs := 2 * self.n_head):
            raise ValueError(f"n_embd is {self.n_embd}: n_head {self.n_head} needs a multiple of {pairs}")
        if self.batch_size % 2:
            raise ValueError(f"batch_size is {self.batch_size}: it must be even, for times in pairs t, 1 - t")

@dataclass
class SampleConfig(Checked):
    """Settings of sample.py."""
    out_dir: str = "out"                        # loads out_dir/model.pt
    text: str = ""                              # what is given; {n}: n unknown tokens; {{: a brace
    prompt_file: str = ""                       # a file to read text from
    edit: str = ""                              # text, or a file of it, to noise and denoise: it is rewritten
    noise: not_none = 0.5                       # of edit: from near 0 (hardly) to 1 (nothing is left)
    length: number(int, 0, 1e6) = 0             # tokens; 0: a block. Beyond it, windows half a block apart
    num_samples: positive = 4
    steps: number(int, 1, 1e6) = 128            # network calls a block; masked: one an unknown token at most
    seed: count = 1337
    temperature: amount = 1.0                   # below 1: more likely text; 0: always the likeliest token
    top_k: count = 0                            # draw from the k likeliest tokens; 0: from all
    top_p: not_none = 1.0                       # draw from the fewest tokens with this probability together
    schedule: choice("linear", "cosine", "squared_cosine", "exponential") = "linear"    # grid of t
    guidance: amount = 0.0                      # above 0: follow the text closely; a second call each step
    order: choice("random", "confidence", "margin", "entropy") = "random"   # of masked: what comes first
    threshold: not_none = 1.0                   # of masked: a step also reveals all tokens surer than this
    remask: not_all = 0.0                       # of masked: share of revealed tokens that a step takes back
    eta: share = 1.0                            # of embed: from 0 (deterministic) to 1 (ancestral)
    watch: truth = False                        # play it in the terminal
    svg: str = ""                               # a file to write the first sample to, as an animation
    device: str = "auto"                        # as in train.py
    dtype: floats = "auto"

def fail(sentence):
    """Ends the program with one sentence on stderr and exit code 1."""
    raise SystemExit(f"error: {sentence}")

def load(cls, argv=None, defaults=None):
    """A cls from its defaults (or a dict of others), the config file, the flags; exits on what is wrong."""
    comments = dict(re.findall(r"(?m)^    (\w+): .*?  # (.*)$", inspect.getsource(cls).replace("%", "%%")))
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: fail(f"{message} (--help lists all settings)")
    parser.add_argument("config", nargs="?", help="a Python file of assignments, name = value")
    for f in fields(cls):
        bare = {"nargs": "?", "const": True} if f.type in (truth, maybe) else {}        # bare: True
        parser.add_argument(f"--{f.name}", metavar=repr(f.default), help=comments.get(f.name), **bare)
    settings = vars(parser.parse_intermixed_args(argv))                         # the given ones, as text
    try:
        if path := settings.pop("config", None):
            file = [f"--{name}={value}" for name, value in runpy.run_path(path).items() if name[0] != "_"]
            settings = vars(parser.parse_intermixed_args(file)) | settings
        return cls(**(defaults or {}) | settings)
    except Exception as e:  # noqa: BLE001 (the config file is the user's code)
        fail(e if type(e) is ValueError else f"{path} can't be read: {type(e).__name__}: {e}")

def hardware(cfg):
    """cfg with device, dtype and compile decided for this machine and process; exits where it lacks one."""
    if cfg.device == "auto":
        cfg.device = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
    if cuda := cfg.device.startswith("cuda"):           # under torchrun each process has a GPU of its own
        cfg.device = f"cuda:{os.environ.get('LOCAL_RANK') or cfg.device[5:] or 0}"
    try:
        torch.zeros(1, device=cfg.device)
    except (RuntimeError, AssertionError):
        fail(f"device is {cfg.device!r}, which isn't here: try 'auto', and one process for each GPU at most")
    if cuda:
        torch.cuda.set_device(cfg.device)               # which pinning, NCCL and get_device_name() go by
    if cfg.dtype == "auto":
        fast = torch.cuda.is_bf16_supported(False) if cuda else torch.cpu._is_avx512_bf16_supported()
        cfg.dtype = "bfloat16" if fast else "float32"
    if isinstance(cfg, Config) and cfg.compile is None:
        cfg.compile = cuda
    return cfg
