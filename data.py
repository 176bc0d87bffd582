"""Tokens and checkpoints on disk: data/<dataset>/ holds train.bin and val.bin (uint16 each) and meta.json.

Bins are memory-mapped, so a corpus may be far larger than memory.
"""
import codecs
import gzip
import http.client
import io
import json
import lzma
import os
import pickle
import zlib

import numpy as np
import torch

from config import Config, fail


class Tokenizer:
    """Text to token ids and back, as meta.json says: an alphabet of characters, or GPT-2's byte pairs."""

    def __init__(self, meta):
        self.V = meta["vocab_size"]
        self.chars = meta.get("chars")
        if self.chars is None:
            import tiktoken
            self.V = -(-self.V // 64) * 64              # as matrix products like it; the rest means nothing
            try:
                self.bpe = tiktoken.get_encoding("gpt2")
            except OSError as e:                        # requests' errors are OSErrors
                fail(f"GPT-2's byte pairs (1.5 MB) can't be downloaded ({type(e).__name__}): connect once, "
                     "or set TIKTOKEN_CACHE_DIR to a folder that has them")
        else:
            self.ids = {c: i for i, c in enumerate(self.chars)}

    def encode(self, text):
        """List of ids; exits on a character that the alphabet lacks."""
        if self.chars is None:
            return self.bpe.encode_ordinary(text)
        if lacking := set(text) - set(self.ids):
            fail(f"the character {min(lacking)!r} isn't in the tokenizer's alphabet of {self.V}: leave it out")
        return [self.ids[c] for c in text]

    def pieces(self, ids):
        """Each token's text, · for an id that is none ([MASK]); half a character goes to the other half."""
        if self.chars:
            return [self.chars[i] if i < len(self.chars) else "·" for i in ids]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts = [decoder.decode(self.bpe.decode_single_token_bytes(i)) if i < self.bpe.n_vocab
                 else decoder.decode(b"", True) + "·" for i in ids]
        return [*texts[:-1], "".join(texts[-1:]) + decoder.decode(b"", True)]

    def decode(self, ids):
        return "".join(self.pieces(ids))


# what reading a text, an archive or a download may raise
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError, http.client.HTTPException)


def opened(path, stream=None):
    """A text, plain, .xz or .gz, as UTF-8 without a byte order mark; its line ends are what they are. A stream
    is read in place of the file at path, which then only names it."""
    unpack = {".xz": lzma.open, ".gz": gzip.open}.get(os.path.splitext(path)[1].lower())
    unpacked = unpack(stream or path) if unpack else stream or open(path, "rb")  # noqa: SIM115 (the caller's)
    return io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline="")


def load_meta(dataset):
    """meta.json of data/<dataset> as a dict; exits if the data set isn't there, or not whole."""
    folder = os.path.join("data", dataset)
    try:
        if os.path.exists(path := os.path.join(folder, "progress.json")):
            with open(path, encoding="utf-8") as f:
                fail(f"{folder} is unfinished: {json.load(f)['command']} finishes it")
        with open(path := os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        for split in "train", "val":
            size = os.path.getsize(path := os.path.join(folder, f"{split}.bin"))
            if size != 2 * meta[f"{split}_tokens"]:
                fail(f"{path} has {size} bytes, not two for each of the {meta[f'{split}_tokens']} tokens that "
                     "meta.json names: copy or prepare it again")
        return meta | {"vocab_size": int(meta["vocab_size"]), "source": str(meta["source"])}
    except (OSError, ValueError, LookupError, TypeError) as e:
        fail(f"{path} can't be used ({type(e).__name__}): prepare_shakespeare.py (characters) and "
             f"prepare_openwebtext.py (byte pairs) make it, with --dataset {dataset}")


def load_bin(dataset, split, V, block_size, look=True):
    """The split as a memory-mapped uint16 array of at least a block; look: reads it all for ids beyond V."""
    path = os.path.join("data", dataset, f"{split}.bin")
    if (n := os.path.getsize(path) // 2) < block_size:
        fail(f"{path} has {n} tokens, fewer than block_size {block_size}: lower it or add text")
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    if look and tokens.max() >= V:
        fail(f"{path} holds the id {tokens.max()}, beyond the vocabulary of {V}: prepare it again")
    return tokens


def crops(tokens, rng, B, T):
    """(B, T) int64: B random stretches of T tokens."""
    starts = rng.integers(0, len(tokens) - T + 1, B)
    return torch.from_numpy(np.stack([tokens[i:i + T] for i in starts]).astype(np.int64))


def replace_file(path, content):
    """Writes bytes under a temporary name, then renames: there is the old file or the new one, never half."""
    with open(f"{path}.tmp", "wb") as f:
        f.write(content)
    os.replace(f"{path}.tmp", path)


def save_checkpoint(path, content):
    """Writes a plain dict as a checkpoint; a crash on the way leaves the old file as it was."""
    try:
        torch.save(content, path + ".tmp")
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:                # torch raises RuntimeErrors for a full disk
        fail(f"{path} can't be written ({e}); what was there before is as it was")


def load_checkpoint(path):
    """What save_checkpoint() wrote, on the CPU. Never executes code; exits if it is missing or foreign."""
    if not os.path.exists(path):
        fail(f"there is no checkpoint {path}: train first, or name another file or folder")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        Config(**content["config"]), content["model"], content["meta"]["source"], content["step"] + content.get("nelbo", 0)
        return content
    except (RuntimeError, ValueError, LookupError, TypeError, OSError, EOFError, pickle.UnpicklingError) as e:
        fail(f"{path} isn't a checkpoint of this version, or not all of one ({type(e).__name__})")


def load_weights(model, weights, path):
    """Loads a checkpoint's weights into model; exits if they are not this model's."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError):
        fail(f"the weights in {path} don't fit this model: was it written by another version?")
