"""The first screen of nbs/index.ipynb: ten digits under two readings of one paper, and five cards.

    python scripts/cover.py [--check | --train]

The cells whose directive is `#| cover` get their outputs here: a small network that runs in the
page (its weights are in scripts/cover.json, which --train makes anew), and a card a paper with its
verdict from nbs/claims.yaml. The README gets the same ten digits as nbs/images/cover.gif.
"""
from __future__ import annotations

import base64
import html
import io
import json
import sys
from pathlib import Path
from string import Template

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = Path(__file__).with_name("cover.json")
SIDE, LAST, STRENGTH = (320, 250), 60, 0.9
READINGS = {"literal": ("Equations 7 and 8 as printed", "The image enters once, at the start."),
            "through": ("Section 3.9 of the same paper", "The image enters in every step.")}
# a card: its claim in nbs/claims.yaml, its question, chapter, notebook and label of its picture
CARDS = {
    "cbl": ("cbl-forgets", "Does a network that settles still know what it looked at?",
            "10_cbl", "fig-cbl", "The output goes back into every hidden layer."),
    "unet": ("unet-settles", "Does the loop settle, or does it only stop listening?",
             "20_unet", "fig-steps", "A noisy polygon, and its segmentation step by step."),
    "lrm": ("lrm-steering", "Can a late layer tell an early one what to look for?",
            "30_lrm", "fig-maps", "What a late layer tells the first one, over the picture."),
    "caps": ("caps-vgg6", "Can a network learn without passing errors from block to block?",
             "43_caps_patterns", "fig-means", "How alike the patterns of ten classes are."),
    "fftnet": ("fft-listops", "Can a filter over frequencies take the place of attention?",
               "50_fftnet", "fig-two-ways", "What one patch receives: a filter and attention."),
}


# ---------------------------------------------------------------- the network of the page

