"""Photos in folders and shards: numbers, damage, kills, and every photo once."""
import csv
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from processes import torchrun
from torchvision.io import encode_jpeg

from feedback_nb.order import batches
from feedback_nb.shards import (
    WNIDS,
    PackedPhotos,
    PhotoTree,
    class_folders,
    decoded,
    mixing,
    pack,
    view,
    windowed,
)

SAMPLE = Path(os.environ.get("FEEDBACK_NB_DATA") or "/nowhere") / "imagenet-sample"


def make_folder(root, classes, photos=5, size=24):
    chance = torch.Generator().manual_seed(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(photos):
            image = torch.randint(0, 256, (3, size, size + i), generator=chance).to(torch.uint8)
            (root / name / f"{name}_{i}.JPEG").write_bytes(bytes(encode_jpeg(image).numpy()))
    return root


def corner(image):
    return image[:, :16, :16].float()


@pytest.fixture
def tree(tmp_path):
    return PhotoTree(make_folder(tmp_path / "train", ["ant", "bee", "cat"]), 3, transform=corner)


# ------------------------------------------------------------------ class numbers

def test_the_class_numbers_are_imagenets():
    assert len(WNIDS) == 1000 and WNIDS == sorted(set(WNIDS))
    known = {"n01440764": 0, "n02102040": 217, "n03888257": 701, "n15075141": 999}
    assert {name: WNIDS.index(name) for name in known} == known


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs FEEDBACK_NB_DATA with imagenet-sample")
def test_the_class_numbers_agree_with_the_table_of_the_sample():
    rows = list(csv.DictReader((SAMPLE / "classes.csv").open()))
    assert [row["wnid"] for row in rows] == WNIDS
    photos = PhotoTree(SAMPLE)
    assert photos.y.tolist() == list(range(1000))


@pytest.mark.parametrize("missing", [0, 499, 999])
def test_a_missing_class_folder_is_named(tmp_path, missing):
    for name in WNIDS[:missing] + WNIDS[missing + 1:]:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=WNIDS[missing]):
        class_folders(tmp_path)
    with pytest.raises(ValueError, match=WNIDS[missing]):
        PhotoTree(tmp_path)


def test_a_folder_that_does_not_belong_is_named_and_system_folders_are_left_out(tmp_path):
    for name in ["ant", "bee", "__MACOSX", ".ipynb_checkpoints", "@eaDir", "_old"]:
        (tmp_path / name).mkdir()
    assert class_folders(tmp_path, 2) == ["ant", "bee"]
    with pytest.raises(ValueError, match="3.*2|2.*3"):
        class_folders(tmp_path, 3)
    for name in WNIDS:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="ant"):
        class_folders(tmp_path)


def test_an_empty_class_folder_and_a_missing_split_are_named(tmp_path):
    make_folder(tmp_path / "train", ["ant", "bee"])
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="cat"):
        PhotoTree(tmp_path / "train", 3)
    with pytest.raises(FileNotFoundError, match="val"):
        PhotoTree(tmp_path / "val", 3)


# ------------------------------------------------------------------ damage

