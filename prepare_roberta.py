"""A pretrained RoBERTa to a masked diffusion model: out_dir/model.pt, for sample.py and train.py.

    python prepare_roberta.py FOLDER                    # roberta-base, distilroberta-base or roberta-large
    python sample.py --out_dir out-roberta --text "The capital of France is{1}."
    python train.py --init_from=out-roberta/model.pt --dataset=openwebtext --out_dir=out-roberta-diffusion

FOLDER is as Hugging Face has it: config.json, vocab.json, and model.safetensors or pytorch_model.bin. Nothing
of it is executed, and transformers isn't needed.

RoBERTa is a masked diffusion model already, but one that has seen a single noise level: 15 % of [MASK]s. Its
tokens are GPT-2's byte pairs in another order, so a data set of GPT-2's ids serves as it is, if the rows of
the embeddings move to GPT-2's places, which happens here. The <s> with which RoBERTa's texts begin is left
out: with random weights it moves the logits by .07 of their s.d. in 16 tokens, .01 in 128 and .002 in 511, if
all positions stay; the first of our tokens has the position that <s> had. The settings of config/roberta.py become those of the model, so that a run which starts from it has
learning rates that don't destroy what is there.
"""
import json
import math
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from config import Config, fail, load
from data import Tokenizer, load_weights, save_checkpoint
from diffusion import Masked
from roberta import POSITIONS

# What roberta.py computes, and config.json has to say. BERT, XLM-R and CamemBERT are other networks or have
# other tokens.
NEEDED = {
    "model_type": "roberta",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": POSITIONS + 2,           # RoBERTa counts positions from pad_token_id + 1
    "pad_token_id": 1,
}

# The parts of a layer by their names here, which are those of torch.nn.TransformerEncoderLayer, and there. Of
# attention's, only the last: queries, keys and values are three matrices there and one here.
PARTS = {
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}

NUMBERS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def read_safetensors(path):
    """{name: tensor}. Such a file is 8 bytes with the length of a JSON header, the header, and raw numbers.

    The header has the kind of numbers, shape, first and last byte of each tensor, counted from its own end. A
    file that was cut short has too few numbers for a shape, which raises an error.
    """
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        raw = content[start + begin:start + end]
        tensors[name] = torch.frombuffer(raw, dtype=NUMBERS[about["dtype"]]).view(about["shape"])
    return tensors


def names(tokenizer):
    """What vocab.json calls GPT-2's 50,256 byte pairs, in the order of their ids.

    It writes each byte as a character that can be seen: itself where it is one in Latin-1, and else, in
    order, one from number 256 on. So a blank becomes Ġ, and " the" is Ġthe.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted({*range(256)} - {*visible})
    letter = dict(zip(visible + others, map(chr, [*visible, *range(256, 324)])))
    tokens = map(tokenizer.bpe.decode_single_token_bytes, range(50256))
    return ["".join(letter[byte] for byte in token) for token in tokens]


def converted(take, order, mask, n_layer, V):
    """The weights of Masked.

    take(name) gives RoBERTa's. Row i of the embeddings, which are the head's weights, too, comes from its row
    order[i], that of [MASK] from its row mask, and its <s>, <pad> and <unk> are left out.
    """
    embeddings = take("roberta.embeddings.word_embeddings.weight")
    stem = torch.zeros(V + 1, embeddings.size(1))
    stem[:len(order)] = embeddings[order]
    stem[V] = embeddings[mask]
    bias = torch.full((V,), -1e30)                      # of ids that only pad V
    bias[:len(order)] = take("lm_head.bias")[order]
    # the first position is row 2; all tokens are of type 0, whose vector is added to each position here
    types = take("roberta.embeddings.token_type_embeddings.weight")
    positions = take("roberta.embeddings.position_embeddings.weight")[2:].float() + types[0]
    weights = {"stem.weight": stem, "bias": bias, "net.positions": positions}
    for kind in "weight", "bias":
        weights[f"net.norm.{kind}"] = take(f"roberta.embeddings.LayerNorm.{kind}")
        weights[f"net.last.{kind}"] = take(f"lm_head.dense.{kind}")
        weights[f"net.last_norm.{kind}"] = take(f"lm_head.layer_norm.{kind}")
        for i in range(n_layer):
            ours = f"net.blocks.{i}"
            its = f"roberta.encoder.layer.{i}"
            qkv = [take(f"{its}.attention.self.{name}.{kind}") for name in ("query", "key", "value")]
            weights[f"{ours}.self_attn.in_proj_{kind}"] = torch.cat(qkv)
            for part, name in PARTS.items():
                weights[f"{ours}.{part}.{kind}"] = take(f"{its}.{name}.{kind}")
    return weights


parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, help="a Hugging Face folder")
parser.add_argument("--out_dir", default="out-roberta", help="where model.pt goes")
args = parser.parse_args()
model_path = f"{args.out_dir}/model.pt"
if os.path.exists(model_path):
    fail(f"{model_path} is there already: pass another --out_dir, or delete it")

path = args.folder / "config.json"
try:
    about = json.loads(path.read_text("utf-8"))
    for name, value in NEEDED.items():
        if about[name] != value:
            fail(f"{path} says that {name} is {about[name]!r}: only RoBERTas with {value!r} can be converted")
    fine_tuning = Path(__file__).with_name("config") / "roberta.py"
    cfg = load(Config, [str(fine_tuning)], {
        "net": "roberta",
        "n_layer": about["num_hidden_layers"],
        "n_head": about["num_attention_heads"],
        "n_embd": about["hidden_size"],
    })

    path = args.folder / "vocab.json"
    ids = json.loads(path.read_text("utf-8"))
    meta = {"vocab_size": 50257, "source": f"what RoBERTa in {args.folder.resolve().name} was trained on"}
    tokenizer = Tokenizer(meta)
    order = [ids[name] for name in [*names(tokenizer), "</s>"]]                 # </s> is our <|endoftext|>
    mask = ids["<mask>"]

    path = args.folder / "model.safetensors"
    if path.exists():
        tensors = read_safetensors(path)
    else:
        path = args.folder / "pytorch_model.bin"
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    weights = converted(tensors.pop, order, mask, cfg.n_layer, tokenizer.V)
    left = [name for name in tensors if name.startswith("roberta.encoder")]
    if left:
        fail(f"{path} holds {left[0]}, of which config.json says nothing: take both from one model")
except Exception as e:  # noqa: BLE001 (JSON, torch, zip and pickle have errors of their own)
    fail(f"{path} isn't of a RoBERTa for masked tokens ({e!r:.150}): download the folder anew")

model = Masked(cfg, tokenizer.V)
load_weights(model, weights, path)                      # exits if a shape isn't what config.json says
config = vars(cfg)
del config["out_dir"], config["init_from"]              # where a run goes and starts is said anew each time
content = {"config": config, "meta": meta, "step": 0, "nelbo": math.nan, "val_batches": None}
try:
    save_checkpoint(model_path, content | {"model": model.state_dict()})
except OSError as e:
    fail(f"{model_path} can't be written: {e}")
print(f"{model_path}: {cfg.n_layer} layers x {cfg.n_embd} channels, block_size {cfg.block_size}")