def train(seed: int = 0) -> dict:
    """One hidden layer, trained in both flows at once, so that both have the same weights."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from feedback_nb.data import load

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    data, test = load("digits"), load("digits", "test")
    x, xt = (d.x.float().flatten(1) / 255 for d in (data, test))
    f, head, context = nn.Linear(64, 16), nn.Linear(16, 10), nn.Linear(10, 8)
    w, v = nn.Linear(16, 16, bias=False), nn.Linear(8, 16)
    norm = lambda m: torch.linalg.matrix_norm(m.weight, 2)
    bound = lambda: norm(w) + norm(v) * norm(context) * norm(head)
    params = [p for m in (f, head, context, w, v) for p in m.parameters()]
    optimizer = torch.optim.Adam(params, lr=1e-2)
    for _ in range(60):
        for rows in torch.randperm(len(x)).split(64):
            loss = 0
            for flow in READINGS:
                o = torch.tanh(f(x[rows]))
                h, gain = o, STRENGTH / bound()
                for _t in range(5):
                    loss = loss + F.cross_entropy(head(h), data.y[rows])
                    z = torch.tanh(context(head(h)))
                    h = (h + torch.tanh(gain * (w(h if flow == "literal" else o) + v(z)))) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    first = [int((test.y == c).nonzero()[0]) for c in range(10)]  # whatever they look like
    h0 = torch.tanh(f(xt[first]))
    plane = torch.linalg.svd(h0 - h0.mean(0), full_matrices=False).Vh[:2]
    tensors = dict(f=f.weight, f_b=f.bias, head=head.weight, head_b=head.bias, v=v.weight,
                   v_b=v.bias, context=context.weight, context_b=context.bias, w=w.weight,
                   mean=h0.mean(0), plane=plane)
    net = {name: t.detach().double().numpy().round(3).tolist() for name, t in tensors.items()}
    size = lambda name: np.linalg.norm(net[name], 2)  # of the rounded weights
    exact = size("w") + size("v") * size("context") * size("head")
    net["bound"] = float(np.ceil(100 * exact) / 100)
    net["digits"] = xt[first].numpy().round(2).tolist()
    states = np.concatenate([run(net, flow)[0] for flow in READINGS])
    spots = (states - net["mean"]) @ np.array(net["plane"]).T
    net["plane"] = (np.array(net["plane"]) * (115 / abs(spots).max())).round(2).tolist()
    for flow in READINGS:  # in figures, of all test digits
        answers = run(net, flow, xt.double().numpy())[1].argmax(2)
        right = (answers == test.y.numpy()).mean(1)
        net[f"right_{flow}"] = {str(t): round(float(right[t]), 4) for t in (0, 4, LAST)}
    net["n_test"] = len(xt)
    return net


def run(net: dict, flow: str, x=None, strength: float = STRENGTH):
    """States (T+1, N, 16) and logits (T+1, N, 10), as the page computes them."""
    m = {name: np.array(value) for name, value in net.items() if isinstance(value, list)}
    layer = lambda name, h: h @ m[name].T + m.get(name + "_b", 0)
    h = o = np.tanh(layer("f", np.array(net["digits"] if x is None else x)))
    states, logits = [], []
    for _ in range(LAST + 1):
        y = layer("head", h)
        states.append(h)
        logits.append(y)
        inner = layer("w", h if flow == "literal" else o) + layer("v", np.tanh(layer("context", y)))
        h = (h + np.tanh(strength / net["bound"] * inner)) / 2
    return np.stack(states), np.stack(logits)


# ---------------------------------------------------------------- the first screen

def png(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def tiles(net: dict) -> list[str]:
    """The ten scans, ink on white, as data URIs."""
    from PIL import Image

    return [png(Image.fromarray(np.uint8(255 - 255 * np.array(digit).reshape(8, 8))))
            for digit in net["digits"]]


def panel(net: dict, flow: str, images: list[str]) -> str:
    """One reading, drawn at its last step; the script of the page moves it."""
    states, logits = run(net, flow)
    spots = (states[-1] - net["mean"]) @ np.array(net["plane"]).T
    answers = logits[-1].argmax(1)
    scan = lambda i, size: (f'<image href="{images[i]}" x="{-size / 2:g}" y="{-size / 2:g}" '
                            f'width="{size}" height="{size}" style="image-rendering: pixelated"/>'
                            f'<rect x="{-size / 2:g}" y="{-size / 2:g}" width="{size}" '
                            f'height="{size}" fill="none" stroke="#7777"/>')
    moving = "".join(f'<g class="tile" transform="translate({a:.1f},{b:.1f})">{scan(i, 20)}</g>'
                     for i, (a, b) in enumerate(spots))
    row = "".join(f'<g transform="translate({20 + 31 * i},202)">{scan(i, 20)}<text class="answer'
                  f'{" wrong" * int(answers[i] != i)}" y="30">{answers[i]}</text></g>'
                  for i in range(10))
    name, what = READINGS[flow]
    width, height = SIDE
    return (f'<figure data-flow="{flow}"><figcaption><strong>{name}</strong> {what}</figcaption>'
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Ten scanned digits at the '
            'places of their hidden states; below, what the network answers for each.">'
            f'<rect class="plane" x=".5" y=".5" width="{width - 1}" height="184"/>'
            f'<g transform="translate({width / 2:g},92) scale(1,.68)">{moving}</g>{row}</svg>'
            f'<p class="cover-says"></p></figure>')


def numbers(net: dict) -> str:
    """What both readings answer, over all test digits."""
    percent = lambda flow, t: f"{100 * net[f'right_{flow}'][str(t)]:.0f} %"
    return ("After four steps, as it was trained, the network on the left reads "
            f"{percent('literal', 4)} of {net['n_test']} test digits correctly, and after {LAST} "
            f"steps {percent('literal', LAST)}; the one on the right, which sees the image in "
            f"every step, {percent('through', 4)} and {percent('through', LAST)}.")


def moving(net: dict, template: list[str]) -> dict[str, str]:
    """The figure as HTML, and for the README as a picture."""
    kept = {name: value for name, value in net.items()
            if not name.startswith(("right", "n_"))}
    images = tiles(net)
    page = Template(template[1]).substitute(
        panels="\n".join(panel(net, flow, images) for flow in READINGS), last=LAST,
        strength=STRENGTH, net=json.dumps(kept, separators=(",", ":")))
    alt = ("Two panels with ten scanned digits at the places of their hidden states. Left, the "
           "equations as printed: all ten run into one point and get one answer. Right, section "
           "3.9: they stay apart and are answered rightly.")
    return {"text/html": template[0] + page + f"<p><small>{numbers(net)}</small></p>",
            "text/markdown": f"![{alt}](images/cover.gif)\n\n*{numbers(net)}*"}


def cards(root: Path) -> dict[str, str]:
    """A card a paper: picture, authors, link, question, verdict with its scale, chapter."""
    from PIL import Image

    data = yaml.safe_load((root / "nbs" / "claims.yaml").read_text(encoding="utf-8"))
    claims = {claim["id"]: claim for claim in data["claims"]}
    items, rows = [], []
    for key, (claim, question, notebook, label, alt) in CARDS.items():
        paper, words = data["papers"][key], claims[claim]["words"].rstrip(".")
        image = Image.open(io.BytesIO(figure(root / "nbs" / f"{notebook}.ipynb", label)))
        image = image.convert("RGB")
        image.thumbnail((440, 300))
        image = image.quantize(32)
        said = (f"“{html.escape(words)}”: <strong>{claims[claim]['verdict']}</strong> "
                f"<small>Scale: {html.escape(claims[claim]['scale'])}</small>")
        chapter = f"{notebook.split('_')[0][0]}0"
        page = next((root / "nbs").glob(f"{chapter}_*.ipynb")).name
        items.append(
            f'<li><img src="{png(image)}" alt="{html.escape(alt)}"><h3>{html.escape(question)}</h3>'
            f'<p>{html.escape(paper["full"])} <a href="{paper["at"]}">{paper["short"]}: the paper'
            f'</a></p><p>{said}</p><p><a href="{page}">Chapter {chapter}</a> · '
            f'<a href="claims.ipynb#{claim}">the claim</a></p></li>')
        rows.append(f"- **{question}** {paper['full']} [The paper]({paper['at']}).\n"
                    f"  “{words}”: *{claims[claim]['verdict']}* (scale: {claims[claim]['scale']}). "
                    f"[Chapter {chapter}]({page})")
    return {"text/html": f'<ul class="cards">{"".join(items)}</ul>',
            "text/markdown": "\n".join(rows)}


def figure(notebook: Path, label: str) -> bytes:
    """The PNG that the cell with this label has stored."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if f"#| label: {label}" in "".join(cell["source"]):
            for output in cell.get("outputs", []):
                if image := output.get("data", {}).get("image/png"):
                    return base64.b64decode("".join(image))
    raise SystemExit(f"{notebook.name} has no figure {label!r} with a stored PNG; execute it first")


