"""Many documents to GPT-2 tokens: data/<dataset>/ with train.bin, val.bin and meta.json.

    python prepare_openwebtext.py                                      # OpenWebText: 13 GB to download
    python prepare_openwebtext.py --input folder more.jsonl.gz --val held_out.txt --dataset my

It reads .txt (documents between lines of <|endoftext|>), .jsonl and .ndjson, plain, .xz or .gz, and tars of
these, but no other file of a folder. A broken line of JSON is skipped, and named at the end; a file with no right
line is refused. A document of more than a million characters in a .txt becomes several.

Without --val, a digest of its text decides whether a document is for validation: copies of it go to the same
side. The default share, one in 2,000, is right for OpenWebText but leaves nothing of a book. So where that is
less than a hundredth of all tokens and less than 100,000, or takes more than a fifth of what --val_share means
for training, the last tenth of all tokens is for validation, wherever in a document it begins. Of copies one is
left there, so that here, too, no document of validation has a copy in train.bin.

Stopped anywhere, by Ctrl-C, a crash or a full disk, the same command goes on, to the same bytes: after each 128
documents progress.json notes which file is read, how many of its documents are done, and the sizes of the bins.
"""
import glob
import hashlib
import io
import json
import os
import re
import shlex
import sys
import tarfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from itertools import islice
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

from config import fail
from data import Tokenizer, replace_file
from prepare_shakespeare import unpacked

URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/urlsf_subset{:02d}.tar"
# which files are read: by their names' endings, and none that is hidden. _data.xz is a tar inside OpenWebText's
READ = re.compile(r"(?i)(^|[/\\])[^./\\][^/\\]*?(\.txt|(?P<json>\.jsonl|\.ndjson|\.json(?=\.xz|\.gz))"
                  r"|(?P<tar>\.tar|\.tgz|_data\.xz))(\.xz|\.gz)?$")
LONGEST = 2 ** 20                           # characters of a document in a .txt; what is longer becomes several
END = 50256                                 # <|endoftext|>, the last token of each document

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("--input", nargs="+", default=[URL.format(i) for i in range(21)],
                    help="files, folders, addresses (default: OpenWebText)")
parser.add_argument("--val", nargs="+", default=(), help="files and folders for validation alone")
parser.add_argument("--dataset", default="openwebtext", help="name of the folder under data/")
parser.add_argument("--field", default="text", help="of JSON lines: the name of the text")
parser.add_argument("--val_share", type=float, default=0.0005, help="of the documents, without --val")
args = parser.parse_args()

if not 0 < args.val_share < 1:
    fail(f"--val_share is {args.val_share}: it must lie between 0 and 1")

# ---- from files to documents


class Download(io.RawIOBase):
    """The bytes at url; takes up a broken connection where it was, gives up after five breaks in a row."""

    def __init__(self, url):
        self.url, self.at, self.body = url, 0, None

    def read(self, n):
        for wait in 1, 2, 4, 8, 16, None:               # seconds
            try:
                if self.body is None:
                    rest = Request(self.url, headers={"Range": f"bytes={self.at}-"})
                    self.body = urlopen(rest, timeout=60)
                data = self.body.read(n)
                if self.body.status != 206 or self.body.length and not data:
                    raise OSError("the server sends no part of a file, or stopped in the middle of one")
                self.at += len(data)
                return data
            except OSError:
                if self.at == 0 or wait is None:        # it never began, or it doesn't go on
                    raise
                self.body = None
                time.sleep(wait)


def in_archive(name, stream):
    """Yields the documents of each file in a tar, as if it lay beside it."""
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            tar.members.clear()                         # else a million of them fill the memory
            if member.isfile() and READ.search(member.name):
                inside = io.BytesIO(tar.extractfile(member).read())             # what is behind it can't seek
                texts = documents(f"{name}/{member.name}", inside)
                if member.name.endswith("_data.xz"):    # as OpenWebText's usual loader does
                    texts = (re.sub("\n\n\n+", "\n\n", text) for text in texts)
                yield from texts
        # an archive ends in two blocks of zeros; tarfile itself takes any bad header for the end
        if tar.fileobj.read(512) != bytes(512):
            raise tarfile.ReadError("the archive is cut short or damaged")


