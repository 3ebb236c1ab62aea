"""What a user of `load`, its cache and the batch functions relies on."""

import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from conftest import write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Subset

from feedback_nb import data, pictures, readers, sets
from feedback_nb.data import (
    PhotoFolder,
    TensorData,
    augment,
    catalogue,
    cli,
    corrupt,
    gaussian_noise,
    load,
    names,
    polygons,
)

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "nbs" / "samples"
FULL = os.environ.get("FEEDBACK_NB_DATA")
full = pytest.mark.skipif(not FULL, reason="needs FEEDBACK_NB_DATA, the folder with the full sets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "Each test has an empty cache of its own and no data root."
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEEDBACK_NB_CACHE", str(folder))
    monkeypatch.delenv("FEEDBACK_NB_DATA", raising=False)
    return folder


def encoded(array, kind="PNG"):
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind)
    return out.getvalue()


def photos(split, n=6, side=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"{split}/{'bird' if i % 2 else 'ant'}/{i:03}.png": encoded(
            rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        )
        for i in range(n)
    }


def write_tree(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def root(tmp_path):
    "A data root with a tiny cifar10-jpeg."
    folder = tmp_path / "root"
    for split in ("train", "test"):
        write_tar(folder / "cifar10-jpeg" / f"{split}.tar.gz", photos(split, seed=split == "test"))
    return folder


def snapshot(folder):
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in [folder, *folder.rglob("*")]}


def cache_files(cache):
    return sorted(p.name for p in (cache / "decoded").iterdir() if p.suffix != ".lock")


# ---------------------------------------------------------------- importing and naming


def test_import_loads_torch_and_the_standard_library_alone_and_touches_nothing(tmp_path):
    code = """
import sys, socket, os
import torch
before = set(sys.modules)
def no(*a, **k): raise AssertionError("network")
socket.socket.connect = no
opened = []
def hook(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        opened.append(args[0])
sys.addaudithook(hook)
import feedback_nb.data
new = {m.split(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new <= {"feedback_nb"}, new
assert not [f for f in opened if not str(f).endswith(".pyc") and ".pyc." not in str(f)], opened
assert not os.path.exists(os.environ["FEEDBACK_NB_CACHE"])
"""
    env = {
        **os.environ,
        "FEEDBACK_NB_CACHE": str(tmp_path / "never"),
        "FEEDBACK_NB_DATA": "no/such/folder",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=tmp_path)


@pytest.mark.parametrize(
    "name", ["fashion-mnist-sample", "FashionMNIST_sample", "FASHION MNIST SAMPLE"]
)
def test_names_are_forgiving(name):
    assert load(name).name == "fashion-mnist-sample"


def test_unknown_name_lists_close_ones_and_all():
    with pytest.raises(ValueError, match="did you mean .*cifar10") as e:
        load("cifar-l0")
    assert all(n in str(e.value) for n in names())


def test_every_set_of_the_book_is_known():
    assert set(names()) >= {
        "digits",
        "mnist",
        "fashion-mnist",
        "kuzushiji-mnist",
        "cifar10",
        "cifar100",
        "cifar10-jpeg",
        "imagenette",
        "imagenette-128",
        "imagenet",
        "imagenet-sample",
        "speechcommands",
        "spoken-digits",
        "nuclei",
        "polygons",
        "fashion-mnist-sample",
        "nuclei-sample",
        "spoken-digits-sample",
    }


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(split="valid"), ("no split 'valid'", "split_off")),
        (dict(split="trian"), ("no split 'trian'", "train, test")),
        (dict(size=0), ("size", "0")),
        (dict(size=2.5), ("size", "2.5")),
        (dict(size=True), ("size",)),
    ],
)
def test_bad_arguments_are_named(asked, words):
    with pytest.raises(ValueError) as e:
        load("digits", **asked)
    assert all(w in str(e.value) for w in words)


def test_unknown_option_is_named():
    with pytest.raises(TypeError, match="no option m; it takes n, classes, shapes, seed"):
        load("polygons", m=3)


# ---------------------------------------------------------------- TensorData

labels = st.lists(st.integers(0, 4), min_size=2, max_size=60)


def toy(y):
    y = torch.tensor(y)
    return TensorData(
        torch.arange(len(y), dtype=torch.float32)[:, None],
        y,
        [str(c) for c in range(5)],
        "toy",
        "train",
    )


@given(labels, st.data())
def test_subset_keeps_shares_to_within_one_example(y, more):
    n, seed = more.draw(st.integers(0, len(y))), more.draw(st.integers(0, 2**31))
    d = toy(y)
    part = d.subset(n, seed)
    assert len(part) == n and len(part.x.unique()) == n
    share = d.y.bincount(minlength=5) * n / len(y)
    assert ((part.y.bincount(minlength=5) - share).abs() < 1).all()
    torch.testing.assert_close(d.y[part.x[:, 0].long()], part.y)  # labels went with their examples
    torch.testing.assert_close(d.subset(n, seed).x, part.x)


@given(labels, st.floats(0.01, 0.99), st.integers(0, 1000))
def test_split_off_is_disjoint_and_whole(y, fraction, seed):
    rest, part = toy(y).split_off(fraction, seed)
    assert len(part) == round(fraction * len(y))
    assert sorted(torch.cat([rest.x, part.x])[:, 0].tolist()) == list(range(len(y)))
    assert (rest.name, rest.split, rest.classes) == ("toy", "train", ("0", "1", "2", "3", "4"))


def test_masks_are_split_plainly():
    rest, part = load("polygons", n=10, size=16).split_off(0.3)
    assert (len(rest), len(part)) == (7, 3) and part.y.shape == (3, 16, 16)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_split_off_refuses_empty_parts(fraction):
    with pytest.raises(ValueError, match="fraction"):
        toy([0, 1]).split_off(fraction)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_takes_a_batch_by_one_index_operation(workers):
    d = load("digits").subset(100)
    calls = []

    class Counted(TensorData):
        def __getitem__(self, i):
            calls.append(i)
            return super().__getitem__(i)

    counted = Counted(d.x, d.y)
    batches = list(
        DataLoader(counted, batch_size=32, collate_fn=counted.collate, num_workers=workers)
    )
    assert [len(x) for x, _ in batches] == [32, 32, 32, 4] and not calls
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), d.x / 255)
    torch.testing.assert_close(torch.cat([y for _, y in batches]), d.y)
    _, y = next(
        iter(DataLoader(Subset(counted, range(50, 60)), batch_size=4, collate_fn=counted.collate))
    )
    torch.testing.assert_close(y, d.y[50:54])


def test_one_example():
    x, y = load("digits")[3]
    assert (
        x.shape == (1, 8, 8)
        and x.dtype == torch.float32
        and 0 <= x.min()
        and x.max() <= 1
        and y.dtype == torch.int64
    )


