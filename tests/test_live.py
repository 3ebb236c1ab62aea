"""Live networks: the graphs beside PyTorch, what is shipped, and the boxes in a real browser."""
import functools
import gzip
import hashlib
import http.server
import importlib.util
import json
import re
import shutil
import threading

import pytest
import torch
from small_project import ROOT, SCRIPTS
from torch import nn

from feedback_nb import live
from feedback_nb.caps import mlp
from feedback_nb.cbl import CBL
from feedback_nb.live import NotExportable, OnnxLoop, export_onnx
from feedback_nb.lrm import LRM
from feedback_nb.networks import cnn
from feedback_nb.steering import Steer
from feedback_nb.unet import ExponentialDecay, FeedbackUNet

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

FOLDER = ROOT / "nbs" / "live"
OURS = ("live.js", "boxes.js", "live.css")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)
MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime")
           if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; "
                                "pip install 'feedback_nb[live]'")
X = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def cells(label):
    "The source of a cell of chapter 80, by its label."
    notebook = json.loads((ROOT / "nbs" / "80_live.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    return next(text for text in sources if f"#| label: {label}\n" in text)


@functools.cache
def networks():
    "What the cell with the three networks defines, with LIVE where it is."
    notebook = json.loads((ROOT / "nbs" / "80_live.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    imports = next(text for text in sources if '"Imports of this page"' in text)
    made = dict(vars(live))
    exec(imports.replace("use_style()", ""), made)
    made["LIVE"] = FOLDER
    exec(cells("live-networks"), made)
    return made


def small(kind):
    torch.manual_seed(0)
    if kind.startswith("CBL"):
        _, adapter, flow = kind.split()
        return CBL(cnn(1, 10, width=4), example=X, adapter=adapter, flow=flow).eval()
    if kind == "LRM":
        return LRM(cnn(1, 10, width=4), example=X, steps=2).eval()
    decay, norm = kind.split()[1:]
    return FeedbackUNet(channels=(4, 8), state=4, decay=decay, norm=norm).eval()


# ---------------------------------------------------------------- the graphs

@needs_onnx
@pytest.mark.parametrize("kind", ["CBL gate through", "CBL attention literal", "UNet matrix group"])
def test_ten_steps_are_those_of_pytorch(kind, tmp_path):
    model = small(kind)
    about = export_onnx(model, X, tmp_path / "loop")
    assert about["difference"] <= 1e-4 and "clock" in about["step"]["inputs"]
    x = X.flip(0).sqrt()  # not the picture that it was exported with
    pairs = zip(range(11), OnnxLoop(tmp_path / "loop").states(x), model.states(x))
    with torch.no_grad():
        for _, found, state in pairs:
            torch.testing.assert_close(found["y"], state.y, atol=1e-4, rtol=1e-4)
            for name, h in state.h.items():
                torch.testing.assert_close(found[f"h.{name}"], h, atol=1e-4, rtol=1e-4)


@needs_onnx
def test_vector_gain_and_blend_are_inputs_and_half_the_bytes_are_enough(tmp_path):
    model = small("LRM")
    source = next(reversed(model.sources))
    whole, half = (export_onnx(model, X, tmp_path / str(half), steer=source, half=half)
                   for half in (False, True))
    assert whole["difference"] <= 1e-4 < 1e-2 and half["half"]
    size = [(tmp_path / str(half) / "step.onnx").stat().st_size for half in (False, True)]
    assert size[1] < 0.75 * size[0]
    vector = torch.randn(2, 10, generator=torch.Generator().manual_seed(1))
    for gain, blend in ((3.0, 1.0), (1.0, 0.0), (2.0, 0.4)):
        steer = Steer(source, vector, gain=gain, blend=blend)
        with torch.no_grad():
            wanted = model.trajectory(X, steps=4, steer=steer).outputs
        loop = OnnxLoop(tmp_path / "False").states(X, vector=vector, gain=gain, blend=blend)
        for y, found in zip(wanted, loop):
            torch.testing.assert_close(found["y"], y, atol=1e-4, rtol=1e-4)


@needs_onnx
def test_what_cannot_be_a_graph_is_refused_and_leaves_nothing(tmp_path):
    for model in (nn.Linear(2, 2), mlp(256, hidden=(8, 8)), small("UNet scalar batch")):
        with pytest.raises(NotExportable, match=type(model).__name__):
            export_onnx(model, X, tmp_path / "loop")
    for options in ({"inputs": {"gain": ["nowhere"]}}, {"steer": "stage1"}):
        with pytest.raises(ValueError):
            export_onnx(small("UNet scalar group"), X, tmp_path / "loop", **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    with pytest.raises(ImportError, match=r"no_such_package.*feedback_nb\[live\]"):
        live._needed("no_such_package")


def test_a_clock_that_is_a_tensor_decays_as_a_number_does():
    torch.manual_seed(0)
    delta = torch.randn(1, 4, 3, 3)
    for kind in ("scalar", "matrix"):
        decay = ExponentialDecay(4, 2.0, kind)
        for t in (0, 1, 5):
            torch.testing.assert_close(decay(delta, torch.tensor(float(t))), decay(delta, t))


@pytest.mark.parametrize("kind", ["CBL gate through", "CBL attention through", "CBL concat literal",
                                  "UNet scalar group", "UNet matrix batch", "LRM"])
def test_whole_models_go_through_torch_export(kind):
    model = small(kind)
    with torch.no_grad():
        exported = torch.export.export(model, (X,), strict=False).module()
        torch.testing.assert_close(exported(X), model(X))


# ---------------------------------------------------------------- what is shipped

def test_the_runtime_is_the_one_from_npm():
    sums = dict(reversed(line.split()) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    assert len(sums) == 3
    for name, wanted in sums.items():
        packed = FOLDER / f"{name}.gz"
        data = gzip.decompress(packed.read_bytes()) if packed.is_file() else (
            FOLDER / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == wanted, name
        assert not name.endswith(".wasm") or data[:4] == b"\0asm"
    assert (FOLDER / "ort-wasm-simd-threaded.wasm.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert "Microsoft" in (FOLDER / "LICENSE-onnxruntime.txt").read_text()


def test_our_scripts_are_small_and_know_no_other_host():
    for name in OURS:
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(r"(https?:)?//[\w-]+\.\w", text), name
        assert len(text.splitlines()) <= 205, name


def test_a_page_with_every_box_is_below_five_megabytes():
    shipped = [p for p in FOLDER.rglob("*") if p.suffix in (".mjs", ".gz", ".js", ".css", ".onnx")
               or p.name in ("loop.json", "box.json")]
    assert sum(p.stat().st_size for p in shipped) < 5e6
    for folder in (p for p in FOLDER.iterdir() if p.is_dir() and p.name[0] != "."):
        assert sum(p.stat().st_size for p in folder.glob("*.onnx")) <= 300_000, folder.name
        assert not re.search(rb"/(home|work|tmp|usr)/", b"".join(
            p.read_bytes() for p in folder.iterdir())), folder.name


def test_the_steepness_of_the_literal_box_is_a_certificate():
    made = networks()
    model = made["stored"]("cbl-through", made["cbl_loop"]("literal"))
    box = json.loads((FOLDER / "cbl-through" / "box.json").read_text())
    norm = lambda layer: float(torch.linalg.matrix_norm(layer.weight.double(), 2))
    last = model.adapters["stage2"]
    around = norm(model.context.linear) * norm(model.net.head)
    assert norm(last.W) + norm(last.V) * around <= box["steepness"] * (1 + 1e-5)


# ---------------------------------------------------------------- in a browser

DRIVE = """<script>addEventListener("load", async () => {
  const said = {};
  for (const box of document.querySelectorAll(".live")) {
    const name = box.dataset.loop;
    box.querySelector("button").click();
    while (!box.dataset.ready) await new Promise(done => setTimeout(done, 50));
    const loops = box.twins ?? {[name]: box.loop};
    for (const flow in loops) {
      while (loops[flow].t < 4) await loops[flow].next();
      const {given, state} = loops[flow];
      said[flow] = {...given, y: Array.from(state.y), x: Array.from(given.x)};
    }
  }
  const end = Object.assign(document.createElement("pre"), {id: "said"});
  end.textContent = JSON.stringify(said);
  document.body.append(end);
})</script>"""


def page_in(folder):
    "The boxes of chapter 80 in a page of their own, with what the book puts beside it."
    import sys
    sys.path.insert(0, str(SCRIPTS))
    import book

    book.copy_live(FOLDER, folder / "live")
    notebook = (ROOT / "nbs" / "80_live.ipynb").read_text(encoding="utf-8")
    texts = ["".join(cell["source"]) for cell in json.loads(notebook)["cells"]]
    boxes = re.findall(r'<div class="live".*?</div>', "\n".join(texts))
    assert len(boxes) == 3
    script = next(re.findall(r"<script src=.*?</script>", text) for text in texts
                  if "<script src=" in text)
    head = '<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">'
    (folder / "page.html").write_text(head + "".join(script + boxes) + DRIVE, encoding="utf-8")
    return folder / "page.html"


@pytest.mark.skipif(not (BROWSER and sync_playwright), reason="no Chromium, or no playwright")
@pytest.mark.parametrize("served", [False, True])
def test_the_boxes_say_in_a_browser_what_pytorch_says(tmp_path, served):
    page, asked = page_in(tmp_path), []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *args):
            asked.append(args[0].split()[1] if args and " " in str(args[0]) else "")

    handler = functools.partial(Handler, directory=str(tmp_path))
    with (http.server.ThreadingHTTPServer(("localhost", 0), handler) as server,
          sync_playwright() as playwright):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://localhost:{server.server_port}/page.html" if served else page.as_uri()
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(at)
        # real time, not Chromium's virtual one: that does not wait for WebAssembly's own threads
        said = tab.wait_for_selector("#said", state="attached", timeout=200_000).text_content()
        browser.close()
        server.shutdown()
    assert served == any(path.endswith(".wasm.gz") for path in asked)
    said, made = json.loads(said), networks()
    models = {"unet": made["stored"]("unet", made["unet_loop"]()),
              "lrm": made["stored"]("lrm", made["lrm_loop"]())}
    for flow in ("through", "literal"):
        models[flow] = made["stored"]("cbl-through", made["cbl_loop"](flow))
    sizes = {"unet": (1, 1, 40, 40), "lrm": (1, 1, 28, 28)}
    for name, model in models.items():
        x = torch.tensor(said[name]["x"]).view(sizes.get(name, (10, 1, 8, 8)))
        options = {}
        if name == "lrm":
            vector, gain = torch.tensor(said[name]["vector"]), said[name]["gain"]
            options["steer"] = Steer("out", vector, gain=float(gain), blend=said[name]["blend"])
        with torch.no_grad():
            y = model.trajectory(x, steps=4, **options).output
        torch.testing.assert_close(torch.tensor(said[name]["y"]).view_as(y), y,
                                   atol=1e-3, rtol=1e-3)
