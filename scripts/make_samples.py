"""Draw the embedded samples in nbs/samples from the full sets. The same bytes come out each time.

    FEEDBACK_NB_DATA=<data folder> python scripts/make_samples.py [output folder]
"""
import csv
import hashlib
import io
import os
import sys
import tarfile
from pathlib import Path

from safetensors.torch import save_file

from feedback_nb.data import load


def fashion(root: Path, out: Path):
    """2,000 + 500 images, the same number of each class, drawn with seed 0."""
    parts = {split: load("fashion-mnist", split, root=root, download=False).subset(n, seed=0)
             for split, n in (("train", 2000), ("test", 500))}
    tensors = {f"{split}_{k}": t.byte()
               for split, d in parts.items() for k, t in (("x", d.x), ("y", d.y))}
    save_file(tensors, out / "fashion-mnist-sample.safetensors",
              metadata={"classes": "\n".join(parts["train"].classes)})


def pack(path: Path, files: dict[str, bytes]):
    """A plain tar with nothing in it that depends on the day, the user or the machine."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))


def nuclei(root: Path, out: Path):
    """45 + 15 pairs, bytes unchanged: of each split and kind those with the smallest sha256."""
    rows = list(
        csv.DictReader((root / "nuclei" / "index.csv").read_text(encoding="utf-8").splitlines()))
    files = {}
    for split, kind, n in (("train", "grey", 40), ("train", "colour", 5), ("test", "grey", 13),
                           ("test", "colour", 2)):
        names = sorted((r["name"] for r in rows if (r["split"], r["kind"]) == (split, kind)),
                       key=lambda s: hashlib.sha256(s.encode()).hexdigest())
        files |= {f"{split}/{k}/{name}": (root / "nuclei" / split / k / name).read_bytes()
                  for name in names[:n] for k in ("images", "masks")}
    pack(out / "nuclei-sample.tar", files)


def digits(root: Path, out: Path):
    """One clip of each word by each speaker, bytes unchanged; four are train, two are test."""
    words = "zero one two three four five six seven eight nine".split()
    speakers = "george jackson lucas nicolas theo yweweler".split()
    test = {(w, s) for i, w in enumerate(words) for j, s in enumerate(speakers) if (j - i) % 3 == 0}
    with tarfile.open(root / "SpeechCommands.tar.gz") as tar:
        inside = {m.name.removeprefix("SpeechCommands/speech_commands_v0.02/"): m for m in tar
                  if m.isfile()}
        read = lambda name: tar.extractfile(inside[name]).read()
        # takes 0-4 are the official test takes, 10 is a training take
        files = {(w, s): f"{w}/{s}_nohash_{0 if (w, s) in test else 10}.wav" for w in words
                 for s in speakers}
        data = {name: read(name) for name in files.values()}
    data["testing_list.txt"] = "".join(f"{files[k]}\n" for k in sorted(test)).encode()
    data["validation_list.txt"] = b""
    pack(out / "spoken-digits-sample.tar", data)


def main():
    needs = "the folder that has FashionMNIST, nuclei and SpeechCommands.tar.gz"
    root = Path(os.environ.get("FEEDBACK_NB_DATA") or sys.exit(f"set FEEDBACK_NB_DATA to {needs}"))
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(
        __file__).resolve().parent.parent / "nbs" / "samples"
    out.mkdir(parents=True, exist_ok=True)
    for draw in (fashion, nuclei, digits): draw(root, out)
    made = ["fashion-mnist-sample.safetensors", "nuclei-sample.tar", "spoken-digits-sample.tar"]
    lines = [f"{hashlib.sha256((out / f).read_bytes()).hexdigest()}  {f}\n" for f in made]
    (out / "SHA256SUMS").write_text("".join(lines), encoding="utf-8", newline="\n")
    print("".join(lines), end="")
    print(f"{sum((out / f).stat().st_size for f in made):,} bytes in all")


if __name__ == "__main__": main()
