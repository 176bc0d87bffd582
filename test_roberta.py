"""RoBERTa: what prepare_roberta.py makes of random weights, against transformers; then as a user runs it.

    pip install transformers==5.24.0 && python -m pytest test_roberta.py
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

import optim
from data import Tokenizer, load_checkpoint
from diffusion import load_model
from test_tools import HERE, refused, script

transformers = pytest.importorskip("transformers", reason="RoBERTa's oracle: pip install transformers==5.24.0")
from transformers.convert_slow_tokenizer import bytes_to_unicode

END = 50256                                 # <|endoftext|>

SMALL = ["--dataset=pairs", "--device=cpu", "--dtype=float32", "--batch_size=4", "--block_size=32",
         "--dropout=0.1", "--gradient_accumulation_steps=4", "--eval_iters=2", "--eval_interval=4",
         "--max_iters=4", "--warmup_iters=1", "--adam_lr=0.001", "--init_from=out-roberta/model.pt"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with hf, a RoBERTa with random weights, out-roberta, what became of it, and data/pairs.

    The bodies of vocab.json are GPT-2's byte pairs in random order between the real one's special tokens.
    """
    path = tmp_path_factory.mktemp("roberta")
    os.chdir(path)
    try:
        tokenizer = Tokenizer({"vocab_size": 50257})
    except SystemExit:
        pytest.skip("GPT-2's byte pairs aren't here: set TIKTOKEN_CACHE_DIR or connect once")
    torch.manual_seed(0)
    roberta = transformers.RobertaForMaskedLM(transformers.RobertaConfig(
        vocab_size=50265, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=514, type_vocab_size=2, layer_norm_eps=1e-5)).eval()
    with torch.no_grad():
        for p in roberta.parameters():
            p.add_(0.2 * torch.randn_like(p))
    roberta.save_pretrained("hf")

    letter = bytes_to_unicode()
    names = ["".join(letter[byte] for byte in tokenizer.bpe.decode_single_token_bytes(i)) for i in range(END)]
    assert names[262] == "Ġthe"
    order = 4 + torch.randperm(END)         # RoBERTa's ids of our tokens
    vocabulary = dict(zip(names, order.tolist())) | {
        "<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<|endoftext|>": 50260, "<mask>": 50264}
    vocabulary |= {f"madeupword000{i}": 50261 + i for i in range(3)}
    assert sorted(vocabulary.values()) == list(range(50265))
    with open("hf/vocab.json", "w") as f:
        json.dump(vocabulary, f)
    script("prepare_roberta.py", "hf")

    ids = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))[:20_000]
    os.makedirs("data/pairs")
    np.array(ids[:15_000], np.uint16).tofile("data/pairs/train.bin")
    np.array(ids[15_000:], np.uint16).tofile("data/pairs/val.bin")
    with open("data/pairs/meta.json", "w") as f:
        json.dump({"vocab_size": 50257, "source": "topics", "train_tokens": 15_000, "val_tokens": 5_000}, f)
    order = torch.cat((order, torch.tensor([2])))
    theirs = torch.full((50305,), 50264)    # their id of each of ours; only [MASK] lies beyond the byte pairs
    theirs[:END + 1] = order
    return {"roberta": roberta, "order": order, "theirs": theirs, "tokenizer": tokenizer, "path": path}


@pytest.fixture
def here(work):
    os.chdir(work["path"])
    return work


@torch.no_grad()
def test_the_logits_are_those_of_transformers_with_any_share_of_masks(here):
    model, *_ = load_model("out-roberta/model.pt", dtype="float32")
    everywhere = torch.ones(1, 512, dtype=torch.bool)
    for share in 0, 0.15, 0.6, 1:
        x = torch.randint(END + 1, (1, 512))
        x[0, ::100] = END
        x = x.masked_fill(torch.rand(1, 512) < share, model.V)
        truth = here["roberta"](here["theirs"][x]).logits[0]
        logits = model.denoise(x, everywhere)
        assert (logits[:, :END + 1] - truth[:, here["order"]]).abs().max() < 1e-4 * truth.std()
        assert (logits[:, END + 1:] < -1e29).all()


@torch.no_grad()
def test_bfloat16_is_as_close_as_it_can_be(here):
    x = torch.randint(END, (1, 64)).masked_fill(torch.rand(1, 64) < 0.5, 50304)
    found, computed_in = [], []
    for dtype in "float32", "bfloat16":
        model, *_ = load_model("out-roberta/model.pt", dtype=dtype)
        model.net.blocks[0].linear1.register_forward_hook(lambda *args: computed_in.append(args[-1].dtype))
        found.append(model.denoise(x, x == 50304)[:, :END])
    exact, rough = found
    assert computed_in == [torch.float32, torch.bfloat16] and rough.dtype == torch.float32
    assert (rough - exact).std() < 0.03 * exact.std()


