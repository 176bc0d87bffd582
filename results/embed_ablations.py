"""Trains the embed process with one choice changed, through train.py as it is, and judges its samples.

    python results/embed_ablations.py mse --max_iters=1000          # a variant below, then flags of train.py

Prints the variant's row of the table: bound, and the judge's measures of 64 samples in 32 steps (judge.py).
"""
import os
import runpy
import sys

import torch
import torch.nn.functional as F

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                os.path.dirname(os.path.abspath(__file__))]
from judge import Judge

import diffusion

Embed = diffusion.Embed


class NoPosterior(Embed):
    """The network has to learn what a token alone tells, too (it still sees the estimate at its input)."""

    def denoise(self, xt, t, sc=None, known=None):
        return super().denoise(xt, t, sc, known) - self.query(xt, t) @ self.table().T


class NoFirstLook(Embed):
    """Self-conditioning starts from zeros, not from the estimate of each token alone."""

    def first(self, xt, t, known=None):
        return self.given(torch.zeros_like(xt), xt, known)


class NoSelfConditioning(Embed):
    """One look, in training, in the bound and while sampling."""
    FIRST_EVERY = 1

    def denoise(self, xt, t, sc=None, known=None):
        return super().denoise(xt, t, None, known)


class Fixed(Embed):
    def __init__(self, cfg, V):
        super().__init__(cfg, V)
        t = self.t(self.edges)
        self.knots.copy_((t[0] - t) / (t[0] - t[-1]))

    def adapt(self, total):
        pass


class Cosine(Fixed):
    """alpha = cos(pi t / 2) (arXiv:2102.09672), over the same range of logsnr."""

    def t(self, logsnr):
        return 2 / torch.pi * torch.atan(torch.exp(-logsnr / 2))


class Sqrt(Fixed):
    """alpha^2 = 1 - sqrt(t) (Diffusion-LM, arXiv:2205.14217, appendix A), over the same range of logsnr."""

    def t(self, logsnr):
        return (-logsnr).sigmoid() ** 2


class Uniform(Fixed):
    """logsnr uniform."""

    def t(self, logsnr):
        return -logsnr


class MSE(Embed):
    """Squared error of the estimated embedding in place of cross-entropy."""

    def forward(self, x0, t):
        def squared(logits, target, reduction):
            return (self.table()[target] - logits.softmax(-1) @ self.table()).square().mean(-1)

        keep, diffusion.F.cross_entropy = F.cross_entropy, squared
        try:
            return super().forward(x0, t)
        finally:
            diffusion.F.cross_entropy = keep


VARIANTS = {"as it is": Embed, "no posterior": NoPosterior, "no first look": NoFirstLook,
            "no self-conditioning": NoSelfConditioning, "cosine": Cosine, "sqrt": Sqrt, "uniform": Uniform,
            "mse": MSE, "masked": diffusion.Masked}
for name, constant in {"second look at half": {"FIRST_EVERY": 2}, "ramp 1/4": {"RAMP": 0.25},
                       "first order": {"AHEAD": 0.0}, "known 0": {"KNOWN_SHARE": 0.0},
                       "known 1/4": {"KNOWN_SHARE": 0.25}, "hidden 0": {"HIDDEN_SHARE": 0.0},
                       "hidden 1/5": {"HIDDEN_SHARE": 0.2}}.items():
    VARIANTS[name] = type(name, (Embed,), constant)

if __name__ == "__main__":
    name, flags = sys.argv[1], sys.argv[2:]
    process = "masked" if name == "masked" else "embed"
    diffusion.PROCESSES[process] = VARIANTS[name]
    sys.argv = ["train.py", f"--process={process}", "--eval_interval=1000000", *flags]
    ran = runpy.run_path(os.path.join(os.path.dirname(diffusion.__file__), "train.py"))
    model, (mean, se) = ran["ema"], ran["evaluate"]()
    clean = ran["table"]().splitlines()[1].split()
    print(f"ROW {name} {' '.join(flags)}: bound {mean:.4f} ± {se:.4f}, first row of the table {clean}")
    judge = Judge(f"data/{ran['cfg'].dataset}")
    for steps in (32,) if process == "embed" else (32, 128):
        torch.manual_seed(0)
        known = torch.zeros(64, ran["T"], dtype=torch.bool)
        *_, (tokens, _) = model.sample(known.long(), known, steps)
        texts = [ran["tokenizer"].decode(row) for row in tokens.tolist()]
        print(f"ROW {name} {' '.join(flags)}: {steps} steps, "
              + ", ".join(f"{key} {value:.3f}" for key, value in judge(texts).items()))
