"""Every setting: defaults here, then a config file of plain assignments, then flags. --help lists them all.

    python train.py config/shakespeare_masked.py --max_iters=2000 --seed 7
"""
import argparse
import inspect
import os
import re
import runpy
from dataclasses import dataclass, fields

import torch


def fail(sentence):
    """Ends the program with one sentence on stderr and exit code 1."""
    raise SystemExit(f"error: {sentence}")


# ---- types of settings: functions from a flag's text to its value


def number(kind, low, high=1e15):
    """An int or a float from low to high."""
    def read(text):
        value = kind(text)                      # argparse reports what is no number
        if not low <= value <= high:            # nan is refused as well
            raise argparse.ArgumentTypeError(f"{text!r} must be a number from {low:g} to {high:g}")
        return value
    read.__name__ = kind.__name__               # argparse says: "invalid int value: 'many'"
    return read


def choice(*values):
    """One of a few values."""
    by_text = {str(value): value for value in values}

    def read(text):
        if text not in by_text:
            raise argparse.ArgumentTypeError(f"{text!r} must be one of {', '.join(by_text)}")
        return by_text[text]
    return read


truth = choice(True, False)
truth_or_auto = choice(True, False, "auto")
precision = choice("auto", "bfloat16", "float32")
positive = number(int, 1)
count = number(int, 0)
amount = number(float, 0)
share = number(float, 0, 1)
not_all = number(float, 0, 1 - 1e-6)
not_none = number(float, 1e-6, 1)


@dataclass
class Config:
    """Settings of train.py."""
    out_dir: str = "out"                        # where ckpt.pt, model.pt and log.csv go
    dataset: str = "shakespeare"                # data/<dataset>/ holds train.bin, val.bin and meta.json
    init_from: str = "scratch"                  # scratch, resume, auto (resume where ckpt.pt is), or a model.pt
    eval_only: truth = False                    # measures a model without training it
    eval_interval: positive = 225               # steps from one evaluation to the next; each also saves
    eval_iters: number(int, 2) = 20             # batches of an evaluation, the same ones each time
    log_interval: positive = 10                 # steps from one look at the training loss to the next
    process: choice("masked", "embed") = "masked"   # which kind of noise
    net: choice("own", "roberta") = "own"       # the network: model.py's, or RoBERTa (prepare_roberta.py)
    embed_dim: positive = 16                    # of embed: the width of its vectors
    batch_size: positive = 32                   # sequences in a micro-batch on one device
    gradient_accumulation_steps: positive = 1   # micro-batches in a step, of all devices together
    block_size: positive = 128                  # tokens in a sequence
    n_layer: positive = 3
    n_head: positive = 3
    n_embd: number(int, 4) = 192                # channels: an even number for each head
    qk_norm: truth = False                      # normalised queries and keys: attention of large models stays in bounds
    dropout: not_all = 0.0
    learning_rate: amount = 0.01                # of Muon, for the matrices of the own net's blocks
    adam_lr: amount = 0.007                     # of AdamW, for everything else
    weight_decay: amount = 0.1                  # of Muon only
    grad_clip: amount = 1.0                     # longer gradients are shortened to this norm; 0: never
    max_iters: count = 900                      # optimizer steps
    warmup_iters: count = 50                    # the rates rise linearly at first; in the last 60 % they fall to 0
    ema_decay: not_all = 0.99                   # of the average of the weights, which is evaluated and sampled
    device: str = "auto"                        # cuda, cuda:1, mps, cpu; auto: the first of these there is
    dtype: precision = "auto"                   # auto: bfloat16 on GPUs that have it, else float32
    compile: truth_or_auto = "auto"             # torch.compile; auto: on CUDA. Not repeatable on CPU threads
    seed: count = 1337                          # of the weights, the crops, the times and the noise


@dataclass
class SampleConfig:
    """Settings of sample.py."""
    out_dir: str = "out"                        # loads out_dir/model.pt
    text: str = ""                              # given text, or its file; {n}: n unknown tokens, behind a whole word
    edit: str = ""                              # a text, or its file, to rewrite: it is noised, then denoised
    noise: not_none = 0.5                       # of edit: near 0 changes little, 1 leaves nothing
    length: count = 0                           # tokens; 0: a block. More are written in windows
    num_samples: positive = 4                   # more samples change the first ones, too
    steps: positive = 128                       # network calls; masked: at most one per unknown token
    seed: count = 1337
    temperature: amount = 1.0                   # below 1: likelier text; 0: always the likeliest token
    top_k: count = 0                            # draws from the k likeliest tokens; 0: from all
    top_p: not_none = 1.0                       # draws from the fewest tokens with this probability together
    schedule: choice("linear", "cosine", "squared_cosine", "exponential") = "linear"    # how t falls
    guidance: amount = 0.0                      # above 0: follows the text closely; two calls a step
    order: choice("random", "confidence", "margin", "entropy") = "random"   # of masked: which come first
    threshold: not_none = 1.0                   # of masked: a step also reveals what is surer than this
    remask: not_all = 0.0                       # of masked: the share that each step takes back
    eta: share = 1.0                            # of embed: from 0 (deterministic) to 1 (ancestral)
    watch: truth = False                        # shows each step in the terminal
    svg: str = ""                               # a file for an animation of the first sample
    device: str = "auto"                        # as in train.py
    dtype: precision = "auto"


def load(cls, argv=None, defaults=None):
    """The settings, a cls: its defaults (or those in a dict), then the config file's, then the flags'."""
    # --help shows the comments that stand beside the settings above
    source = inspect.getsource(cls).replace("%", "%%")
    comments = dict(re.findall(r"(?m)^    (\w+): .*?  # (.*)$", source))
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: fail(f"{message} (--help lists all settings)")
    parser.add_argument("config", nargs="?", help="a Python file of assignments, name = value")
    for f in fields(cls):
        bare = {"nargs": "?", "const": "True"} if f.type in (truth, truth_or_auto) else {}       # --compile
        parser.add_argument(
            f"--{f.name}", type=f.type, metavar=repr(f.default), help=comments.get(f.name), **bare)
    flags = vars(parser.parse_intermixed_args(argv))
    path = flags.pop("config", None)
    assigned = {}
    if path:
        try:
            variables = runpy.run_path(path)
        except Exception as e:  # noqa: BLE001 (the file is the user's code)
            fail(f"{path} can't be read: {type(e).__name__}: {e}")
        # what the file assigns is checked as if it came from flags
        lines = [f"--{name}={value}"
                 for name, value in variables.items() if name[0] != "_"]
        assigned = vars(parser.parse_args(lines))
    return cls(**(defaults or {}) | assigned | flags)


def hardware(cfg):
    """Decides on device, dtype and compile where they are "auto"; exits if the device isn't there."""
    if cfg.device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        cfg.device = found.type if found else "cpu"
    on_cuda = cfg.device.startswith("cuda")
    try:
        if on_cuda and "LOCAL_RANK" in os.environ:      # under torchrun each process has a GPU of its own
            cfg.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(cfg.device)
        torch.zeros(1, device=cfg.device)
    except (RuntimeError, AssertionError):
        fail(f"device is {cfg.device!r}, which isn't here: try 'auto', and one process for each GPU at most")
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if on_cuda and torch.cuda.is_bf16_supported(False) else "float32"
    if isinstance(cfg, Config) and cfg.compile == "auto":
        cfg.compile = on_cuda
    return cfg
