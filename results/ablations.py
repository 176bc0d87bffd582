"""Trains with one thing changed, through train.py as it is; prints a row of bound and judge.py's measures.

    python results/ablations.py masked "causal GPT" --max_iters=800 --eval_iters=128 --seed=1
    python results/ablations.py embed "first order" --init_from=out-embed/model.pt --eval_only=True

Process, variant (one of VARIANTS below), flags of train.py; the last line measures a trained model. A variant
is what it puts in the place of some text in diffusion.py. The run's folder is a temporary one.
"""
import sys
import tempfile
import types
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parents[:2]
sys.path[:0] = str(HERE), str(ROOT)

ON_THE_BOUND = {"        k, _, target, logits = self.predict(x0, t)\n":
                "        return self.nelbo(x0, t).mean()\n"}
OWN_HEAD = {"F.linear(h, self.stem.weight[:self.V].to(h.dtype))": "self.head(h)"}
DRAWN = "nn.init.normal_(self.stem.weight, std=cfg.n_embd ** -0.5)"
VARIANTS = {
    "masked": {
        "as it is": {},
        "on the bound": ON_THE_BOUND,                   # a masked token weighs 1/k
        "uniform times": {"    if bell: ": "    if False: "},
        "separate head": OWN_HEAD | {DRAWN: "self.head = Linear(cfg.n_embd, V)"},
        "coins": {      # in training: an independent time for each row, and a coin for each token
            "        return x0.masked_fill(":
                "        if self.training:\n"
                "            k = (torch.rand(x0.shape) < torch.rand(len(x0), 1)).sum(1).to(k)\n"
                "        return x0.masked_fill("},
        # its bound is exact; with the tied head it would begin by repeating its input
        "causal GPT": OWN_HEAD | ON_THE_BOUND | {
            DRAWN: "self.head = Linear(cfg.n_embd, V, zero=True)",
            "self.stem(xt), t)": "self.stem(F.pad(xt[:, :-1], (1, 0), value=self.V)), torch.zeros_like(t))",
            "        k, row, target, logits = self.predict(x0, t)\n":
                "        logits = self.denoise(x0, t).transpose(1, 2)\n"
                "        return F.cross_entropy(logits, x0, reduction='none').mean(1)\n",
            "torch.rand_like(p[:, 0])": "-torch.arange(len(p)).to(p)",         # it samples from left to right
            'blind = order == "random" and threshold == 1': "blind = False"}},
    "embed": {
        "as it is": {},
        "uniform times": {"    if bell: ": "    if False: "},
        "no second look": {".detach() if sc is None else sc": ".detach()"},     # also in bound and samples
        "second look at half": {"row = row + row // 3 + 1": "row = 2 * row[:B // 2] + 1"},
        "hidden 0": {"HIDDEN_SHARE = 0.1": "HIDDEN_SHARE = 0.0"},
        "known 0": {"KNOWN_SHARE = 1 / 8": "KNOWN_SHARE = 0.0"},
        "one look in the bound": {"        second = self.denoise(xt, t, ":
            "        return self.denoise(xt, t).softmax(-1)\n        second = self.denoise(xt, t, "},
        "first order": {"2 * sc - before": "sc"}}}                              # the sampler's estimate

def changed(file, changes):
    """The file's code, with each text replaced by another; raises where it isn't there, or not only once."""
    source = (ROOT / file).read_text(encoding="utf-8")
    for old, new in changes.items():
        assert source.count(old) == 1, f"{file} has {old!r} {source.count(old)} times, not once"
        source = source.replace(old, new)
    return compile(source, ROOT / file, "exec")

process, name, *flags = sys.argv[1:]
training = changed("train.py", {"    nelbo, se = total(": "    global nelbo, se\n    nelbo, se = total("})
codes = {(kind, key): changed("diffusion.py", variants[key]) for kind, variants in VARIANTS.items()
         for key in variants}
if (process, name) not in codes:
    sys.exit(f"error: {process} {name!r} is none of {[*codes]}")
sys.modules["diffusion"] = types.ModuleType("diffusion")
exec(codes[process, name], vars(sys.modules["diffusion"]))  # noqa: S102 (our own)
from judge import Judge
from samplers import measure

if name == "causal GPT":
    from model import Block, F
    Block.attention = staticmethod(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
train = {"__name__": "__main__"}
with tempfile.TemporaryDirectory() as folder:
    sys.argv = ["train.py", f"--process={process}", "--eval_interval=1000000", f"--out_dir={folder}", *flags]
    exec(training, train)  # noqa: S102
row = f"ROW {process}, {name} {' '.join(flags)}: bound {train['nelbo']:.4f} ± {train['se']:.4f}"
judge = Judge(f"data/{train['cfg'].dataset}")
for steps in (32, 128) if name != "causal GPT" else (train["T"],):
    calls, _, nats, real, entropy = measure(train["ema"], judge, train["tokenizer"], train["T"], steps, {})
    row += f"; {calls} calls: 5-gram nats {nats:.3f}, real words {real:.3f}, entropy {entropy:.3f}"
print(row)
