"""Long sequences: generators, the published files' layouts in small, and the networks."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from feedback_nb.fftnet import FNetMixer, SpectralMixer, attention
from feedback_nb.long_sequences import (
    VOCABULARY,
    SequenceClassifier,
    equal_parameters,
    evaluate_listops,
    grey_pixels,
    listops,
    pathfinder,
    read_listops,
    read_pathfinder,
    read_retrieval,
    read_text,
)

words = lambda row: [VOCABULARY[i] for i in row.tolist() if i]


def by_python(tokens):
    """The value of an expression, by turning it into nested function calls."""
    names = {"[MIN": "min", "[MAX": "max", "[MED": "med", "[SM": "sm"}
    text = " ".join(
        f"{names[t]}([" if t in names else "])," if t == "]" else f"{t}," for t in tokens
    )
    functions = {
        "min": min,
        "max": max,
        "med": lambda v: int(np.median(v)),
        "sm": lambda v: sum(v) % 10,
    }
    return eval(text.rstrip(","), functions)


# ------------------------------------------------------------ ListOps


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(20, 90))
def test_listops_values_depth_and_length(seed, n_tokens):
    data = listops(4, n_tokens, seed=seed, max_depth=4, max_args=5)
    assert data.x.shape == (4, n_tokens) and data.x.dtype == torch.int32
    for row, y in zip(data.x, data.y.tolist(), strict=True):
        line = words(row)
        assert by_python(line) == evaluate_listops(line) == y
        assert n_tokens // 4 < len(line) < n_tokens and (row[len(line) :] == 0).all()
        depth, deepest = 0, 0
        for token in line:
            depth += token.startswith("[")
            deepest = max(deepest, depth)
            depth -= token == "]"
        assert depth == 0 and deepest <= 3  # an argument at depth 4 is a digit


def test_listops_is_seeded_and_splits_differ():
    a, b, c = listops(50, 64), listops(50, 64), listops(50, 64, split="test")
    assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    seen = {tuple(row) for row in a.x.tolist()}
    assert len(seen) == 50 and not seen & {tuple(row) for row in c.x.tolist()}
    before = torch.random.get_rng_state()
    listops(5, 64, seed=3), pathfinder(4, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_listops_arguments_are_operators_one_time_in_four():
    data = listops(600, 128, shortest=4)
    arguments = sum(sum(t.isdigit() or t.startswith("[") for t in words(row)) - 1 for row in data.x)
    operators = sum(sum(t.startswith("[") for t in words(row)) - 1 for row in data.x)
    assert 0.1 < operators / arguments < 0.25  # long trees are thrown away, so it is below 1/4


# ------------------------------------------------------------ Pathfinder


def parts(picture, level):
    """Connected regions (8 neighbours) of pixels above a level, as a list of sets."""
    left, found = {tuple(p) for p in (picture > level).nonzero().tolist()}, []
    while left:
        todo, region = [left.pop()], set()
        while todo:
            r, c = todo.pop()
            region.add((r, c))
            near = {(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            todo += near
        found.append(region)
    return found


def test_pathfinder_is_balanced_seeded_and_has_two_discs():
    data, again = pathfinder(200, 32, dashes=8), pathfinder(200, 32, dashes=8)
    assert (
        torch.equal(data.x, again.x) and data.x.shape == (200, 1024) and data.x.dtype == torch.uint8
    )
    assert int(data.y.sum()) == 100
    assert pathfinder(7).y.bincount().tolist() in ([3, 4], [4, 3])
    discs = [len(parts(x.view(32, 32), 250)) for x in data.x]
    assert max(discs) <= 2 and sum(d == 2 for d in discs) > 180  # two of them may touch
    assert not torch.equal(data.x, pathfinder(200, 32, dashes=8, split="test").x)


def test_pathfinder_labels_say_whether_a_line_joins_the_discs():
    """Where thickened dashes flow together, the discs are in one region if the label says so."""
    data = pathfinder(120, 48, dashes=5, step=3.0, distractors=0)
    right = asked = 0
    for x, y in zip(data.x.view(-1, 48, 48), data.y.tolist(), strict=True):
        wide = torch.nn.functional.max_pool2d(x[None, None].float(), 3, 1, 1)[0, 0]
        regions = parts(wide, 60)
        discs = parts(x, 250)
        if len(discs) == 2:
            at = [
                next(i for i, region in enumerate(regions) if next(iter(disc)) in region)
                for disc in discs
            ]
            right += (at[0] == at[1]) == bool(y)
            asked += 1
    assert asked >= 100 and right >= 0.9 * asked  # discs that touch are not asked about


def test_pathfinder_without_room_is_named():
    message = "no room: 60 dashes of 2.5 pixels, 2 distractors in 16 pixels; take fewer"
    with pytest.raises(ValueError, match=message):
        pathfinder(2, 16, dashes=60)
    with pytest.raises(ValueError, match="no room: 4 dashes .* 14 distractors in 16 pixels"):
        pathfinder(2, 16, distractors=14)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"n": 2, "n_tokens": 256, "max_depth": 2}, "0 of 2 expressions found: 64 to 256 words"),
        ({"n": 1, "n_tokens": 6, "shortest": 5}, "0 of 1 expressions found: 5 to 6 words"),
        ({"n": 10**6, "n_tokens": 6, "shortest": 4, "max_depth": 2}, "of 1000000 expressions"),
    ],
)
def test_listops_that_do_not_exist_are_named(sizes, message):
    if sizes["n"] > 10:
        sizes = {**sizes, "max_args": 2}
    with pytest.raises(ValueError, match=message):
        listops(**sizes)


# ------------------------------------------------------------ pixels


def test_grey_pixels_are_the_weighted_rows():
    data = grey_pixels("fashion-mnist-sample", "test")
    assert data.x.shape == (500, 784) and data.x.dtype == torch.uint8
    from feedback_nb.data import load

    assert torch.equal(data.x[3].view(28, 28), load("fashion-mnist-sample", "test").x[3, 0])
    assert data[0][0].max() <= 1


def test_grey_of_colours(monkeypatch):
    from feedback_nb import long_sequences
    from feedback_nb.data import TensorData

    x = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    monkeypatch.setattr(
        long_sequences,
        "load",
        lambda *args, **options: TensorData(x, torch.zeros(2, dtype=torch.long), ["a"], "fake"),
    )
    wanted = torch.stack(
        [
            torch.from_numpy(
                np.asarray(Image.fromarray(i.permute(1, 2, 0).numpy()).convert("L")).copy()
            )
            for i in x
        ]
    )
    assert (
        grey_pixels("fake").x.view(2, 4, 4).int() - wanted.int()
    ).abs().max() <= 1  # Pillow rounds by integers


# ------------------------------------------------------------ the published files


def test_listops_file(tmp_path):
    file = tmp_path / "basic_train.tsv"
    file.write_text("Source\tTarget\r\n( ( ( [MAX 3 ) [MIN 8 5 ] ) ] )\t5\r\n[SM 7 8 ]\t5\r\n")
    data = read_listops(file, 9)
    assert [words(row) for row in data.x] == ["[MAX 3 [MIN 8 5 ] ]".split(), "[SM 7 8 ]".split()]
    assert data.y.tolist() == [5, 5] and read_listops(file, 3).x.shape == (2, 3)
    file.write_text("Source\tTarget\n[MAX 3 x ]\t3\n")
    with pytest.raises(ValueError, match="basic_train.tsv holds 'x', which is no word of ListOps"):
        read_listops(file)
    file.write_text("A\tB\n1\t2\n")
    with pytest.raises(ValueError, match="lacks rows or the columns Source and Target"):
        read_listops(file)


def test_pathfinder_files(tmp_path):
    (
        (tmp_path / "metadata").mkdir(),
        (tmp_path / "imgs" / "0").mkdir(parents=True),
        (tmp_path / "imgs" / "1").mkdir(),
    )
    pictures = {}
    for part, number, label in ((0, 0, 1), (0, 1, 0), (1, 0, 1)):
        pixels = np.full((32, 32), 40 * part + 10 * number + label, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "imgs" / str(part) / f"sample_{number}.png")
        pictures[part, number] = int(pixels[0, 0]), label
    (tmp_path / "imgs" / "1" / "sample_9.png").touch()  # the release has an empty file
    (tmp_path / "metadata" / "10.npy").write_text(
        "imgs/1 sample_0.png 0 1 x\nimgs/1 sample_9.png 9 0 x\n"
    )
    (tmp_path / "metadata" / "2.npy").write_text(
        "imgs/0 sample_0.png 0 1 x\nimgs/0 sample_1.png 1 0 x\n"
    )
    data = read_pathfinder(tmp_path)
    assert data.x.shape == (3, 1024) and list(
        zip(data.x[:, 0].tolist(), data.y.tolist(), strict=True)
    ) == [*pictures.values()]
    (tmp_path / "metadata" / "2.npy").unlink(), (tmp_path / "metadata" / "10.npy").unlink()
    with pytest.raises(ValueError, match="has no pictures listed in metadata"):
        read_pathfinder(tmp_path)


def test_retrieval_and_text_files(tmp_path):
    file = tmp_path / "new_aan_pairs.train.tsv"
    lines = "1.0\t3\t4\tab\tÄ\n0.0\t5\t6\tabcdef\tx\n1.0\t7\t8\ta\x0cb\ta\x85\u2028\r\r\n"
    file.write_bytes(lines.encode())
    data = read_retrieval(file, 4)
    assert data.x.shape == (3, 2, 4) and data.y.tolist() == [1, 0, 1]
    assert data.x[2, 0].tolist() == [98, 13, 99, 0]
    assert data.x[0].tolist() == [[98, 99, 0, 0], [0xC3 + 1, 0x84 + 1, 0, 0]] and data.x[
        1, 0
    ].tolist() == [98, 99, 100, 101]
    file.write_text("1.0\ta\n")
    with pytest.raises(ValueError, match="must have 5 columns"):
        read_retrieval(file)
    for part, text in (("neg", "no"), ("pos", "yes")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "0_1.txt").write_text(text)
    data = read_text(tmp_path, 3)
    assert data.x.tolist() == [[111, 112, 0], [122, 102, 116]] and data.y.tolist() == [0, 1]
    with pytest.raises(ValueError, match="has no neg"):
        read_text(tmp_path / "pos")


# ------------------------------------------------------------ networks


@pytest.mark.parametrize("mixer", [SpectralMixer, attention, FNetMixer])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_what_stands_behind_the_end_is_not_read(mixer, pool):
    torch.manual_seed(0)
    net = SequenceClassifier(16, 12, 3, dim=8, heads=2, mixer=mixer, pool=pool).eval()
    x = torch.randint(1, 16, (4, 12))
    x[:, 7:] = 0
    y = net(x)
    with torch.no_grad():
        net.embed.weight[0] += 5  # the vector of padding
        net.position[:, -3:] += 5
    assert torch.allclose(net(x), y, atol=1e-5)
    assert not torch.allclose(net(x.roll(1, 1)), y, atol=1e-3)


def test_a_sequence_longer_than_the_positions_is_named():
    net = SequenceClassifier(None, 9, 3, dim=8, heads=2, anchors=5)
    assert net(torch.rand(2, 6)).shape == (2, 3)
    with pytest.raises(ValueError, match="12 tokens, but positions for 9"):
        net(torch.rand(2, 12))


def test_numbers_and_gradients():
    torch.manual_seed(0)
    net = SequenceClassifier(None, 9, 3, dim=8, heads=2)
    net(torch.rand(5, 9)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_equal_parameters_fills_up_and_draws_nothing():
    make = lambda mixer: (
        lambda mlp_ratio: SequenceClassifier(
            16, 20, 3, dim=8, heads=1, mixer=mixer, mlp_ratio=mlp_ratio
        )
    )
    target = sum(p.numel() for p in make(SpectralMixer)(mlp_ratio=8).parameters())
    for mixer in (SpectralMixer, attention, FNetMixer):
        net = equal_parameters(make(mixer), target, 8)
        n, each = sum(p.numel() for p in net.parameters()), 2 * (2 * 8 + 1)
        assert target - each < n <= target
    torch.manual_seed(3)
    a = equal_parameters(make(attention), target, 8)
    torch.manual_seed(3)
    b = make(attention)(mlp_ratio=a.blocks[0].mlp[1].out_features / 8)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(ValueError, match=re.escape("above the target of 10")):
        equal_parameters(make(attention), 10, 8)
    with pytest.raises(ValueError, match="shortest=70"):
        listops(1, 64, shortest=70)