def test_other_files_give_the_same_weights(here):
    shutil.copytree("hf", "older", dirs_exist_ok=True)
    os.remove("older/model.safetensors")
    torch.save(here["roberta"].state_dict(), "older/pytorch_model.bin")
    script("prepare_roberta.py", "older", "--out_dir=out-older")
    here["roberta"].half().save_pretrained("half")
    here["roberta"].float().load_state_dict(torch.load("older/pytorch_model.bin"))
    shutil.copy("hf/vocab.json", "half")
    script("prepare_roberta.py", "half", "--out_dir=out-half")
    first, older, half = (
        load_checkpoint(f"out-{name}/model.pt")["model"] for name in ("roberta", "older", "half"))
    assert all(torch.equal(first[key], older[key]) for key in first)
    assert all(torch.allclose(first[key], half[key], atol=1e-3, rtol=1e-3) for key in first)


def test_a_blank_gets_what_roberta_gives_and_nothing_was_measured(here, capsys):
    before, after = "The value of", " is None."
    script("sample.py", "--out_dir=out-roberta", f"--text={before}{{1}}{after}", "--temperature=0",
           "--num_samples=1", "--device=cpu", "--dtype=float32")
    out, err = capsys.readouterr()
    ids = [*here["tokenizer"].encode(before), 50304, *here["tokenizer"].encode(after)]
    with torch.no_grad():
        logits = here["roberta"](here["theirs"][torch.tensor([ids])]).logits[0, ids.index(50304)]
    best = logits[here["order"]].argmax().item()
    assert out == before + here["tokenizer"].decode([best]) + after + "\n"
    assert "step 0, bound nan nats/token, trained on what RoBERTa in hf was" in err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_starts_from_it_with_rates_that_keep_it_and_lowers_the_loss(here, dtype, capsys):
    out_dir = f"--out_dir=fine-{dtype}"
    script("train.py", *SMALL, out_dir, f"--dtype={dtype}")
    out = capsys.readouterr().out
    start, end = map(float, re.findall(r"val nelbo (\d+\.\d+)", out))
    assert end < start - 0.1
    pretrained, tuned = load_checkpoint("out-roberta/model.pt"), load_checkpoint(f"fine-{dtype}/ckpt.pt")
    assert all(torch.equal(tuned[name]["bias"], pretrained["model"]["bias"]) for name in ("model", "ema"))
    config = pretrained["config"]
    assert config["adam_lr"] == 1e-4 and config["block_size"] == 512 and config["n_layer"] == 2
    script("sample.py", out_dir, "--text=The {8} of{3}.", "--num_samples=2", "--steps=4", f"--dtype={dtype}")
    texts = capsys.readouterr().out.split("\n" + 80 * "-" + "\n")
    assert len(texts) == 2 and all(re.fullmatch("(?s)The .* of.*\\.\n?", text) for text in texts)


def test_stop_and_resume_is_bit_identical(here, monkeypatch):
    script("train.py", *SMALL, "--out_dir=whole")
    with monkeypatch.context() as patch:                    # stopped in its second step
        calls, update = [], optim.update

        def stopped(*args):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(*args)
        patch.setattr(optim, "update", stopped)
        patch.setattr(signal, "raise_signal", lambda number: None)
        script("train.py", *SMALL, "--out_dir=parts")
    assert load_checkpoint("parts/ckpt.pt")["step"] == 2
    script("train.py", "--init_from=resume", "--out_dir=parts")
    whole, parts = (load_checkpoint(f"{name}/ckpt.pt") for name in ("whole", "parts"))
    assert parts["step"] == 4
    for name in "model", "ema":
        assert all(torch.equal(whole[name][key], parts[name][key]) for key in whole[name])


def test_two_processes_do_what_one_does(here):
    script("train.py", *SMALL, "--out_dir=one")
    port = f"--master_port={29000 + os.getpid() % 999}"
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", port,
         os.path.join(HERE, "train.py"), *SMALL, "--out_dir=two"],
        capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    one, two = (load_checkpoint(f"{name}/ckpt.pt")["model"] for name in ("one", "two"))
    for key in one:                         # but the bias of keys, which changes nothing: Adam takes steps of
        # a whole size even where the gradient is but rounding
        rows = [0, 2] if key.endswith("in_proj_bias") else [0]
        a, b = (w[key].chunk(3) if len(rows) == 2 else [w[key]] for w in (one, two))
        assert all((a[i] - b[i]).abs().max() < 1e-5 for i in rows), key


