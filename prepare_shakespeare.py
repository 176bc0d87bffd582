"""Any text to character tokens: data/<dataset>/ with train.bin, val.bin and meta.json.

    python prepare_shakespeare.py                                   # downloads Tiny Shakespeare (1.1 MB)
    python prepare_shakespeare.py --input my.txt.gz --dataset my    # any UTF-8 text, plain, .gz or .xz
"""
import contextlib
import gzip
import hashlib
import http.client
import io
import json
import lzma
import os
import sys
import urllib.request
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from config import fail
from data import load_checkpoint, load_data, replace_file

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# what reading a text, an archive or a download may raise
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError, http.client.HTTPException)


def opened(path, stream=None):
    """A text, plain, .xz or .gz, as UTF-8 without a byte order mark; its line ends are what they are. A
    stream is read in place of the file at path, which then only names it."""
    unpack = {".xz": lzma.open, ".gz": gzip.open}.get(os.path.splitext(path)[1].lower())
    unpacked = unpack(stream or path) if unpack else stream or open(path, "rb")  # noqa: SIM115 (the caller's)
    return io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline="")


@contextlib.contextmanager
def owned(dataset, foreign):
    """The folder data/<dataset>, for this process alone; exits if it's in use, full, or of foreign tokens."""
    folder, lock = Path("data", dataset), None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.name == "posix":                          # other systems have no such lock
            import fcntl
            lock = os.open(folder, os.O_RDONLY)         # of the folder itself: no file that could stay behind
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in folder.glob("*.json"):              # of a finished data set, or of one that isn't
            if f'"tokenizer": "{foreign}"' in path.read_text("utf-8", "replace"):
                fail(f"{path} is of {foreign} tokens, which this script doesn't make: name another --dataset")
        yield folder
    except (OSError, KeyboardInterrupt) as e:
        why = {BlockingIOError: "another process prepares it", KeyboardInterrupt: "interrupted"}
        fail(f"{folder} can't be finished now ({why.get(type(e), e)}): once it can, the same command goes on")
    finally:
        if lock is not None:
            os.close(lock)


def load(path, offline=False):
    """(text, what it is): the file at path, else Tiny Shakespeare, else English that ships inside Python."""
    try:
        if path:
            with opened(path) as f:
                return f.read(), path
        raw = b"" if offline else urllib.request.urlopen(URL, timeout=20).read()
        if raw and hashlib.sha256(raw).hexdigest() != SHA256:
            fail(f"what {URL} sends isn't Tiny Shakespeare (its sha256 differs): pass --input FILE")
        if raw:
            return raw.decode(), "Tiny Shakespeare"
    except UNREADABLE as e:
        if path:
            fail(f"{path} can't be read as UTF-8 text: {e}")
        print(f"Tiny Shakespeare can't be downloaded ({e}): using Python's reference; --input takes any text")
    return "\n\n".join(topics[name] for name in sorted(topics)), "the Python reference (pydoc_data.topics)"


def prepare(dataset="shakespeare", path=None, offline=False, val=None, like=None):
    """Writes data/<dataset>: nine tenths of a text to train on, the rest (or the file val) to validate."""
    text, source = load(path, offline)
    cut = len(text) if val else int(0.9 * len(text))
    text += load(val)[0] if val else ""
    chars = "".join(sorted(set(text)))
    if like:                                            # the alphabet of a model that is to be fine-tuned
        found = load_checkpoint(like)["meta"] if like.endswith(".pt") else load_data(like, 1)[0]
        chars = found.get("chars", "")
    if lacks := [f"{c!r} {n:,} times" for c, n in Counter(text).most_common() if c not in chars]:
        fail(f"{like} lacks {len(lacks)} characters of this text: {', '.join(lacks[:40])}; replace them")
    if len(text) < 10 or cut == len(text) or not 2 <= len(chars) <= 65_535:     # uint16, and one is [MASK]
        fail(f"{source} has {len(text)} characters ({len(text) - cut} to validate), {len(chars):,} distinct")
    ids = {c: i for i, c in enumerate(chars)}
    tokens = np.fromiter(map(ids.get, text), np.uint16, len(text))
    meta = {"tokenizer": "chars", "chars": chars, "vocab_size": len(chars), "source": source,
            "train_tokens": cut, "val_tokens": len(text) - cut}
    with owned(dataset, foreign="gpt2") as folder:
        (folder / "meta.json").unlink(missing_ok=True)  # without it, nobody takes the rest for whole
        replace_file(folder / "train.bin", tokens[:cut].tofile)
        replace_file(folder / "val.bin", tokens[cut:].tofile)
        replace_file(folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
    print(f"{folder}: {cut:,} + {len(text) - cut:,} characters of {source}; {len(chars)} distinct: {chars!r}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")            # a terminal may lack what the alphabet has
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--input", dest="path", help="a UTF-8 text file (default: download Tiny Shakespeare)")
    parser.add_argument("--dataset", default="shakespeare", help="name of the folder under data/")
    parser.add_argument("--offline", action="store_true", help="don't download: use the text inside Python")
    parser.add_argument("--val", help="a file to validate on (default: the last tenth of the text)")
    parser.add_argument("--like", help="a dataset or model.pt with the alphabet to use, to fine-tune a model")
    prepare(**vars(parser.parse_args()))