@pytest.mark.parametrize(
    ("x", "y", "classes", "error", "words"),
    [
        (3, torch.zeros(2, dtype=torch.int64), (), ValueError, ("y", "3", "2")),
        (2, torch.zeros(2), (), TypeError, ("int64", "float32")),
        (2, torch.tensor([0, 2]), ("a", "b"), ValueError, ("y", "1", "2")),
        (2, torch.tensor([-1, 0]), ("a", "b"), ValueError, ("-1",)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(x, y, classes, error, words):
    with pytest.raises(error) as e:
        TensorData(torch.zeros(x, 1), y, classes)
    assert all(w in str(e.value) for w in words)


def test_changing_a_loaded_tensor_does_not_change_the_cache(root):
    kept = load("cifar10-jpeg", root=root).x.clone()
    again = load("cifar10-jpeg", root=root)  # this one is backed by the cache file
    again.x.zero_()
    torch.testing.assert_close(load("cifar10-jpeg", root=root).x, kept)


# ---------------------------------------------------------------- roots


def test_a_root_that_does_not_exist_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="root=.*gone.*does not exist"):
        load("digits", root=tmp_path / "gone")
    monkeypatch.setenv("FEEDBACK_NB_DATA", str(tmp_path / "lost"))
    with pytest.raises(FileNotFoundError, match="FEEDBACK_NB_DATA.*lost.*does not exist"):
        load("fashion-mnist")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="file"):
        load("digits", root=tmp_path / "file")


def test_missing_data_without_download_says_where_it_looked_and_how_to_get_it(tmp_path, cache):
    with pytest.raises(FileNotFoundError) as e:
        load("fashion-mnist", root=tmp_path, download=False)
    for words in (
        "FashionMNIST/raw/train-images-idx3-ubyte.gz",
        str(tmp_path),
        str(cache),
        "download=True",
        "30.9 MB",
        "FEEDBACK_NB_DATA",
    ):
        assert words in str(e.value)
    assert not cache.exists()


@pytest.mark.parametrize(
    "name",
    ["cifar10-jpeg", "imagenette-128", "imagenet-sample", "nuclei", "spoken-digits", "imagenet"],
)
def test_sets_that_cannot_be_downloaded_say_what_to_do(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot be downloaded: .*(root=|FEEDBACK_NB_DATA)"):
        load(name, next(iter(data.SOURCES[name].splits)), root=tmp_path)


def test_the_environment_names_the_root_and_an_argument_overrides_it(root, tmp_path, monkeypatch):
    monkeypatch.setenv("FEEDBACK_NB_DATA", str(root))
    assert len(load("cifar10-jpeg")) == 6
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        load("cifar10-jpeg", root=empty)


def offline(urls, path, digest):
    raise ConnectionError("no network")


def test_jpeg_copies_are_never_passed_off_as_cifar10(root, monkeypatch, cache):
    with pytest.raises(FileNotFoundError, match="cifar10-jpeg.*not the same data"):
        load("cifar10", root=root, download=False)
    monkeypatch.setattr(data, "fetch", offline)
    with pytest.raises(ConnectionError, match="no network.*by hand"):
        load("cifar10", root=root)
    assert not [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_the_root_is_only_read(root):
    before = snapshot(root)
    for path in root.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for _ in range(2):
        load("cifar10-jpeg", root=root)
    assert snapshot(root) == before


# ---------------------------------------------------------------- reading photos


def test_photos_from_an_archive_are_what_imagefolder_reads_from_a_folder(root, tmp_path):
    from torchvision.datasets import ImageFolder

    packed = load("cifar10-jpeg", root=root)
    unpacked = write_tree(tmp_path / "plain" / "cifar10-jpeg", photos("train"))
    folder = load("cifar10-jpeg", root=unpacked.parent)
    oracle = ImageFolder(unpacked / "train")
    expected = torch.stack(
        [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in oracle]
    )
    for d in (packed, folder):
        torch.testing.assert_close(d.x, expected)
        assert d.y.tolist() == oracle.targets and d.classes == ("ant", "bird")


def test_order_does_not_depend_on_the_order_in_the_archive(tmp_path):
    files = list(photos("train").items())
    random.Random(1).shuffle(files)
    write_tar(tmp_path / "a" / "cifar10-jpeg" / "train.tar.gz", photos("train"))
    write_tar(tmp_path / "b" / "cifar10-jpeg" / "train.tar.gz", dict(files))
    torch.testing.assert_close(
        load("cifar10-jpeg", root=tmp_path / "a").x, load("cifar10-jpeg", root=tmp_path / "b").x
    )


def test_photos_of_many_sizes_need_a_size(tmp_path):
    write_tree(
        tmp_path / "cifar10-jpeg",
        photos("train", 2, 8) | {"train/cat/a.png": encoded(np.zeros((9, 12, 3), np.uint8))},
    )
    with pytest.raises(ValueError, match="2 sizes.*size="):
        load("cifar10-jpeg", root=tmp_path)
    assert load("cifar10-jpeg", root=tmp_path, size=8).x.shape == (3, 3, 8, 8)


def test_resizing_takes_the_middle_square(tmp_path):
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, 8:24] = 200  # the middle square is one flat colour
    write_tree(tmp_path / "cifar10-jpeg", {"train/a/a.png": encoded(wide)})
    assert load("cifar10-jpeg", root=tmp_path, size=8).x.unique().tolist() == [200]


@pytest.mark.parametrize(
    "size,file",
    [
        (None, "imagenette2-160.tgz"),
        (128, "imagenette2-160.tgz"),
        (224, "imagenette2-320.tgz"),
        (400, "imagenette2.tgz"),
    ],
)
def test_imagenette_picks_the_smallest_archive_that_is_large_enough(
    tmp_path, size, file, monkeypatch
):
    write_tar(
        tmp_path / file,
        {
            f"{file[:-4]}/{name}": content
            for name, content in (photos("train") | photos("val", 4)).items()
        },
    )
    monkeypatch.setitem(
        sets._IMAGENETTE,
        sets._px(size or 160),
        hashlib.md5((tmp_path / file).read_bytes()).hexdigest(),
    )
    assert len(load("imagenette", "train", root=tmp_path, size=size)) == 6
    assert (
        len(load("imagenette", "valid", root=tmp_path, size=size))
        == len(load("imagenette", "test", root=tmp_path, size=size))
        == 4
    )


def test_wordnet_numbers_become_names(tmp_path):
    image = encoded(np.zeros((8, 8, 3), np.uint8))
    write_tree(
        tmp_path / "imagenette-128",
        {"train/n02102040/a.png": image, "train/n01440764/b.png": image},
    )
    assert load("imagenette-128", root=tmp_path).classes == ("tench", "English springer")
    write_tree(
        tmp_path / "imagenet-sample",
        {
            "n01440764/a.png": image,
            "n99/b.png": image,
            "classes.csv": b"index,wnid,name\n0,n01440764,tench\n1,n99,a thing\n",
        },
    )
    assert load("imagenet-sample", "test", root=tmp_path).classes == ("tench", "a thing")


def test_pairs_without_partner_are_named(tmp_path):
    image, mask = (
        encoded(np.full((20, 30, 3), 9, np.uint8)),
        encoded(np.full((20, 30), 255, np.uint8)),
    )
    write_tree(
        tmp_path / "nuclei" / "train",
        {"images/a.png": image, "masks/a.png": mask, "images/b.png": image},
    )
    with pytest.raises(RuntimeError, match="2 images and 1 masks.*b.png"):
        load("nuclei", root=tmp_path)
    write_tree(tmp_path / "nuclei" / "train", {"masks/b.png": mask})
    d = load("nuclei", root=tmp_path, size=16)
    assert (
        d.x.shape == (2, 3, 16, 16)
        and d.y.shape == (2, 16, 16)
        and d.y.dtype == torch.int64
        and (d.y == 1).all()
    )


# ---------------------------------------------------------------- damage and malice in sources


def test_a_damaged_image_is_named(tmp_path):
    write_tar(
        tmp_path / "cifar10-jpeg" / "train.tar.gz",
        photos("train") | {"train/bird/broken.png": b"\x89PNG but no more"},
    )
    with pytest.raises(RuntimeError, match="bird/broken.png.*damaged.*get it again"):
        load("cifar10-jpeg", root=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_archive_is_named(root, damage, cache):
    path = root / "cifar10-jpeg" / "train.tar.gz"
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "garbage": b"not a tar", "empty": b""}[damage]
    )
    with pytest.raises(RuntimeError, match="train.tar.gz.*get it again"):
        load("cifar10-jpeg", root=root)
    assert cache_files(cache) == []


def test_a_listed_checksum_that_differs_is_refused(root):
    archive = root / "cifar10-jpeg" / "train.tar.gz"
    (root / "SHA256SUMS").write_text(
        f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  cifar10-jpeg/train.tar.gz\n"
    )
    load("cifar10-jpeg", root=root)
    swapped = photos("train", seed=5)
    write_tar(archive, swapped)  # a whole archive, but not the one that is listed
    with pytest.raises(RuntimeError, match="train.tar.gz.*sha256"):
        load("cifar10-jpeg", root=root)


def test_listed_checksums_also_guard_single_files(tmp_path):
    tree = write_tree(tmp_path / "cifar10-jpeg", photos("train"))
    (tmp_path / "SHA256SUMS").write_text(
        "".join(
            f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(tmp_path).as_posix()}\n"
            for p in tree.rglob("*.png")
        )
    )
    load("cifar10-jpeg", root=tmp_path)
    (tree / "train/ant/002.png").write_bytes(encoded(np.zeros((8, 8, 3), np.uint8)))
    with pytest.raises(RuntimeError, match="002.png.*sha256"):
        load("cifar10-jpeg", root=tmp_path)


