"""Any text to character tokens: data/<dataset>/ with train.bin, val.bin and meta.json.

    python prepare_shakespeare.py                                   # downloads Tiny Shakespeare (1.1 MB)
    python prepare_shakespeare.py --input my.txt.gz --dataset my    # any UTF-8 text, plain, .gz or .xz
"""
import contextlib
import hashlib
import json
import os
import re
import sys
import urllib.request
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from config import fail
from data import UNREADABLE, load_checkpoint, load_meta, opened, replace_file

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def load(path, offline):
    """(text, what it is): the file at path, else Tiny Shakespeare, else English that ships inside Python."""
    try:
        if path:
            with opened(path) as f:
                return f.read(), path
        if not offline:
            raw = urllib.request.urlopen(URL, timeout=20).read()
            if hashlib.sha256(raw).hexdigest() != SHA256:
                fail(f"what {URL} sends isn't Tiny Shakespeare (its sha256 differs): pass --input FILE")
            return raw.decode(), "Tiny Shakespeare"
    except UNREADABLE as e:
        if path:
            fail(f"{path} can't be read as UTF-8 text: {e}")
        print(f"Tiny Shakespeare can't be downloaded ({e}): using Python's reference; --input takes any text")
    return "\n\n".join(topics[name] for name in sorted(topics)), "the Python reference (pydoc_data.topics)"


@contextlib.contextmanager
def owned(dataset, tokenizer):
    """The folder data/<dataset>, for this process alone; exits if it is in use, of other tokens, or full."""
    folder = os.path.join("data", dataset)
    try:
        with contextlib.ExitStack() as stack:
            os.makedirs(folder, exist_ok=True)
            if os.name == "posix":                      # other systems have no such lock
                import fcntl
                lock = os.open(folder, os.O_RDONLY)     # of the folder itself: no file that could stay behind
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in Path(folder).glob("*.json"):    # of a finished data set, of one that isn't
                found = re.search(r'"tokenizer": "(\w+)"', path.read_text("utf-8", "replace"))
                if found and found[1] != tokenizer:
                    fail(f"{path} is of {found[1]} tokens, not of {tokenizer}: name another --dataset")
            yield Path(folder)
    except BlockingIOError:
        fail(f"{folder} is being prepared by another process: wait for it, or name another --dataset")
    except OSError as e:
        fail(f"{folder} can't be written ({e.strerror}): make room, then the same command goes on")
    except KeyboardInterrupt:
        fail(f"interrupted before {folder} was finished; the same command goes on")


def prepare(dataset="shakespeare", path=None, offline=False, val=None, like=None):
    """Writes data/<dataset>: nine tenths of a text to train on, the rest (or the file val) to validate."""
    text, source = load(path, offline)
    cut = len(text) if val else int(0.9 * len(text))
    text += load(val, offline)[0] if val else ""
    chars = "".join(sorted(set(text)))
    if like:                                            # the alphabet of a model that is to be fine-tuned
        chars = (load_checkpoint(like)["meta"] if like.endswith(".pt") else load_meta(like)).get("chars", "")
    if lacks := [f"{c!r} {n:,} times" for c, n in Counter(text).most_common() if c not in chars]:
        fail(f"{like} lacks {len(lacks)} characters of this text: {', '.join(lacks[:40])}; replace them")
    if len(text) < 10 or cut == len(text) or not 2 <= len(chars) <= 65_535:     # uint16, and one is [MASK]
        fail(f"{source} has {len(text)} characters ({len(text) - cut} to validate), {len(chars):,} distinct")
    ids = {c: i for i, c in enumerate(chars)}
    tokens = np.fromiter(map(ids.get, text), np.uint16, len(text))
    meta = {"tokenizer": "chars", "chars": chars, "vocab_size": len(chars), "source": source,
            "train_tokens": cut, "val_tokens": len(text) - cut}
    with owned(dataset, "chars") as folder:
        (folder / "meta.json").unlink(missing_ok=True)  # without it, nobody takes the rest for whole
        replace_file(folder / "train.bin", tokens[:cut].tobytes())
        replace_file(folder / "val.bin", tokens[cut:].tobytes())
        replace_file(folder / "meta.json", json.dumps(meta, indent=1).encode())
    print(f"{folder}: {cut:,} + {len(text) - cut:,} characters; alphabet of {len(chars)}: {chars!r}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")            # a terminal may lack what the alphabet has
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--input", dest="path", help="a UTF-8 text file (default: download Tiny Shakespeare)")
    parser.add_argument("--dataset", default="shakespeare", help="name of the folder under data/")
    parser.add_argument("--offline", action="store_true", help="don't download: use the text inside Python")
    parser.add_argument("--val", help="a file to validate on (default: the last tenth of the text)")
    parser.add_argument("--like", help="a dataset or model.pt with the alphabet to use, to fine-tune a model")
    prepare(**vars(parser.parse_args()))