def in_json_lines(name, lines):
    """Yields the text of each line, nothing where it is null, and for a broken line a ValueError."""
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)[args.field] if line.strip() else None
            if text is not None:
                yield text.strip()
        except Exception as e:  # noqa: BLE001 (of JSON, UTF-8, the field, or what has no strip)
            yield ValueError(f"{name}, line {number} is no JSON with a string {args.field!r} ({e!r:.99})")


def in_text(lines):
    """Yields what stands between the lines of <|endoftext|>; what is longer than LONGEST, in several parts,
    so that a document larger than the memory can be read as well."""
    text = ""
    while line := lines.readline(LONGEST):
        if line.strip() != "<|endoftext|>":
            text += line
            if len(text) < LONGEST:
                continue
        yield text.strip()
        text = ""
    yield text.strip()


def documents(name, stream):
    """Yields the texts in a stream of that name, and a ValueError for each broken line of JSON."""
    ending = READ.search(name)
    if ending["tar"]:
        return in_archive(name, stream)
    plain = unpacked(name, stream)
    if ending["json"]:
        return in_json_lines(name, plain)
    return in_text(io.TextIOWrapper(plain, "utf-8-sig", newline=""))


# ---- the sources: path of each file, once, and the share of its documents that is for validation


share = 0 if args.val else args.val_share
sources = {}                                            # {real path: (path, share)}
for given in [*args.input, *args.val]:
    paths = [given, *sorted(glob.glob(f"{glob.escape(given)}/**", recursive=True))]
    paths = [path for path in paths if READ.search(path) and ("://" in path or os.path.isfile(path))]
    if not paths:
        fail(f"{given} is neither a file nor a folder of files of a kind that is read: see --help")
    for path in paths:
        sources[os.path.realpath(path)] = path, 1 if given in args.val else share

# ---- the journal in progress.json: how far it was at some moment, and the size that each bin had then.
# ---- What a bin has beyond that when the command goes on was written later, and is written again.

path = folder = Path("data", args.dataset)
journal, meta_path = folder / "progress.json", folder / "meta.json"


def digest(raw):
    """64 hexadecimal digits that no other bytes have."""
    return hashlib.sha256(raw).hexdigest()


done = {"command": shlex.join(["python", *sys.argv]),   # what finishes it
        "settings": digest(f"{args.field} {[*sources.values()]}".encode()),
        "files": 0, "read": 0, "seen": "",              # files that are done; of the next one: documents, digest
        "train": 0, "val": 0,                           # bytes in the bins
        "broken": 0, "named": []}                       # how many broken lines; what is wrong with five
begin = dict(done)                                      # nothing is done


def keep(state):
    """Writes the journal: a command that is stopped from now on goes on from state."""
    replace_file(journal, lambda file: file.write(json.dumps(state).encode()))


# ---- tokens


def append(split, arrays):
    """Writes tokens to a bin, behind those that the journal knows of."""
    with open(folder / f"{split}.bin", "ab") as file:
        if file.tell() < done[split]:
            fail(f"{file.name} has lost a part of its tokens: delete {folder}, or name another --dataset")
        file.truncate(done[split])
        file.writelines(arrays)
    done[split] = os.path.getsize(file.name)


def side(text, share):
    """Which bin a text goes to: its digest decides, so that all copies of it go to the same one."""
    place = int(digest(text.encode("utf-8", "replace")), 16) / 2 ** 256         # from 0 to 1, as if drawn
    return "val" if place < share else "train"