@pytest.mark.parametrize("name", ["../evil/ant/a.png", "train/../../evil/a.png", "/evil/ant/a.png"])
def test_archive_members_cannot_escape(tmp_path, name, cache):
    files = photos("train")
    write_tar(
        tmp_path / "root" / "cifar10-jpeg" / "train.tar.gz",
        {name: files["train/ant/000.png"]} | files,
    )
    with pytest.raises(RuntimeError, match="points out of the archive"):
        load("cifar10-jpeg", root=tmp_path / "root")
    assert not list(tmp_path.rglob("evil")) and not list(tmp_path.rglob("*.png"))


def test_links_and_devices_in_archives_are_not_followed(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(np.zeros((8, 8, 3), np.uint8)))
    path = write_tar(tmp_path / "cifar10-jpeg" / "train.tar", photos("train"), "w")
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"train/ant/x{kind.decode()}.png")
            member.type, member.linkname = kind, str(secret)
            tar.addfile(member)
    with gzip.open(path.with_name("train.tar.gz"), "wb") as out:
        out.write(path.read_bytes())
    assert len(load("cifar10-jpeg", root=tmp_path)) == 6


# ---------------------------------------------------------------- MNIST and CIFAR


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist_files(monkeypatch):
    return idx_files(monkeypatch, "FashionMNIST")


def idx_files(monkeypatch, family):
    "A tiny MNIST or heir with torchvision told its sums."
    import torchvision

    rng, files = np.random.default_rng(0), {}
    for split, n in (("train", 12), ("t10k", 5)):
        files[f"{split}-images-idx3-ubyte.gz"] = gzip.compress(
            idx(rng.integers(0, 256, (n, 28, 28))), mtime=0
        )
        files[f"{split}-labels-idx1-ubyte.gz"] = gzip.compress(idx(rng.integers(0, 10, n)), mtime=0)
    monkeypatch.setattr(
        getattr(torchvision.datasets, family),
        "resources",
        [(f, hashlib.md5(b).hexdigest()) for f, b in files.items()],
    )
    return files


@pytest.mark.parametrize(
    ("name", "family"),
    [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kuzushiji-mnist", "KMNIST")],
)
def test_idx_files_are_read_as_torchvision_reads_them(tmp_path, monkeypatch, name, family):
    import torchvision

    files = idx_files(monkeypatch, family)
    write_tree(tmp_path / "zipped" / family / "raw", files)
    write_tree(
        tmp_path / "plain" / family / "raw", {f[:-3]: gzip.decompress(b) for f, b in files.items()}
    )
    for split in ("train", "test"):
        oracle = getattr(torchvision.datasets, family)(
            tmp_path / "plain", train=split == "train", download=False
        )
        for folder in ("zipped", "plain"):
            d = load(name, split, root=tmp_path / folder)
            torch.testing.assert_close(d.x[:, 0], oracle.data)
            torch.testing.assert_close(d.y, oracle.targets)
            assert list(d.classes) == [
                c.split(" - ")[-1] for c in oracle.classes
            ]  # torchvision says "0 - zero"


def test_wrong_md5_is_refused_and_named(tmp_path, mnist_files, cache):
    bad = bytearray(mnist_files["train-labels-idx1-ubyte.gz"])
    bad[-1] ^= 1
    write_tree(
        tmp_path / "FashionMNIST" / "raw", mnist_files | {"train-labels-idx1-ubyte.gz": bytes(bad)}
    )
    with pytest.raises(RuntimeError, match="train-labels-idx1-ubyte.gz.*md5.*get it again"):
        load("fashion-mnist", root=tmp_path)
    assert cache_files(cache) == []


def test_an_idx_file_cut_short_is_named(tmp_path, mnist_files):
    plain = {f[:-3]: gzip.decompress(b) for f, b in mnist_files.items()}
    for n in (0, 3, 10, 500):
        write_tree(
            tmp_path / "FashionMNIST" / "raw",
            plain | {"train-images-idx3-ubyte": plain["train-images-idx3-ubyte"][:n]},
        )
        with pytest.raises(RuntimeError, match="train-images-idx3-ubyte' is not a whole"):
            load("fashion-mnist", root=tmp_path)


def cifar_files(monkeypatch, family="CIFAR10"):
    "A tiny CIFAR in pickles, with torchvision told its sums."
    import torchvision

    cls, rng = getattr(torchvision.datasets, family), np.random.default_rng(1)
    key = "labels" if family == "CIFAR10" else "fine_labels"
    files = {
        f: pickle.dumps(
            {
                "data": rng.integers(0, 256, (4, 3072), dtype=np.uint8),
                key: rng.integers(0, 3, 4).tolist(),
            }
        )
        for f, _ in cls.train_list + cls.test_list
    }
    files[cls.meta["filename"]] = pickle.dumps({cls.meta["key"]: ["one", "two", "three"]})
    md5 = {f: hashlib.md5(b).hexdigest() for f, b in files.items()}
    monkeypatch.setattr(cls, "train_list", [[f, md5[f]] for f, _ in cls.train_list])
    monkeypatch.setattr(cls, "test_list", [[f, md5[f]] for f, _ in cls.test_list])
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5[cls.meta["filename"]]})
    return cls, files


