"""What files of strangers may hold: each fault is refused by name, or read as it was meant."""
import gzip
import hashlib
import io
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_tar
from PIL import Image

from feedback_nb.data import DIGITS, PhotoFolder, load


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Each test has an empty cache of its own and no data root."""
    monkeypatch.setenv("FEEDBACK_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEEDBACK_NB_DATA", raising=False)


def png(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def grey(value=9, side=8):
    return png(np.full((side, side), value, np.uint8))


def photos(split, classes, n=2):
    return {f"{split}/{c}/{i}.png": grey(10 * i + len(c)) for c in classes for i in range(n)}


def write_tree(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


# ---------------------------------------------------------------- classes are those of all splits

@pytest.mark.parametrize("kinds", ["folders", "archives", "mixed"])
def test_a_class_has_one_number_in_all_splits(tmp_path, kinds):
    root = tmp_path / "cifar10-jpeg"
    for split, classes in (("train", ["ant", "bee", "cat"]), ("test", ["ant", "cat"])):
        if kinds == "archives" or kinds == "mixed" and split == "train":
            write_tar(root / f"{split}.tar.gz", photos(split, classes))
        else:
            write_tree(root, photos(split, classes))
    train, test = (load("cifar10-jpeg", split, root=tmp_path) for split in ("train", "test"))
    assert train.classes == test.classes == ("ant", "bee", "cat")
    assert train.y.tolist() == [0, 0, 1, 1, 2, 2] and test.y.tolist() == [0, 0, 2, 2]


def test_a_new_class_of_another_split_is_noticed_by_the_cache(tmp_path):
    write_tree(tmp_path / "cifar10-jpeg", photos("test", ["bee", "cat"]))
    assert load("cifar10-jpeg", "test", root=tmp_path).y.tolist() == [0, 0, 1, 1]
    write_tree(tmp_path / "cifar10-jpeg", photos("train", ["ant", "bee", "cat"]))
    assert load("cifar10-jpeg", "test", root=tmp_path).y.tolist() == [1, 1, 2, 2]


def test_one_archive_with_both_splits(tmp_path, monkeypatch):
    from feedback_nb import sets
    files = photos("x/train", ["ant", "bee", "cat"]) | photos("x/val", ["cat"])
    path = write_tar(tmp_path / "imagenette2-160.tgz", files)
    monkeypatch.setitem(sets._IMAGENETTE, "-160", hashlib.md5(path.read_bytes()).hexdigest())
    test = load("imagenette", "test", root=tmp_path, size=8)
    assert test.y.tolist() == [2, 2] and test.classes == ("ant", "bee", "cat")


def test_a_photo_folder_takes_the_classes_of_another(tmp_path):
    write_tree(tmp_path, photos("train", ["ant", "bee", "cat"]) | photos("test", ["ant", "cat"]))
    train = PhotoFolder(tmp_path / "train", size=8)
    test = PhotoFolder(tmp_path / "test", size=8, classes=train.classes)
    assert test.y.tolist() == [0, 0, 2, 2] and test.classes == ("ant", "bee", "cat")
    with pytest.raises(RuntimeError, match="2 classes, expected 3"):
        PhotoFolder(tmp_path / "test", classes=["Ameise", "Biene", "Katze"])
    with pytest.raises(RuntimeError, match="no images"):
        PhotoFolder(write_tree(tmp_path / "empty", {"a.txt": b""}))


LEFT = [".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/ant/._0.png", "@eaDir/ant/0.png",
        "ant/.ipynb_checkpoints/0-checkpoint.png", "ant/._0.png", ".DS_Store/0.png"]


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_what_a_system_leaves_behind_is_no_class_and_no_photo(tmp_path, left, kind):
    files = photos("train", ["ant", "bee"]) | {f"train/{left}": grey()}
    if kind == "folder":
        write_tree(tmp_path / "cifar10-jpeg", files)
        seen = PhotoFolder(tmp_path / "cifar10-jpeg" / "train")
        assert seen.classes == ("ant", "bee") and len(seen) == 4
    else:
        write_tar(tmp_path / "cifar10-jpeg" / "train.tar.gz", files)
    data = load("cifar10-jpeg", root=tmp_path)
    assert data.classes == ("ant", "bee") and data.y.tolist() == [0, 0, 1, 1]


def test_a_root_below_a_hidden_folder_is_read(tmp_path):
    write_tree(tmp_path / ".data" / "cifar10-jpeg", photos("train", ["ant"]))
    assert len(load("cifar10-jpeg", root=tmp_path / ".data")) == 2


def test_a_stray_image_is_named(tmp_path):
    files = photos("train", ["ant"])
    write_tree(tmp_path / "a" / "cifar10-jpeg", files | {"train/stray.png": grey()})
    write_tree(tmp_path / "b" / "imagenet-sample", {"n1/a.png": grey(), "stray.png": grey()})
    write_tree(tmp_path / "c" / "nuclei", {"train/stray.png": grey()})
    write_tar(tmp_path / "d" / "cifar10-jpeg" / "train.tar.gz", files | {"train/stray.png": grey()})
    for root, name, split in (("a", "cifar10-jpeg", "train"), ("b", "imagenet-sample", "test"),
                              ("c", "nuclei", "train"), ("d", "cifar10-jpeg", "train")):
        with pytest.raises(RuntimeError, match="stray.png"):
            load(name, split, root=tmp_path / root)


@pytest.mark.parametrize("table", [b"index,synset,title\n0,n1,ant\n", b"wnid,name\nn1\n",
                                   "wnid,name\nn1,Ameisenbär\n".encode("latin-1")])
def test_a_table_of_classes_that_cannot_be_read_is_named(tmp_path, table):
    write_tree(tmp_path / "imagenet-sample", {"n1/a.png": grey(), "classes.csv": table})
    with pytest.raises(RuntimeError, match="classes.csv"):
        load("imagenet-sample", "test", root=tmp_path)


def test_a_table_of_classes_that_changed_is_noticed(tmp_path):
    for name in ("ant", "bee"):
        table = f"wnid,name\nn1,{name}\n".encode()
        write_tree(tmp_path / "imagenet-sample", {"n1/a.png": grey(), "classes.csv": table})
        assert load("imagenet-sample", "test", root=tmp_path).classes == (name,)


# ---------------------------------------------------------------- pictures

def test_pictures_of_sixteen_bits_are_scaled_to_eight(tmp_path):
    deep = np.array([[0, 257, 30000, 65535]] * 4, np.uint16)
    write_tree(tmp_path / "cifar10-jpeg", {"train/a/0.png": png(deep),
                                           "train/a/1.png": png(np.full((4, 4), 117, np.uint8))})
    data = load("cifar10-jpeg", root=tmp_path)
    assert data.x.dtype == torch.uint8
    assert data.x[0, :, 0].tolist() == [[0, 1, 117, 255]] * 3  # 30000 / 257 = 116.7
    x, _ = data[0]
    assert x.max() == 1
    folder = PhotoFolder(tmp_path / "cifar10-jpeg" / "train", size=4)
    torch.testing.assert_close(folder[0][0], x)


def test_a_picture_of_900_million_pixels_is_refused_before_it_is_decoded(tmp_path):
    import resource
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bomb = png(np.zeros((30000, 30000), np.uint8), compress_level=1)
    assert len(bomb) < 8_000_000
    write_tree(tmp_path / "cifar10-jpeg", {"train/a/bomb.png": bomb})
    del bomb
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RuntimeError, match="bomb.png.*too large"):
        load("cifar10-jpeg", root=tmp_path, size=32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


def test_a_member_of_an_archive_may_not_be_huge(tmp_path):
    path = tmp_path / "cifar10-jpeg" / "train.tar.gz"
    write_tar(path, photos("train", ["ant"]))
    member = tarfile.TarInfo("train/ant/huge.png")
    member.size = 1 << 40
    path.write_bytes(gzip.compress(member.tobuf() + b"\0" * 10240))
    with pytest.raises(RuntimeError, match="huge.png"):
        load("cifar10-jpeg", root=tmp_path)


def nuclei(tmp_path, image, mask):
    files = {"images/a.png": png(image), "masks/a.png": png(mask)}
    write_tree(tmp_path / "nuclei" / "train", files)
    return load("nuclei", root=tmp_path, size=8)


def test_image_and_mask_must_have_one_shape(tmp_path):
    with pytest.raises(RuntimeError, match="a.png.*20 x 30.*30 x 20"):
        nuclei(tmp_path, np.zeros((20, 30), np.uint8), np.zeros((30, 20), np.uint8))


@pytest.mark.parametrize("white", [1, 2, 127, 255, 65535])
def test_a_mask_is_what_is_not_black(tmp_path, white):
    mask = np.zeros((8, 8), np.uint8 if white < 256 else np.uint16)
    mask[2:4, 5] = white
    data = nuclei(tmp_path, np.full((8, 8), 50, np.uint8), mask)
    torch.testing.assert_close(data.y[0], torch.from_numpy(mask > 0).long())


def test_a_red_mask_is_a_mask(tmp_path):
    mask = np.zeros((8, 8, 3), np.uint8)
    mask[2:4, 5, 0] = 255
    assert nuclei(tmp_path, np.zeros((8, 8), np.uint8), mask).y.sum() == 2


def test_a_mask_with_many_values_is_refused(tmp_path):
    mask = np.arange(64, dtype=np.uint8).reshape(8, 8)  # one number for each nucleus
    with pytest.raises(RuntimeError, match="a.png.*64 values"):
        nuclei(tmp_path, np.zeros((8, 8), np.uint8), mask)


# ---------------------------------------------------------------- sums and archives

STYLES = {
    "gnu": "{sum}  {name}\n", "binary": "{sum} *{name}\n", "bsd": "SHA256 ({name}) = {sum}\n",
    "capitals": "{SUM}  {name}\n", "mark": "\ufeff{sum}  {name}\n", "dot": "{sum}  ./{name}\n",
    "windows": "{sum}  {name}\r\n", "comment": "# sums\n\n{sum}  {name}\n",
}


@pytest.mark.parametrize("style", STYLES)
def test_sums_are_read_in_every_style(tmp_path, style):
    name = "cifar10-jpeg/train.tar.gz"
    path = write_tar(tmp_path / name, photos("train", ["ant"]))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    table = STYLES[style].format(sum=digest, SUM=digest.upper(), name=name)
    (tmp_path / "SHA256SUMS").write_bytes(table.encode())
    assert len(load("cifar10-jpeg", root=tmp_path)) == 2
    write_tar(path, photos("train", ["bee"]))
    with pytest.raises(RuntimeError, match="train.tar.gz.*sha256"):
        load("cifar10-jpeg", root=tmp_path)


@pytest.mark.parametrize("table", [b"abc  cifar10-jpeg/train.tar.gz\n", b"what is this?\n",
                                   "é  name\n".encode("latin-1")])
def test_sums_that_cannot_be_read_are_refused(tmp_path, table):
    write_tar(tmp_path / "cifar10-jpeg/train.tar.gz", photos("train", ["ant"]))
    (tmp_path / "SHA256SUMS").write_bytes(table)
    with pytest.raises(RuntimeError, match="SHA256SUMS"):
        load("cifar10-jpeg", root=tmp_path)


def test_a_file_that_is_listed_and_missing_is_named(tmp_path):
    write_tree(tmp_path / "cifar10-jpeg", photos("train", ["ant"]))
    name = "cifar10-jpeg/train/ant/7.png"
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n{'0' * 64}  mnist/other\n")
    with pytest.raises(RuntimeError, match="7.png"):
        load("cifar10-jpeg", root=tmp_path)


def test_one_flipped_bit_in_a_packed_archive_never_alters_a_picture(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    bmp = io.BytesIO()  # stored, not deflated: nothing of its own would notice
    Image.fromarray(noise).save(bmp, "PNG", compress_level=0)
    path = tmp_path / "cifar10-jpeg" / "train.tar.gz"
    whole = bytearray(write_tar(path, {"train/a/0.png": bmp.getvalue()}).read_bytes())
    good = load("cifar10-jpeg", root=tmp_path).x
    refused = 0
    for at in range(10, len(whole)):
        whole[at] ^= 1 << at % 8
        path.write_bytes(whole)
        whole[at] ^= 1 << at % 8
        try:
            torch.testing.assert_close(load("cifar10-jpeg", root=tmp_path).x, good)
        except RuntimeError:
            refused += 1
    assert refused > 0.9 * (len(whole) - 10)


def test_the_sum_at_the_end_of_a_packed_archive_is_read(tmp_path):
    path = write_tar(tmp_path / "cifar10-jpeg" / "train.tar.gz", photos("train", ["ant"]))
    whole = bytearray(path.read_bytes())
    whole[-8] ^= 1  # of the checksum itself
    path.write_bytes(whole)
    with pytest.raises(RuntimeError, match="train.tar.gz"):
        load("cifar10-jpeg", root=tmp_path)


# ---------------------------------------------------------------- lists of clips

def speech(tmp_path, testing, validation, extra=()):
    import soundfile
    sound = io.BytesIO()
    soundfile.write(sound, np.zeros(800, np.int16), 8000, format="WAV")
    files = {f"{w}/{who}_nohash_0.wav": sound.getvalue() for w in DIGITS for who in "abc"}
    files |= {"testing_list.txt": testing, "validation_list.txt": validation}
    files |= {name: sound.getvalue() for name in extra}
    base = "SpeechCommands/speech_commands_v0.02"
    write_tar(tmp_path / "SpeechCommands.tar.gz", {f"{base}/{k}": v for k, v in files.items()})
    return lambda split: load("spoken-digits", split, root=tmp_path, features="wave", seconds=0.1)


def listed(who):
    return "".join(f"{w}/{who}_nohash_0.wav\n" for w in DIGITS).encode()


@pytest.mark.parametrize("change", [bytes.upper, lambda t: t.replace(b"_0.wav", b"_1.wav"),
                                    lambda t: t.replace(b".wav", b""), lambda t: t + b"zero/z.wav"])
def test_a_listed_clip_that_is_missing_is_refused_in_every_split(tmp_path, change):
    get = speech(tmp_path, change(listed("a")), listed("b"))
    for split in ("train", "valid", "test"):
        with pytest.raises(RuntimeError, match="list"):
            get(split)


def test_lists_that_overlap_are_refused(tmp_path):
    get = speech(tmp_path, listed("a"), listed("b") + b"six/a_nohash_0.wav\n")
    with pytest.raises(RuntimeError, match="six/a_nohash_0.wav"):
        get("valid")


def test_lists_with_blank_lines_marks_and_carriage_returns_are_read(tmp_path):
    get = speech(tmp_path, b"\xef\xbb\xbf" + listed("a").replace(b"\n", b"\r\n") + b"\n\n", b"")
    assert [len(get(split)) for split in ("train", "test")] == [20, 10]


def test_a_list_that_is_not_utf_8_is_named(tmp_path):
    get = speech(tmp_path, listed("a"), "zéro/b_nohash_0.wav".encode("latin-1"))
    with pytest.raises(RuntimeError, match="validation_list.txt"):
        get("train")


def test_clips_that_a_system_left_behind_are_passed_over(tmp_path):
    extra = ("@eaDir/six/a_nohash_0.wav", "six/._a_nohash_0.wav", "__MACOSX/six/a_nohash_0.wav")
    assert len(speech(tmp_path, listed("a"), listed("b"), extra)("train")) == 10


def test_a_missing_list_is_named(tmp_path):
    path = tmp_path / "SpeechCommands.tar.gz"
    speech(tmp_path, listed("a"), listed("b"))
    with tarfile.open(path) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    for name in ("testing_list.txt", "validation_list.txt"):
        write_tar(path, {k: v for k, v in files.items() if not k.endswith(name)})
        with pytest.raises((RuntimeError, FileNotFoundError), match=name):
            load("spoken-digits", root=tmp_path)
    assert Path(path).is_file()
