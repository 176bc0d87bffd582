"""RoBERTa: what prepare_roberta.py makes of random weights, against transformers; then as a user runs it.

    pip install transformers==5.24.0 && python -m pytest test_roberta.py
"""
import json
import os
import re
import shutil
import signal
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

import optim
from data import load_checkpoint
from diffusion import load_model
from test_tools import byte_pairs, call_in, put, refused, samples, script, send

transformers = pytest.importorskip("transformers", reason="RoBERTa's oracle: pip install transformers==5.24.0")
from transformers.convert_slow_tokenizer import bytes_to_unicode

END = 50256                                 # <|endoftext|>
MASK = 50304
SCRATCH = ["--dataset=pairs", "--device=cpu", "--batch_size=4", "--block_size=32", "--dropout=0.1",
           "--gradient_accumulation_steps=4", "--eval_iters=2", "--max_iters=4", "--warmup_iters=1"]
SMALL = [*SCRATCH, "--adam_lr=0.001", "--init_from=out-roberta/model.pt"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """In a folder of its own: hf, a RoBERTa with random weights, out-roberta, what became of it, and data/pairs.

    Between the real one's special tokens, vocab.json has GPT-2's byte pairs in random order. Gives RoBERTa,
    its id of each of our tokens, and the tokenizer.
    """
    os.chdir(tmp_path_factory.mktemp("roberta"))
    tokenizer = byte_pairs()
    torch.manual_seed(0)
    roberta = transformers.RobertaForMaskedLM(transformers.RobertaConfig(
        vocab_size=50265, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=514, type_vocab_size=2, layer_norm_eps=1e-5)).eval()
    for p in roberta.parameters():
        p.data += 0.2 * torch.randn_like(p)
    roberta.save_pretrained("hf")

    theirs = torch.full((MASK + 1,), 50264)
    theirs[:END] = 4 + torch.randperm(END)
    theirs[END] = 2                         # </s>
    letter = bytes_to_unicode()
    names = ["".join(letter[byte] for byte in token) for token in tokenizer.bpe.decode_tokens_bytes(range(END))]
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<|endoftext|>": 50260, "<mask>": 50264}
    ids = np.array(tokenizer.encode("\n".join(topics.values()))[:20_000], np.uint16)
    put({"hf/vocab.json": json.dumps(special | dict(zip(names, theirs.tolist()))),
         "data/pairs/train.bin": ids[5_000:].tobytes(), "data/pairs/val.bin": ids[:5_000].tobytes(),
         "data/pairs/meta.json": json.dumps(
             {"vocab_size": 50257, "source": "topics", "train_tokens": 15_000, "val_tokens": 5_000})})
    script("prepare_roberta.py", "hf")
    return roberta, theirs, tokenizer


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.2)])
@torch.no_grad()
def test_the_logits_are_those_of_transformers_with_any_share_of_masks(work, dtype, tolerance):
    roberta, theirs, _ = work
    model, *_ = load_model("out-roberta/model.pt", dtype=dtype)
    used = []
    model.net.blocks[0].linear1.register_forward_hook(lambda *args: used.append(str(args[-1].dtype)))
    for share in 0, 0.15, 0.6, 1:
        x = torch.randint(END + 1, (1, 512))
        x = x.masked_fill(torch.rand(1, 512) < share, MASK)
        truth = roberta(theirs[x]).logits[0][:, theirs[:END + 1]]
        logits = model.denoise(x, x >= 0)
        assert (logits[:, :END + 1] - truth).abs().max() < tolerance * truth.std()
        assert (logits[:, END + 1:] < -1e29).all()
    assert used == 4 * [f"torch.{dtype}"]


def test_other_files_give_the_same_weights_and_pickles_are_not_executed(work):
    first = load_checkpoint("out-roberta/model.pt")["model"]
    shutil.copytree("hf", "other")
    os.remove("other/model.safetensors")
    torch.save(work[0].state_dict(), "other/pytorch_model.bin")
    script("prepare_roberta.py", "other", "--out_dir=bin")
    put({"other/pytorch_model.bin": b"cos\nmkdir\n(S'executed'\ntR."})
    assert re.search("pytorch_model.bin isn't of .*UnpicklingError", refused(
        "prepare_roberta.py", "other", "--out_dir=code"))
    assert not os.path.exists("executed")
    weights = load_checkpoint("bin/model.pt")["model"]
    assert all(torch.equal(first[key], weights[key]) for key in first)
    assert "is there already" in refused("prepare_roberta.py", "hf")
    assert "can't be written" in refused("prepare_roberta.py", "hf", "--out_dir=hf/vocab.json")


