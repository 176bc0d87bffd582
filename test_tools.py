"""What a user does: settings, preparing data, training, stopping, going on, sampling. All in a folder of its own.

    python -m pytest test_tools.py
"""
import glob
import inspect
import itertools
import json
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
from pydoc_data.topics import topics
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import optim
from config import Config, SampleConfig, load
from data import Tokenizer, load_checkpoint
from diffusion import ORDERS, PROCESSES, SCHEDULES, load_model, times
from pictures import animation
from test_diffusion import TINY, last, unknown

HERE = os.path.dirname(os.path.abspath(__file__))
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
        return runpy.run_path(os.path.join(HERE, name), run_name="__main__")
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
    for path, content in files.items():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode())


def everything(folder):
    """{path: bytes} of all that is in a folder."""
    paths = [path for path in glob.glob(f"{folder}/**", recursive=True) if os.path.isfile(path)]
    return {path: open(path, "rb").read() for path in paths}


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


# ---- settings


def test_settings_come_from_defaults_then_the_file_then_flags(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("learning_rate = 1  # an int is a float\nn_layer = 12 // 2\nseed = 3\n_hidden = 5\n")
    cfg = load(Config, [str(file), "--seed=9", "--eval_only", "--out_dir", "a b", "--compile=auto"])
    assert (cfg.learning_rate, cfg.n_layer, cfg.seed, cfg.eval_only, cfg.out_dir) == (1.0, 6, 9, True, "a b")
    assert load(Config, ["--seed=9", str(file)]).seed == 9                      # flags win wherever they are
    assert load(Config, ["--eval_only", "False"]).eval_only is False
    assert load(SampleConfig, ["--text=12"]).text == "12"
    files = glob.glob(f"{HERE}/config/*.py")
    loaded = {os.path.basename(path): load(Config, [path]) for path in files}
    assert len(loaded) > 4 and loaded["shakespeare_cpu.py"] == Config()         # the default


@pytest.mark.parametrize("cls", [Config, SampleConfig])
def test_help_lists_every_setting(cls, capsys):
    with pytest.raises(SystemExit, match="0"):
        load(cls, ["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in vars(cls()))
    assert cls == Config or "0: always the" in text


@pytest.mark.parametrize("flag, words", [
    ("--n_layr=3", "--n_layr --help"), ("--n_layer=2.5", "n_layer '2.5' int"),
    ("--learning_rate=nan", "learning_rate 'nan' from 0"), ("--n_embd=100", "n_embd 100 n_head 3 multiple of 6"),
    ("broken.py", "broken.py can't be read SyntaxError"), ("strange.py", "--colour"),
    ("--process=msked", f"must be one of {', '.join(PROCESSES)}"), ("--top_p=0", "top_p '0'"),
    ("--order=best", f"must be one of {', '.join(ORDERS)}"),
    ("--schedule=no", f"must be one of {', '.join(SCHEDULES)}")])
def test_a_wrong_setting_is_named_in_one_sentence(flag, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put({"broken.py": "n_layer = = 3", "strange.py": "colour = 3"})
    of_sampling = vars(SampleConfig()).keys() - vars(Config()).keys()
    with pytest.raises(SystemExit) as stop:
        load(SampleConfig if flag[2:].split("=")[0] in of_sampling else Config, [flag])
    assert all(word in stop.value.code for word in words.split()) and "\n" not in stop.value.code


# ---- training


def test_training_prints_and_logs_what_it_promises(here, capsys):
    script("train.py", *SMALL, "--out_dir=printed", "--seed=2", "--log_interval=1")
    out = capsys.readouterr().out
    assert "source: text.txt" in out and "float32" in out and "parameters" in out
    found = re.findall(r"^step (\d+): val nelbo (\d\.\d{4}) ± (\d\.\d{4}) nats/token, .*\d\.\d+ bits/char", out,
                       re.MULTILINE)
    assert [step for step, _, _ in found] == ["0", "4", "8"]
    levels = ["0.05", *(f"0.{i}0" for i in range(1, 10)), "0.95"]
    assert re.findall(r"^  (0\.\d+) +\d", out, re.MULTILINE) == 3 * levels
    header, *rows = [row.split(",") for row in (here / "printed/log.csv").read_text().splitlines()]
    assert header == ["step", "train_loss", "val_nelbo", "se"]
    assert [(step, nelbo, se) for step, _, nelbo, se in rows] == found
    assert rows[0][1] == "" and 1 < float(rows[1][1]) < 5       # before the first step there is no loss


def test_a_models_bound_is_measured_again_on_the_same_noise(here, capsys):
    script("train.py", "--init_from=out/model.pt", "--eval_only=True", "--device=cpu", "--out_dir=none")
    assert f"val nelbo {load_checkpoint('out/model.pt')['nelbo']:.4f} " in capsys.readouterr().out
    assert not os.path.exists("none")
    ran = script("train.py", "--init_from=out/model.pt", "--eval_only=True")
    bounds = [ran["ema"].nelbo(*ran["batch"]("val", times(np.random.default_rng((1, i)), 1, 8)[0], i)).mean()
              for i in range(2)]                            # its times are uniform, not those of training
    assert abs(sum(bounds).item() / 2 - ran["nelbo"]) < 1e-4


def test_where_stderr_is_no_terminal_there_is_a_line_a_minute(here, monkeypatch, capsys):
    monkeypatch.setattr(time, "time", itertools.count(0, 25).__next__)          # 25 seconds a look
    script("train.py", *SMALL, "--out_dir=minutes", "--log_interval=1")
    out, err = capsys.readouterr()
    assert re.findall(r"<.* tokens/s, step (\d), loss \d\.\d{4}\]", out) == ["3", "6"]
    assert not err


def test_a_new_run_never_starts_in_the_folder_of_another(here):
    shutil.copytree("out", "owned")
    os.symlink("owned/model.pt", "link.pt")
    before = everything("owned")
    for flags in [], ["--process=embed"], ["--init_from=owned/ckpt.pt"], ["--init_from=link.pt"]:
        assert re.search("owned/.*pt is of another run: .*--init_from=resume --out_dir=owned",
                         refused("train.py", *SMALL, "--out_dir=owned", *flags))
    assert before == everything("owned")
    os.remove("owned/ckpt.pt")
    assert "owned/model.pt is" in refused("train.py", *SMALL, "--out_dir=owned")


def test_auto_starts_then_resumes_and_a_finished_run_says_so(here, capsys):
    said = []
    for n in 2, 4, 4:
        script("train.py", *SMALL, "--init_from=auto", "--out_dir=auto", f"--max_iters={n}")
        said.append(capsys.readouterr().out)
    assert "settings are" not in said[0]
    assert "auto/ckpt.pt, step 2, but max_iters 4 (was 2)\n" in said[1] and "no step is left" not in said[1]
    assert "no step is left" in said[2]
    assert load_checkpoint("auto/ckpt.pt")["step"] == 4


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
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_of_tokens_that_are_strings_the_bound_is_told_per_character(here, capsys):
    put({"strings.txt": "The value of an expression.\n" * 400})
    script("prepare_shakespeare.py", "--input", "strings.txt", "--dataset", "strings", "--vocab_size", "30")
    script("train.py", *SMALL, "--dataset=strings", "--out_dir=strings", "--max_iters=0")
    meta = json.loads((here / "data/strings/meta.json").read_text())
    assert meta["val_tokens"] < 0.6 * meta["val_chars"]
    found = re.search(r"nelbo ([\d.]+) .*, ([\d.]+) bits/char", capsys.readouterr().out)
    nats, bits = map(float, found.groups())
    assert abs(bits - nats / math.log(2) * meta["val_tokens"] / meta["val_chars"]) < 1e-3
    texts, _ = samples(capsys, "--out_dir=strings", "--text=The value{3}", "--steps=2")
    assert all(text.startswith("The value") and len(text) >= 12 for text in texts)


# ---- several processes


def torchrun(n, *flags, node=0, nodes=1):
    """Starts train.py on n processes of one of several nodes, all of them on this machine."""
    port = 29500 + os.getpid() % 1000
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--nnodes={nodes}",
         f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}",
         os.path.join(HERE, "train.py"), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(out):
    """The numbers of the last evaluation that a run printed: its bound, and the table by noise level."""
    bound, table = out.split("val nelbo ")[-1].split("\n", 1)
    return np.array([float(bound.split()[0]), *map(float, re.findall(r" \d\.\d{4}", table))])


@pytest.mark.parametrize("process, n", [("masked", 3), ("embed", 2)])
def test_the_run_does_not_depend_on_the_number_of_processes(here, capsys, process, n):
    flags = [*SMALL, f"--process={process}", "--gradient_accumulation_steps=6", "--batch_size=4",
             "--eval_iters=20", "--dropout=0.1", "--warmup_iters=50"]       # of 4 and 8 steps the same ones
    script("train.py", *flags, "--out_dir=one-" + process)
    outcomes = [outcome(capsys.readouterr().out)]
    run = torchrun(n, *flags, "--out_dir=many-" + process)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err[-2000:]
    outcomes.append(outcome(out))
    if process == "masked":                                 # two nodes for 4 steps, one process for the rest
        runs = [torchrun(1, *flags, "--max_iters=4", "--out_dir=nodes-masked", node=i, nodes=2) for i in (0, 1)]
        for run in runs:
            _, err = run.communicate(timeout=300)
            assert run.returncode == 0, err[-2000:]
        script("train.py", "--out_dir=nodes-masked", "--init_from=resume", "--max_iters=8")
        outcomes.append(outcome(capsys.readouterr().out))
    assert all(np.abs(found - outcomes[0]).max() < 3e-4 for found in outcomes)
    one, *others = (load_checkpoint(f"{folder}/ckpt.pt") for folder in sorted(glob.glob(f"*-{process}"))[::-1])
    for ckpt in others:
        assert ckpt["step"] == 8
        assert all((ckpt["model"][key] - one["model"][key]).abs().max() < 1e-5 for key in one["model"])


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
    with monkeypatch.context() as patch:
        call_in(patch, 5, optim, "update", send(number))        # in step 5, which is finished and saved
        script("train.py", *flags, f"--out_dir=parts-{process}")
    assert ended_by == [number] and "stopped at step 5, saved" in capsys.readouterr().out
    script("train.py", "--init_from=resume", f"--out_dir=parts-{process}")      # with the settings of the run
    torch.set_num_threads(1)
    whole, parts = (load_checkpoint(f"{folder}-{process}/ckpt.pt") for folder in ("whole", "parts"))
    for name in "model", "ema":
        assert all(torch.equal(whole[name][key], parts[name][key]) for key in whole[name])
    assert parts["step"] == 8 and whole["log"] == parts["log"]


def test_a_stop_in_a_step_or_an_evaluation_loses_nothing_and_logs_nothing_twice(
        here, monkeypatch, capsys, ended_by):
    flags = [*SMALL, "--out_dir=long", "--max_iters=2", "--eval_interval=2", "--log_interval=1"]
    with monkeypatch.context() as patch:                    # in the second micro-batch of the second step
        call_in(patch, 5, PROCESSES["masked"], "forward", send(signal.SIGINT))
        script("train.py", *flags, "--gradient_accumulation_steps=3")
    assert load_checkpoint("long/ckpt.pt")["step"] == 1
    with monkeypatch.context() as patch:                    # in the first batch of the evaluation
        call_in(patch, 1, PROCESSES["masked"], "nelbo", send(signal.SIGINT))
        script("train.py", "--init_from=resume", "--out_dir=long")
    assert load_checkpoint("long/ckpt.pt")["step"] == 2
    put({"long/log.csv": "step,train_loss,val_nelbo,se\n0,,3,1\n9,1.5,3,1\n2,1."})      # a later row, a cut one
    capsys.readouterr()
    with monkeypatch.context() as patch:                    # in the last samples: all is done but the exit code
        call_in(patch, 1, PROCESSES["masked"], "sample", send(signal.SIGINT))
        script("train.py", "--init_from=resume", "--out_dir=long")
    assert "step 2: val nelbo" in capsys.readouterr().out
    rows = [row.split(",")[:2] for row in (here / "long/log.csv").read_text().splitlines()[1:]]
    assert rows == [["0", ""], ["2", ""]]                   # no step was taken before either
    assert ended_by == 3 * [signal.SIGINT]


def test_killed_between_its_first_two_files_a_run_goes_on(here, monkeypatch):
    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda old, new: sys.exit("killed") if "model" in new else replace(old, new))
        assert refused("train.py", *SMALL, "--out_dir=killed") == "killed"
    assert not os.path.exists("killed/model.pt")
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
        assert {*os.listdir(folder)} == {"ckpt.pt", "model.pt", "log.csv"}
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


@pytest.mark.parametrize("numbers, code, step", [([signal.SIGTERM], -15, 1), ([signal.SIGINT] * 2, -2, 0)])
def test_a_stop_ends_by_its_signal_a_second_one_at_once(here, numbers, code, step):
    run = python("-c", f"""
import os, runpy, sys, time
from diffusion import Masked
forward, calls = Masked.forward, []
def signalled(*args):
    calls.append(1)
    if len(calls) == 2:
        for number in {[*map(int, numbers)]}:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
    return forward(*args)
Masked.forward = signalled
sys.argv = ["train.py", *{SMALL}, "--out_dir=by{code}", "--gradient_accumulation_steps=1"]
runpy.run_path("{HERE}/train.py")""")
    assert run.returncode == code
    assert load_checkpoint(f"by{code}/ckpt.pt")["step"] == 2 * step
    assert run.stdout.count("stopped at step 2") == step and not run.stderr


# ---- in a terminal, as it is: Ctrl-C, pipes, a terminal that is closed

TRAIN = shlex.join([sys.executable, f"{HERE}/train.py", *SMALL, "--max_iters=100000", "--eval_interval=50000"])


class Terminal:
    """Runs a command of bash in a terminal of its own."""

    def __init__(self, command):
        self.shown = ""
        self.process, self.file = pty.fork()
        if self.process == 0:
            listen_to_signals()
            os.execv("/bin/bash", ["bash", "-c", f"stty cols 99 rows 30; {command}"])       # for the bar

    def read(self, pattern="no such text"):
        """Reads what it shows until a pattern comes, or all programs in it have ended."""
        while not re.search(pattern, self.shown):
            assert select.select([self.file], [], [], 120)[0], self.shown
            try:
                self.shown += os.read(self.file, 4096).decode("utf-8", "replace")
            except OSError:
                return

    def press_ctrl_c(self):
        os.write(self.file, b"\3")

    def ended(self):
        """The exit code, or minus the signal by which bash ended."""
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def test_ctrl_c_ends_a_loop_of_runs_and_the_printed_command_goes_on(here):
    terminal = Terminal(f"for s in 1 2; do {TRAIN} --out_dir=sd-$s; done")
    terminal.read("loss ")
    terminal.press_ctrl_c()
    terminal.read()
    assert terminal.ended() == -signal.SIGINT and not os.path.exists("sd-2")
    step, go_on = re.search(r"stopped at step (\d+), saved: go on with (.*?)\r?\n", terminal.shown).groups()
    assert load_checkpoint("sd-1/ckpt.pt")["step"] == int(step) > 0
    script("train.py", *shlex.split(go_on), f"--max_iters={int(step) + 1}")
    assert load_checkpoint("sd-1/ckpt.pt")["step"] == int(step) + 1


def test_ctrl_c_ends_tee_first_and_the_run_still_saves(here):
    terminal = Terminal(f"trap : INT; {TRAIN} --out_dir=tee 2>&1 | tee log; echo codes ${{PIPESTATUS[*]}}")
    terminal.read("0.95 [^-]*-{80}[^-]*-{80}")
    time.sleep(2)                                           # a few steps
    terminal.press_ctrl_c()
    terminal.read()
    assert "codes 130 130" in terminal.shown and "rror" not in terminal.shown
    assert load_checkpoint("tee/ckpt.pt")["step"] > 0


def test_a_closed_terminal_saves(here):
    terminal = Terminal(f"exec {TRAIN} --out_dir=closed")
    terminal.read("loss ")
    os.close(terminal.file)
    assert terminal.ended() == -signal.SIGHUP
    assert load_checkpoint("closed/ckpt.pt")["step"] > 0


def test_a_closed_pipe_trains_on_to_the_end_in_silence(here):
    command = f"{TRAIN} --max_iters=8 --eval_interval=4 --out_dir=piped | head -3; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and not run.stderr and run.stdout.count("\n") == 3
    assert load_checkpoint("piped/ckpt.pt")["step"] == 8


# ---- what can't be used is refused


@pytest.fixture(scope="session")
def broken(text_dir):
    """Data sets and checkpoints, in bad/, that are of no use."""
    os.chdir(text_dir)
    with open("data/text/meta.json") as f:
        alphabet = json.load(f)

    def dataset(name, train=b"\1\0" * 99, val=b"\1\0" * 99, **changes):
        counts = {"train_tokens": len(train) // 2, "val_tokens": len(val) // 2}
        put({f"data/{name}/meta.json": json.dumps(alphabet | counts | changes),
             f"data/{name}/train.bin": train, f"data/{name}/val.bin": val})

    dataset("odd", train=b"123")
    dataset("cut-off", train_tokens=100)
    dataset("short", val=b"\0\0" * 31)
    dataset("beyond", train=np.full(100, 999, np.uint16).tobytes())
    dataset("other", chars=alphabet["chars"][::-1])
    dataset("unfinished")
    os.remove("data/unfinished/meta.json")              # as prepare_openwebtext.py leaves it when stopped
    model = load_checkpoint("out/model.pt")
    whole = everything("out")
    put({"data/broken/meta.json": '{"tokenizer": "cha', "empty.txt": "\n",
         "bad/cut/model.pt": whole["out/model.pt"][:5000], "bad/ckpt.pt": whole["out/ckpt.pt"][:5000]})
    for name, content in {"foreign": {"model": 1}, "code": {"f": os.system},
                          "shape": model | {"config": model["config"] | {"n_embd": 64}}}.items():
        os.makedirs(f"bad/{name}")
        torch.save(content, f"bad/{name}/model.pt")


@pytest.mark.parametrize("words, flags", [
    ("data/none can't be used .* --dataset none", ["--dataset=none"]),
    ("data/broken can't be used", ["--dataset=broken"]),
    ("data/unfinished can't be used .* --dataset unfinished .* goes on with it", ["--dataset=unfinished"]),
    ("data/odd", ["--dataset=odd"]), ("cut-off/train.bin has 99 tokens: .* says 100", ["--dataset=cut-off"]),
    ("a block takes at least 32", ["--dataset=short"]), ("ids beyond the vocab", ["--dataset=beyond"]),
    ("another vocabulary", ["--dataset=other", "--init_from=out/model.pt"]),
    ("nowhere/ckpt.pt isn't a checkpoint.*FileNotFound", ["--init_from=resume", "--out_dir=nowhere"]),
    ("bad/ckpt.pt isn't a checkpoint of this version", ["--init_from=resume", "--out_dir=bad"]),
    ("bad/code/model.pt isn't a checkpoint", ["--init_from=bad/code/model.pt"]),
    ("device is 'tpu'", ["--device=tpu"]), ("device is 'cuda:99'", ["--device=cuda:99"]),
    ("(loss|bound) nan at step .* that isn't saved", ["--learning_rate=1e14", "--grad_clip=0.0"]),
    ("bound nan .* that isn't saved", ["--learning_rate=1e12", "--adam_lr=1e12", "--eval_interval=1"])])
def test_training_refuses_what_it_cannot_use(here, broken, words, flags):
    shutil.rmtree("refused", ignore_errors=True)
    assert re.search(words, refused("train.py", *SMALL, "--out_dir=refused", *flags))
    assert os.path.exists("refused") == ("nan" in words)


@pytest.mark.parametrize("words, flags", [
    ("nowhere/model.pt isn't a .*train first", ["--out_dir=nowhere"]), ("noise is for edit", ["--noise=0.2"]),
    *((f"bad/{name}/model.pt .*version", [f"--out_dir=bad/{name}"]) for name in ("cut", "foreign", "code", "shape")),
    ("'世' isn't in the tokenizer's alphabet", ["--text=世{3}"]), ("give one of them", ["--text=a{3}", "--edit=b"]),
    ("'out/model.pt' can't be read as UTF-8", ["--text=out/model.pt"]), ("is empty", ["--text=empty.txt"]),
    ("a brace is doubled", ["--text=a{b}"]),
    ("eta is 0.5, but masked diffusion has no such setting", ["--eta=0.5"]),
    ("nowhere/a.svg' can't be written", ["--svg=nowhere/a.svg"])])
def test_sampling_refuses_what_it_cannot_use(here, broken, words, flags):
    assert re.search(words, refused("sample.py", *flags))


# ---- sampling


def samples(capsys, *flags):
    """The texts that sample.py writes, and what it says."""
    script("sample.py", *flags)
    out = capsys.readouterr()
    return out.out[:-1].split("\n" + "-" * 80 + "\n"), out.err


def drawn(svg):
    """The lines of each picture in an SVG, those of its layers one after the other."""
    name = "{http://www.w3.org/2000/svg}"
    return [[span.text for span in picture.iter(f"{name}tspan")]
            for picture in ElementTree.fromstring(svg).findall(f"{name}g/{name}g")]


def listen(monkeypatch, process="masked"):
    """A list that gets the (x, states) of each call of the process's sampler."""
    calls, sample = [], PROCESSES[process].sample

    def sampler(self, x, *args, **settings):
        calls.append((x.clone(), []))
        for state in sample(self, x, *args, **settings):
            calls[-1][1].append(state[0].clone())
            yield state

    sampler.__signature__ = inspect.signature(sample)
    monkeypatch.setattr(PROCESSES[process], "sample", sampler)
    return calls


@pytest.mark.parametrize("flags, pattern, counts", [
    (["--text=The{19} of {5}.", "--steps=6"], r"The.{19} of .{5}\.", "72 tokens in 6 network calls"),
    (["--text=The", "--steps=300"], "The.{29}", "87 tokens in 29 network calls"),
    (["--text=a{40}"], "a.{40}", "120 tokens"),
    (["--text=x^{{y}} + {2}", "--steps=2"], r"x\^\{y\} \+ ..", "6 tokens in 2"),
    (["--temperature=0", "--order=entropy", "--steps=2", "--watch"], ".{32}", "96 tokens in 2"),
    (["--text=prompt.txt", "--length=80", "--steps=4"], r"Th.{60} of.{15}", "225 tokens in 16"),
    (["--text=" + 40 * "a", "--length=50", "--steps=4"], 40 * "a" + ".{10}", "30 tokens in 6 network calls"),
    (["--length=100", "--steps=8"], ".{100}", "300 tokens in 44 network calls")])           # last window: 4
def test_sampling_fills_what_is_unknown_and_repeats_itself(here, capsys, flags, pattern, counts):
    put({"prompt.txt": "\ufeffTh{60} of\n"})
    texts, err = samples(capsys, "--num_samples=3", *flags)
    assert len(texts) == 3 and all(re.fullmatch(pattern, text, re.DOTALL) for text in texts)
    assert counts in err and "masked diffusion" in err and "\033" not in err                # no terminal
    assert samples(capsys, "--num_samples=3", *flags)[0] == texts
    other_seed, _ = samples(capsys, "--num_samples=3", *flags, "--seed=2")
    assert (other_seed == texts) == (flags[0] == "--temperature=0")


def test_a_length_that_does_not_fit_is_answered_with_one_that_does(here, capsys):
    for flags in ["--text=" + 40 * "a"], ["--text=abcd", "--length=3"], ["--edit=abc", "--length=30"]:
        advice = re.search(r"--length=\d+", refused("sample.py", *flags))[0]
        samples(capsys, flags[0], advice, "--steps=2", "--num_samples=1")


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("flag", ["--text", "--edit"])
def test_files_are_read_as_they_are_but_for_the_last_line_end(here, monkeypatch, flag, end):
    ckpt = load_checkpoint("out/model.pt")
    ckpt["meta"]["chars"] = [{"~": "\r"}.get(c, c) for c in ckpt["meta"]["chars"]]      # a model of such text
    os.makedirs("returns", exist_ok=True)
    torch.save(ckpt, "returns/model.pt")
    text = "a\rb\r\n\nc"
    put({"crlf.txt": f"\ufeff{text}{end}"})
    calls = listen(monkeypatch)
    script("sample.py", f"{flag}=crlf.txt", "--out_dir=returns", "--num_samples=1", "--steps=1")
    read = Tokenizer(ckpt["meta"]).decode(calls[0][0][0].tolist())
    assert read == text.ljust(32 if flag == "--text" else 0, "·")


def test_watch_draws_every_state_in_a_terminal(here, monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    script("sample.py", "--text=The{8}", "--num_samples=1", "--steps=4", "--watch")
    frames = capsys.readouterr().err.split("\033[H\033[2J")[1:]
    assert len(frames) == 5 and frames[0].count("\033[2m·") == 8 and frames[-1].count("\033[2m") == 0
    assert sum(f.count("\033[32m") for f in frames) == 8 and all(f.startswith("\033[0mT") for f in frames)


def test_a_text_is_rewritten_the_more_the_noise(here, capsys):
    text, kept = 3 * "The value of the expression is", []
    put({"edit.txt": text + "\n"})
    for noise in 0.01, 0.4, 1.0:
        texts, _ = samples(capsys, "--edit=edit.txt", f"--noise={noise}", "--num_samples=8")
        assert {len(new) for new in texts} == {90}          # in windows
        kept.append(sum(a == b for new in texts for a, b in zip(new, text)) / sum(map(len, texts)))
    assert kept[0] > 0.75 > kept[1] > 0.4 > kept[2]


def test_noise_of_sampling_is_not_the_embeddings_of_training(here, monkeypatch):
    script("train.py", *SMALL, "--process=embed", "--max_iters=1", "--seed=7", "--out_dir=seed7")
    calls = listen(monkeypatch, "embed")
    script("sample.py", "--out_dir=seed7", "--seed=7", "--steps=1", "--num_samples=1")
    # the same random numbers would make position i look like token i
    assert (calls[0][1][0][0] == torch.arange(32)).float().mean() < 0.2


@pytest.mark.parametrize("steps", [4, 128])
def test_svg_holds_every_state_and_ends_with_the_text(here, capsys, monkeypatch, steps):
    calls = listen(monkeypatch)
    (text, _), _ = samples(capsys, "--text=a < b{200} & c", "--length=209", f"--steps={steps}",
                           "--num_samples=2", "--svg=a.svg")
    pictures, n = drawn((here / "a.svg").read_text("utf-8")), sum(len(states) for _, states in calls)
    assert os.path.getsize("a.svg") < 100_000 and min(26, n) <= len(pictures) <= 49
    dots = ["".join(lines).count("·") for lines in pictures]
    assert dots == sorted(dots, reverse=True) and dots[0] > 150 and dots[-1] == 0
    assert re.sub(r"\s", "", "".join(pictures[-1])) == re.sub(r"\s", "", text)


@pytest.mark.parametrize("text, lines", [
    (64 * "a" + "\nb", [64 * "a", "b"]), (65 * "a", [64 * "a", "a"]), ("a\n\nb", ["a", "b"]),
    ("世世<", ["世世<"]), ("a\x07\tb", ["a  b"])])
def test_svg_lays_text_out_in_lines_and_columns_which_earlier_pictures_keep(text, lines):
    states = (len(text) * ["世·\n"], len(text) * [0.1]), (list(text), len(text) * [1])
    *_, first, final = drawn(animation(states))
    assert final == lines
    for old, new in zip(first, final):                      # in a column: no 世, but ·, if it fits
        assert sum(1 + (c == "世") for c in old) <= sum(1 + (c == "世") for c in new) + 1


# ---- byte pairs


@pytest.fixture(scope="session")
def gpt2():
    try:
        return Tokenizer({"vocab_size": 50257})
    except SystemExit:
        pytest.skip("GPT-2's byte pairs aren't here: set TIKTOKEN_CACHE_DIR or connect once")


def test_pieces_of_byte_pairs_keep_halves_of_characters_together(gpt2):
    ids = gpt2.encode("a 世界🙂")
    pieces = gpt2.pieces(ids)
    assert len(ids) == len(pieces) > 5 and "".join(pieces) == "a 世界🙂" == gpt2.decode(ids)
    assert gpt2.pieces([ids[0], gpt2.V, ids[-1]])[:2] == ["a", "·"]
    assert gpt2.decode([*ids[:-1], gpt2.V]).endswith("�·")
    assert gpt2.decode(ids[:-1]) == "a 世界" and gpt2.decode([]) == ""         # half a character is none


@pytest.mark.parametrize("process", PROCESSES)
def test_byte_pairs_train_and_padding_is_never_sampled(here, gpt2, process, capsys):
    put({"docs.txt": topics["lambda"] * 9})
    if not os.path.exists("data/docs"):
        script("prepare_openwebtext.py", "--input", "docs.txt", "--dataset", "docs")
    ran = script("train.py", *SMALL, "--dataset=docs", f"--process={process}", "--max_iters=2", "--batch_size=2",
                 "--block_size=16", "--n_layer=1", f"--out_dir=docs-{process}")
    model, out = ran["ema"], capsys.readouterr().out
    assert model.V == 50304 and "perplexity <= " in out
    for temperature in 1.0, 1e6:                            # nearly uniform over the ids that are left
        x = last(model.sample(*unknown(16, 16), 4, temperature=temperature))
        assert x.max() < 50257
    assert process == "embed" or (x.max() > 45_000 and len(x.unique()) > 200)
    texts, _ = samples(capsys, f"--out_dir=docs-{process}", "--text=The {3} of", "--num_samples=2", "--steps=2")
    assert [text[:3] for text in texts] == ["The", "The"]


# ---- all of it: a small model learns English far beyond its letter frequencies


def entropy(share):
    return -(share[share > 0] * np.log(share[share > 0])).sum()


@pytest.mark.parametrize("process", PROCESSES)
def test_end_to_end_a_model_learns_english_and_does_not_collapse(here, process, capsys):
    text = re.sub(r"[^A-Za-z0-9 .,;:()'\n]+", " ", "\n".join(topics[name] for name in sorted(topics)))
    prepare("prose", re.sub(r"\s+", " ", text))             # sentences, without tables
    script("train.py", "--dataset=prose", f"--out_dir=trained-{process}", f"--process={process}", "--n_layer=2",
           "--n_embd=64", "--n_head=1", "--block_size=64", "--max_iters=300", "--eval_iters=16")
    final = capsys.readouterr().out.split("step 300: ")[1]
    tokens = np.fromfile("data/prose/train.bin", np.uint16)
    real = np.bincount(tokens) / len(tokens)
    assert float(re.search(r"val nelbo (\d\.\d+)", final)[1]) < entropy(real) - 0.25
    # noise costs; a collapsed row is flat
    names, *rows = re.search(r"^     t .*(\n  0\..*)+", final, re.MULTILINE)[0].strip().splitlines()
    column = dict(zip(re.split("  +", names), zip(*(map(float, row.split()) for row in rows))))
    assert sorted(column["cross-entropy"][::2]) == list(column["cross-entropy"][::2])
    assert column["accuracy"][0] > column["accuracy"][-1] + 0.2
    model = load_model(f"trained-{process}/model.pt")[0]
    if process == "embed":
        assert column["accuracy"][0] > 0.98 and column["cosine"][0] > 0.98      # t = .05
        assert all(abs(c - m) < 0.1 for c, m in zip(column["cosine"], column["magnitude"]))
        e = F.normalize(model.table(), dim=1)
        assert abs((e @ e.T - torch.eye(len(e))).mean()) < 0.05
    torch.manual_seed(0)
    x = last(model.sample(*unknown(64, 64), 64))
    share = np.bincount(x.flatten().numpy(), minlength=model.V) / x.numel()
    assert share.max() < 1.5 * real[share.argmax()] and entropy(share) > entropy(real) - 0.3


def test_ablations_change_what_is_there():
    assert "as it is" in refused("results/ablations.py", "masked", "no such one")


def test_bench_measures_both_processes_beside_a_gpt(here, monkeypatch, capsys):
    clock = time.perf_counter                               # runs ten times as fast, for fewer rounds
    monkeypatch.setattr(time, "perf_counter", lambda: 10 * clock())
    script("bench.py", *SMALL)
    out = capsys.readouterr().out
    for name in "masked", "embed", "causal GPT":
        assert re.search(rf"^{name} +\d+\.\d +\d+\.\d-\d+\.\d +[\d,]+ +\d\.\d{{3}}", out, re.MULTILINE), out
    for kind in "masked sampling, 32 steps", "masked sampling, confidence", "embed sampling, 32 steps":
        assert re.search(rf"^{kind}: [\d,]+ \S+ for batch 1, [\d,]+ \S+ for batch 32$", out, re.MULTILINE)
