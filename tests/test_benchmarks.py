"""The table of all benchmarks, and what fails it. No time is measured here."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import small_project

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def load(monkeypatch):
    """A benchmark by its name; they all see their neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def module(name):
        path = ROOT / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location("bench " + name, path)
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    return module


@pytest.fixture
def bench(load):
    return load("__main__")


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
    assert {"book", "caps", "cbl", "fftnet", "growth", "imports", "lrm", "methods", "peers",
            "predictive", "unet"} <= set(bench.PARTS)
    for part in bench.PARTS:
        assert "--record" in (ROOT / f"benchmarks/{part}.py").read_text(), part


def test_a_peer_that_is_missing_is_a_row_and_no_failure(bench, load, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)  # its import fails
    threads, table = load("peers").torch.get_num_threads(), tmp_path / "rows.json"
    load("peers").main(["--peers", "segmentation_models_pytorch", "--threads", str(threads),
                        "--record", str(table)])
    (row,) = json.loads(table.read_text())["rows"]
    assert "pip install segmentation-models-pytorch" in row["missing"]
    assert bench.bounded("peers", row) is None


def test_both_sides_of_a_fixed_point_are_one_map(bench, load, monkeypatch):
    torchdeq = pytest.importorskip("torchdeq", reason="the peer is not installed")
    peers = load("peers")
    args = peers.argparse.Namespace(batch=2, tol=1e-6, rounds=1, device="cpu")
    _, ours, theirs, x, y = next(peers.solvers(torchdeq, args))
    peers.torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(peers, "in_turn", lambda sides, rounds, device: [1.0, 3.0])
    found = [bench.bounded("peers", row) for row in peers.rows("torchdeq", args)]
    assert [row and (row["what"], row["ratio"]) for row in found] == [
        None, ("fixed point, training", 3.0), None]


def test_the_book_is_timed_and_never_executed(load, monkeypatch, tmp_path):
    book, root = load("book"), small_project.make(tmp_path / "mini")
    assert [set(row) for row in book.rows(root)] == [{"measured", "missing"}]
    copies = [root / "_book" / "notebooks" / path.name for path in root.glob("nbs/*.ipynb")]
    copies[0].parent.mkdir(parents=True)
    for seconds, path in enumerate(copies, 1):
        path.write_text(json.dumps({"metadata": {"book": {"seconds": seconds}}}))
    stopped, total, slowest = book.rows(root)  # of other code, so they would be executed
    assert "changed" in stopped["missing"] and all(path.is_file() for path in copies)
    assert (total["seconds"], slowest["seconds"]) == (sum(range(1, len(copies) + 1)), len(copies))
    monkeypatch.setattr(book, "again", lambda root: (2.0, 0))
    row = next(book.rows(root))
    assert (row["times 10 seconds"], row["bound"]) == (0.2, 1)
