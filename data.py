"""Tokens and checkpoints on disk: data/<dataset>/ holds train.bin and val.bin (uint16), and meta.json."""
import codecs
import json
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import torch

from config import Config, fail


class Tokenizer:
    """Text to token ids and back, as meta.json says: characters and longer strings, or GPT-2's byte pairs."""

    def __init__(self, meta):
        self.V = meta["vocab_size"]
        self.chars = meta.get("chars")
        if self.chars is not None:
            self.ids = {string: i for i, string in enumerate(self.chars)}       # each character, maybe more
            longest_first = sorted(map(re.escape, self.ids), key=len, reverse=True)
            self.pattern = re.compile("|".join(longest_first))
            return
        import tiktoken
        self.V = math.ceil(self.V / 64) * 64            # faster on GPUs; the added ids are never used
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except OSError as e:                            # an error of the network is one as well
            fail(f"GPT-2's byte pairs: {type(e).__name__}; connect once, or set TIKTOKEN_CACHE_DIR")

    def encode(self, text):
        """List of ids; exits on a character that the alphabet lacks."""
        if self.chars is None:
            return self.bpe.encode_ordinary(text)
        lacking = set(text) - set(self.ids)
        if lacking:
            fail(f"the character {min(lacking)!r} isn't in the tokenizer's alphabet: leave it out")
        return [self.ids[string] for string in self.pattern.findall(text)]

    def pieces(self, ids):
        """Each token's text; · stands for [MASK]."""
        if self.chars is not None:
            return [self.chars[i] if i < len(self.chars) else "·" for i in ids]
        # a token may end within a character: the decoder keeps that part until the next token comes
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        raw = [self.bpe.decode_single_token_bytes(i) if i < self.bpe.n_vocab else "·".encode() for i in ids]
        return [decoder.decode(part) for part in raw]

    def decode(self, ids):
        return "".join(self.pieces(ids))


# ---- the tokens of a data set

ENDS = 10 ** 7              # tokens at either end of a file that are looked at before training starts


def load_data(dataset, block_size):
    """(meta.json, {split: its tokens}) of data/<dataset>; exits if nothing can be trained on them."""
    folder = Path("data", dataset)
    splits = {}
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        for split in "train", "val":
            n = meta[f"{split}_tokens"]
            splits[split] = ids = np.memmap(folder / f"{split}.bin", np.uint16, "r")        # not read into the memory
            if not block_size <= len(ids) == n:
                fail(f"{folder}/{split}.bin has {len(ids)} tokens: meta.json says {n}; a block takes {block_size}")
            if max(ids[:ENDS].max(), ids[-ENDS:].max()) >= meta["vocab_size"]:
                fail(f"{folder}/{split}.bin holds ids beyond the vocabulary: prepare it again")
    except Exception as e:  # noqa: BLE001 (meta.json may hold anything)
        fail(f"{folder} can't be used ({e!r}): prepare_*.py --dataset {dataset} writes it anew, or goes on with it")
    # tells a data set that was prepared anew from the one before
    meta["checksum"] = zlib.crc32(splits["val"][:ENDS], zlib.crc32(splits["train"][:ENDS]))
    return meta, splits


def crops(tokens, rng, B, T):
    """(B, T) int64: B random stretches of T tokens."""
    starts = rng.integers(0, len(tokens) - T + 1, B)
    rows = [tokens[i:i + T] for i in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


# ---- checkpoints, which are plain dicts


FORMAT = 3                  # of checkpoints: commit b26d635 reads those without a number, 42a868e those with a 2


def save_checkpoint(path, content):
    """Writes a dict; a crash on the way leaves the old file as it was. Raises an OSError if it can't."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        torch.save(content | {"format": FORMAT}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except RuntimeError as e:                           # this is what torch makes of a full disk
        raise OSError(e) from e


def load_checkpoint(path):
    """What save_checkpoint() wrote, on the CPU. Never executes code; exits if it is missing or foreign."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if ckpt.get("format") != FORMAT:
            fail(f"{path} is of an older version, which commit b26d635 or 42a868e reads")
        Config(**ckpt["config"])                        # raises an error if this version has other settings
        return ckpt
    except Exception as e:  # noqa: BLE001 (torch, zip and pickle have errors of their own)
        fail(f"{path} isn't a checkpoint of this version ({type(e).__name__}): train first, or name another")


def load_weights(model, weights, path):
    """Loads a checkpoint's weights into model; exits if they are not this model's."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError):
        fail(f"the weights in {path} don't fit this model: was it written by another version?")
