"""Every setting: defaults here, then a config file of plain assignments, then flags.

    python train.py config/shakespeare_masked.py --max_iters=2000 --seed 7
    python train.py --help
"""
import argparse
import contextlib
import inspect
import os
import re
import runpy
import shutil
from dataclasses import dataclass, fields, replace

import torch
from torch.utils._triton import has_triton

# The type of a setting is a function from text to its value, which raises ValueError with what it must be.

def number(convert, low, high=1e15):
    def read(text):
        with contextlib.suppress(ValueError):
            if low <= (value := convert(text)) <= high:
                return value
        raise ValueError(f"a {'whole ' * (convert is int)}number from {low:g} to {high:g}")
    return read


def choice(*values):
    def read(text):
        if text not in map(str, values):
            raise ValueError("one of " + ", ".join(map(str, values)))
        return values[[*map(str, values)].index(text)]
    return read


positive, count, amount = number(int, 1), number(int, 0), number(float, 0)
share, not_all, not_none = number(float, 0, 1), number(float, 0, 1 - 1e-6), number(float, 1e-6, 1)
truth, maybe, precision = choice(True, False), choice(True, False, None), choice("auto", "bfloat16", "float32")


class Checked:
    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            try:
                setattr(self, f.name, f.type(str(value)))
            except ValueError as e:
                raise ValueError(f"{f.name} is {value!r}: it must be {e}") from None


@dataclass
class Config(Checked):
    """Settings of train.py."""
    out_dir: str = "out"                        # where ckpt.pt, model.pt and log.csv go
    dataset: str = "shakespeare"                # data/<dataset>/ holds train.bin, val.bin and meta.json
    init_from: str = "scratch"                  # scratch, resume (out_dir/ckpt.pt), or a model.pt to start from
    eval_only: truth = False                    # print the bound and the table by noise level, and stop
    eval_interval: positive = 1000              # steps between evaluations; each also writes the checkpoints
    eval_iters: number(int, 2) = 64             # batches of an evaluation, the same ones each time
    log_interval: positive = 10                 # steps between updates of the progress bar
    process: choice("masked", "embed") = "masked"   # which diffusion; the names are those in diffusion.py
    embed_dim: positive = 16                    # of embed: width of the noised embeddings
    batch_size: positive = 32                   # sequences in a micro-batch on one device; even
    gradient_accumulation_steps: positive = 1   # micro-batches in an optimizer step, over all devices together
    block_size: positive = 128                  # tokens in a sequence
    n_layer: positive = 3
    n_head: positive = 3
    n_embd: positive = 192                      # channels: an even number for each head
    dropout: not_all = 0.0
    learning_rate: amount = 0.01                # of Muon, for the matrices of the blocks
    adam_lr: amount = 0.005                     # of AdamW, for everything else
    weight_decay: amount = 0.1                  # of Muon only
    beta1: not_all = 0.9                        # of AdamW
    beta2: not_all = 0.95
    grad_clip: amount = 1.0                     # the gradient's greatest norm; 0: no limit
    max_iters: count = 3000                     # optimizer steps
    warmup_iters: count = 50                    # linear warm-up; the last 60 % decay linearly to zero
    ema_decay: not_all = 0.99                   # running average of the weights, which is what is evaluated
    device: str = "auto"                        # cuda, cuda:1, mps, cpu; auto: the first of these there is
    dtype: precision = "auto"                   # auto: bfloat16 where the chip has it, else float32
    compile: maybe = None                       # torch.compile; None: on CUDA only
    seed: count = 1337                          # of weights, crops, times and noise

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd is {self.n_embd}: with n_head {self.n_head} it must be a multiple of "
                             f"{2 * self.n_head}, for a whole, even number of channels in each head")
        if self.batch_size % 2:
            raise ValueError(f"batch_size is {self.batch_size}: it must be even, for times in pairs t, 1 - t")


