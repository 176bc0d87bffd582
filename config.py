"""Every setting: defaults here, then a config file of plain assignments, then flags.

    python train.py config/shakespeare_masked.py --max_iters=2000 --seed 7
    python train.py --help
"""
import ast
import ctypes
import difflib
import inspect
import os
import re
import runpy
import sys
import typing
from dataclasses import dataclass, fields, replace


@dataclass
class Config:
    """Settings of train.py."""
    out_dir: str = "out"                    # where ckpt.pt, model.pt and log.csv go
    dataset: str = "shakespeare"            # data/<dataset>/ holds train.bin, val.bin and meta.json
    init_from: str = "scratch"              # scratch, resume (out_dir/ckpt.pt), or a model.pt to start from
    eval_only: bool = False                 # print the bound and the table by noise level, then stop
    eval_interval: int = 1000               # steps between evaluations; each also writes the checkpoints
    eval_iters: int = 64                    # batches in an evaluation, the same ones each time
    log_interval: int = 10                  # steps between updates of the progress bar
    process: str = "masked"                 # which diffusion: masked or embed
    embed_dim: int = 16                     # of embed: width of the noised embeddings
    batch_size: int = 32                    # sequences in a micro-batch on one device; even
    gradient_accumulation_steps: int = 1    # micro-batches in an optimizer step, over all devices together
    block_size: int = 128                   # tokens in a sequence
    n_layer: int = 3
    n_head: int = 3
    n_embd: int = 192
    dropout: float = 0.0
    learning_rate: float = 0.01             # of Muon, for the matrices of the blocks
    adam_lr: float = 0.005                  # of AdamW, for everything else
    weight_decay: float = 0.1               # of Muon only
    beta1: float = 0.9                      # of AdamW
    beta2: float = 0.95
    grad_clip: float = 1.0                  # the gradient's greatest norm; 0: no limit
    max_iters: int = 3000                   # optimizer steps
    warmup_iters: int = 50                  # linear warm-up; the last 60 % decay linearly to zero
    ema_decay: float = 0.99                 # running average of the weights, which is what is evaluated
    device: str = "auto"                    # cuda, cuda:1, mps, cpu; auto: the first of these there is
    dtype: str = "auto"                     # bfloat16, float32; auto: bfloat16 where the chip has it
    compile: bool | None = None             # torch.compile; None: on CUDA only
    seed: int = 1337                        # of weights, crops, times and noise

    def __post_init__(self):
        check(self)
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd is {self.n_embd} and n_head {self.n_head}: a head needs a whole, even "
                             f"number of channels, so n_embd must be a multiple of {2 * self.n_head}")


@dataclass
class SampleConfig:
    """Settings of sample.py."""
    out_dir: str = "out"                    # loads out_dir/model.pt
    text: str = ""                          # what is given, with {n} for n unknown tokens; '': all unknown
    prompt_file: str = ""                   # a file to read text from
    edit: str = ""                          # text, or a file of it, to noise and denoise: it is rewritten
    noise: float = 0.5                      # of edit: how far, from near 0 (hardly) to 1 (nothing is left)
    length: int = 0                         # tokens; 0: a block. Beyond it, windows with half a block known
    num_samples: int = 4
    steps: int = 128                        # network calls a block; masked: at most one an unknown token
    seed: int = 1337
    temperature: float = 1.0                # below 1: more likely text; 0: always the likeliest token
    top_k: int = 0                          # draw from the k likeliest tokens; 0: from all
    top_p: float = 1.0                      # draw from the fewest tokens that hold this share of probability
    schedule: str = "linear"                # grid of t: linear, cosine, squared_cosine, exponential
    guidance: float = 0.0                   # above 0: follow the text more closely; a second call each step
    order: str = "random"                   # of masked: random, confidence, margin, entropy
    threshold: float = 1.0                  # of masked: a step also reveals all tokens surer than this
    remask: float = 0.0                     # of masked: share of revealed tokens that a step takes back
    eta: float = 1.0                        # of embed: from 0 (deterministic) to 1 (ancestral)
    watch: bool = False                     # play it in the terminal
    svg: str = ""                           # a file to write the first sample to, as an animation
    device: str = "auto"                    # as in train.py
    dtype: str = "auto"

    def __post_init__(self):
        check(self)


