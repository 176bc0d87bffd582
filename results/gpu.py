"""What a first GPU shows: each result is printed and appended to results/gpu.md, whatever becomes of others.

    python results/gpu.py 30                    # minutes, of which two thirds train; ten more for the rest
    python results/gpu.py 1 --device=cpu --n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2

Flags go to every train.py and bench.py. Another device draws other noise: losses agree but for that.
"""
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE, ROOT = Path(__file__).resolve().parents[:2]
sys.path.insert(0, str(ROOT))
from config import Config, hardware, load
from diffusion import Embed

minutes, flags, folder = float(sys.argv[1]), sys.argv[2:], tempfile.TemporaryDirectory()

def say(line):
    with open(HERE / "gpu.md", "a", encoding="utf-8") as f:
        f.write(line + "\n")
    print(line, flush=True)

def run(script, *settings):
    """(what it printed, or the end of its errors, and seconds)"""
    start, command = time.time(), [sys.executable, script, *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stderr[-500:] if done.returncode else done.stdout, time.time() - start

def train(*settings):
    return run("train.py", *flags, f"--out_dir={folder.name}/{time.time()}", *settings)

say(f"\n## {time.ctime()}: torch {torch.__version__}, CUDA {torch.version.cuda}, flags {flags}\n")
for process in "masked", "embed":
    for setting in "--device=cpu", "--compile=False", "--compile=True", "--dtype=float32":
        output, seconds = train(f"--process={process}", "--max_iters=20", "--eval_iters=16", setting)
        say(f"- {process} {setting}: {re.findall('nelbo (.*) nats', output) or output}, {seconds:.0f} s")
for process in "masked", "embed":
    say("\n" + run("bench.py", f"config/owt_{process}.py", *flags, "--gradient_accumulation_steps=1",
                   "--dataset=synthetic")[0])
for process in "masked", "embed":
    path = f"config/shakespeare_{process}.py"       # two runs differ by the time of 100 steps
    few, many = (train(path, f"--max_iters={n}", "--eval_interval=9999")[1] for n in (20, 120))
    steps = min(20_000, int(minutes / 3 * 60 * 100 / max(many - few, 0.1)))
    say(f"\n{path}, {10 * (many - few):.1f} ms a step\n" + train(path, f"--max_iters={steps}")[0])
cfg = hardware(load(Config, [*flags, "--dtype=float32", "--block_size=65"]))    # another kernel: no multiple
model, xt, t = Embed(cfg, 65), torch.randn(4, 65, cfg.embed_dim), torch.rand(4)     # of 8
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.1)
cpu, device = (model.to(x).denoise(xt.to(x), t.to(x)).detach().cpu() for x in ("cpu", cfg.device))
say(f"- 65 tokens: {(cpu - device).abs().max():.1e} between logits on CPU and {cfg.device} ({cpu.std():.1f})")