@dataclass
class SampleConfig(Checked):
    """Settings of sample.py."""
    out_dir: str = "out"                        # loads out_dir/model.pt
    text: str = ""                              # what is given; {n} is n unknown tokens, {{ a brace; '': nothing
    prompt_file: str = ""                       # a file to read text from
    edit: str = ""                              # text, or a file of it, to noise and denoise: it is rewritten
    noise: not_none = 0.5                       # of edit: how far, from near 0 (hardly) to 1 (nothing is left)
    length: number(int, 0, 1e6) = 0             # tokens; 0: a block. Beyond it, windows with half a block known
    num_samples: positive = 4
    steps: number(int, 1, 1e6) = 128            # network calls a block; masked: one an unknown token at most
    seed: count = 1337
    temperature: amount = 1.0                   # below 1: more likely text; 0: always the likeliest token
    top_k: count = 0                            # draw from the k likeliest tokens; 0: from all
    top_p: not_none = 1.0                       # draw from the fewest tokens that hold this share of probability
    schedule: choice("linear", "cosine", "squared_cosine", "exponential") = "linear"    # grid of t
    guidance: amount = 0.0                      # above 0: follow the text more closely; a second call each step
    order: choice("random", "confidence", "margin", "entropy") = "random"   # of masked: what is revealed first
    threshold: not_none = 1.0                   # of masked: a step also reveals all tokens surer than this
    remask: not_all = 0.0                       # of masked: share of revealed tokens that a step takes back
    eta: share = 1.0                            # of embed: from 0 (deterministic) to 1 (ancestral)
    watch: truth = False                        # play it in the terminal
    svg: str = ""                               # a file to write the first sample to, as an animation
    device: str = "auto"                        # as in train.py
    dtype: precision = "auto"


def fail(sentence):
    """Ends the program with one sentence on stderr and exit code 1."""
    raise SystemExit(f"error: {sentence}")


def load(cls, argv=None, defaults=None):
    """A cls (Config or SampleConfig) from its defaults or a dict of others, then the config file in argv, if
    any, then the flags: --key value or --key=value; a bare --key means True. Exits on what is wrong."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = lambda message: fail(f"{message} (--help lists all settings)")
    parser.add_argument("config", nargs="?", help="a Python file of assignments, name = value")
    for f in fields(cls):
        bare = {"nargs": "?", "const": True} if f.type in (truth, maybe) else {}
        parser.add_argument(f"--{f.name}", metavar=repr(f.default), **bare,
                            help=comments.get(f.name, "").replace("%", "%%"))
    settings = vars(parser.parse_intermixed_args(argv))
    if path := settings.pop("config", None):
        try:
            file = runpy.run_path(path).items()
        except Exception as e:  # noqa: BLE001 (the file is the user's code)
            fail(f"{path} can't be read as a config file: {type(e).__name__}: {e}")
        file = [f"--{name}={value}" for name, value in file if not name.startswith("_")]
        settings = vars(parser.parse_intermixed_args(file)) | settings
    try:
        return cls(**(defaults or {}) | settings)
    except ValueError as e:
        fail(e)


def hardware(cfg):
    """cfg with device, dtype and (where it has one) compile decided for this machine and process, whose GPU
    becomes the current one. Exits where the machine lacks what is asked for."""
    device, dtype, compiled = cfg.device, cfg.dtype, getattr(cfg, "compile", False)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if cuda := device.startswith("cuda"):               # under torchrun each process has a GPU of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK') or device[5:] or 0}"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        fail(f"device is {device!r}: this machine doesn't have it; leave it at 'auto', and start at most one "
             "process for each GPU")
    if cuda:
        torch.cuda.set_device(device)
    if dtype == "auto":
        fast = torch.cuda.is_bf16_supported(False) if cuda else (
            device == "cpu" and torch.cpu._is_avx512_bf16_supported())
        dtype = "bfloat16" if fast else "float32"
    compiled = cuda if compiled is None else compiled
    if compiled and not (has_triton() if cuda else shutil.which(os.environ.get("CXX", "g++"))):
        fail(f"compile needs {'Triton' if cuda else 'a C++ compiler'}, and there is none: install it, or pass "
             "--compile=False")
    return replace(cfg, device=device, dtype=dtype, **{"compile": compiled} if hasattr(cfg, "compile") else {})
