"""Trains with one thing changed, through train.py as it is; prints a row of bound and judge.py's measures.

    python results/ablations.py masked "causal GPT" --max_iters=800 --eval_iters=128 --seed=1
    python results/ablations.py embed "first order" --init_from=out-embed/model.pt --eval_only=True

The arguments are a process, a variant (see VARIANTS below) and flags of train.py. The second line measures a
model that is trained already. The run's folder is a temporary one.
"""
import runpy
import sys
import tempfile
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parents[:2]
sys.path[:0] = str(HERE), str(ROOT)

import torch
import torch.nn.functional as F
from judge import Judge
from samplers import measure
from torch import nn

import diffusion
from diffusion import ORDERS, Embed, Masked, times
from model import Linear

# ---- variants of masked


class OnTheBound(Masked):
    """Trains on the bound itself: a masked token weighs 1/k."""

    def forward(self, x0, t):
        return self.nelbo(x0, t).mean()


class SeparateHead(Masked):
    """The head has weights of its own, and the embeddings start as long as torch makes them."""

    def __init__(self, cfg, V):
        super().__init__(cfg, V)
        nn.init.normal_(self.stem.weight)
        self.head = Linear(cfg.n_embd, V)

    def denoise(self, xt, where):
        t = (xt == self.V).float().mean(1)
        h = self.net(self.stem(xt), t)
        return self.head(h[where]).float() + self.bias


class Coins(Masked):
    """In training each row has a time of its own, independent of the others', and each token a coin."""

    def corrupt(self, x0, t):
        if not self.training:
            return super().corrupt(x0, t)
        t = torch.rand(len(x0), 1, device=x0.device)
        gone = torch.rand(x0.shape, device=x0.device) < t
        return x0.masked_fill(gone, self.V)


ORDERS["left to right"] = lambda p: -torch.arange(len(p)).to(p)


class Causal(SeparateHead):
    """A GPT of the same parts: what the bound says of it is exact, and it writes from left to right.

    It is told no time. The head is its own and starts at zero: a tied one would begin by repeating its input.
    """

    def __init__(self, cfg, V):
        super().__init__(cfg, V)
        nn.init.zeros_(self.head.weight)
        for block in self.net.blocks:
            block.causal = True

    def denoise(self, xt, where):
        before = F.pad(xt[:, :-1], (1, 0), value=self.V)                    # a place sees those before it
        t = torch.zeros(len(xt), device=xt.device)
        h = self.net(self.stem(before), t)
        return self.head(h[where]).float() + self.bias

    def predict(self, x0, t):
        everywhere = torch.ones_like(x0, dtype=torch.bool)
        return everywhere, self.denoise(x0, everywhere), x0.flatten()

    def sample(self, x, known, steps, **settings):
        return super().sample(x, known, x.size(1), order="left to right", **settings)


# ---- variants of embed


class NoSecondLook(Embed):
    """The network is never told its own answer, but always that of each token alone."""

    def denoise(self, xt, t, sc=None, known=None):
        return super().denoise(xt, t, None, known)


class SecondLookAtHalf(Embed):
    """A second look at half of the rows in training, not at three quarters."""

    def denoise(self, xt, t, sc=None, known=None):
        logits = super().denoise(xt, t, sc, known)
        if self.training and not torch.is_grad_enabled():                       # the first look of forward()
            n = len(xt) // 3
            logits[:n] = self.alone(xt, t, known)[:n]
        return logits


class HiddenNone(Embed):
    """Training hides no tokens."""
    HIDDEN_SHARE = 0.0


class KnownNone(Embed):
    """No rows in training have known tokens."""
    KNOWN_SHARE = 0.0


class OneLook(Embed):
    """The bound takes the network's first answer."""

    def predict(self, x0, t):
        xt = self.corrupt(x0, t)
        return self.denoise(xt, t).softmax(-1)


class FirstOrder(Embed):
    """The sampler takes its estimate as it is, not extrapolated."""
    AHEAD = 0


VARIANTS = {
    "masked": {
        "as it is": Masked,
        "on the bound": OnTheBound,
        "uniform times": Masked,
        "separate head": SeparateHead,
        "coins": Coins,
        "causal GPT": Causal,
    },
    "embed": {
        "as it is": Embed,
        "uniform times": Embed,
        "no second look": NoSecondLook,                 # also in bound and samples
        "second look at half": SecondLookAtHalf,
        "hidden 0": HiddenNone,
        "known 0": KnownNone,
        "one look in the bound": OneLook,
        "first order": FirstOrder,
    },
}

# ---- train.py with the variant in its process's place, then 64 samples

process, name, *flags = sys.argv[1:]
if name not in VARIANTS.get(process, {}):
    names = [(kind, key) for kind, variants in VARIANTS.items() for key in variants]
    sys.exit(f"error: {process} {name!r} is none of {names}")
diffusion.PROCESSES[process] = VARIANTS[process][name]
if name == "uniform times":
    diffusion.times = lambda rng, n_micro, B, bell=False: times(rng, n_micro, B)
with tempfile.TemporaryDirectory() as folder:
    sys.argv = ["train.py", f"--process={process}", "--eval_interval=1000000", f"--out_dir={folder}", *flags]
    train = runpy.run_path(str(ROOT / "train.py"))
row = f"ROW {process}, {name} {' '.join(flags)}: bound {train['nelbo']:.4f} ± {train['se']:.4f}"
judge = Judge(f"data/{train['cfg'].dataset}")
T = train["T"]
for steps in (T,) if name == "causal GPT" else (32, 128):
    calls, _, nats, real, entropy = measure(train["ema"], judge, train["tokenizer"], T, steps, {})
    row += f"; {calls} calls: 5-gram nats {nats:.3f}, real words {real:.3f}, entropy {entropy:.3f}"
print(row)