@pytest.mark.parametrize("family", ["CIFAR10", "CIFAR100"])
def test_cifar_is_read_as_torchvision_reads_it(tmp_path, monkeypatch, family):
    cls, files = cifar_files(monkeypatch, family)
    write_tree(tmp_path / "folder" / cls.base_folder, files)
    archive = write_tar(
        tmp_path / "archive" / cls.filename, {f"{cls.base_folder}/{f}": b for f, b in files.items()}
    )
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    for split in ("train", "test"):
        oracle = cls(tmp_path / "folder", train=split == "train", download=False)
        for folder in ("folder", "archive"):
            d = load(family, split, root=tmp_path / folder)
            torch.testing.assert_close(d.x, torch.from_numpy(oracle.data).permute(0, 3, 1, 2))
            assert d.y.tolist() == oracle.targets and list(d.classes) == oracle.classes


def test_a_pickle_with_another_md5_is_never_opened(tmp_path, monkeypatch):
    cls, files = cifar_files(monkeypatch)

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    write_tree(tmp_path / cls.base_folder, files | {"data_batch_2": pickle.dumps(Bomb())})
    with pytest.raises(RuntimeError, match="cifar-10-batches-py.*md5"):
        load("cifar10", root=tmp_path)
    assert not (tmp_path / "exploded").exists()
    (tmp_path / cls.base_folder / "data_batch_2").unlink()
    with pytest.raises(RuntimeError, match="cifar-10-batches-py"):
        load("cifar10", root=tmp_path)


# ---------------------------------------------------------------- the cache


def no_decoding(monkeypatch):
    def refuse(*a, **k):
        raise AssertionError("decoded again")

    monkeypatch.setattr(readers, "members", refuse)


def test_the_second_load_decodes_nothing(root, monkeypatch):
    first = load("cifar10-jpeg", root=root)
    no_decoding(monkeypatch)
    second = load("cifar10-jpeg", root=root)
    torch.testing.assert_close(second.x, first.x)
    torch.testing.assert_close(second.y, first.y)
    assert second.classes == first.classes


def test_size_split_and_root_have_files_of_their_own(root, tmp_path, cache):
    other = tmp_path / "other"
    write_tar(other / "cifar10-jpeg" / "train.tar.gz", photos("train", seed=9))
    loaded = [
        load("cifar10-jpeg", root=root),
        load("cifar10-jpeg", root=root, size=4),
        load("cifar10-jpeg", "test", root=root),
        load("cifar10-jpeg", root=other),
    ]
    assert len(cache_files(cache)) == 4
    assert not torch.equal(loaded[0].x, loaded[3].x) and loaded[1].x.shape[-1] == 4


def test_a_changed_source_is_noticed_and_replaces_its_file(root, cache):
    before = load("cifar10-jpeg", root=root)
    write_tar(root / "cifar10-jpeg" / "train.tar.gz", photos("train", seed=7))
    assert not torch.equal(load("cifar10-jpeg", root=root).x, before.x)
    assert len(cache_files(cache)) == 1


@pytest.mark.parametrize("where", ["header", "names", "pixels", "end", "cut", "empty", "garbage"])
def test_a_damaged_cache_file_is_named_and_made_again(root, cache, where):
    good = load("cifar10-jpeg", root=root)
    file = cache / "decoded" / cache_files(cache)[0]
    whole = bytearray(file.read_bytes())
    if where == "header":
        whole[3] ^= 0xFF
    if where == "names":
        whole[whole.index(b"bird")] ^= 1  # a class name, in the metadata
    if where == "pixels":
        whole[len(whole) // 2] ^= 1
    if where == "end":
        whole[-1] ^= 0x80
    file.write_bytes(
        {"cut": bytes(whole[: len(whole) // 2]), "empty": b"", "garbage": b"\0" * 100}.get(
            where, bytes(whole)
        )
    )
    with pytest.warns(UserWarning, match=rf"{file.name}.*damaged.*made again"):
        again = load("cifar10-jpeg", root=root)
    torch.testing.assert_close(again.x, good.x)
    assert again.classes == good.classes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("cifar10-jpeg", root=root)


@given(st.integers(0, 10**9), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_no_flipped_bit_gets_through(tmp_path_factory, at, bit):
    path = tmp_path_factory.mktemp("cache") / "a.safetensors"
    make = lambda: (
        {"x": torch.arange(200, dtype=torch.uint8), "y": torch.arange(200)},
        {"classes": json.dumps(["a", "b"])},
    )
    data._cached(path, {"format": "1", "source": "s"}, make)
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] ^= 1 << bit
    path.write_bytes(raw)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        hit = data._recall(path, {"format": "1", "source": "s"})
    if hit:  # only where the flip changed nothing that is read, such as white space in the header
        torch.testing.assert_close(hit[0], make()[0])
        assert hit[1]["classes"] == make()[1]["classes"]


WRITER = """
import sys, torch, pathlib
from feedback_nb import data, pictures, readers, sets
def make():
    print("made", flush=True)
    return {"x": torch.full((1 << 27,), 7, dtype=torch.uint8)}, {"classes": "[]"}
data._cached(pathlib.Path(sys.argv[1]), {"source": "1"}, make)
print("done", flush=True)
"""


def start(path):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def test_kill_minus_9_while_the_cache_is_written(tmp_path):
    path = tmp_path / "decoded" / "big.safetensors"
    for pause in (0, 0.01, 0.04):
        p = start(path)
        while p.poll() is None and not list(path.parent.glob("*.tmp")):
            time.sleep(0.0005)
        time.sleep(pause)
        p.send_signal(signal.SIGKILL)
        p.wait()
        if pause == 0:
            assert (
                list(path.parent.glob("*.tmp")) and not path.exists()
            )  # the kill came in the middle
        if path.exists():
            assert data._recall(path, {"source": "1"}) is not None  # whole, if it is there at all
            path.unlink()
    tensors, _ = data._cached(
        path, {"source": "1"}, lambda: ({"x": torch.arange(9)}, {"classes": "[]"})
    )
    assert tensors["x"].tolist() == list(range(9))
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".lock"] == [
        "big.safetensors"
    ]  # what the killed left is gone


def test_two_processes_at_once_decode_once(tmp_path):
    path = tmp_path / "decoded" / "big.safetensors"
    outputs = [p.communicate()[0] for p in [start(path), start(path)]]
    assert sorted(outputs) == ["done\n", "made\ndone\n"]


@pytest.mark.parametrize("error", ["disk", "safetensors"])
def test_a_full_disk_costs_the_cache_and_nothing_else(root, cache, monkeypatch, error):
    import safetensors.torch

    def full_disk(tensors, path, metadata=None):
        Path(path).write_bytes(b"the first bytes still had room")
        raise (
            OSError(errno.ENOSPC, "No space left on device")
            if error == "disk"
            else safetensors.SafetensorError("I/O error: No space left on device")
        )

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.warns(UserWarning, match="could not keep.*No space left.*FEEDBACK_NB_CACHE"):
        d = load("cifar10-jpeg", root=root)
    assert len(d) == 6 and cache_files(cache) == []


@pytest.mark.skipif(
    sys.platform == "win32", reason="a path under a file fails in another way there"
)
def test_a_cache_folder_that_cannot_be_made(root, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEEDBACK_NB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="could not keep.*FEEDBACK_NB_CACHE"):
        assert len(load("cifar10-jpeg", root=root)) == 6


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere"
)
def test_a_cache_folder_that_may_not_be_written(root, cache):
    (cache / "decoded").mkdir(parents=True)
    (cache / "decoded").chmod(0o555)
    with pytest.warns(UserWarning, match="could not keep"):
        assert len(load("cifar10-jpeg", root=root)) == 6


def test_the_cache_folder_is_the_users_unless_one_is_named(monkeypatch):
    import pooch

    monkeypatch.setenv("FEEDBACK_NB_CACHE", "~/own")
    assert data.cache_folder() == Path.home() / "own"
    monkeypatch.delenv("FEEDBACK_NB_CACHE")
    assert data.cache_folder() == pooch.os_cache("feedback_nb")


def test_a_cache_file_is_hashed_only_after_somebody_wrote_it(root, cache, monkeypatch):
    load("cifar10-jpeg", root=root)
    hashed = []
    digest = data._digest
    monkeypatch.setattr(data, "_digest", lambda *a: hashed.append(1) or digest(*a))
    load("cifar10-jpeg", root=root)
    assert not hashed
    (cache / "decoded" / cache_files(cache)[0]).touch()
    load("cifar10-jpeg", root=root)
    assert hashed


# ---------------------------------------------------------------- downloads


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a):
            super().__init__(*a, directory=str(folder))

        def log_message(self, *a):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{httpd.server_port}/"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    "As when the package is installed without its checkout."
    (elsewhere := tmp_path / "site-packages" / "feedback_nb").mkdir(parents=True)
    monkeypatch.setattr(data, "__file__", str(elsewhere / "data.py"))
    monkeypatch.chdir(tmp_path)


