"""What a user does: settings, preparing data, training, stopping, going on, sampling. All in a folder of its own.

    python -m pytest test_tools.py
"""
import glob
import itertools
import math
import os
import pty
import re
import runpy
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import optim
from config import Config, SampleConfig, load
from data import Tokenizer, load_checkpoint
from diffusion import PROCESSES, times
from pictures import animation
from test_diffusion import TINY, last, unknown

HERE = Path(__file__).resolve().parent
SMALL = [f"--{name}={value}" for name, value in TINY.items()] + [
    "--dataset=text", "--eval_iters=2", "--eval_interval=4", "--max_iters=8", "--warmup_iters=2"]
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

# ---- helpers: scripts run in this process, unless it takes several


def script(name, *argv):
    """Runs a script as `python name argv`; returns its globals. SystemExit comes through."""
    before = sys.argv
    handlers = [signal.getsignal(number) for number in SIGNALS]
    sys.argv = [name, *argv]
    listen_to_signals()
    try:
        return runpy.run_path(f"{HERE}/{name}", run_name="__main__")
    finally:
        sys.argv = before
        for number, handler in zip(SIGNALS, handlers):
            signal.signal(number, handler)


def listen_to_signals():
    """Under nohup, or behind an &, some are ignored."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def refused(name, *argv):
    """The one sentence with which a script refuses argv."""
    with pytest.raises(SystemExit) as stop:
        script(name, *argv)
    assert "\n" not in stop.value.code
    return stop.value.code


def python(*argv):
    """Runs a program in a process of its own; it has ended."""
    return subprocess.run([sys.executable, *argv], env=os.environ | {"PYTHONPATH": HERE}, capture_output=True,
                          text=True, check=False, preexec_fn=listen_to_signals)


def put(files):
    """Writes files, {path: bytes or text}, and the folders they are in."""
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def everything(folder):
    """{path: bytes} of all that is in a folder."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def prepare(name, text):
    """Makes the characters of a text a data set."""
    put({f"{name}.txt": text})
    script("prepare_shakespeare.py", "--input", f"{name}.txt", "--dataset", name, "--vocab_size", "0")


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory):
    """A folder with data/text, from the text inside Python, and out/, a masked model after 8 steps."""
    path = tmp_path_factory.mktemp("run")
    os.chdir(path)
    prepare("text", "\n\n".join(topics[name] for name in sorted(topics)))
    script("train.py", *SMALL)
    return path


@pytest.fixture
def here(text_dir):
    os.chdir(text_dir)
    return text_dir


def byte_pairs():
    """GPT-2's tokenizer; where it isn't, the test is skipped."""
    try:
        return Tokenizer({"vocab_size": 50257})
    except SystemExit:
        pytest.skip("GPT-2's byte pairs aren't here: set TIKTOKEN_CACHE_DIR or connect once")


# ---- settings


def test_settings_come_from_defaults_then_the_file_then_flags(here):
    put({"c.py": "learning_rate = 1  # an int is a float\nn_layer = 12 // 2\nseed = 3\n_hidden = 5\n"})
    cfg = load(Config, ["--seed=9", "c.py", "--eval_only", "--compile", "False", "--out_dir", "a b"])
    assert cfg == Config(learning_rate=1.0, n_layer=6, seed=9, eval_only=True, compile=False, out_dir="a b")
    loaded = {os.path.basename(path): load(Config, [path]) for path in glob.glob(f"{HERE}/config/*.py")}
    assert len(loaded) > 4 and loaded["shakespeare_cpu.py"] == Config()         # the default