# ---------------------------------------------------------------- the README's picture

def film(net: dict) -> tuple[bytes, bytes]:
    """The two panels as an animated GIF of few colours, and its end as the share image."""
    from PIL import Image, ImageDraw, ImageFont

    scale, (width, height) = 1.25, SIDE
    at = lambda *numbers: tuple(int(n * scale + 0.5) for n in numbers)
    scans = [Image.fromarray(np.uint8(255 - 255 * np.array(d).reshape(8, 8))).resize(
        at(20, 20), Image.NEAREST) for d in net["digits"]]
    try:
        font = ImageFont.load_default(size=15)
    except TypeError:  # before Pillow 10.1
        font = ImageFont.load_default()
    paths = {flow: run(net, flow) for flow in READINGS}
    frames = []
    for t in [0, 0, 0, *range(1, LAST + 1, 2), *[LAST] * 10]:
        page = Image.new("L", at(2 * width + 20, height + 45), 255)
        draw = ImageDraw.Draw(page)
        for side, (flow, (states, logits)) in enumerate(paths.items()):
            left = side * (width + 20)
            spots = (states[t] - net["mean"]) @ np.array(net["plane"]).T
            draw.text(at(left + 4, 4), READINGS[flow][0], 0, font)
            draw.rectangle(at(left + 1, 24, left + width - 1, 208), outline=150)
            for i, (a, b) in enumerate(spots):
                corner = at(left + width / 2 + a - 10, 116 + 0.68 * b - 10)
                page.paste(scans[i], corner)
                end = (corner[0] + scans[i].width, corner[1] + scans[i].height)
                draw.rectangle([corner, end], outline=150)
            for i, answer in enumerate(logits[t].argmax(1)):
                page.paste(scans[i], at(left + 10 + 31 * i, 218))
                draw.text(at(left + 15 + 31 * i, 240), str(answer), 0, font)
            draw.text(at(left + 4, 266),
                      f"step {t}: {int((logits[t].argmax(1) == np.arange(10)).sum())} of 10 right",
                      0, font)
        frames.append(page.quantize(16))
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=110, loop=0,
                   optimize=True)
    page, last = Image.new("L", (1200, 630), 255), io.BytesIO()
    end = frames[-1].convert("L").resize((1120, round(1120 * frames[-1].height / frames[-1].width)))
    page.paste(end, (40, 90))
    page.quantize(16).save(last, "PNG", optimize=True)
    return buffer.getvalue(), last.getvalue()