def test_samples_are_fetched_once_when_there_is_no_checkout(server, installed, cache, monkeypatch):
    folder, url = server
    (folder / "spoken-digits-sample.tar").write_bytes(
        (SAMPLES / "spoken-digits-sample.tar").read_bytes()
    )
    monkeypatch.setattr(sets, "SAMPLES_URL", url)
    with pytest.raises(FileNotFoundError, match="download=True"):
        load("spoken-digits-sample", download=False)
    assert len(load("spoken-digits-sample")) == 40
    monkeypatch.setattr(data, "fetch", offline)
    assert len(load("spoken-digits-sample", "test")) == 20
    assert [p.name for p in (cache / "downloads" / "samples").iterdir() if p.suffix != ".lock"] == [
        "spoken-digits-sample.tar"
    ]


@pytest.mark.parametrize("served", [b"<html>a page of an airport</html>", b""])
def test_a_download_that_is_something_else_is_refused_and_leaves_nothing(
    server, installed, cache, monkeypatch, served
):
    folder, url = server
    (folder / "nuclei-sample.tar").write_bytes(served)
    monkeypatch.setattr(sets, "SAMPLES_URL", url)
    with pytest.raises(ConnectionError, match=r"nuclei-sample.tar.*(hash|hash of downloaded)"):
        load("nuclei-sample")
    assert not [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_second_address_is_tried(server, mnist_files, monkeypatch, cache):
    from torchvision.datasets import FashionMNIST

    folder, url = server
    write_tree(folder, mnist_files)
    monkeypatch.setattr(FashionMNIST, "mirrors", [url + "gone/", url])
    assert len(load("fashion-mnist")) == 12
    assert (
        cache / "downloads/FashionMNIST/raw/train-images-idx3-ubyte.gz"
    ).read_bytes() == mnist_files["train-images-idx3-ubyte.gz"]
    monkeypatch.setattr(FashionMNIST, "mirrors", [url + "gone/"])
    with pytest.raises(ConnectionError, match="404"):
        load("fashion-mnist", "test")


def test_a_download_that_stops_halfway_is_refused(mnist_files, monkeypatch, cache):
    def cut(self, url, path, *a, **k):
        Path(path).write_bytes(mnist_files[url.split("/")[-1]][:-5])

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", cut)
    with pytest.raises(ConnectionError, match="train-images"):
        load("fashion-mnist")
    assert not [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_full_disk_while_downloading_is_told(mnist_files, monkeypatch, cache):
    def full_disk(self, url, path, *a, **k):
        Path(path).write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", full_disk)
    with pytest.raises(OSError, match="No space left.*FEEDBACK_NB_CACHE") as e:
        load("fashion-mnist")
    assert e.value.errno == errno.ENOSPC
    assert not [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_downloaded_file_that_rotted_is_refused(mnist_files, cache):
    files = dict(mnist_files)
    write_tree(
        cache / "downloads" / "FashionMNIST" / "raw",
        files | {"train-images-idx3-ubyte.gz": files["train-images-idx3-ubyte.gz"][:-1]},
    )
    with pytest.raises(
        RuntimeError, match="train-images-idx3-ubyte.gz.*remove it and get it again"
    ):
        load("fashion-mnist")


# ---------------------------------------------------------------- embedded samples


def test_samples_are_the_bytes_that_are_listed():
    listed = dict(
        reversed(line.split("  ")) for line in (SAMPLES / "SHA256SUMS").read_text().splitlines()
    )
    assert (
        listed
        == data.SAMPLES
        == {f: hashlib.sha256((SAMPLES / f).read_bytes()).hexdigest() for f in listed}
    )


def test_samples_are_small_and_carry_their_licences():
    assert (SAMPLES / "fashion-mnist-sample.safetensors").stat().st_size <= 2_000_000
    assert sum(p.stat().st_size for p in SAMPLES.iterdir()) <= 8_000_000
    readme = (SAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f in readme for f in data.SAMPLES) and all(
        licence in readme for licence in ("MIT", "CC0", "CC BY-SA 4.0")
    )
    assert "Zalando" in (SAMPLES / "LICENSE-fashion-mnist.txt").read_text(encoding="utf-8")


def test_samples_hold_what_they_say():
    for split, n in (("train", 200), ("test", 50)):
        d = load("fashion-mnist-sample", split)
        assert (
            d.x.shape == (10 * n, 1, 28, 28)
            and d.y.bincount().tolist() == [n] * 10
            and d.classes[8] == "Bag"
        )
    for split, n in (("train", 45), ("test", 15)):
        d = load("nuclei-sample", split)
        assert (
            d.x.shape == (n, 3, 128, 128)
            and d.y.shape == (n, 128, 128)
            and d.y.unique().tolist() == [0, 1]
        )
    assert not {x.sum().item() for x in load("nuclei-sample").x} & {
        x.sum().item() for x in load("nuclei-sample", "test").x
    }


def test_a_damaged_sample_is_refused(tmp_path):
    raw = bytearray((SAMPLES / "fashion-mnist-sample.safetensors").read_bytes())
    raw[-100] ^= 1
    write_tree(tmp_path, {"samples/fashion-mnist-sample.safetensors": bytes(raw)})
    with pytest.raises(RuntimeError, match="fashion-mnist-sample.safetensors.*sha256"):
        load("fashion-mnist-sample", root=tmp_path)


@full
def test_the_script_draws_the_same_samples_again(tmp_path):
    env = {
        **os.environ,
        "FEEDBACK_NB_DATA": FULL,
        "FEEDBACK_NB_CACHE": str(tmp_path / "c"),
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_samples.py"), str(tmp_path / "out")],
        check=True,
        env=env,
        stdout=subprocess.DEVNULL,
    )
    for file in [*data.SAMPLES, "SHA256SUMS"]:
        assert (tmp_path / "out" / file).read_bytes() == (SAMPLES / file).read_bytes(), file


# ---------------------------------------------------------------- polygons


@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2**40),
)
@settings(max_examples=40, deadline=None)
def test_polygons_are_white_where_their_mask_is(n, size, classes, shapes, seed):
    x, y = polygons(n, size, classes, shapes, seed)
    assert (
        x.shape == (n, 1, size, size)
        and x.dtype == torch.uint8
        and y.shape == (n, size, size)
        and y.dtype == torch.int64
    )
    torch.testing.assert_close(x[:, 0] == 255, y > 0)
    assert set(x.unique().tolist()) <= {0, 255} and 0 <= y.min() and y.max() <= classes
    torch.testing.assert_close(
        polygons(n + 3, size, classes, shapes, seed)[1][:n], y
    )  # image i does not depend on how many there are


def test_polygons_differ_between_images_seeds_and_splits():
    y = polygons(50, 32)[1]
    assert len(y.flatten(1).unique(dim=0)) == 50
    assert not torch.equal(y, polygons(50, 32, seed=1)[1])
    parts = [
        load("polygons", split, n=50, size=32).y.flatten(1) for split in ("train", "valid", "test")
    ]
    assert len(torch.cat(parts).unique(dim=0)) == 150


def test_each_class_has_its_number_of_corners():
    u = torch.rand(
        300, 1, 5 + 2 * 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    corners, number = pictures._corners(u, 100, classes=4)
    distinct = torch.tensor([len(c.unique(dim=0)) for c in corners[:, 0]])
    torch.testing.assert_close(distinct, number[:, 0, 0])
    assert number.unique().tolist() == [3, 4, 5, 6] and corners.min() >= 0 and corners.max() <= 100


def test_polygon_defaults():
    assert load("polygons").x.shape == (200, 1, 128, 128) and len(load("polygons", "test")) == 20
    assert load("polygons", n=5, size=16, classes=3).classes == (
        "background",
        "3 corners",
        "4 corners",
        "5 corners",
    )


@pytest.mark.parametrize(
    "bad", [dict(n=-1), dict(size=0), dict(classes=0), dict(shapes=0), dict(seed=-1)]
)
def test_polygons_refuse_nonsense(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        polygons(**bad)


def test_rasterising_agrees_with_pillow_away_from_the_outline():
    from PIL import ImageDraw

    u = torch.rand(20, 1, 21, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    corners = pictures._corners(u, 64, 1)[0][:, 0]
    for mine, outline in zip(pictures._inside(corners, 64), corners):
        image = Image.new("L", (64, 64))
        ImageDraw.Draw(image).polygon([tuple(p) for p in (outline - 0.5).tolist()], fill=1)
        length = (outline - outline.roll(-1, 0)).norm(dim=-1).sum()
        assert (torch.from_numpy(np.array(image)).bool() != mine).sum() <= length


# ---------------------------------------------------------------- noise and corruptions


def test_gaussian_noise_has_the_asked_strength_and_keeps_type():
    g = lambda: torch.Generator().manual_seed(0)
    x = torch.full((8, 3, 64, 64), 128, dtype=torch.uint8)
    assert abs(gaussian_noise(x, 2.0, None, g()).std() - 2) < 0.02
    torch.testing.assert_close(gaussian_noise(x, 2.0, None, g()), gaussian_noise(x, 2.0, None, g()))
    clipped = gaussian_noise(x, 2.0, "clip", g())
    assert clipped.min() == 0 and clipped.max() == 1
    channels = gaussian_noise(x, 1.0, None, g()) - 128 / 255
    assert abs((channels[:, 0] * channels[:, 1]).mean()) < 0.02  # channels have noise of their own
    for dtype in (torch.float64, torch.bfloat16):
        assert gaussian_noise(x.to(dtype) / 255, 0.1).dtype == dtype
    flat = torch.zeros(2, 1, 4, 4)
    assert gaussian_noise(flat, 0.0, "image").isfinite().all()  # nothing to scale by
    with pytest.raises(ValueError, match="rescale"):
        gaussian_noise(flat, 1.0, "minmax")
    with pytest.raises(ValueError, match="sigma"):
        gaussian_noise(flat, float("nan"))


def picture(channels=3, side=32, n=3):
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (n, channels, side, side), dtype=np.uint8)
    )


@pytest.mark.parametrize("kind", list(data.SEVERITIES))
@pytest.mark.parametrize("channels", [1, 3])
def test_corruptions_are_repeatable_and_leave_their_input_alone(kind, channels):
    x = picture(channels)
    kept = x.clone()
    out = corrupt(x, kind, 3, seed=1)
    assert out.shape == x.shape and out.dtype == torch.uint8 and not torch.equal(out, x)
    torch.testing.assert_close(corrupt(x, kind, 3, seed=1), out)
    torch.testing.assert_close(x, kept)
    assert torch.equal(corrupt(x, kind, 3, seed=2), out) != kind.endswith("noise")
    assert corrupt(x[:0], kind).shape == (0, channels, 32, 32)


def test_blur_is_scipys_gaussian():
    from scipy.ndimage import gaussian_filter

    x = picture()
    for severity, sigma in enumerate(data.SEVERITIES["gaussian_blur"], 1):
        expected = gaussian_filter(
            x.numpy().astype(np.float64), (0, 0, sigma, sigma), mode="nearest", truncate=4
        )
        assert (
            corrupt(x, "gaussian_blur", severity) - torch.from_numpy(expected).round()
        ).abs().max() <= 1


def test_defocus_is_a_filter_with_the_disk():
    from scipy.ndimage import correlate

    x = picture()
    for severity, level in enumerate(data.SEVERITIES["defocus_blur"], 1):
        disk = pictures._disk(*level)
        assert abs(disk.sum() - 1) < 1e-6
        expected = correlate(x.numpy().astype(np.float64), disk.numpy()[None, None], mode="mirror")
        assert (
            corrupt(x, "defocus_blur", severity) - torch.from_numpy(expected).round()
        ).abs().max() <= 1


@pytest.mark.parametrize("side", [32, 37])
def test_pixelate_and_jpeg_are_pillows(side):
    x = picture(side=side)
    for severity in range(1, 6):
        share, quality = (
            data.SEVERITIES["pixelate"][severity - 1],
            data.SEVERITIES["jpeg"][severity - 1],
        )
        coarse, jpeg = corrupt(x, "pixelate", severity), corrupt(x, "jpeg", severity)
        for i, image in enumerate(x):
            pil = Image.fromarray(image.permute(1, 2, 0).numpy())
            expected = pil.resize([int(side * share)] * 2, Image.Resampling.BOX).resize(
                (side, side), Image.Resampling.BOX
            )
            assert np.abs(np.asarray(expected, int) - coarse[i].permute(1, 2, 0).numpy()).max() <= 1
            decoded = np.array(
                Image.open(io.BytesIO(encoded_jpeg(pil, quality))).convert("RGB"), int
            )
            assert np.abs(decoded - jpeg[i].permute(1, 2, 0).numpy()).mean() < 2


def encoded_jpeg(image, quality):
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def test_contrast_and_brightness_by_hand():
    x = torch.tensor([[[[0, 200]], [[101, 101]], [[50, 150]]]], dtype=torch.uint8)
    assert corrupt(x, "contrast", 2)[0, 0, 0].tolist() == [
        50,
        150,
    ]  # half the distance from the mean, 100
    brighter = corrupt(x, "brightness", 5)[
        0, :, 0, 0
    ].tolist()  # (0, 101, 50): brightest 101 + 76.5, hue and saturation kept
    assert brighter[0] == 0 and brighter[1] in (177, 178) and brighter[2] == 88
    assert corrupt(
        torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "brightness", 5
    ).unique().tolist() == [76]


def test_noise_families_have_their_statistics():
    x = torch.full((20, 3, 64, 64), 128, dtype=torch.uint8)
    v = 128 / 255
    std = lambda kind: (corrupt(x, kind, 1).float() / 255).std().item()
    assert abs(std("gaussian_noise") - 0.04) < 0.002
    assert abs(std("shot_noise") - (v / 500) ** 0.5) < 0.002  # Poisson: the variance is the mean
    assert abs(std("speckle_noise") - 0.06 * v) < 0.002
    hit = corrupt(x, "impulse_noise", 5)
    assert (
        abs((hit == 255).float().mean() - 0.035) < 0.004
        and abs((hit == 0).float().mean() - 0.035) < 0.004
    )
    assert set(hit.unique().tolist()) == {0, 128, 255}


@pytest.mark.parametrize("severity", [0, 6, 2.5, "3"])
def test_severity_is_checked(severity):
    with pytest.raises(ValueError, match="severity"):
        corrupt(picture(), "jpeg", severity)


# ---------------------------------------------------------------- augmentation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_augmented_images_are_windows_of_the_padded_image(dtype):
    x = picture(n=40, side=9).to(dtype)
    out = augment(x, padding=2, generator=torch.Generator().manual_seed(0))
    assert out.dtype == dtype and out.shape == x.shape
    padded = torch.nn.functional.pad(x, [2] * 4)
    seen = set()
    for image, result in zip(padded, out):
        windows = {
            (top, left, turned): image[:, top : top + 9, left : left + 9].flip(-1)
            if turned
            else image[:, top : top + 9, left : left + 9]
            for top in range(5)
            for left in range(5)
            for turned in (False, True)
        }
        matching = [k for k, w in windows.items() if torch.equal(w, result)]
        assert len(matching) == 1
        seen |= set(matching)
    assert len(seen) > 15 and {t for *_, t in seen} == {True, False}  # drawn for each image


def test_augment_draws_from_its_generator_alone():
    x, g = picture(n=10), lambda: torch.Generator().manual_seed(5)
    state = torch.get_rng_state()
    torch.testing.assert_close(augment(x, generator=g()), augment(x, generator=g()))
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- sound


def wav(samples, rate=16000):
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="WAV", subtype="PCM_16")
    return out.getvalue()


def speech(words, rate, per_word=3):
    tone = lambda f: 0.5 * np.sin(2 * np.pi * f * np.arange(rate // 2) / rate)
    files = {
        f"{w}/s{i}_nohash_{i}.wav": wav(tone(300 + 20 * k + i), rate)
        for k, w in enumerate(words)
        for i in range(per_word)
    }
    files |= {
        "testing_list.txt": "\n".join(f"{w}/s0_nohash_0.wav" for w in words).encode(),
        "validation_list.txt": "\n".join(f"{w}/s1_nohash_1.wav" for w in words).encode(),
    }
    return files | {"_background_noise_/hum.wav": wav(tone(50), rate)}


def test_speech_commands_from_folder_and_archive(tmp_path, monkeypatch):
    files = speech(data.WORDS, 16000)
    write_tree(tmp_path / "a" / "SpeechCommands" / "speech_commands_v0.02", files)
    archive = write_tar(
        tmp_path / "b" / "speech_commands_v0.02.tar.gz", {f"./{k}": v for k, v in files.items()}
    )
    source = data.SOURCES["speechcommands"]
    monkeypatch.setitem(
        data.SOURCES,
        "speechcommands",
        sets.replace(
            source,
            fetch=lambda s, z: [
                ([], archive.name, "sha256:" + hashlib.sha256(archive.read_bytes()).hexdigest())
            ],
        ),
    )
    import torchaudio

    for split, subset in (("train", "training"), ("valid", "validation"), ("test", "testing")):
        a, b = (load("speechcommands", split, root=tmp_path / r, features="wave") for r in "ab")
        torch.testing.assert_close(a.x, b.x)
        oracle = torchaudio.datasets.SPEECHCOMMANDS(tmp_path / "a", subset=subset, download=False)
        assert sorted(oracle.get_metadata(i)[2] for i in range(len(oracle))) == [
            a.classes[i] for i in a.y
        ]
        assert (
            a.x.shape == (35, 1, 16000)
            and a.x.dtype == torch.int16
            and (a.x[..., 8000:] == 0).all()
        )  # silence after half a second
    mel = load("speechcommands", root=tmp_path / "a", n_mels=40)
    assert mel.x.shape == (35, 1, 40, 101) and mel[0][0].dtype == torch.float32
    assert load("speechcommands", root=tmp_path / "a", seconds=0.5).x.shape[-1] == 51


def test_ten_digits_are_not_passed_off_as_35_words_nor_the_reverse(tmp_path):
    for words, kind, other in (
        (data.DIGITS, "a", "speechcommands"),
        (data.WORDS, "b", "spoken-digits"),
    ):
        write_tree(
            tmp_path / kind / "SpeechCommands" / "speech_commands_v0.02", speech(words, 8000)
        )
        with pytest.raises((RuntimeError, FileNotFoundError)) as e:
            load(other, root=tmp_path / kind, download=False)
    assert (
        "35 words" in str(e.value)
        and "10 words" in str(e.value)
        and "spoken-digits" in str(e.value)
    )


def test_sound_at_8_khz_is_resampled(tmp_path):
    write_tree(tmp_path / "SpeechCommands" / "speech_commands_v0.02", speech(data.DIGITS, 8000))
    d = load("spoken-digits", root=tmp_path, features="wave")
    assert d.x.shape == (10, 1, 16000)
    spectrum = torch.fft.rfft(d[:][0][:, 0, :8000]).abs()  # half a second of tone: bins of 2 Hz
    torch.testing.assert_close(
        spectrum.argmax(1) * 2.0,
        torch.tensor([300.0 + 20 * k + 2 for k in range(10)]),
        atol=2,
        rtol=0,
    )
    mel = load("spoken-digits", root=tmp_path)
    assert mel.x[:, 0, 56:].float().amax() < mel.x.float().amax() - 40  # nothing above 4 kHz


def test_speech_arguments_are_checked():
    with pytest.raises(ValueError, match="no size in pixels"):
        load("spoken-digits-sample", size=32)
    with pytest.raises(ValueError, match="features"):
        load("spoken-digits-sample", features="mfcc")


def test_a_damaged_clip_is_named(tmp_path):
    files = speech(data.DIGITS, 8000) | {"two/s2_nohash_2.wav": b"RIFF no sound"}
    write_tree(tmp_path / "SpeechCommands" / "speech_commands_v0.02", files)
    with pytest.raises(RuntimeError, match="two/s2_nohash_2.wav.*damaged"):
        load("spoken-digits", root=tmp_path)


# ---------------------------------------------------------------- photos in files


def test_a_photo_folder_is_imagefolder_with_batches(tmp_path):
    from torchvision.datasets import ImageFolder

    write_tree(tmp_path, photos("train", 8, side=12))
    d = PhotoFolder(tmp_path / "train", size=12)
    oracle = ImageFolder(tmp_path / "train")
    x, y = next(iter(DataLoader(d, batch_size=8, collate_fn=d.collate)))
    torch.testing.assert_close(
        x, torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i, _ in oracle]) / 255
    )
    assert y.tolist() == oracle.targets
    rest, part = d.split_off(0.5)
    assert {*rest.files} | {*part.files} == {*d.files} and not {*rest.files} & {*part.files}
    torch.testing.assert_close(d[3][0], x[3])
    assert PhotoFolder(tmp_path / "train", transform=lambda image: image[:, :5, :5])[0][
        0
    ].shape == (3, 5, 5)


def test_imagenet_must_have_its_thousand_folders(tmp_path):
    write_tree(tmp_path / "imagenet", photos("train"))
    with pytest.raises(RuntimeError, match="2 classes, expected 1000"):
        load("imagenet", root=tmp_path)


@pytest.mark.parametrize("layout", [".", "imagenet", "ILSVRC/Data/CLS-LOC"])
def test_imagenet_with_a_thousand_folders(tmp_path, layout):
    image = encoded(np.full((30, 40, 3), 90, np.uint8))
    write_tree(
        tmp_path / layout / "val", {f"n{i:08}/a.JPEG": image for i in [*range(999), 1440764]}
    )
    d = load("imagenet", "test", root=tmp_path, size=8)
    assert len(d) == 1000 and d.classes[0] == "tench" and d.split == "test"
    x, y = d.__getitems__([0, 999])
    torch.testing.assert_close(x, torch.full((2, 3, 8, 8), 90 / 255))
    assert y.tolist() == [0, 999]


# ---------------------------------------------------------------- the command


def test_the_command_lists_gets_and_fails_in_one_line(root, capsys):
    assert cli(["--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert all(n in out for n in names()) and str(root) in next(
        line for line in out.splitlines() if line.startswith("cifar10-jpeg")
    )
    assert cli(["--root", str(root), "cifar10-jpeg", "digits"]) == 0
    assert "cifar10-jpeg test: 6" in capsys.readouterr().out
    for wrong in (["nope"], ["--root", str(root / "nope")], ["--root", str(root), "nuclei"]):
        assert cli(wrong) == 1
        err = capsys.readouterr().err
        assert err.startswith("feedback_nb_data: ") and err.count("\n") == 1


def test_the_command_tells_its_version():
    import feedback_nb

    done = subprocess.run(
        [sys.executable, "-c", "from feedback_nb.data import cli; cli(['--version'])"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == f"feedback_nb {feedback_nb.__version__}"


def test_the_catalogue_says_where_each_set_is(root):
    rows = {r["name"]: r for r in catalogue(root)}
    assert (
        rows["cifar10-jpeg"]["where"] == str(root)
        and rows["digits"]["where"] == "always"
        and rows["cifar10"]["where"] == "to download"
        and rows["nuclei"]["where"] == "not here"
    )
    assert all(r["licence"] for r in rows.values())


# ---------------------------------------------------------------- the real sets


@full
def test_the_real_sets_have_the_published_counts(monkeypatch):
    monkeypatch.setenv("FEEDBACK_NB_DATA", FULL)
    before = {str(p): p.stat().st_mtime_ns for p in Path(FULL).rglob("*")}
    get = lambda *a, **k: load(*a, download=False, **k)
    assert get("mnist").y.bincount().tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert get("mnist", "test").y.bincount().tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    for name, counts in (
        ("fashion-mnist", (6000, 1000)),
        ("cifar10-jpeg", (5000, 1000)),
        ("imagenette-128", (400, 100)),
    ):
        for split, n in zip(("train", "test"), counts):
            assert get(name, split).y.bincount().tolist() == [n] * 10, name
    assert get("cifar10-jpeg").classes == (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    sample = get("imagenet-sample", "test", size=32)
    from torchvision.models import AlexNet_Weights

    assert sample.y.tolist() == list(range(1000))
    assert (
        sum(
            a == b for a, b in zip(sample.classes, AlexNet_Weights.IMAGENET1K_V1.meta["categories"])
        )
        > 900
    )
    nuclei = get("nuclei"), get("nuclei", "test")
    assert [len(d) for d in nuclei] == [497, 90]
    for split, n in (("train", 240), ("valid", 30), ("test", 30)):
        assert get("spoken-digits", split).y.bincount().tolist() == [n] * 10
    with pytest.raises(FileNotFoundError):
        get("speechcommands")
    assert {str(p): p.stat().st_mtime_ns for p in Path(FULL).rglob("*")} == before


@full
def test_real_jpegs_decode_as_pillow_decodes_them():
    d = load("cifar10-jpeg", "test", root=FULL)
    with tarfile.open(Path(FULL) / "cifar10-jpeg" / "test.tar.gz") as tar:
        members = sorted((m for m in tar if m.isfile()), key=lambda m: m.name)
        for i in range(0, 10000, 997):
            expected = np.array(Image.open(tar.extractfile(members[i])).convert("RGB"))
            torch.testing.assert_close(d.x[i], torch.from_numpy(expected).permute(2, 0, 1))
            assert d.classes[d.y[i]] == members[i].name.split("/")[1]