@pytest.mark.parametrize("cls", [Config, SampleConfig])
def test_help_lists_every_setting(cls, capsys):
    with pytest.raises(SystemExit, match="0"):
        load(cls, ["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in vars(cls()))


# ---- training


def test_training_prints_and_logs_what_it_promises(here, monkeypatch, capsys):
    monkeypatch.setattr(time, "time", itertools.count(0, 25).__next__)          # 25 seconds a look
    script("train.py", *SMALL, "--out_dir=printed", "--log_interval=1")
    out, err = capsys.readouterr()
    assert "source: text.txt" in out and not err
    found = re.findall(r"^step (\d): val nelbo (\d\.\d{4}) ± (\d\.\d{4}) nats/token, .*\d bits/char", out,
                       re.MULTILINE)
    assert [step for step, _, _ in found] == ["0", "4", "8"]
    assert len(re.findall(r"^  0\.\d\d +\d", out, re.MULTILINE)) == 3 * 7       # levels of noise
    # where stderr is no terminal, there is a line a minute
    assert re.findall(r"<.* tokens/s, step (\d), loss \d\.\d{4}\]", out) == ["3", "6"]
    header, *rows = [row.split(",") for row in (here / "printed/log.csv").read_text().splitlines()]
    assert header == ["step", "train_loss", "val_nelbo", "se"]
    assert [(step, nelbo, se) for step, _, nelbo, se in rows] == found
    assert rows[0][1] == "" and 1 < float(rows[1][1]) < 5       # before the first step there is no loss


def test_a_models_bound_is_measured_again_on_the_same_noise(here):
    ran = script("train.py", "--init_from=out/model.pt", "--eval_only=True", "--out_dir=none")
    bounds = [ran["ema"].nelbo(*ran["batch"]("val", times(np.random.default_rng((1, i)), 1, 8)[0], i)).mean()
              for i in range(2)]                            # its times are uniform, not those of training
    assert abs(sum(bounds).item() / 2 - ran["nelbo"]) < 1e-4
    assert not os.path.exists("none")


def test_a_new_run_never_starts_in_the_folder_of_another(here):
    shutil.copytree("out", "owned")
    before = everything("owned")
    for flags in [], ["--init_from=owned/ckpt.pt"]:
        assert re.search("owned/.*pt is of another run: .*--init_from=resume --out_dir=owned",
                         refused("train.py", *SMALL, "--out_dir=owned", *flags))
    assert before == everything("owned")


def test_auto_starts_then_resumes_and_a_finished_run_says_so(here, capsys):
    said = []
    for n in 2, 4, 4:
        script("train.py", *SMALL, "--init_from=auto", "--out_dir=auto", f"--max_iters={n}", "--log_interval=1")
        said.append(capsys.readouterr().out)
    assert "auto/ckpt.pt, step 2, but max_iters 4 (was 2)\n" in said[1] and "no step is left" not in said[1]
    assert "no step is left" in said[2]
    ckpt = load_checkpoint("auto/ckpt.pt")
    assert ckpt["step"] == 4 and ",," not in ckpt["log"][4]     # the training loss stays


def test_a_best_bound_counts_only_on_the_data_it_was_measured_on(here, capsys):
    prepare("best", topics["lambda"] * 9)
    script("train.py", *SMALL, "--dataset=best", "--out_dir=best")
    torch.save(load_checkpoint("best/model.pt") | {"nelbo": 0.1}, "best/model.pt")      # never reached again
    script("train.py", "--out_dir=best", "--init_from=resume", "--max_iters=9")
    assert load_checkpoint("best/model.pt")["nelbo"] == 0.1
    assert "not the same" not in capsys.readouterr().out
    prepare("best", topics["lambda"] * 9 + "a new end")
    script("train.py", "--out_dir=best", "--init_from=resume", "--max_iters=10")
    assert "data/best is not the same" in capsys.readouterr().out
    assert load_checkpoint("best/model.pt")["nelbo"] > 0.1


def test_weights_can_start_a_run_on_other_text_of_the_same_alphabet(here):
    put({"new.txt": "The value of an expression.\n" * 40})
    script("prepare_shakespeare.py", "--input", "new.txt", "--dataset", "new", "--like", "out/model.pt")
    script("train.py", "--init_from=out/model.pt", "--dataset=new", "--out_dir=fine", "--max_iters=1",
           "--learning_rate=0.0", "--adam_lr=0.0")
    old, new = (load_checkpoint(path)["model"] for path in ("out/model.pt", "fine/ckpt.pt"))
    assert_close(new, old, rtol=0, atol=0)


def test_of_tokens_that_are_strings_the_bound_is_told_per_character(here, capsys):
    put({"strings.txt": "The value of an expression.\n" * 400})
    script("prepare_shakespeare.py", "--input", "strings.txt", "--dataset", "strings", "--vocab_size", "30")
    ran = script("train.py", *SMALL, "--dataset=strings", "--out_dir=strings", "--max_iters=0")
    per_char = ran["nelbo"] * ran["meta"]["val_tokens"] / ran["meta"]["val_chars"]
    assert f", {per_char:.4f} nats/char, {per_char / math.log(2):.3f} bits/char\n" in capsys.readouterr().out


# ---- several processes


def torchrun(n, *flags, node=0, nodes=1):
    """Starts train.py on n processes of one of several nodes, all of them on this machine."""
    port = 29500 + os.getpid() % 1000
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--nnodes={nodes}",
         f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}",
         f"{HERE}/train.py", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(out, step):
    """The numbers of that step's evaluation, as a run printed them: its bound, and the table by noise level."""
    printed = out.split(f"step {step}: val nelbo ")[1].split("---")[0]
    return np.array(re.findall(r"\d\.\d{4}", printed), float)


@pytest.mark.parametrize("process, n, nodes", [("masked", 3, 1), ("masked", 1, 2), ("embed", 2, 1)])
def test_the_run_does_not_depend_on_the_number_of_processes(here, capsys, process, n, nodes):
    flags = [*SMALL, f"--process={process}", "--gradient_accumulation_steps=6", "--batch_size=4",
             "--eval_iters=20", "--dropout=0.1", "--warmup_iters=50"]       # the same rates in 4 and 8 steps
    script("train.py", *flags, f"--out_dir=one-{process}-{n}")
    one = capsys.readouterr().out
    many_dir = f"--out_dir=many-{process}-{n}"              # half of it; one process goes on
    runs = [torchrun(n, *flags, "--max_iters=4", many_dir, node=i, nodes=nodes) for i in range(nodes)]
    for run in runs[::-1]:                                  # node 0, which prints, is the last
        many, err = run.communicate(timeout=300)
        assert run.returncode == 0, err[-2000:]
    script("train.py", "--init_from=resume", many_dir, "--max_iters=8")
    many += capsys.readouterr().out
    assert all(np.abs(outcome(many, step) - outcome(one, step)).max() < 3e-4 for step in (4, 8))
    one, many = (load_checkpoint(f"{name}-{process}-{n}/ckpt.pt")["model"] for name in ("one", "many"))
    assert_close(many, one, rtol=0, atol=1e-5)


def test_a_stopped_torchrun_saves(here, monkeypatch):
    run = torchrun(2, *SMALL, "--gradient_accumulation_steps=20000", "--out_dir=stopped")
    while not os.path.exists("stopped/log.csv"):            # then its first step begins, which takes minutes
        assert run.poll() is None
        time.sleep(0.2)
    time.sleep(1)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert "stopped at step 0, saved" in out, err
    assert run.returncode != 0
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert "multiple of the 5 processes" in refused("train.py", *SMALL, "--out_dir=five")


# ---- stopping and going on


@pytest.fixture
def ended_by(monkeypatch):
    """The signals by which train.py ended; here, pytest would end as well."""
    numbers = []
    monkeypatch.setattr(signal, "raise_signal", numbers.append)
    return numbers


def call_in(patch, number, owner, name, action):
    """Calls action() at the beginning of that call of owner.name."""
    calls, function = itertools.count(1), getattr(owner, name)

    def counted(*args, **settings):
        if next(calls) == number:
            action()
        return function(*args, **settings)

    patch.setattr(owner, name, counted)


def send(number):
    """What sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("process, threads, number, sizes", [
    ("masked", 1, signal.SIGTERM, []),
    ("embed", 2, signal.SIGHUP, ["--batch_size=32", "--block_size=64"])])       # 32,768 looked-up numbers
def test_stop_and_resume_is_bit_identical(here, process, threads, number, sizes, capsys, monkeypatch, ended_by):
    flags = [*SMALL, *sizes, f"--process={process}", "--gradient_accumulation_steps=2", "--dropout=0.1",
             "--learning_rate=0.02", "--log_interval=1"]
    torch.set_num_threads(threads)
    script("train.py", *flags, f"--out_dir=whole-{process}")
    call_in(monkeypatch, 5, optim, "update", send(number))      # in step 5, which is finished and saved
    script("train.py", *flags, f"--out_dir=parts-{process}")
    assert ended_by == [number] and "stopped at step 5, saved" in capsys.readouterr().out
    script("train.py", "--init_from=resume", f"--out_dir=parts-{process}")      # with the settings of the run
    torch.set_num_threads(1)
    whole, parts = (load_checkpoint(f"{folder}-{process}/ckpt.pt") for folder in ("whole", "parts"))
    for name in "model", "ema":
        assert_close(parts[name], whole[name], rtol=0, atol=0)
    assert parts["step"] == 8 and whole["log"] == parts["log"]


def test_a_stop_in_a_step_or_an_evaluation_loses_nothing_and_logs_nothing_twice(here, monkeypatch, ended_by):
    # in the second micro-batch of the second step; in an evaluation; in the last samples, when all is done
    for number, name, step in (5, "forward", 1), (1, "nelbo", 2), (1, "sample", 2):
        put({"long/log.csv": "step,train_loss,val_nelbo,se\n0,,3,1\n9,1.5,3,1\n2,1."})   # a later row, a cut one
        call_in(monkeypatch, number, PROCESSES["masked"], name, send(signal.SIGINT))
        script("train.py", *SMALL, "--init_from=auto", "--out_dir=long", "--max_iters=2", "--eval_interval=2",
               "--log_interval=1", "--gradient_accumulation_steps=3")
        assert load_checkpoint("long/ckpt.pt")["step"] == step
    rows = [row.split(",")[:2] for row in (here / "long/log.csv").read_text().splitlines()[1:]]
    assert rows == [["0", ""], ["2", ""]]                   # no step was taken before either
    assert ended_by == 3 * [signal.SIGINT]


def test_killed_between_its_first_two_files_or_beside_a_broken_one_a_run_goes_on(here, monkeypatch):
    call_in(monkeypatch, 2, os, "replace", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script("train.py", *SMALL, "--out_dir=killed")
    assert not os.path.exists("killed/model.pt")
    put({"killed/model.pt": "a part of it"})
    assert "save failed" in refused("train.py", "--init_from=resume", "--out_dir=killed")
    os.remove("killed/model.pt")
    script("train.py", "--init_from=resume", "--out_dir=killed")
    assert load_checkpoint("killed/model.pt")["step"] > 0


@pytest.mark.parametrize("name", ["ckpt.pt.tmp", "model.pt.tmp", "log.csv"])
@pytest.mark.parametrize("mended", [False, True])
def test_a_save_that_fails_is_said_and_tried_again(here, name, mended, capsys, monkeypatch):
    folder = f"full-{name}-{mended}"
    os.makedirs(folder)
    os.symlink("/dev/full", f"{folder}/{name}")             # a full disk
    if mended:                                              # while the run goes on
        call_in(monkeypatch, 2, optim, "update", lambda: os.remove(f"{folder}/{name}"))
        script("train.py", *SMALL, f"--out_dir={folder}")
    else:
        assert "the last attempt to save failed" in refused("train.py", *SMALL, f"--out_dir={folder}")
    said = re.findall(r"not saved at step (\d)", capsys.readouterr().out)
    assert said == (["0"] if mended else ["0", "4", "8"])


def test_weights_that_are_not_finite_are_never_saved(here, monkeypatch, capsys, ended_by):
    shutil.copytree("out", "finite")
    call_in(monkeypatch, 3, optim, "update", send(signal.SIGINT))
    assert "save failed" in refused(
        "train.py", "--init_from=resume", "--out_dir=finite", "--max_iters=100", "--adam_lr=1e15",
        "--learning_rate=1e15", "--log_interval=100000")
    assert "aren't finite" in capsys.readouterr().out and ended_by == [signal.SIGINT]
    ckpt = load_checkpoint("finite/ckpt.pt")
    assert ckpt["step"] == 8 and all(p.isfinite().all() for p in ckpt["model"].values())


def test_a_second_ctrl_c_ends_at_once(here):
    run = python("-c", f"""
import os, runpy, signal, sys, time
from diffusion import Masked
def twice(*args):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
Masked.forward = twice
sys.argv = ["train.py", *{SMALL}, "--out_dir=twice"]
runpy.run_path("{HERE}/train.py")""")
    assert run.returncode == -signal.SIGINT and not run.stderr
    assert load_checkpoint("twice/ckpt.pt")["step"] == 0


# ---- in a terminal, as it is: Ctrl-C, pipes, a terminal that is closed

TRAIN = shlex.join([sys.executable, f"{HERE}/train.py", *SMALL, "--max_iters=100000", "--eval_interval=50000"])


def in_terminal(command):
    """Starts a command of bash in a terminal of its own: its process, and a file to read and to type."""
    process, file = pty.fork()
    if process == 0:
        listen_to_signals()
        os.execv("/bin/bash", ["bash", "-c", f"stty cols 99 rows 30; {command}"])       # for the bar
    return process, file


def shown(file, pattern="no such text"):
    """What a terminal shows until a pattern comes, or all programs in it have ended."""
    text = ""
    while not re.search(pattern, text):
        assert select.select([file], [], [], 120)[0], text
        try:
            text += os.read(file, 4096).decode("utf-8", "replace")
        except OSError:
            break
    return text


def exit_code(process):
    """Minus the signal by which it ended, if one did."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_ctrl_c_ends_a_loop_of_runs_and_the_printed_command_goes_on(here):
    bash, file = in_terminal(f"for s in 1 2; do {TRAIN} --out_dir=sd-$s; done")
    shown(file, "loss ")
    os.write(file, b"\3")
    step, go_on = re.search(r"stopped at step (\d+), saved: go on with (.*?)\r?\n", shown(file)).groups()
    assert exit_code(bash) == -signal.SIGINT and not os.path.exists("sd-2")
    assert load_checkpoint("sd-1/ckpt.pt")["step"] == int(step) > 0
    script("train.py", *shlex.split(go_on), f"--max_iters={int(step) + 1}")
    assert load_checkpoint("sd-1/ckpt.pt")["step"] == int(step) + 1


def test_ctrl_c_ends_tee_first_and_the_run_still_saves(here):
    _, file = in_terminal(f"trap : INT; {TRAIN} --out_dir=tee 2>&1 | tee log; echo codes ${{PIPESTATUS[*]}}")
    shown(file, "0.95 [^-]*-{80}[^-]*-{80}")
    time.sleep(2)                                           # a few steps
    os.write(file, b"\3")
    text = shown(file)
    assert "codes 130 130" in text and "rror" not in text
    assert load_checkpoint("tee/ckpt.pt")["step"] > 0


def test_a_closed_terminal_saves(here):
    run, file = in_terminal(f"exec {TRAIN} --out_dir=closed")
    shown(file, "loss ")
    os.close(file)
    assert exit_code(run) == -signal.SIGHUP
    assert load_checkpoint("closed/ckpt.pt")["step"] > 0


def test_a_closed_pipe_trains_on_to_the_end_in_silence(here):
    command = f"{TRAIN} --max_iters=8 --eval_interval=4 --out_dir=piped | head -3; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and not run.stderr and run.stdout.count("\n") == 3
    assert load_checkpoint("piped/ckpt.pt")["step"] == 8


# ---- what can't be used is refused


@pytest.fixture(scope="session")
def broken(text_dir):
    """Settings, data sets and checkpoints that are of no use."""
    os.chdir(text_dir)
    put({"broken.py": "n_layer = = 3", "empty.txt": "\n",
         "bad/cut/model.pt": everything("out")["out/model.pt"][:5000]})
    prepare("other", "another alphabet " * 99)
    n = os.path.getsize("data/text/train.bin")
    for name, content in ("cut", b"\1\0" * 99), ("beyond", b"\3" * n):
        shutil.copytree("data/text", f"data/{name}")
        put({f"data/{name}/train.bin": content})
    model = load_checkpoint("out/model.pt")
    for name, changes in {"foreign": {"format": 1}, "code": {"step": os.system},
                          "shape": {"config": model["config"] | {"n_embd": 64}}}.items():
        os.makedirs(f"bad/{name}")
        torch.save(model | changes, f"bad/{name}/model.pt")


@pytest.mark.parametrize("flags, words", {
    "--n_layr=3": "--n_layr.*--help",
    "--n_layer=2.5": "n_layer.* int value: '2.5'",
    "--learning_rate=nan": "learning_rate: 'nan' must be a number from 0",
    "--n_embd=30": "n_embd is 30: n_head 2 needs a multiple of 4",
    "broken.py": "broken.py can't be read: SyntaxError",
    "--device=tpu": "device is 'tpu'",
    "--dataset=none": "data/none can't be used .* --dataset none .* goes on with it",
    "--dataset=cut": "cut/train.bin has 99 tokens: meta.json says",
    "--dataset=beyond": "ids beyond the vocab",
    "--block_size=9999999": "a block takes 9999999",
    "--dataset=other --init_from=out/model.pt": "another vocabulary",
    "--init_from=resume --out_dir=nowhere": "nowhere/ckpt.pt isn't a checkpoint.*FileNotFound",
    "--adam_lr=1e12 --log_interval=1 --out_dir=nan-loss": "loss .* at step .* that isn't saved",
    "--adam_lr=1e12 --eval_interval=1 --out_dir=nan-bound": "save failed",
}.items())
def test_training_refuses_what_it_cannot_use(here, broken, flags, words):
    assert re.search(words, refused("train.py", *SMALL, "--out_dir=refused", *flags.split()))
    assert not os.path.exists("refused")


@pytest.mark.parametrize("flags, words", {
    "--order=best": "order: 'best' must be one of random, ",
    "--out_dir=nowhere": "nowhere/model.pt isn't a .*train first",
    "--out_dir=bad/cut": "bad/cut/model.pt .*version",
    "--out_dir=bad/foreign": "bad/foreign/model.pt .*version",
    "--out_dir=bad/code": "bad/code/model.pt .*version",
    "--out_dir=bad/shape": "bad/shape/model.pt .*version",
    "--noise=0.2": "noise is for edit",
    "--text=世{3}": "'世' isn't in the tokenizer's alphabet",
    "--text=a{3} --edit=b": "give one of them",
    "--text=out/model.pt": "'out/model.pt' can't be read as UTF-8",
    "--text=empty.txt": "is empty",
    "--text=abcd --length=3": "4 tokens .* pass --length=5",
    "--edit=abc --length=30": "3 tokens .* pass --length=3",
    "--eta=0.5": "eta is 0.5, but masked diffusion has no such setting",
    "--svg=nowhere/a.svg": "nowhere/a.svg' can't be written",
}.items())
def test_sampling_refuses_what_it_cannot_use(here, broken, flags, words):
    assert re.search(words, refused("sample.py", *flags.split()))


# ---- sampling


def samples(capsys, *flags):
    """The texts that sample.py writes, and what it says."""
    script("sample.py", *flags)
    out, err = capsys.readouterr()
    return out[:-1].split(f"\n{80 * '-'}\n"), err


@pytest.mark.parametrize("flags, pattern", [
    ("'--text=The{19} of {{{5}}}.' --steps=6", r"The.{19} of \{.{5}\}\."), ("--text=The --steps=300", "The.{29}"),
    ("--temperature=0 --order=entropy --steps=2 --watch", ".{32}"),
    ("--text=prompt.txt --length=85 --steps=8", r"Th.{60} of.{20}"),                        # in windows
    (f"--text={40 * 'a'} --length=50 --steps=4", 40 * "a" + ".{10}")])
def test_sampling_fills_what_is_unknown_and_repeats_itself(here, capsys, flags, pattern):
    put({"prompt.txt": "\ufeffTh{60} of\r\n"})            # the last line's end is no text
    flags = ["--num_samples=3", *shlex.split(flags)]
    texts, err = samples(capsys, *flags)
    assert len(texts) == 3 and all(re.fullmatch(pattern, text, re.DOTALL) for text in texts)
    assert "masked diffusion" in err and "\033" not in err                # no terminal
    assert samples(capsys, *flags)[0] == texts
    assert (samples(capsys, *flags, "--seed=2")[0] == texts) == ("--temperature=0" in flags)


def test_watch_draws_every_state_in_a_terminal(here, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    script("sample.py", "--text=The{8}", "--num_samples=1", "--steps=4", "--watch")
    frames = capsys.readouterr().err.split("\033[H\033[2J")[1:]
    assert [frame.count("\033[2m·") for frame in frames] == [8, 6, 4, 2, 0]     # noise
    assert sum(frame.count("\033[32m") for frame in frames) == 8                # new


def test_a_text_is_rewritten_the_more_the_noise(here, capsys):
    text, kept = 3 * "The value of the expression is", []
    put({"edit.txt": text + "\n"})
    for noise in 0.01, 0.4, 1.0:
        texts, _ = samples(capsys, "--edit=edit.txt", f"--noise={noise}", "--num_samples=8")
        assert {len(new) for new in texts} == {90}          # in windows
        kept.append(np.mean([a == b for new in texts for a, b in zip(new, text)]))
    assert kept[0] > 0.75 > kept[1] > 0.4 > kept[2]


def drawn(svg):
    """The lines of each picture in an SVG."""
    name = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(svg)
    pictures = [["".join(line.itertext()).rstrip() for line in picture] for picture in root.findall(f"{name}g/{name}g")]
    assert float(root.get("width")) > 8 * max(map(len, pictures[-1]))           # the film is as wide as its text
    return pictures


def test_svg_shows_the_text_in_the_making(here, capsys):
    (text, _), _ = samples(capsys, "--text=a < b{200} & c", "--length=209", "--num_samples=2", "--svg=a.svg")
    pictures = drawn((here / "a.svg").read_text("utf-8"))
    dots = ["".join(lines).count("·") for lines in pictures]
    assert dots == sorted(dots, reverse=True) and dots[0] > 150 and dots[-1] == 0
    assert re.sub(r"\s", "", "".join(pictures[-1])) == re.sub(r"\s", "", text)


@pytest.mark.parametrize("text, lines", [
    (64 * "a" + "\nb", [64 * "a", "b"]), (65 * "a", [64 * "a", "a"]), ("a\n\nb", ["a", "", "b"]),
    ("a\x07\tb", ["a  b"])])
def test_svg_lays_text_out_in_lines_and_columns(text, lines):
    before = ["longer", *text[1:]]                          # each token has the columns of the last picture
    pictures = drawn(animation([(before, len(text) * [0]), (text, len(text) * [1])]))
    assert pictures[-1] == lines and pictures[0] == ["l" + lines[0][1:], *lines[1:]]


# ---- byte pairs


@pytest.fixture(scope="session")
def gpt2():
    return byte_pairs()


def test_pieces_of_byte_pairs_keep_halves_of_characters_together(gpt2):
    ids = gpt2.encode("a 世界🙂")
    pieces = gpt2.pieces(ids)
    assert len(ids) == len(pieces) > 5 and "".join(pieces) == "a 世界🙂" == gpt2.decode(ids)
    assert gpt2.decode([*ids[:-1], gpt2.V]).endswith("�·")
    assert gpt2.decode(ids[:-1]) == "a 世界" and gpt2.decode([]) == ""         # half a character is none


@pytest.mark.parametrize("process", PROCESSES)
def test_byte_pairs_train_and_padding_is_never_sampled(here, gpt2, process, capsys):
    name = f"docs-{process}"
    put({"docs.txt": topics["lambda"] * 9})
    script("prepare_openwebtext.py", "--input", "docs.txt", "--dataset", name)
    ran = script("train.py", *SMALL, f"--dataset={name}", f"--process={process}", "--max_iters=2", "--batch_size=1",
                 "--block_size=16", "--n_layer=1", f"--out_dir={name}")
    assert "perplexity <= " in capsys.readouterr().out
    x = last(ran["ema"].sample(*unknown(16, 16), 4, temperature=1e6))   # nearly uniform over the ids that are left
    assert x.max() < 50257 and (process == "embed" or x.max() > 45_000)
    texts, _ = samples(capsys, f"--out_dir={name}", "--text=The {3} of", "--num_samples=2", "--steps=2")
    assert [text[:3] for text in texts] == ["The", "The"]


# ---- all of it: a small model learns English far beyond its letter frequencies


def entropy(share):
    return -(share[share > 0] * np.log(share[share > 0])).sum()


@pytest.mark.parametrize("process", PROCESSES)
def test_end_to_end_a_model_learns_english_and_does_not_collapse(here, process):
    text = re.sub(r"[^A-Za-z0-9 .,;:()'\n]+", " ", "\n".join(topics[name] for name in sorted(topics)))
    prepare("prose", re.sub(r"\s+", " ", text))             # sentences, without tables
    ran = script("train.py", "--dataset=prose", f"--out_dir=trained-{process}", f"--process={process}",
                 "--n_layer=2", "--n_embd=64", "--n_head=1", "--block_size=64", "--max_iters=300", "--eval_iters=16")
    tokens = ran["splits"]["train"]
    real = np.bincount(tokens) / len(tokens)
    assert ran["nelbo"] < entropy(real) - 0.25
    column = dict(zip(ran["names"], ran["rows"].T.numpy()))
    assert (np.diff(column["cross-entropy"][::2]) > 0).all()    # noise costs; a collapsed row is flat
    if process == "embed":
        assert column["cosine"][0] > 0.98                   # t = .05
        assert np.abs(column["cosine"] - column["magnitude"]).max() < 0.1
    torch.manual_seed(0)
    x = last(ran["ema"].sample(*unknown(64, 64), 64))
    share = np.bincount(x.flatten(), minlength=len(real)) / x.numel()
    assert share.max() < 1.5 * real[share.argmax()] and entropy(share) > entropy(real) - 0.3


def test_ablations_change_what_is_there():
    assert "as it is" in refused("results/ablations.py", "masked", "no such one")


def test_bench_measures_both_processes_beside_a_gpt(here, monkeypatch, capsys):
    clock = time.perf_counter                               # runs ten times as fast, for fewer rounds
    monkeypatch.setattr(time, "perf_counter", lambda: 10 * clock())
    script("bench.py", *SMALL)
    named = re.findall(r"^(\w.*?)(?:  +\d+\.\d |: [\d,]+ tokens/s for batch 1,)", capsys.readouterr().out, re.MULTILINE)
    assert named == ["masked", "embed", "causal GPT", "masked sampling, 32 steps", "masked sampling, confidence",
                     "embed sampling, 32 steps"]
