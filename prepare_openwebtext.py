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
documents meta.json notes which file is read, how many of its documents are done, and the sizes of what is
written. Each file from the network is downloaded as a whole before it is read; for a connection that breaks now
and then: until python prepare_openwebtext.py; do sleep 60; done
"""
import glob
import io
import json
import os
import random
import re
import tarfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from itertools import islice
from pathlib import Path
from urllib.request import urlretrieve

import numpy as np
from tqdm import tqdm

from config import fail, not_none
from data import Tokenizer
from prepare_shakespeare import unpacked

OPENWEBTEXT = [f"https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/urlsf_subset{i:02d}.tar"
               for i in range(21)]
# which files are read: by their names' endings, and none that is hidden. _data.xz is a tar inside OpenWebText's
READ = re.compile(r"(?i)(^|[/\\])[^./\\][^/\\]*?(\.txt|(?P<json>\.jsonl|\.ndjson|\.json(?=\.xz|\.gz))"
                  r"|(?P<tar>\.tar|\.tgz|_data\.xz))(\.xz|\.gz)?$")
LONGEST = 2 ** 20                           # characters of a document in a .txt; what is longer becomes several
END = 50256                                 # <|endoftext|>, the last token of each document

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("--input", nargs="+", default=OPENWEBTEXT,
                    help="files, folders, addresses (default: OpenWebText)")
parser.add_argument("--val", nargs="+", default=(), help="files and folders for validation alone")
parser.add_argument("--dataset", default="openwebtext", help="name of the folder under data/")
parser.add_argument("--field", default="text", help="of JSON lines: the name of the text")
parser.add_argument("--val_share", type=not_none, default=0.0005, help="of the documents, without --val")
args = parser.parse_args()

# ---- from files to documents


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
    """Yields the text of each line, "" where it is null, and for a broken line bytes that say what is wrong."""
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield (json.loads(line)[args.field] or "").strip()
        except Exception as e:  # noqa: BLE001 (of JSON, UTF-8, the field, or what has no strip)
            yield f"{name}, line {number} is no JSON with a string {args.field!r} ({e!r:.99})\n".encode()


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
    """Yields the texts in a stream of that name, and bytes for each broken line of JSON."""
    ending = READ.search(name)
    if ending["tar"]:
        return in_archive(name, stream)
    plain = unpacked(name, stream)
    if ending["json"]:
        return in_json_lines(name, plain)
    return in_text(io.TextIOWrapper(plain, "utf-8-sig", newline=""))


# ---- the sources: path of each file, once, and the share of its documents that is for validation


sources = {}                                            # {real path: (path, share)}
for given in [*args.input, *args.val]:
    paths = [given, *sorted(glob.glob(f"{glob.escape(given)}/**", recursive=True))]
    paths = [path for path in paths if READ.search(path) and ("://" in path or os.path.isfile(path))]
    if not paths:
        fail(f"{given} is neither a file nor a folder of files of a kind that is read: see --help")
    share = given in args.val if args.val else args.val_share
    for path in paths:
        sources[os.path.realpath(path)] = path, share

# ---- until all is done, meta.json is a journal: how far it was at some moment, and the sizes that the files had then

path = folder = Path("data", args.dataset)
meta_path = folder / "meta.json"


def digest(text):
    """A number from 0 to 1 as if drawn, but always the same one for a text, by its SHA-512."""
    return random.Random(text.encode("utf-8", "replace")).random()


FILES = "train.bin", "val.bin", "broken.txt"            # the last one names the broken lines
settings = digest(f"{args.field} {[*sources.values()]}")
done = {"settings": settings,
        "sources": 0, "read": 0} | dict.fromkeys(FILES, 0)      # sources that are done; of the next one, documents


def keep(meta):
    """Writes meta.json: a command that is stopped from now on goes on from there."""
    part = folder / "meta.tmp"
    part.write_text(json.dumps(meta, indent=1))
    part.replace(meta_path)


# ---- tokens


def read(path, share):
    """Encodes what a file, or what is downloaded from an address, holds behind what was done of it before."""
    at = right = 0
    local = path
    if "://" in path:
        print(f"downloading {path}")
        local, _ = urlretrieve(path, folder / "download")
    with open(local, "rb") as stream:
        found = iter(tqdm(documents(path, stream), path, unit=" documents", leave=False, delay=1))
        while batch := list(islice(found, 128)):        # no more than this in memory
            texts = [item for item in batch if isinstance(item, str)]
            at += len(batch)
            right += len(texts)
            if at <= done["read"]:
                continue
            broken = [item for item in batch if isinstance(item, bytes)]
            parts = {"train.bin": [], "val.bin": [], "broken.txt": broken}
            for text, ids in zip(texts, bpe.encode_ordinary_batch(texts)):
                # its digest decides where a text goes, so that all copies of it go to the same side
                name = "val.bin" if digest(text) < share else "train.bin"
                if ids:
                    parts[name].append(np.array([*ids, END], np.uint16))
            for name, part in parts.items():
                with open(folder / name, "ab") as file:
                    if file.tell() != done[name]:
                        fail(f"{name} lost a part, or was changed by another process: wait for that, or delete {folder}")
                    file.writelines(part)
                    done[name] = file.tell()
            done["read"] = at
            keep(done)
    if at and not right:
        fail(f"no line of {path} is right: see {folder}/broken.txt")


def last_tenth():
    """Gives validation the last tenth of all tokens instead, where each text counts once. They are in memory:
    at the default --val_share these are less than 200 million, as long as few documents don't make a fifth."""
    ids = np.concatenate([np.fromfile(folder / name, np.uint16) for name in ("val.bin", "train.bin")])
    texts = np.split(ids, np.flatnonzero(ids == END) + 1)
    once = {text.tobytes(): text for text in texts}
    ids = np.concatenate([*once.values()])
    meta_path.unlink()                                  # stopped from here on, it reads all files again
    for name, part in zip(FILES, np.split(ids, [len(ids) * 9 // 10])):
        part.tofile(folder / name)
        done[name] = part.nbytes


def finish():
    """Writes meta.json as train.py reads it, and says what there is."""
    n_train, n_val = done["train.bin"] // 2, done["val.bin"] // 2
    if not n_train or not n_val:
        fail(f"{folder} has {n_train} tokens to train on, {n_val} to validate: use another text, --dataset")
    # how many characters begin in each token: as many as it has bytes that don't go on with one
    begin_in = [sum(byte >> 6 != 2 for byte in token) for token in bpe.decode_tokens_bytes(range(END))]
    counts = np.bincount(np.fromfile(folder / "val.bin", np.uint16))            # END is the highest id there
    (folder / "download").unlink(missing_ok=True)
    keep({"vocab_size": 50257, "source": ", ".join(args.input)[:200], "train_tokens": n_train,
          "val_tokens": n_val, "val_chars": int(counts[:END] @ begin_in)})
    print(f"{folder}: {n_train:,} tokens to train on, {n_val:,} to validate")
    broken = (folder / "broken.txt").read_text("utf-8").splitlines()
    if broken:
        print(f"{len(broken):,} broken lines were skipped, see {folder}/broken.txt: {'; '.join(broken[:5])}")


try:
    bpe = Tokenizer({"vocab_size": 50257}).bpe
    os.makedirs(folder, exist_ok=True)
    if meta_path.exists():
        done = json.loads(meta_path.read_bytes())
    if done.get("settings") != settings:
        fail(f"{folder} is finished, or begun with other files or settings: name another --dataset")
    for name in FILES:
        with open(folder / name, "ab") as file:
            file.truncate(min(file.tell(), done[name]))     # what is behind was written later, and is written again
    for path, share in islice(sources.values(), done["sources"], None):
        read(path, share)
        done["sources"] += 1
        done["read"] = 0
    n = done["train.bin"] + done["val.bin"]             # bytes, two a token
    if not args.val and not min(n / 100, 200_000) <= done["val.bin"] <= n * (0.2 + 0.8 * args.val_share):
        last_tenth()
    finish()
except (Exception, KeyboardInterrupt) as e:  # noqa: BLE001 (each kind of packing has errors of its own)
    fail(f"stopped at {path} ({type(e).__name__}: {e}): the same command goes on from there")