def test_it_starts_from_nothing_too_and_a_compiled_step_is_one_graph(here, monkeypatch):
    ran = script("train.py", *SMALL[:-1], "--net=roberta", "--n_layer=1", "--n_embd=32", "--n_head=2",
                 "--max_iters=1", "--out_dir=nothing")
    monkeypatch.setattr(torch._dynamo.config, "capture_dynamic_output_shape_ops", True)
    model = ran["model"]
    model.compile(fullgraph=True, backend="aot_eager")
    for t in 0.2, 0.7:
        x0, t = torch.randint(END, (4, 32)), torch.full((4,), t)
        torch.manual_seed(0)
        with torch.no_grad():
            truth = model.eval().forward(x0, t)
        torch.manual_seed(0)
        assert abs(model(x0, t) - truth) < 1e-4


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def change(name, **values):
    with open(f"{name}/config.json") as f:
        config = json.load(f)
    with open(f"{name}/config.json", "w") as f:
        json.dump(config | values, f)


@pytest.mark.parametrize("words, spoil", [
    ("config.json isn't of a RoBERTa .*FileNotFound", lambda: os.remove("bad/config.json")),
    ("vocab.json isn't of a RoBERTa .*FileNotFound", lambda: os.remove("bad/vocab.json")),
    ("pytorch_model.bin isn't of .*FileNotFound", lambda: os.remove("bad/model.safetensors")),
    ("model_type is 'bert'", lambda: change("bad", model_type="bert")),
    ("model_type is 'xlm-roberta'", lambda: change("bad", model_type="xlm-roberta")),
    ("layer_norm_eps is 1e-12", lambda: change("bad", layer_norm_eps=1e-12)),
    ("max_position_embeddings is 130", lambda: change("bad", max_position_embeddings=130)),
    ("'hidden_size'", lambda: shutil.copy("data/small.json", "bad/config.json")),
    ("n_embd is 32: n_head 5", lambda: change("bad", num_attention_heads=5)),
    ("holds roberta.encoder.layer.1.*take both", lambda: change("bad", num_hidden_layers=1)),
    ("KeyError..roberta.encoder.layer.2", lambda: change("bad", num_hidden_layers=3)),
    ("weights in bad/model.safetensors don't fit", lambda: change("bad", hidden_size=64)),
    ("vocab.json isn't of .*KeyError..!", lambda: shutil.copy("data/small.json", "bad/vocab.json")),
    ("vocab.json isn't of .*JSONDecodeError", lambda: os.truncate("bad/vocab.json", 1000)),
    *(("model.safetensors isn't of a RoBERTa", lambda n=n: os.truncate("bad/model.safetensors", n))
      for n in (0, 5, 100, 10_000, 6_000_000)),
    ("pytorch_model.bin isn't of .*UnpicklingError", lambda: (
        os.remove("bad/model.safetensors"), torch.save(Code(), "bad/pytorch_model.bin"))),
    ("out-bad/model.pt is there already", lambda: (
        os.mkdir("out-bad"), open("out-bad/model.pt", "w").close())),
    ("out-bad/model.pt can't be written", lambda: open("out-bad", "w").close()),
])
def test_what_is_no_roberta_is_refused_in_one_sentence(here, words, spoil):
    shutil.rmtree("bad", ignore_errors=True)
    shutil.copytree("hf", "bad")
    with open("data/small.json", "w") as f:
        json.dump({"model_type": "roberta", "hidden_act": "gelu", "layer_norm_eps": 1e-5, "pad_token_id": 1,
                   "max_position_embeddings": 514, "num_hidden_layers": 1, "num_attention_heads": 1}, f)
    spoil()
    assert re.search(words, refused("prepare_roberta.py", "bad", "--out_dir=out-bad"))
    assert not os.path.exists("out-bad/model.pt") or not os.path.getsize("out-bad/model.pt")
    assert not os.path.exists("executed")
    shutil.rmtree("out-bad", ignore_errors=True)
    if os.path.exists("out-bad"):
        os.remove("out-bad")


@pytest.mark.parametrize("words, flags", [
    ("process is 'embed', but RoBERTa", ["--process=embed"]),
    ("block_size is 513: RoBERTa has 512 positions", ["--block_size=513"]),
    ("don't fit this model", ["--n_layer=3"]), ("don't fit this model", ["--net=own"]),
    ("out-roberta/model.pt is of another run", ["--out_dir=out-roberta"]),
])
def test_training_refuses_what_roberta_cannot_do(here, words, flags):
    assert re.search(words, refused("train.py", *SMALL, "--out_dir=refused", *flags))
    assert not os.path.exists("refused")
