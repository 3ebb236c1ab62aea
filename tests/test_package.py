"""What `pip install` gives: the contract of public names, light imports, metadata, and the
pictures of the README."""

import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p.stem for p in (ROOT / "feedback_nb").glob("*.py")
                 if p.stem not in ("__init__", "_modidx"))
LIGHT = ("torchvision torchaudio pandas matplotlib sklearn scipy safetensors captum tqdm IPython "
         "PIL").split()


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=ROOT / "nbs")


def test_importing_everything_loads_torch_alone():
    lines = "\n".join(f"import feedback_nb.{name}" for name in MODULES)
    done = run(f"import sys, torch\nbefore = set(sys.modules)\n{lines}\n"
               "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))")
    assert done.returncode == 0, done.stderr
    assert "feedback_nb" in done.stdout.split()
    assert not set(done.stdout.split()) & set(LIGHT)


def test_importing_touches_neither_network_nor_disk():
    code = f"""
import sys, torch
import importlib.util
touching = ("os.mkdir", "os.rename", "os.remove", "urllib.Request", "subprocess.Popen",
            "os.listdir")
def hook(event, args):
    if event.startswith("socket.") or event in touching:
        if event != "os.listdir" or "feedback_nb" not in str(args): print("event", event, args)
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        if "__pycache__" not in str(args[0]): print("event", event, args)
sys.dont_write_bytecode = True
sys.addaudithook(hook)
{chr(10).join(f"import feedback_nb.{name}" for name in MODULES)}
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    # Python's own import system lists folders
    events = [line for line in done.stdout.splitlines() if "os.listdir" not in line]
    assert not events


# module: {name: the parameters that other people's scripts pass}
CONTRACT = {
    "fixed_points": {
        "Trajectory": ["outputs", "residuals", "states"],
        "iterate": ["f", "h0", "steps", "tol", "damping", "solver", "memory"],
        "lipschitz": ["f", "h"],
        "banach_bounds": ["q", "first_step", "n"],
        "a_posteriori": ["q", "last_step"],
        "relative_residual": ["change", "h"],
        "fixed_point": ["f", "h0"],
    },
    "certificates": {"jacobian_norm": ["f", "h"], "conv_norm_bound": ["conv"],
                     "lipschitz_upper": ["net", "shape"]},
    "feedback": {
        "Trajectory": ["outputs", "residuals", "states"],
        "FeedbackModel": ["steps"],
        "stepwise_loss": ["trajectory", "target", "loss_fn", "weights"],
        "layer_shapes": ["net", "names", "example"],
        "tap": ["net", "names"],
        "edit": ["net"],
    },
    "cbl": {"CBL": ["net", "layers", "example", "context_dim", "steps", "alpha", "adapter", "flow",
                    "tol"]},
    "data": {"load": ["name", "split", "root", "size", "download"], "names": []},
    "training": {
        "fit": ["model", "data", "epochs", "lr", "optimizer", "schedule", "loss", "augment", "seed",
                "precision", "checkpoint", "resume", "callbacks"],
        "evaluate": ["model", "data"],
    },
    "unet": {
        "UNet": [],
        "FeedbackLoop": ["body", "head", "state", "feedback", "steps", "tau", "decay", "softmax"],
        "FeedbackUNet": ["in_channels", "n_classes", "channels", "state"],
        "ExponentialDecay": [],
    },
    "lrm": {
        "Connection": ["source", "destination"],
        "LRM": ["backbone", "connections", "example", "steps", "motif", "mode"],
        "alexnet_lrm": ["level"],
        "load_published": ["model", "state_dict"],
    },
    "steering": {
        "Steer": ["source", "vector", "gain", "blend", "from_first_pass"],
        "one_hot": [],
        "instance": ["model"],
        "prototype": ["model"],
        "contrast": [],
        "TextPrior": [],
        "overlay": ["a", "b"],
        "side_by_side": ["a", "b"],
        "triplets": [],
        "a_prime": ["hits", "false_alarms"],
    },
    "signatures": {
        "responses": ["model", "x", "layers", "steps", "steer"],
        "moments": ["model", "data", "layers"],
        "localize": ["moments", "target", "q"],
        "signature": ["model"],
        "brainscore": ["model", "preprocessing", "identifier"],
    },
    "caps": {
        "CAPs": ["blocks", "n_classes", "width", "score", "temperature", "norm", "rule"],
        "local_backward": ["x", "y", "keep", "budget", "optimizers"],
        "vgg": ["depth"],
        "mlp": [],
        "recalibrate": ["model", "data"],
        "switch_rule": [],
        "orthogonality": ["patterns", "y"],
        "sparsity": ["patterns"],
    },
    "fftnet": {
        "SpectralMixer": ["dim", "n_tokens", "heads"],
        "FFTNetBlock": ["dim", "n_tokens", "heads"],
        "FFTNetViT": ["size", "n_classes", "image_size"],
        "FNetMixer": ["dim"],
        "attention": ["dim", "heads", "projections"],
        "WindowedMixer": ["dim", "window"],
        "WaveletMixer": ["dim", "levels"],
        "ModReLUMixer": ["dim", "n_tokens", "heads"],
    },
    "long_sequences": {"listops": ["n", "n_tokens", "seed"], "pathfinder": ["n", "size", "seed"],
                       "grey_pixels": ["name"], "SequenceClassifier": ["vocabulary", "n_tokens",
                           "n_classes"]},
    "evaluation": {"compare": ["factories", "data", "seeds"]},
    "cost": {"cost": ["model", "example"]},
    "robustness": {"noise_curve": [], "fgsm_curve": [], "pgd_curve": []},
}


@pytest.mark.parametrize("module, name", [(m, n) for m, names in CONTRACT.items() for n in names])
def test_public_names_and_parameters(module, name):
    loaded = importlib.import_module(f"feedback_nb.{module}")
    assert name in loaded.__all__
    assert set(CONTRACT[module][name]) <= set(inspect.signature(getattr(loaded, name)).parameters)


def test_names_that_moved_are_found_where_they_were():
    from feedback_nb import cost, evaluation, robustness

    assert evaluation.cost is cost.cost
    for name in CONTRACT["robustness"]:
        assert getattr(evaluation, name) is getattr(robustness, name)


def test_defaults_of_the_contract():
    from feedback_nb.cbl import CBL
    from feedback_nb.fixed_points import iterate

    defaults = {k: p.default for k, p in inspect.signature(CBL).parameters.items()}
    wanted = {"context_dim": 64, "steps": 4, "alpha": 0.5, "adapter": "gate", "flow": "through",
              "tol": None}
    assert {k: defaults[k] for k in wanted} == wanted
    defaults = {k: p.default for k, p in inspect.signature(iterate).parameters.items()}
    assert (defaults["damping"], defaults["memory"]) == (0.0, 5)


def test_every_public_function_is_documented():
    for module in MODULES:
        loaded = importlib.import_module(f"feedback_nb.{module}")
        for name in loaded.__all__:
            thing = getattr(loaded, name)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                assert inspect.getdoc(thing), f"{module}.{name}"


def test_metadata_is_that_of_settings():
    cfg, meta = settings(), importlib.metadata.metadata("feedback_nb")
    import feedback_nb

    assert feedback_nb.__version__ == meta["Version"] == cfg["version"]
    assert meta["License-Expression"] == "Apache-2.0" or meta["License"] == "Apache-2.0"
    assert meta["Requires-Python"] == ">=" + cfg["min_python"]
    assert {e.name: e.value for e in importlib.metadata.entry_points(group="console_scripts")
            if e.name.startswith("feedback_nb")} == {
        "feedback_nb_data": "feedback_nb.data:cli"
    }


def test_the_package_declares_lower_bounds_and_the_constraints_exact_versions():
    assert all(re.fullmatch(r"[\w-]+(\[\w+\])?>=[\d.]+", r)
               for r in settings()["requirements"].split())
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line
             and not line.startswith("#")]
    assert all(re.match(r"[\w.-]+==[\w.+!]+", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    assert (pins["torch"], pins["torchvision"], pins["torchaudio"], pins["nbdev"]) == ("2.11.0",
        "0.26.0", "2.11.0", "2.4.14")


def test_both_nbdevs_read_the_same():
    "nbdev 2.4 reads settings.ini, nbdev 3 pyproject.toml."
    import tomllib

    read, cfg = tomllib.loads((ROOT / "pyproject.toml").read_text()), settings()
    nbdev, urls = read["tool"]["nbdev"], read["project"]["urls"]
    assert read["project"]["name"] == cfg["lib_name"] and urls["Source"] == cfg["git_url"]
    assert urls["Documentation"] == cfg["doc_host"] + cfg["doc_baseurl"]
    assert all(str(nbdev[key]).lower() == cfg[key].lower() for key in nbdev)


def test_every_chapter_is_in_the_contents():
    index = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    text = "".join("".join(cell["source"]) for cell in index["cells"])
    for path in (ROOT / "nbs").glob("[0-9]*.ipynb"):
        front = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title = re.search(r"^# (.+)$", front, flags=re.M)[1]
        name = f"[{path.stem.split('_')[0]} {title}]({path.name})"
        assert name in text, f"the contents have no {name}"
        assert path.name in (ROOT / "_quarto.yml").read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_options_of_cells_are_yaml(path):
    """Quarto reads them as YAML and stops at a quote within quotes."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        lines = "".join(cell["source"]).splitlines() * (cell["cell_type"] == "code")
        for line in lines:
            if found := re.match(r"#\|\s*([\w-]+:\s.*)", line):
                assert isinstance(yaml.safe_load(found[1]), dict), line