DAMAGE = {"truncated": lambda data: data[: len(data) // 2], "empty": lambda data: b"",
          "noise": lambda data: b"\xff\xd8\xff" + bytes(200), "text": lambda data: b"<html>"}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_photo_is_named_or_skipped_and_counted(tree, kind):
    path = tree.root / tree.files[6]
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    with pytest.raises(RuntimeError, match="bee_1.JPEG"):
        tree.__getitems__([5, 6, 7])
    lenient = PhotoTree(tree.root, 3, transform=corner, corrupt="skip")
    x, y = lenient.__getitems__([4, 5, 6, 7])
    assert x.shape == (3, 3, 16, 16) and y.tolist() == [0, 1, 1]
    lenient.__getitems__([6, 8])  # met again: counted once
    assert lenient.skipped() == [str(path)]
    with pytest.raises(RuntimeError, match="bee_1.JPEG"):
        lenient.__getitems__([6])  # nothing is left of this batch


def test_readers_in_other_processes_count_in_the_same_place(tree):
    (tree.root / tree.files[6]).write_bytes(b"nothing")
    lenient = PhotoTree(tree.root, 3, transform=corner, corrupt="skip")
    loader = torch.utils.data.DataLoader(
        lenient, batch_size=5, num_workers=2, collate_fn=lambda batch: batch)
    assert sum(len(y) for _, y in loader) == 14
    assert len(lenient.skipped()) == 1


def test_what_is_no_plain_jpeg_goes_to_pillow(tmp_path):
    from PIL import Image

    for mode, suffix in (("CMYK", "jpeg"), ("RGBA", "png"), ("L", "jpeg")):
        Image.new(mode, (20, 10)).save(tmp_path / f"{mode}.{suffix}")
        image, = decoded([(tmp_path / f"{mode}.{suffix}").read_bytes()])
        assert image.shape == (3, 10, 20) and image.dtype == torch.uint8


# ------------------------------------------------------------------ packed

def test_packed_photos_are_the_same_photos_and_open_as_webdataset(tree, tmp_path):
    index = pack(tree, tmp_path / "packed", per_shard=4)
    packed = PackedPhotos(index.parent, 3, transform=corner)
    here = Counter((tree.read(i), int(tree.y[i])) for i in range(15))
    assert here == Counter((packed.read(i), int(packed.y[i])) for i in range(15))
    webdataset = pytest.importorskip("webdataset")
    shards = sorted(map(str, index.parent.glob("*.tar")))
    streamed = webdataset.WebDataset(shards, shardshuffle=False)
    assert here == Counter((sample["jpg"], int(sample["cls"])) for sample in streamed)


def test_a_killed_pack_goes_on_and_writes_no_shard_twice(tree, tmp_path):
    whole = pack(tree, tmp_path / "whole", per_shard=2)
    script = (
        "import os, sys; from feedback_nb.shards import PhotoTree, pack\n"
        f"tree = PhotoTree({str(tree.root)!r}, 3)\n"
        "stop = lambda done, of: os._exit(9) if done == int(sys.argv[1]) else None\n"
        f"pack(tree, {str(tmp_path / 'cut')!r}, per_shard=2, report=stop)")
    times = []
    for stop in (1, 3, 7):
        done = subprocess.run([sys.executable, "-c", script, str(stop)])
        assert done.returncode == 9 and not (tmp_path / "cut" / "index.json").exists()
        times.append((tmp_path / "cut" / "shard-00000.tar").stat().st_mtime_ns)
    assert len(set(times)) == 1
    (tmp_path / "cut" / ".shard-00007.tar.123.tmp").mkdir()  # what a kill inside leaves
    index = pack(tree, tmp_path / "cut", per_shard=2)
    assert json.loads(index.read_text()) == json.loads(whole.read_text())
    assert not list(index.parent.glob(".*.tmp"))


def test_two_calls_of_pack_at_once_do_not_take_each_others_files_away(tree, tmp_path):
    folder, second = tmp_path / "packed", []

    class Slow(PhotoTree):
        def read(self, i):
            if not second:  # the first call is in the middle of its first shard
                second.append(pool.submit(pack, tree, folder, per_shard=4))
                time.sleep(0.5)
            return super().read(i)

    with ThreadPoolExecutor(1) as pool:
        index = pack(Slow(tree.root, 3), folder, per_shard=4)
        assert second[0].result() == index
    assert len(PackedPhotos(folder, 3)) == 15


def test_pack_refuses_shards_of_something_else_and_names_damage(tree, tmp_path):
    pack(tree, tmp_path / "packed", per_shard=4)
    with pytest.raises(ValueError, match="packed"):
        pack(tree, tmp_path / "packed", per_shard=5)
    (tree.root / tree.files[0]).write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="ant_0.JPEG"):
        pack(tree, tmp_path / "other")
    lenient = PhotoTree(tree.root, 3, corrupt="skip")
    index = pack(lenient, tmp_path / "lenient", per_shard=4)
    assert json.loads(index.read_text())["skipped"] == [tree.files[0]] == ["ant/ant_0.JPEG"]
    assert len(PackedPhotos(index.parent, 3)) == 14


def test_shards_that_are_cut_or_missing_or_of_other_classes_are_refused(tree, tmp_path):
    folder = pack(tree, tmp_path / "packed", per_shard=4).parent
    with pytest.raises(ValueError, match="1000"):
        PackedPhotos(folder)
    shard = folder / "shard-00001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(ValueError, match="shard-00001"):
        PackedPhotos(folder, 3)
    shard.unlink()
    with pytest.raises(ValueError, match="shard-00001"):
        PackedPhotos(folder, 3)


