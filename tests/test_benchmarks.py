"""The table of all benchmarks, and what fails it. No time is measured here."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks/__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_ratio_of_a_row_is_the_one_to_its_floor(bench):
    row = {"network": "CNN", "times one pass": 5.1, "times its floor": 1.02, "bound": 1.25}
    found = bench.bounded("cbl", row)
    assert (found["ratio"], found["bound"], found["what"]) == (1.02, 1.25, "CNN")
    assert bench.bounded("cbl", {**row, "bound": None}) is None
    with pytest.raises(KeyError, match="cbl.py"):
        bench.bounded("cbl", {"seconds": 3.0, "bound": 1.0})


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/bench_*.json")), ids=lambda p: p.stem)
def test_every_recorded_row_with_a_bound_can_be_told(bench, path):
    rows = json.loads(path.read_text())["rows"]
    told = [bench.bounded(path.stem, row) for row in rows]
    assert any(told) and all(row["ratio"] > 0 for row in told if row)


@pytest.mark.parametrize("ratio,status", [(1.0, 0), (1.3, 1)])
def test_check_fails_above_a_bound_and_only_there(bench, monkeypatch, tmp_path, capsys, ratio,
                                                  status):
    row = {"motif": "paper", "times two plain passes": ratio, "bound": 1.1}
    monkeypatch.setattr(bench, "run", lambda part, options: [bench.bounded(part, row)])
    table = tmp_path / "table.json"
    assert bench.main(["--only", "lrm", "--check", "--json", str(table)]) == status
    assert bench.main(["--only", "lrm"]) == 0
    assert ("ABOVE" in capsys.readouterr().out) == bool(status)
    recorded = json.loads(table.read_text())
    assert recorded["rows"][0]["ratio"] == ratio and recorded["threads"] > 0


def test_every_benchmark_of_the_table_can_be_recorded(bench):
    assert {"caps", "cbl", "fftnet", "growth", "imports", "lrm", "methods",
            "predictive", "unet"} <= set(bench.PARTS)
    for part in bench.PARTS:
        assert "--record" in (ROOT / f"benchmarks/{part}.py").read_text(), part