RULES = {                                   # what a value must be: a test of it, the settings it holds for
    "at least 1": (lambda v: v >= 1, (
        "eval_interval", "log_interval", "gradient_accumulation_steps", "block_size", "n_layer", "n_head",
        "n_embd", "embed_dim", "num_samples")),
    "0 or more and finite": (lambda v: 0 <= v < 2 ** 62, (
        "max_iters", "warmup_iters", "weight_decay", "grad_clip", "learning_rate", "adam_lr", "seed",
        "temperature", "top_k", "guidance")),
    "from 0 to a million": (lambda v: 0 <= v <= 10 ** 6, ("length",)),
    "from 1 to a million": (lambda v: 1 <= v <= 10 ** 6, ("steps",)),
    "at least 2, for a standard error": (lambda v: v >= 2, ("eval_iters",)),
    "even, since times come in pairs t, 1 - t": (lambda v: v >= 2 and v % 2 == 0, ("batch_size",)),
    "in [0, 1)": (lambda v: 0 <= v < 1, ("dropout", "ema_decay", "beta1", "beta2", "remask")),
    "in [0, 1]": (lambda v: 0 <= v <= 1, ("eta",)),
    "in (0, 1]": (lambda v: 0 < v <= 1, ("top_p", "threshold", "noise")),
}
CHOICES = {
    "process": ("masked", "embed"), "dtype": ("auto", "bfloat16", "float32"),
    "order": ("random", "confidence", "margin", "entropy"),
    "schedule": ("linear", "cosine", "squared_cosine", "exponential"),
}


def check(cfg):
    """Raises ValueError with one sentence on the first value of cfg that breaks a rule."""
    for name, value in vars(cfg).items():
        for words, (holds, names) in RULES.items():
            if name in names and not holds(value):
                raise ValueError(f"{name} is {value!r}: it must be {words}")
        if value not in CHOICES.get(name, (value,)):
            raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(CHOICES[name])}")


def fail(sentence):
    """Ends the program with one sentence on stderr and exit code 1."""
    raise SystemExit(f"error: {sentence}")


def assignments(path):
    """Dict of what the config file at path assigns, but for names with _ in front; exits if it can't."""
    if not os.path.isfile(path):
        fail(f"there is no config file {path!r}; settings are given as --key=value")
    try:
        values = runpy.run_path(path)
    except Exception as e:  # noqa: BLE001 (the file is the user's code)
        fail(f"{path} can't be read as a config file: {type(e).__name__}: {e}")
    return {name: value for name, value in values.items() if not name.startswith("_")}


def load(cls, argv=None):
    """A cls (Config or SampleConfig) from defaults, then the config file in argv, if any, then the flags.

    Flags are --key value or --key=value; a bare --key means True. Exits with a sentence on what is wrong.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(describe(cls))
        raise SystemExit(0)
    kinds = {name: typing.get_args(kind) or (kind,) for name, kind in typing.get_type_hints(cls).items()}
    from_file, from_flags = {}, {}
    while argv:
        word = argv.pop(0)
        if not word.startswith("--"):
            from_file |= assignments(word)
            continue
        key, equals, text = word[2:].partition("=")
        if not equals:
            if bool in kinds.get(key, ()) and (not argv or argv[0] not in ("True", "False", "None")):
                text = "True"
            elif argv and key in kinds:
                text = argv.pop(0)
        try:
            from_flags[key] = text if kinds.get(key) == (str,) else ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError):
            from_flags[key] = text
    settings = from_file | from_flags
    for key, value in settings.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0)[0]
            fail(f"there is no setting {key!r}; the nearest is {near!r} (--help lists all)")
        if type(value) is int and float in kinds[key]:
            settings[key] = float(value)
        elif type(value) not in kinds[key]:
            names = " or ".join(k.__name__ for k in kinds[key])
            fail(f"{key} must be of type {names}, not {value!r}")
    try:
        return cls(**settings)
    except ValueError as e:
        fail(e)


def describe(cls):
    """Text of --help: each setting with its default and the comment beside it in this file."""
    lines = [cls.__doc__, "Give a config file of assignments, and flags as --key=value or --key value.", ""]
    source = inspect.getsource(cls)
    for f in fields(cls):
        comment = re.search(rf"^    {f.name}: [^#\n]*(?:# (.*))?$", source, re.MULTILINE).group(1) or ""
        lines.append(f"  --{f.name}={f.default!r}".ljust(40) + comment)
    return "\n".join(lines)


def hardware(cfg):
    """cfg with device, dtype and (where it has one) compile decided for this machine."""
    # on a CPU large tensors get huge pages, and their memory is kept for the next ones instead of going back
    # to the system: at V = 50,304 a step takes less than half the time (results/bpe.md)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "mallopt"):                        # glibc: no mmap for large blocks, no trimming
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)
    import torch
    device, dtype = cfg.device, cfg.dtype
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        kind = torch.zeros(1, device=device).device.type
    except (RuntimeError, AssertionError):
        fail(f"device is {device!r}: this machine doesn't have it; leave it at 'auto'")
    if dtype == "auto":
        fast = torch.cuda.is_bf16_supported(False) if kind == "cuda" else (
            kind == "cpu" and torch.cpu._is_avx512_bf16_supported())
        dtype = "bfloat16" if fast else "float32"
    cfg = replace(cfg, device=device, dtype=dtype)
    if getattr(cfg, "compile", False) is None:
        cfg = replace(cfg, compile=kind == "cuda")
    return cfg