def test_a_blank_gets_what_roberta_gives_and_nothing_was_measured(work, capsys):
    roberta, theirs, tokenizer = work
    texts, err = samples(capsys, "--out_dir=out-roberta", "--text=The value of{1} is None.", "--temperature=0",
                         "--num_samples=1", "--device=cpu")
    ids = [*tokenizer.encode("The value of"), MASK, *tokenizer.encode(" is None.")]
    logits = roberta(theirs[ids][None]).logits[0, ids.index(MASK)]
    best = logits[theirs[:END + 1]].argmax().item()
    assert texts == [f"The value of{tokenizer.decode([best])} is None."]
    assert "step 0, bound nan nats/token, trained on what RoBERTa in hf was" in err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_lowers_the_loss_keeps_the_bias_and_goes_on_exactly(work, dtype, monkeypatch, capsys):
    flags = [*SMALL, f"--dtype={dtype}"]
    script("train.py", *flags, f"--out_dir=whole-{dtype}")
    start, end = map(float, re.findall(r"val nelbo (\d+\.\d+)", capsys.readouterr().out))
    assert end < start - 0.1
    call_in(monkeypatch, 2, optim, "update", send(signal.SIGTERM))
    monkeypatch.setattr(signal, "raise_signal", print)
    script("train.py", *flags, f"--out_dir={dtype}")
    assert load_checkpoint(f"{dtype}/ckpt.pt")["step"] == 2
    script("train.py", "--init_from=resume", f"--out_dir={dtype}")
    before, whole, parts = (load_checkpoint(path) for path in (
        "out-roberta/model.pt", f"whole-{dtype}/ckpt.pt", f"{dtype}/ckpt.pt"))
    for name in "model", "ema":
        assert all(torch.equal(whole[name][key], parts[name][key]) for key in before["model"])
        assert torch.equal(whole[name]["bias"], before["model"]["bias"])
    capsys.readouterr()
    texts, _ = samples(capsys, f"--out_dir={dtype}", f"--dtype={dtype}", "--text=The {8} of{3}.", "--num_samples=2",
                       "--steps=4")
    assert len(texts) == 2 and all(re.fullmatch("(?s)The .* of.*\\.", text) for text in texts)


def test_it_starts_from_nothing_too_and_a_compiled_step_is_one_graph(work, monkeypatch):
    ran = script("train.py", *SCRATCH, "--net=roberta", "--n_layer=1", "--n_embd=32", "--n_head=2",
                 "--max_iters=1", "--out_dir=nothing")
    monkeypatch.setattr(torch._dynamo.config, "capture_dynamic_output_shape_ops", True)
    model = ran["model"]
    model.compile(fullgraph=True, backend="aot_eager")
    for t in 0.2, 0.7:
        batch = torch.randint(END, (4, 32)), torch.full((4,), t)
        torch.manual_seed(0)
        truth = model.eval().forward(*batch)
        torch.manual_seed(0)
        assert abs(model(*batch) - truth) < 1e-4


@pytest.mark.parametrize("words, name, value", [
    ("config.json isn't of a RoBERTa .*FileNotFound", "config.json", None),
    ("vocab.json isn't of a RoBERTa .*FileNotFound", "vocab.json", None),
    ("config.json isn't of .*KeyError..model_type", "config.json", "{}"),
    ("vocab.json isn't of .*KeyError..!", "vocab.json", "{}"),
    *(("model.safetensors isn't of a RoBERTa", "model.safetensors", size) for size in (0, 6_000_000)),
    ("model_type is 'xlm-roberta'", "model_type", "xlm-roberta"),
    ("layer_norm_eps is 1e-12", "layer_norm_eps", 1e-12),
    ("holds roberta.encoder.layer.1.*take both", "num_hidden_layers", 1),
    ("KeyError..roberta.encoder.layer.2", "num_hidden_layers", 3),
    ("weights in bad/model.safetensors don't fit", "hidden_size", 64),
])
def test_what_is_no_roberta_is_refused_in_one_sentence(work, words, name, value):
    """A copy of hf with one mistake: a setting's other value, or a file that is gone, cut or another."""
    shutil.copytree("hf", "bad", dirs_exist_ok=True)
    file = Path("bad", name)
    if not file.exists():
        about = json.loads(Path("bad/config.json").read_text())
        put({"bad/config.json": json.dumps(about | {name: value})})
    elif value is None:
        file.unlink()
    elif isinstance(value, int):
        os.truncate(file, value)
    else:
        put({file: value})
    assert re.search(words, refused("prepare_roberta.py", "bad", "--out_dir=refused"))
    assert not os.path.exists("refused")


@pytest.mark.parametrize("words, flag", [
    ("process is 'embed', but RoBERTa", "--process=embed"),
    ("block_size is 513: RoBERTa has 512 positions", "--block_size=513"),
    ("don't fit this model", "--n_layer=3"), ("don't fit this model", "--net=own"),
    ("out-roberta/model.pt is of another run", "--out_dir=out-roberta"),
])
def test_training_refuses_what_roberta_cannot_do(work, words, flag):
    assert re.search(words, refused("train.py", *SMALL, "--out_dir=refused", flag))
    assert not os.path.exists("refused")