def read(path, share):
    """Encodes what a file holds, behind what was done of it before."""
    seen, skip, right = "", done["seen"], 0
    with Download(path) if "://" in path else open(path, "rb") as stream:
        found = iter(tqdm(documents(path, stream), path, unit=" documents", leave=False, delay=1))
        while batch := list(islice(found, 128)):         # no more than this in memory
            seen = digest(f"{seen} {batch}".encode())
            broken = [str(item) for item in batch if isinstance(item, ValueError)]
            right += len(batch) - len(broken)
            if skip:
                skip = seen != done["seen"]
                continue
            texts = [item for item in batch if isinstance(item, str) and item]
            ids = bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())
            parts = {"train": [], "val": []}
            for text, its in zip(texts, ids):
                parts[side(text, share)].append(np.array([*its, END], np.uint16))
            for split, arrays in parts.items():
                append(split, arrays)
            done.update(seen=seen, read=done["read"] + len(batch), broken=done["broken"] + len(broken),
                        named=(done["named"] + broken)[:5])
            keep(done)
    if seen and not right:
        fail(f"no line of {path} is right: {broken[0]}")
    if skip:
        fail(f"{path} has changed since {folder} was begun: name another --dataset")


def kept(split):
    """Yields the tokens of each document in a bin, which may be larger than the memory."""
    rest = np.uint16([])
    with open(folder / f"{split}.bin", "rb") as file:
        while len(ids := np.fromfile(file, np.uint16, 2 ** 20)):
            ids = np.concatenate([rest, ids])
            *whole, rest = np.split(ids, np.flatnonzero(ids == END) + 1)
            yield from whole
    if len(rest):                                       # where a document was cut
        yield rest


def last_tenth():
    """Gives validation the last tenth of all tokens instead, where each text counts once. They are in memory:
    at the default --val_share these are less than 200 million, as long as few documents don't make a fifth."""
    documents = {digest(ids): ids for split in ("val", "train") for ids in kept(split)}
    ids = np.concatenate([*documents.values()])
    keep(begin)                                         # stopped from here on, it reads all files again
    done.update(train=0, val=0)
    cut = len(ids) * 9 // 10
    append("train", [ids[:cut]])
    append("val", [ids[cut:]])


def finish():
    """Writes meta.json, and says what there is."""
    n_train, n_val = done["train"] // 2, done["val"] // 2
    if not n_train or not n_val:
        fail(f"{folder} has {n_train} tokens to train on, {n_val} to validate: use another text, --dataset")
    lengths = np.array([len(ids) for split in ("train", "val") for ids in kept(split)])    # with <|endoftext|>
    meta = {"vocab_size": 50257, "source": ", ".join(args.input)[:200],
            "train_tokens": n_train, "val_tokens": n_val,
            "val_chars": sum(len(bpe.decode(ids[ids != END].tolist())) for ids in kept("val"))}
    meta_path.write_text(json.dumps(meta, indent=1), "utf-8")
    journal.unlink()                                    # last: stopped before, the same command comes back here
    print(f"{folder}: {n_train:,} tokens to train on, {n_val:,} to validate; {len(lengths):,} documents of "
          f"{lengths.mean():,.1f} tokens in the mean, {np.median(lengths):,.0f} in the median, "
          f"{(lengths > 1024).mean():.1%} of them longer than 1,024")
    if done["broken"]:
        print(f"{done['broken']:,} broken lines were skipped, first of all: {'; '.join(done['named'])}")


try:
    bpe = Tokenizer({"vocab_size": 50257}).bpe
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.bin", "ab") as lock:
        if os.name == "posix":                          # two processes would mix their tokens
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if journal.exists():
            old = json.loads(journal.read_text("utf-8"))
            if old["settings"] == done["settings"]:
                done.update(old)
            elif old["train"] + old["val"]:
                fail(f"{folder} is begun with other files or settings: name another --dataset")
        elif meta_path.exists():
            fail(f"{folder} is finished: name another --dataset")
        for path, share in [*sources.values()][done["files"]:]:
            read(path, share)
            done.update(files=done["files"] + 1, read=0, seen="")
        path, n = folder, done["train"] + done["val"]   # bytes, two a token
        if not args.val and not min(n / 100, 200_000) <= done["val"] <= n * (0.2 + 0.8 * args.val_share):
            last_tenth()
        finish()
except BlockingIOError:
    fail(f"{folder} is being prepared by another process: wait until that has finished")
except (Exception, KeyboardInterrupt) as e:  # noqa: BLE001 (each kind of packing has errors of its own)
    fail(f"stopped at {path} ({type(e).__name__}: {e}): the same command goes on from there")