@pytest.mark.parametrize("text", ["", "[]", '{"chunks": [], "config": {}}'])
def test_an_index_of_another_tool_is_refused(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json"):
        PackedPhotos(tmp_path, 3)


def test_a_full_disk_leaves_no_half_shard(tree, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OSError, match="No space"):
        pack(tree, tmp_path / "packed")
    assert {p.name for p in (tmp_path / "packed").iterdir()} - {".lock"} == {"plan.json"}
    monkeypatch.undo()
    assert len(PackedPhotos(pack(tree, tmp_path / "packed").parent, 3)) == 15


def test_a_cache_holds_whole_shards(tree, tmp_path):
    folder = pack(tree, tmp_path / "packed", per_shard=4).parent
    packed = PackedPhotos(folder, 3, cache=tmp_path / "fast", transform=corner)
    packed.__getitems__([0, 1])
    assert [p.name[-15:] for p in (tmp_path / "fast").glob("*.tar")] == ["shard-00000.tar"]
    for shard in folder.glob("*00000.tar"):
        shard.unlink()
    assert packed.__getitems__([0, 1])[0].shape == (2, 3, 16, 16)


def test_train_and_val_share_a_cache_and_each_finds_its_own_photos(tmp_path):
    for seed, split in enumerate(("train", "val")):  # both have a shard-00000.tar
        tree = PhotoTree(make_folder(tmp_path / split, ["ant", "bee"], photos=3 + seed), 2)
        folder = pack(tree, tmp_path / "packed" / split).parent
        packed = PackedPhotos(folder, 2, cache=tmp_path / "fast")
        assert Counter(map(packed.read, range(len(tree)))) == Counter(
            map(tree.read, range(len(tree))))


def test_a_window_mixes_few_shards_and_loses_nothing():
    shard = torch.arange(10).repeat_interleave(20)
    order = windowed(shard, 2, "key")
    assert sorted(order) == list(range(200)) and order == windowed(shard, 2, "key")
    assert order != windowed(shard, 2, "other")
    open_at = [len(set(shard[order[k : k + 40]].tolist())) for k in range(0, 200, 40)]
    assert open_at == [2] * 5


def test_a_run_on_packed_photos_reads_them_window_by_window(tree, tmp_path):
    folder = pack(tree, tmp_path / "packed", per_shard=1).parent
    packed = PackedPhotos(folder, 3, window=3, transform=corner)
    read = [i for indices, _, _ in batches(packed, 4, seed=0, epoch=1) for i in indices]
    assert read == packed.order(0, 1) and sorted(read) == list(range(15))


@pytest.mark.parametrize("suffix", ["webp", "bmp", "tif"])
def test_a_photo_that_imagefolder_would_find_is_found(tree, suffix):
    from PIL import Image

    Image.new("RGB", (24, 24)).save(tree.root / "bee" / f"new.{suffix}")
    found = PhotoTree(tree.root, 3, transform=corner)
    assert len(found) == 16 and found[found.files.index(f"bee/new.{suffix}")][1] == 1


# ------------------------------------------------------------------ what a network sees

@pytest.mark.parametrize("augment", [None, "crop", "ra", "ta_wide"])
def test_views_have_one_size_and_repeat_with_the_seed(tree, augment):
    photo, = decoded([tree.read(4)])
    look = view(16, augment, resize=18, erase=0.5 if augment else 0)
    seen = []
    for _ in range(2):
        torch.manual_seed(1)
        seen.append(look(photo))
    assert seen[0].shape == (3, 16, 16) and seen[0].dtype == torch.float32
    torch.testing.assert_close(*seen, atol=0, rtol=0)


@pytest.mark.parametrize("augment", ["ra", "ta_wide"])
def test_augmented_photos_are_interpolated_as_in_torchvisions_recipes(augment):
    assert view(16, augment).transforms[2].interpolation.value == "bilinear"


def test_mixed_labels_are_distributions():
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 3
    torch.manual_seed(0)
    _, mixed = mixing(3, mixup=0.2, cutmix=1)(x, y)
    assert mixed.shape == (6, 3)
    torch.testing.assert_close(mixed.sum(1), torch.ones(6))
    assert mixing(3) is None


# ------------------------------------------------------------------ every photo once

COUNT = """
import json, os, sys
from torch import distributed
from feedback_nb.shards import PackedPhotos, PhotoTree
from feedback_nb.training import batches
kind, root, classes, workers, batch = sys.argv[1:]
small = lambda image: image[:, :16, :16].float()
photos = {"tree": PhotoTree, "packed": PackedPhotos}[kind](root, int(classes), transform=small)
distributed.init_process_group("gloo")
rank, world = distributed.get_rank(), distributed.get_world_size()
mine = []
for indices, share, (x, y) in batches(photos, int(batch), seed=3, epoch=1, rank=rank, world=world,
                                      workers=int(workers)):
    assert y.tolist() == photos.y[indices].tolist() and len(x) == len(indices)
    mine += indices if share else []
parts = [None] * world
distributed.all_gather_object(parts, mine)
if rank == 0:
    print(json.dumps(parts))
distributed.barrier()  # nobody leaves while another still hears from it
distributed.destroy_process_group()
"""


def count(world, *args):
    done = torchrun("--no-python", sys.executable, "-c", COUNT, *args, world=world,
                    env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("world,workers,kind", [(1, 2, "tree"), (2, 0, "packed"), (3, 1, "tree")])
def test_every_photo_comes_once_on_any_number_of_processes(tree, tmp_path, world, workers, kind):
    root = tree.root
    if kind == "packed":
        root = pack(tree, tmp_path / "packed", per_shard=4).parent
    parts = count(world, kind, root, 3, workers, 4)  # 15 photos: batches of 4, 4, 4 and 3
    assert len(parts) == world
    assert sorted(i for part in parts for i in part) == list(range(15))


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs FEEDBACK_NB_DATA with imagenet-sample")
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_photo_of_the_sample_comes_once(world):
    parts = count(world, "tree", SAMPLE, 1000, 1, 64)
    assert sorted(i for part in parts for i in part) == list(range(1000))
    assert max(map(len, parts)) - min(map(len, parts)) <= 16  # one for each batch at most