# ---------------------------------------------------------------- into the notebook

def outputs(root: Path, net: dict) -> dict[str, dict[str, str]]:
    template = WEIGHTS.with_suffix(".html").read_text(encoding="utf-8").split("<!-- part -->\n")
    return {"moving": moving(net, template), "cards": cards(root)}


def filled(root: Path, net: dict) -> str:
    """nbs/index.ipynb with the outputs of its `#| cover` cells, as nbdev_clean leaves it."""
    from execnb.nbio import nb2str
    from fastcore.xtras import loads

    notebook = json.loads((root / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        for name, data in outputs(root, net).items():
            if f"#| cover: {name}\n" in cell["source"]:
                shown = {kind: text.splitlines(keepends=True) for kind, text in data.items()}
                cell["outputs"] = [{"data": shown | {"text/plain": ["made by scripts/cover.py"]},
                                    "execution_count": None, "metadata": {},
                                    "output_type": "execute_result"}]
    return nb2str(loads(json.dumps(notebook)))


def check_cover(root: Path) -> list[str]:
    """The first screen is what the network, the claims and the chapters' pictures give."""
    index = root / "nbs" / "index.ipynb"
    if not index.is_file() or "#| cover: cards" not in index.read_text(encoding="utf-8"):
        return []
    same = filled(root, json.loads(WEIGHTS.read_text())) == index.read_text(encoding="utf-8")
    return [] if same else ["nbs/index.ipynb: its first screen is stale: run scripts/cover.py"]


def main() -> int:
    if "--check" in sys.argv:
        faults = check_cover(ROOT)
        print(*faults, sep="\n")
        return bool(faults)
    if "--train" in sys.argv:
        WEIGHTS.write_text(json.dumps(train(), separators=(",", ":")) + "\n")
    net = json.loads(WEIGHTS.read_text())
    (ROOT / "nbs" / "index.ipynb").write_text(filled(ROOT, net), encoding="utf-8")
    for name, data in zip(("cover.gif", "share.png"), film(net)):
        (ROOT / "nbs" / "images" / name).write_bytes(data)
    print("wrote nbs/index.ipynb, nbs/images/cover.gif and share.png;", numbers(net))
    return 0


if __name__ == "__main__":
    sys.exit(main())
