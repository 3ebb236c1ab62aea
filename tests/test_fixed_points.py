"""Banach's bounds, halting per example, Anderson, Lipschitz constants, implicit gradients."""

import copy
import gc
import math
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close

from feedback_nb.fixed_points import (
    NotConverged,
    Trajectory,
    a_posteriori,
    banach_bounds,
    fixed_point,
    iterate,
    lipschitz,
    relative_residual,
)

F64 = torch.float64
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=30, deadline=None)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed),
                       dtype=torch.float64).to(dtype)


def matrix(n, norm, seed=0, dtype=F64):
    "A random (n, n) matrix whose largest singular value is `norm`."
    w = normal(n, n, seed=seed)
    return (w * norm / torch.linalg.matrix_norm(w, 2)).to(dtype)


@pytest.fixture(autouse=True)
def no_warnings():
    "Each test says which warnings it expects."
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# --- Banach ---------------------------------------------------------------------------------------
# ------------------


@few
@given(seeds, st.integers(1, 6), st.floats(0, 0.97), st.floats(0.01, 100),
       st.sampled_from(["affine", "tanh"]))
def test_both_bounds_hold_for_random_contractions_and_starts(seed, n, q, spread, kind):
    A, b = matrix(n, q, seed), normal(n, seed=seed + 1)
    f = (lambda h: h @ A.T + b) if kind == "affine" else (
        lambda h: q * torch.tanh(h @ (A.T / q if q else A.T) + b))
    h0 = spread * normal(4, n, seed=seed + 2)
    star = iterate(f, h0, steps=int(40 / -math.log(q)) + 2 if q > 1e-9 else 3, keep="last").output
    path = iterate(f, h0, steps=20)
    errors = torch.stack([(h - star).norm(dim=1) for h in path.outputs])
    slack = 1e-9 * (1 + spread) / (1 - q)
    lengths = torch.stack(path.outputs).diff(dim=0).norm(dim=2)
    a_priori, after = banach_bounds(q, lengths[0], 20), a_posteriori(q, lengths)
    assert (errors <= a_priori + slack).all()
    assert (errors[1:] <= after + slack).all()
    assert (after <= a_priori[1:] +
            slack).all()  # the bound that looks is never worse than the one that plans


def test_bounds_by_hand_and_their_shapes():
    assert_close(banach_bounds(0.5, 0.5, 3), torch.tensor([1, 0.5, 0.25, 0.125], dtype=F64))
    assert_close(banach_bounds(0.0, 2.0, 2), torch.tensor([2.0, 0.0, 0.0],
                                                          dtype=F64))  # f is constant: one step
    assert a_posteriori(0.75, 2.0) == 6.0
    steps = torch.tensor([1.0, 2.0])
    assert banach_bounds(0.5, steps, 4).shape == (5, 2) and banach_bounds(0.5, steps,
                                                                          4).dtype == torch.float32
    assert banach_bounds(torch.tensor([0.1, 0.2]), 1.0, 0).shape == (1, 2)
    assert_close(banach_bounds(0.5, steps, 4)[:, 1], banach_bounds(0.5, steps[1], 4))


@pytest.mark.parametrize("q", [1.0, 1.5, -0.1, math.nan, torch.tensor([0.5, 1.0])])
def test_bounds_refuse_what_is_no_contraction(q):
    with pytest.raises(ValueError, match=r"q must be in \[0, 1\)"):
        banach_bounds(q, 1.0, 3)
    with pytest.raises(ValueError, match=r"q must be in \[0, 1\)"):
        a_posteriori(q, 1.0)


def test_bounds_refuse_negative_lengths():
    with pytest.raises(ValueError, match="n must"):
        banach_bounds(0.5, 1.0, -1)
    with pytest.raises(ValueError, match="first_step"):
        banach_bounds(0.5, torch.tensor([1.0, -1.0]), 2)
    with pytest.raises(ValueError, match="first_step"):
        banach_bounds(0.5, math.nan, 2)


# --- the residual
# --------------------------------------------------------------------------------------------------
# -


@few
@given(seeds, st.integers(1, 4), st.floats(1e-6, 1e6))
def test_the_residual_is_the_ratio_of_two_norms_and_has_no_unit(seed, batch, unit):
    tree = lambda seed: {"a": normal(batch, 3, 2, seed=seed), "b": [normal(batch, seed=seed + 1)]}
    change, h = tree(seed), tree(seed + 2)
    flat = lambda t: torch.cat([t["a"].flatten(1), t["b"][0][:, None]], 1).norm(dim=1)
    assert_close(relative_residual(change, h), flat(change) / flat(h))
    scaled = lambda t: {"a": unit * t["a"], "b": [unit * t["b"][0]]}
    assert_close(relative_residual(scaled(change), scaled(h)), relative_residual(change, h))


def test_the_residual_of_blank_still_and_broken_states():
    change = torch.tensor([[0.0], [1.0], [math.nan], [math.inf], [1.0], [1e-30]])
    h = torch.tensor([[0.0], [0.0], [1.0], [1.0], [math.inf], [1e-30]])
    assert_close(relative_residual(change, h),
                 torch.tensor([0, math.inf, math.nan, math.nan, math.nan, 1.0]), equal_nan=True)
    assert relative_residual(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)
    half = torch.full((1, 300), 200.0, dtype=torch.float16)  # its squares overflow
    assert relative_residual(half, half).dtype == torch.float32 and relative_residual(half,
                                                                                      half) == 1
    state = {"h": torch.ones(2, 1), "clock": torch.tensor([3, 4]),
             "name": "x"}  # what is no float does not count
    assert_close(relative_residual(state, state), torch.ones(2))
    assert not relative_residual(torch.ones(2, 1, requires_grad=True), torch.ones(2,
                                                                                  1)).requires_grad
    spiral = torch.tensor([[1 + 1j]])
    assert_close(relative_residual(spiral, 2 * spiral), torch.tensor([0.5]))


@few
@given(seeds, st.sampled_from(["picard", "anderson"]), st.sampled_from([0.0, 0.3]))
def test_row_t_belongs_to_state_t_and_takes_t_plus_one_evaluations(seed, solver, damping):
    W, b = matrix(5, 1.2, seed), normal(5, seed=seed + 1)
    seen = []
    f = lambda h: (seen.append(h), torch.tanh(h @ W + b))[1]
    path = iterate(f, normal(3, 5, seed=seed + 2), steps=12, solver=solver, damping=damping)
    assert len(seen) == 12 + (solver == "anderson")
    for t, (h, row) in enumerate(zip(path.outputs[:-1], path.residuals, strict=True)):
        assert_close(row, (f(h) - h).norm(dim=1) / h.norm(dim=1))
        measured = torch.stack(
            seen[:t + 1])  # each example's state is among those that f was evaluated at
        assert all((measured[:, i] == h[i]).all(1).any() for i in range(3))


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_the_tolerance_has_no_unit(solver):
    W, b = matrix(5, 0.9), normal(5, seed=1)
    runs = [
        iterate(lambda h, c=c: c * torch.tanh(h / c @ W + b), torch.zeros(2, 5, dtype=F64),
                steps=300, tol=1e-6, solver=solver) for c in (1.0, 1024.0)
    ]
    assert runs[0].converged.all() and runs[0].n_steps.tolist() == runs[1].n_steps.tolist()
    assert_close(1024 * runs[0].output, runs[1].output)
    assert_close(runs[0].residuals, runs[1].residuals)
    assert (runs[0].residuals[0] == math.inf).all()  # a blank start is no error


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_converged_is_what_the_last_row_says(solver):
    W, b = matrix(5, 0.9), normal(5, seed=1)
    calls = []
    f = lambda h: (calls.append(1), torch.tanh(h @ W + b))[1]
    path = iterate(f, normal(4, 5, seed=2), steps=300, tol=1e-8, solver=solver)
    assert path.converged.all() and (path.residuals[-1] <= 1e-8).all()
    assert len(calls) == path.steps == len(
        path.residuals)  # when all have halted, no evaluation more
    assert path.n_steps.tolist() == [int((row > 1e-8).sum()) + 1 for row in path.residuals.T]


def test_a_fixed_point_at_zero_is_never_near_and_a_shift_helps():
    with pytest.warns(NotConverged):
        path = iterate(lambda h: h / 2, torch.ones(1), steps=30, tol=1e-2)
    assert_close(path.residuals, torch.full((30,), 0.5))
    f, h0 = lambda h: h / 2, torch.ones(1)
    assert iterate(lambda s: f(s - 1) + 1, h0 + 1, steps=30, tol=1e-2).converged


def test_no_tolerance_can_be_said_in_two_ways():
    for none in (None, False):
        path = iterate(lambda h: h + 1, torch.zeros(1), steps=3, tol=none)
        assert path.converged is None and path.steps == 3
        assert_close(
            fixed_point(lambda h: h / 2, torch.ones(1), steps=3, tol=none, solver="picard"),
            torch.tensor([0.125]))
    assert iterate(torch.cos, torch.ones(1), steps=np.int64(3)).steps == 3
    assert iterate(torch.cos, torch.ones(1), steps=np.int32(3), memory=np.int8(2),
                   solver="anderson").steps == 3


# --- plain iteration
# ------------------------------------------------------------------------------------------------


def test_outputs_and_residuals_are_the_loop_written_out():
    h = normal(3, 2)
    path = iterate(torch.cos, h, steps=4)
    assert path.outputs[0] is h and path.steps == 4 and path.output is path.outputs[
        -1] and path.converged is None
    for t in range(4):
        assert_close(path.outputs[t + 1], path.outputs[t].cos(), rtol=0, atol=0)
        assert_close(
            path.residuals[t],
            (path.outputs[t].cos() - path.outputs[t]).norm(dim=1) / path.outputs[t].norm(dim=1))
    assert path.residuals.shape == (4, 3) and path.n_steps.tolist() == [4, 4, 4]


def test_no_steps_is_the_start():
    h = torch.ones(3, 2)
    path = iterate(torch.cos, h, steps=0)
    assert path.output is h and path.steps == 0 and path.residuals.shape == (
        0, 3) and path.n_steps.tolist() == [0] * 3
    with pytest.warns(NotConverged, match="3 of 3 .*after 0 steps"):
        assert not iterate(torch.cos, h, steps=0, tol=1e-3).converged.any()


def test_keeping_the_last_state_changes_nothing_else():
    every, last = (iterate(torch.cos, normal(3, 2), steps=30, tol=1e-3, keep=k)
                   for k in ("all", "last"))
    assert len(last.outputs) == 2 and last.steps == every.steps
    assert_close((last.output, last.residuals, last.n_steps),
                 (every.output, every.residuals, every.n_steps))


@few
@given(seeds, st.sampled_from(["picard", "anderson"]), st.sampled_from([0.0, 0.3]))
def test_an_example_does_not_feel_its_neighbours(seed, solver, damping):
    W, scale = matrix(4, 0.8, seed), torch.tensor([[1e-6], [1.0], [1e3]], dtype=F64)
    x = normal(3, 4, seed=seed + 1)

    def run(i):  # sums, not matmul: that may round otherwise for another batch size
        f = lambda h: torch.tanh((h[:, None, :] * W).sum(2) + x[i])
        return iterate(f, (scale * normal(3, 4, seed=seed + 2))[i], steps=300, tol=1e-8,
                       solver=solver, damping=damping)

    together = run(slice(None))
    assert together.converged.all()
    for i in range(3):
        alone = run(slice(i, i + 1))
        assert together.n_steps[i] == alone.n_steps[0]
        assert_close(together.output[i], alone.output[0], rtol=0, atol=1e-12)
        assert_close(together.residuals[-1, i], alone.residuals[-1, 0], rtol=1e-3, atol=1e-12)


def test_an_example_that_has_halted_stands_still_and_the_loop_ends_with_the_last():
    path = iterate(lambda h: (h - 1) / 2 + 1, torch.tensor([[2.0], [1.001]], dtype=F64), steps=100,
                   tol=1e-4)
    slow, quick = path.n_steps.tolist()
    # residual of h_t is 2^-(t+1)·(h_0 - 1) over about 1: 2^-14 < 1e-4 at t = 13, and 2^-4·1e-3 <
    # 1e-4 at t = 3
    assert (slow, quick) == (14, 4) and path.steps == 14 and path.converged.all()
    assert all(torch.equal(h[1], path.outputs[4][1]) for h in path.outputs[4:])
    assert torch.equal(path.residuals[3:, 1], path.residuals[3, 1].expand(11))


def test_damping_cannot_fake_convergence():
    with pytest.warns(NotConverged):
        path = iterate(lambda h: h + 1, torch.ones(1, 1), steps=10, tol=1e-2, damping=0.999)
    assert_close(path.residuals,
                 1 / torch.stack(path.outputs[:-1])[:, :, 0])  # of the whole step, 1, not of 0.001


def test_a_state_that_turns_on_a_circle_is_not_converged():
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    with pytest.warns(NotConverged):  # the norm never changes, the state always does
        assert not iterate(lambda h: h @ turn.T, torch.tensor([[1.0, 0.0]]), steps=20,
                           tol=1e-3).converged.any()
    damped = iterate(lambda h: h @ turn.T,
                     torch.tensor([[1.0, 0.0]], dtype=F64).float(), steps=40, damping=0.5)
    assert_close(damped.output.norm(), torch.tensor(0.5**20))


@few
@given(seeds, st.floats(0.05, 0.95), st.floats(0, 0.95))
def test_damping_keeps_to_the_guarantee(seed, q, alpha):
    A = matrix(3, q, seed)
    path = iterate(lambda h: h @ A.T, normal(2, 3, seed=seed + 1), steps=10, damping=alpha)
    norms = torch.stack([h.norm(dim=1) for h in path.outputs])
    assert (norms[1:] <= (alpha + (1 - alpha) * q) * norms[:-1] + 1e-12).all()


def test_pytree_and_one_tensor_are_the_same_iteration():
    W = matrix(6, 0.9)
    f = lambda h: torch.tanh(h @ W + 0.1)

    def g(s):
        new = f(torch.cat([s["a"], s["b"][0].flatten(1)], 1))
        return {"a": new[:, :2], "b": [new[:, 2:].reshape(-1, 2, 2)]}

    h0 = normal(5, 6, seed=1)
    tree0 = {"a": h0[:, :2], "b": [h0[:, 2:].reshape(-1, 2, 2)]}
    for solver in ("picard", "anderson"):
        one, tree = (iterate(m, h, steps=40, tol=1e-8, solver=solver)
                     for m, h in ((f, h0), (g, tree0)))
        assert_close(one.residuals, tree.residuals)
        assert_close(one.output[:, 2:], tree.output["b"][0].flatten(1))
        assert one.n_steps.tolist() == tree.n_steps.tolist()
    assert_close(lipschitz(f, h0), lipschitz(g, tree0), rtol=1e-4, atol=0)


def test_what_counts_as_one_example():
    assert iterate(torch.cos, torch.ones(4), steps=3).residuals.shape == (3,)
    assert iterate(torch.cos, torch.ones(4), steps=3, batched=True).residuals.shape == (3, 4)
    assert iterate(torch.cos, torch.ones(4, 2), steps=3).residuals.shape == (3, 4)
    assert iterate(torch.cos, torch.ones(4, 2), steps=3, batched=False).residuals.shape == (3,)
    assert iterate(lambda s: s, (torch.ones(4, 2), torch.ones(4)),
                   steps=3).residuals.shape == (3, 4)
    assert iterate(torch.cos, torch.ones(0, 2), steps=3, tol=1e-3).residuals.shape[1] == 0
    with pytest.raises(ValueError, match="dimension 0.*batched=False"):
        iterate(lambda s: s, (torch.ones(4, 2), torch.ones(3)), steps=3)
    with pytest.raises(ValueError, match="dimension 0"):
        iterate(lambda s: s, (torch.ones(4, 2), torch.ones(())), steps=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_the_dtype_of_the_state_is_kept(dtype, solver):
    W = matrix(4, 0.5, dtype=dtype)
    tol = 16 * torch.finfo(dtype).eps
    path = iterate(lambda h: h @ W + 1, torch.zeros(3, 4, dtype=dtype), steps=50, tol=tol,
                   solver=solver)
    assert path.output.dtype == dtype and path.residuals.dtype == torch.promote_types(
        dtype, torch.float32)
    exact = torch.linalg.solve((torch.eye(4, dtype=F64) - W.double()).T, torch.ones(4, dtype=F64))
    assert_close(path.output.double(), exact.expand(3, 4), rtol=0, atol=40 * torch.finfo(dtype).eps)


def test_autograd_sees_every_plain_step():
    theta = torch.tensor(0.5, dtype=F64, requires_grad=True)
    h = iterate(lambda h: theta * h + 1, torch.zeros(1, dtype=F64), steps=3).output  # θ² + θ + 1
    assert_close(torch.autograd.grad(h.sum(), theta)[0], torch.tensor(2.0, dtype=F64))
    path = iterate(lambda h: theta * h + 1, torch.zeros(1, dtype=F64), steps=3, solver="anderson")
    # no wrong gradient, none
    assert not path.output.requires_grad and not path.residuals.requires_grad


def test_nothing_global_is_touched_and_a_trajectory_travels():
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    path = iterate(torch.cos, torch.ones(2, 1), steps=60, tol=1e-3)
    lipschitz(torch.cos, torch.ones(2, 1))
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == dtype
    for other in (copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
        assert isinstance(other, Trajectory) and other.steps == path.steps
        assert_close(other.outputs, path.outputs)
        assert_close(other.n_steps, path.n_steps)


def test_it_runs_in_inference_mode():
    with torch.inference_mode():
        for solver in ("picard", "anderson"):
            assert iterate(torch.cos, torch.ones(2, 1), steps=60, tol=1e-3,
                           solver=solver).converged.all()


# --- Anderson -------------------------------------------------------------------------------------
# ------------------


@settings(max_examples=150, deadline=None)
@given(seeds, st.integers(1, 10), st.floats(0.1, 0.99), st.integers(0, 3))
def test_anderson_ends_on_a_linear_map_in_dimension_plus_one_steps(seed, d, norm, spare):
    A, b, h0 = matrix(d, norm, seed), normal(d, seed=seed + 1), normal(d, seed=seed + 2)
    path = iterate(lambda h: A @ h + b, h0, steps=d + 1, solver="anderson", memory=d + spare)
    assert len(path.outputs) - 1 <= d + 1
    assert (A @ path.output + b - path.output).norm() <= 1e-8 * (path.outputs[0].norm() + b.norm())
    exact = torch.linalg.solve(torch.eye(d, dtype=F64) - A, b)
    assert_close(path.output, exact, rtol=1e-5, atol=1e-7)


def test_anderson_is_not_exact_where_gmres_stagnates():
    M, c = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    exact = torch.linalg.solve(torch.eye(2, dtype=F64) - M, c)
    run = lambda **options: iterate(lambda h: M @ h + c, torch.zeros(2, dtype=F64), steps=3, solver=
                                    "anderson", memory=2, **options)
    assert_close((run().output - exact).norm(),
                 torch.tensor(1.0, dtype=F64))  # d + 1 steps, and as far as at the start
    assert_close(run(damping=0.1).output, exact)


def test_anderson_on_a_line_is_the_secant_method():
    for slope in (-3.0, -1.1, -0.9, 0.5, 2.0):  # slopes that repel as well
        path = iterate(lambda h, s=slope: 1 + s * (h - 1), torch.full((1, ), 0.3, dtype=F64),
                       steps=2, solver="anderson")
        assert_close(path.output, torch.ones(1, dtype=F64))


@few
@given(seeds, st.integers(1, 8), st.floats(0.5, 4))
def test_anderson_goes_on_from_the_best_state_to_the_best_state(seed, memory, gain):
    W, b = matrix(8, gain, seed), normal(8, seed=seed + 1)
    f = lambda h: torch.tanh(h @ W + b)
    count = []
    path = iterate(lambda h: (count.append(1), f(h))[1], normal(3, 8, seed=seed + 2), steps=25,
                   solver="anderson", memory=memory)
    assert len(count) == 26  # one evaluation more than steps
    lengths = torch.stack([(f(h) - h).norm(dim=1) for h in path.outputs])
    assert (lengths[1:]
            <= lengths[:-1]).all()  # the shortest step is the best, also after the last evaluation
    assert_close(path.residuals, lengths[:-1] / torch.stack(path.outputs[:-1]).norm(dim=2))


def test_anderson_beats_plain_iteration_where_that_is_slow():
    A, b = matrix(30, 1.0, 3), normal(30, seed=4)
    A = 0.999 * (A + A.T) / torch.linalg.matrix_norm(A + A.T, 2)
    plain, mixed = (iterate(lambda h: h @ A + b, torch.zeros(2, 30, dtype=F64), steps=60, solver=s,
                            memory=10) for s in ("picard", "anderson"))
    assert (mixed.residuals[-1] < 1e-2 * plain.residuals[-1]).all()


def test_anderson_survives_a_map_that_fails_at_a_mixed_state():
    calls = []

    def f(h):  # the third evaluation is the first at a state that no plain step would visit
        calls.append(1)
        new = torch.cos(h)
        return torch.where(torch.tensor([[len(calls) == 3], [False]]), torch.nan, new)

    path = iterate(f, torch.tensor([[0.1], [0.2]], dtype=F64), steps=40, tol=1e-10,
                   solver="anderson")
    assert path.converged.all()
    assert_close(path.output, torch.full((2, 1), 0.7390851332151607, dtype=F64))


def test_anderson_with_damping_finds_the_same_point():
    W = matrix(5, 0.9)
    a, b = (iterate(lambda h: torch.tanh(h @ W + 1), torch.zeros(2, 5, dtype=F64), steps=60,
                    tol=1e-11, solver="anderson", damping=d).output for d in (0.0, 0.4))
    assert_close(a, b)


def test_the_first_anderson_step_is_the_damped_plain_one():
    plain, mixed = (iterate(torch.cos, torch.tensor([[0.3]]), steps=1, damping=0.25, solver=solver)
                    for solver in ("picard", "anderson"))
    assert_close(mixed.output, plain.output)
    # the second mixes: a damped step from where the secant crosses zero
    path = iterate(lambda h: h**2 / 4 + 0.5, torch.tensor([[0.1]], dtype=F64), steps=2, damping=0.5,
                   solver="anderson")
    x0, x1, x2 = path.outputs
    f0, f1 = x0**2 / 4 + 0.5, x1**2 / 4 + 0.5
    gamma = (f1 - x1) / ((f1 - x1) - (f0 - x0))
    assert_close(x2, 0.5 * (f1 - gamma * (f1 - f0)) + 0.5 * (x1 - gamma * (x1 - x0)))


def test_anderson_does_nothing_wrong_at_a_fixed_point():
    for h in (torch.zeros(2, 3), torch.ones(2, 3)):
        path = iterate(lambda s: s * 1, h, steps=10, tol=1e-6, solver="anderson")
        assert path.converged.all() and path.n_steps.tolist() == [1, 1] and torch.equal(
            path.output, h)


# --- errors and warnings
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": -1}, "steps.*-1"),
        ({"steps": 2.5}, "steps.*2.5"),
        ({"steps": True}, "steps.*True"),
        ({"steps": np.bool_(True)}, "steps"),
        ({"steps": np.int64(-1)}, "steps.*-1"),
        ({"tol": -1e-3}, "tol.*-0.001"),
        ({"tol": math.nan}, "tol.*nan"),
        ({"tol": math.inf}, "tol.*inf"),
        ({"tol": True}, "tol.*True"),
        ({"damping": 1.0}, r"damping.*\[0, 1\)"),
        ({"damping": -0.1}, r"damping.*-0.1"),
        ({"damping": math.nan}, r"damping.*nan"),
        ({"solver": "andersen"}, "'andersen'.*solver.*picard, anderson"),
        ({"memory": 0}, "memory.*0"),
        ({"memory": False}, "memory.*False"),
        ({"keep": "none"}, "'none'.*keep.*all, last"),
    ],
)
def test_options_out_of_range_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        iterate(torch.cos, torch.ones(2, 2), **options)
    if "keep" not in options:
        with pytest.raises(ValueError, match=says):
            fixed_point(torch.cos, torch.ones(2, 2), **options)


def test_backward_options_are_checked_before_anything_runs():
    with pytest.raises(ValueError, match="steps.*-3"):
        fixed_point(pytest.fail, torch.ones(2, 2), backward_steps=-3)
    with pytest.raises(ValueError, match="tol.*-1"):
        fixed_point(pytest.fail, torch.ones(2, 2), backward_tol=-1.0)


@pytest.mark.parametrize(
    ("f", "says"),
    [
        (lambda h: h[:1], r"f\(h\).*\(2, 2, torch.float32\).*\(1, 2, torch.float32\)"),
        (lambda h: h.double(), r"f\(h\).*float32.*float64"),
        (lambda h: (h,), r"f\(h\).*got \(\("),
        (lambda h: 3.0, r"f\(h\).*'float'"),
        (lambda h: h.mul_(0.5), r"f\(h\).*overwritten"),
    ],
)
@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_a_map_that_does_not_give_the_state_back_is_named(f, says, solver):
    with pytest.raises(ValueError, match=says):
        iterate(f, torch.ones(2, 2), solver=solver)


@pytest.mark.parametrize(
    "h0", [torch.ones(2, dtype=torch.int64), {"a": torch.ones(2), "b": 3.0}, {}, None])
def test_a_state_must_be_tensors_of_numbers(h0):
    with pytest.raises(ValueError, match="state.*tensors"):
        iterate(lambda h: h, h0)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("tol", [None, 1e-3])
def test_a_state_that_is_not_finite_is_named_with_its_step_and_example(solver, tol):
    h0 = torch.tensor([[0.5], [-1.0], [0.3]], dtype=F64)
    with pytest.raises(FloatingPointError, match="iterate: example 1 not finite after step 1"):
        iterate(torch.sqrt, h0, steps=5, tol=tol, solver=solver)
    with pytest.raises(FloatingPointError, match="example 2 not finite after step 0"):
        iterate(torch.cos, torch.tensor([[0.5], [1.0], [math.nan]]), steps=5, tol=tol,
                solver=solver)


def test_divergence_says_when():
    with pytest.raises(
            FloatingPointError,
            match=r"after step 10\."):  # h0^(2^10) is the first power of two above 2^1023
        iterate(lambda h: h**2, torch.tensor(2.0, dtype=F64), steps=50)
    with pytest.raises(FloatingPointError, match="0, 1, 2, 3, 4 "):
        iterate(lambda h: h**2, torch.full((10, 1), 2.0, dtype=F64), steps=50)


def test_the_warning_says_how_many_how_far_and_what_to_do():
    with pytest.warns(NotConverged,
                      match="iterate: 1 of 2 .*tol=0.001.* 0.0152.*5 steps.*anderson"):
        path = iterate(lambda h: (h - 1) / 2 + 1, torch.tensor([[1.001], [1.5]], dtype=F64),
                       steps=5, tol=1e-3)
    assert path.converged.tolist() == [True, False]
    with pytest.warns(NotConverged, match="1 of 1 "):
        iterate(lambda h: h / 2, torch.ones(1), steps=5, tol=1e-3)
    assert issubclass(NotConverged, UserWarning)


# --- local Lipschitz constant
# ---------------------------------------------------------------------------------------


@few
@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_lipschitz_is_the_largest_singular_value_of_the_jacobian(seed, n, m):
    W = normal(n, m, seed=seed)
    h = normal(3, n, seed=seed + 1)
    f = lambda h: torch.sin(h @ W)  # it may map to another dimension
    exact = torch.stack([torch.linalg.matrix_norm(torch.func.jacrev(f)(row), 2) for row in h])
    found = lipschitz(f, h)
    assert found.shape == (3,)
    assert_close(found, exact, rtol=1e-3, atol=1e-9)
    assert (found <= exact * (1 + 1e-9)).all()  # from below


def test_lipschitz_of_a_whole_state_and_of_a_coupled_batch():
    W = matrix(12, 2.5)
    whole = lambda h: (W @ h.flatten()).reshape(h.shape)  # couples the rows
    found = lipschitz(whole, torch.zeros(3, 4, dtype=F64), batched=False)
    assert_close(found, torch.tensor(2.5, dtype=F64), rtol=1e-4, atol=0)
    assert lipschitz(torch.sin, torch.zeros(())).item() == pytest.approx(1.0)
    assert lipschitz(lambda h: 0 * h, torch.ones(3)).item() == 0
    assert_close(lipschitz(lambda h: W.float() @ h, torch.zeros(12)), torch.tensor(2.5), rtol=1e-3,
                 atol=0)


def test_lipschitz_bounds_no_step_but_is_attained():
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    for p in net.parameters():
        p.data = normal(*p.shape, seed=p.numel())
    h = normal(1, 5, seed=9)
    local = lipschitz(net, h)
    assert not local.requires_grad and all(p.grad is None for p in net.parameters())
    tiny = 1e-6 * torch.nn.functional.normalize(normal(1000, 5, seed=2), dim=1)
    stretch = (net(h + tiny) - net(h)).norm(dim=1) / 1e-6
    assert stretch.max() <= local * 1.001 and stretch.max() >= 0.9 * local


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rest", ["equal", "spread"])
def test_lipschitz_finds_one_steep_direction_among_many(dtype, rest):
    stretch = 0.97 * (torch.ones(16384) if rest == "equal" else torch.linspace(0, 1, 16384))
    stretch[1234] = 1.02
    stretch = stretch.to(dtype)
    for seed in range(3):
        assert_close(
            lipschitz(lambda h: stretch * h, torch.zeros(16384, dtype=dtype), seed=seed).item(),
            1.02, rtol=1e-5, atol=0)


def test_lipschitz_misses_one_percent_as_seldom_as_its_theorem_says():
    # the hardest cases known: all singular values but one crowded below the largest
    for gap in (0.98, 0.985, 0.99):
        stretch = torch.cos(torch.linspace(0.0, math.pi / 2, 1000, dtype=F64)) * gap
        stretch[7] = 1.0
        f = lambda h, stretch=stretch: stretch * h
        found = torch.stack(
            [lipschitz(f, torch.zeros(1000, dtype=F64), tol=5e-3, seed=s) for s in range(20)])
        assert (found >= 0.99).all() and (found <= 1 + 1e-12).all()


def test_lipschitz_measures_one_map_even_where_each_call_is_another():
    W, calls = matrix(30, 2.0), []
    f = lambda h: h @ W * (1 + 0.1 * len(calls)) + calls.append(1) if calls else (calls.append(1), h
                                                                                  @ W)[1]
    assert_close(lipschitz(f, torch.zeros(30, dtype=F64)), torch.tensor(2.0, dtype=F64), rtol=1e-5,
                 atol=0)
    assert len(calls) == 1


def test_lipschitz_of_attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    h = normal(2, 3, 8, dtype=torch.float32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = [
            torch.linalg.matrix_norm(torch.func.jacrev(layer)(x[None]).reshape(24, 24), 2).detach()
            for x in h
        ]
        assert_close(lipschitz(layer, h), torch.stack(exact), rtol=1e-4, atol=0)


def test_lipschitz_never_exceeds_the_true_value_after_a_breakdown():
    for rank in (1, 2,
                 5):  # Lanczos' method ends after as many steps, and goes on with rounding errors
        A = normal(40, rank, seed=rank) @ normal(rank, 30, seed=rank + 9)
        found = lipschitz(lambda h, A=A: A @ h, torch.zeros(30, dtype=F64), iters=100)
        assert_close(found, torch.linalg.matrix_norm(A, 2), rtol=1e-6, atol=0)
        assert found <= torch.linalg.matrix_norm(A, 2) * (1 + 1e-12)


def test_lipschitz_takes_maps_that_see_the_whole_batch_and_convolutions():
    x = normal(3, 2, 6, 6, seed=3, dtype=torch.float32)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(),
                        nn.AvgPool2d(3, 1, 1), nn.Conv2d(4, 2, 3, padding=1))
    f = lambda h: net(
        h) + x  # x has the batch size of h: the state must not be copied along the batch
    exact = [
        torch.linalg.matrix_norm(torch.func.jacrev(net)(h[None]).reshape(72, 72), 2) for h in 2 * x
    ]
    assert_close(lipschitz(f, 2 * x), torch.stack(exact).detach(), rtol=1e-4, atol=0)


def test_lipschitz_says_when_it_has_not_settled_or_cannot():
    W = matrix(40, 1.0)
    with pytest.warns(NotConverged, match="lipschitz.*3 iterations"):
        low = lipschitz(lambda h: W @ h, torch.zeros(40, dtype=F64), iters=3)
    assert low < 1
    for options in ({"iters": 0}, {"starts": 0}):
        with pytest.raises(ValueError, match="iters|starts"):
            lipschitz(torch.cos, torch.ones(2), **options)
    with pytest.raises(FloatingPointError, match="Jacobian"):
        lipschitz(torch.sqrt, torch.zeros(2))


def test_spectral_norm_certifies_nothing_about_a_convolution():
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    nn.init.ones_(conv.weight)
    conv = spectral_norm(conv, n_power_iterations=30).eval()
    assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-4)
    by_hand = (1 + 2 * math.cos(math.pi / 17)) ** 2 / 3  # 16 pixels, zero padding
    assert lipschitz(conv, torch.zeros(2, 4, 16, 16)).tolist() == pytest.approx([by_hand] * 2,
                                                                                rel=1e-4)


# --- implicit gradients
# ---------------------------------------------------------------------------------------------


class Cell(nn.Module):
    "A contraction on a pytree, with a weight and an input injected at every step."

    def __init__(self, seed=0, norm=0.8):
        super().__init__()
        self.weight = nn.Parameter(matrix(5, norm, seed))

    def start(self, x):
        return {"a": torch.zeros_like(x), "b": (x.new_zeros(len(x), 5, 1),)}

    def step(self, x):
        return lambda s: {"a": torch.tanh(s["b"][0][:, :, 0] @ self.weight + x),
                          "b": (torch.tanh(s["a"] @ self.weight)[:, :, None] / 2,)}


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from(["picard", "anderson"]), st.sampled_from([0.0, 0.3]))
def test_implicit_gradients_are_the_unrolled_ones(seed, solver, damping):
    cell, x = Cell(seed), normal(4, 5, seed=seed + 1).requires_grad_()

    def gradients(s):
        loss = s["a"].pow(2).sum() + (s["b"][0].sin() *
                                      torch.arange(4, dtype=F64)[:, None, None]).sum()
        return torch.autograd.grad(loss, [cell.weight, x])

    found = fixed_point(cell.step(x), cell.start(x), steps=400, tol=1e-11, solver=solver,
                        damping=damping)
    unrolled = iterate(cell.step(x), cell.start(x), steps=250).output
    assert_close(found, unrolled, rtol=0, atol=1e-9)
    assert_close(gradients(found), gradients(unrolled), rtol=0, atol=1e-6)


def test_implicit_gradients_against_finite_differences():
    W, x = matrix(3, 0.7).requires_grad_(), normal(2, 3, seed=1).requires_grad_()

    def solve(W, x):
        return fixed_point(lambda h: torch.tanh(h @ W + x), torch.zeros(2, 3, dtype=F64), tol=1e-12,
                           backward_tol=1e-12)

    assert torch.autograd.gradcheck(solve, [W, x])
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        torch.autograd.grad(solve(W, x).sum(), W, create_graph=True)


def test_implicit_gradient_where_the_batch_is_coupled():
    W = matrix(6, 0.8).requires_grad_()

    def f(h):
        return torch.tanh(W @ h.flatten() + 0.5).reshape(h.shape)

    h0 = torch.zeros(2, 3, dtype=F64)
    (a,) = torch.autograd.grad(fixed_point(f, h0, tol=1e-12, batched=False).sum(), W)
    (b,) = torch.autograd.grad(iterate(f, h0, steps=300).output.sum(), W)
    assert_close(a, b, rtol=0, atol=1e-8)


def test_the_start_gets_no_gradient_and_parameters_get_theirs_once():
    cell, x = Cell(), normal(4, 5, seed=1)
    h0 = {
        "a": torch.zeros(4, 5, dtype=F64, requires_grad=True),
        "b": (torch.zeros(4, 5, 1, dtype=F64), )
    }
    out = fixed_point(cell.step(x), h0, tol=1e-10)
    out["a"].sum().backward(retain_graph=True)
    once = cell.weight.grad.clone()
    assert h0["a"].grad is None and not x.requires_grad
    out["a"].sum().backward()  # a second time through a kept graph adds the same again
    assert_close(cell.weight.grad, 2 * once)


def test_values_do_not_depend_on_whether_gradients_are_recorded():
    cell, x = Cell(), normal(4, 5, seed=1)
    with_graph = fixed_point(cell.step(x), cell.start(x), return_trajectory=True)
    with torch.no_grad():
        without = fixed_point(cell.step(x), cell.start(x), return_trajectory=True)
    assert with_graph.output["a"].requires_grad and not without.output["a"].requires_grad
    assert_close(with_graph.output, without.output, rtol=0, atol=0)
    assert_close(with_graph.residuals, without.residuals, rtol=0, atol=0)
    assert not fixed_point(lambda h: h.detach() / 2, torch.ones(
        2, 2)).requires_grad  # nothing to differentiate


def test_a_small_gradient_is_solved_as_well_as_a_large_one():
    cell, x = Cell(), normal(4, 5, seed=1)

    def gradient(scale):
        out = fixed_point(cell.step(x), cell.start(x), tol=1e-6)
        return torch.autograd.grad(scale * out["a"].pow(2).sum(), cell.weight)[0] / scale

    assert_close(gradient(1.0), gradient(1e-9))


def test_examples_with_no_gradient_or_an_infinite_one_do_not_spoil_the_others():
    x = normal(3, 5, seed=1).requires_grad_()
    W = matrix(5, 0.8)

    def gradient(v):
        out = fixed_point(lambda h: torch.tanh(h @ W + x), torch.zeros(3, 5, dtype=F64), tol=1e-10)
        return torch.autograd.grad(out, x, v)[0]

    clean = gradient(torch.ones(3, 5, dtype=F64))
    spoilt = gradient(torch.tensor([[1.0], [0.0], [math.inf]], dtype=F64).expand(3, 5))
    assert_close(spoilt[0], clean[0])
    assert_close(spoilt[1], torch.zeros(5, dtype=F64))
    assert not spoilt[2].isfinite().any()  # handed on, as a gradient scaler expects


def test_both_solves_warn():
    W = matrix(5, 0.99).requires_grad_()
    f = lambda h: h @ W + 1
    with pytest.warns(NotConverged, match="fixed_point: 2 of 2 "):
        fixed_point(f, torch.zeros(2, 5, dtype=F64), steps=2, tol=1e-6)
    out = fixed_point(f, torch.zeros(2, 5, dtype=F64), steps=30, tol=1e-6, backward_steps=2)
    with pytest.warns(NotConverged, match="fixed_point, gradient: 2 of 2 .*tol=1e-06.* 2 steps"):
        out.sum().backward()


def saved_bytes(run):
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = run()
    return sum(kept.values()) if alive is not None else 0


def test_memory_does_not_grow_with_the_steps():
    W, x = matrix(32, 0.9).requires_grad_(), normal(16, 32, seed=1)
    f, h0 = lambda h: torch.tanh(h @ W + x), torch.zeros(16, 32, dtype=F64)

    def implicit(T):
        path = fixed_point(f, h0, steps=T, tol=False, solver="picard", return_trajectory=True)
        assert path.steps == T and len(path.outputs) == 2  # nor are the states kept
        return path

    few_steps, many_steps = (saved_bytes(lambda T=T: implicit(T)) for T in (2, 64))
    assert few_steps == many_steps
    unrolled = [saved_bytes(lambda T=T: iterate(f, h0, steps=T)) for T in (2, 64)]
    assert unrolled[1] - unrolled[0] >= 62 * h0.nbytes
    assert many_steps < unrolled[0] + h0.nbytes


@pytest.mark.parametrize("keep_output", [False, True])
def test_a_call_leaves_nothing_behind(keep_output):
    alive = []

    def call():
        W = matrix(32, 0.9).requires_grad_()

        def f(h):
            new = torch.tanh(h @ W + 1)
            alive.append(weakref.ref(new))
            return new

        out = fixed_point(f, torch.zeros(4, 32, dtype=F64), tol=1e-8)
        out.sum().backward()
        return out.detach() if keep_output else None

    gc.collect()
    gc.disable()  # a reference cycle would wait for the collector: there must be none
    try:
        kept = call()
        assert alive and not any(ref() is not None for ref in alive)
    finally:
        gc.enable()
    assert (kept is not None) == keep_output


def test_an_optimiser_can_train_through_it():
    torch.manual_seed(0)
    cell = nn.Linear(4, 4)
    nn.init.orthogonal_(cell.weight, gain=0.5)
    x, target = normal(16, 4,
                       dtype=torch.float32), 0.5 * torch.tanh(normal(16, 4, dtype=torch.float32))
    optimiser = torch.optim.SGD(cell.parameters(), lr=0.2)
    losses = []
    for _ in range(30):
        loss = (fixed_point(lambda h: torch.tanh(cell(h) + x), torch.zeros(16, 4)) -
                target).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_torchdeq_agrees():
    torchdeq = pytest.importorskip("torchdeq", reason="the oracle is not installed")
    W, x = matrix(6, 0.8).requires_grad_(), normal(3, 6, seed=1).requires_grad_()
    f = lambda h: torch.tanh(h @ W + x)
    h0 = torch.zeros(3, 6, dtype=F64)
    deq = torchdeq.get_deq(f_solver="fixed_point_iter", b_solver="fixed_point_iter", f_max_iter=300,
                           b_max_iter=300, f_tol=1e-12, b_tol=1e-12, ift=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        theirs = deq(f, h0)[0][-1]
        their_gradients = torch.autograd.grad(theirs.pow(3).sum(), [W, x])
    ours = fixed_point(f, h0, tol=1e-12)
    assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert_close(torch.autograd.grad(ours.pow(3).sum(), [W, x]), their_gradients, rtol=0, atol=1e-8)


# --- what feedback networks need from it
# ----------------------------------------------------------------------------


@few
@given(seeds)
def test_a_spectral_radius_below_one_suffices_whatever_the_norm(seed):
    # J = P diag(λ) P⁻¹ with a skewed P: every usual norm is above 1, the spectral radius is 0.8
    P = torch.tensor([[1.0, 1.0], [0.0, 0.2]], dtype=F64)
    J = P @ torch.diag(torch.tensor([0.8, -0.7], dtype=F64)) @ torch.linalg.inv(P)
    assert all(torch.linalg.matrix_norm(J, p) > 1 for p in (1, 2, math.inf, "fro"))
    f = lambda h: 1 + torch.tanh((h - 1) @ J.T)  # its fixed point is 1, its Jacobian there J
    start = 1 + 0.3 * normal(4, 2, seed=seed)
    errors = (torch.stack(iterate(f, start, steps=100).outputs) -
              1) @ torch.linalg.inv(P).T  # in the norm made for J
    lengths = errors.abs().amax(2)
    assert (lengths[-1] < 1e-6).all()
    assert (lengths[41:81] <= (0.8 + 1e-3) * lengths[40:80]).all()  # it shrinks at each step


def test_a_contraction_that_never_sees_its_input_forgets_it():
    W, x = matrix(6, 0.8), normal(3, 6, seed=1)
    forgets = iterate(lambda h: torch.tanh(h @ W + 1), x, steps=200).output
    recalls = iterate(lambda h: torch.tanh(h @ W + x), x, steps=200).output
    assert_close(forgets, forgets[:1].expand(3, 6))
    assert torch.pdist(recalls).min() > 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_it_stays_on_the_device(solver):
    W = matrix(6, 0.8, dtype=torch.float32).cuda().requires_grad_()
    f, h0 = lambda h: torch.tanh(h @ W + 1), torch.zeros(3, 6, device="cuda")
    path = iterate(f, h0, steps=50, tol=1e-5, solver=solver)
    assert path.output.device == path.residuals.device == path.n_steps.device == h0.device
    out = fixed_point(f, h0, solver=solver)
    (gradient,) = torch.autograd.grad(out.sum(), W)
    (unrolled,) = torch.autograd.grad(iterate(f, h0, steps=100).output.sum(), W)
    assert_close(gradient, unrolled, rtol=1e-2, atol=1e-3)
    assert lipschitz(f, h0).device == h0.device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_without_a_tolerance_no_step_waits_for_the_device():
    calls = []

    def f(h):  # between the first call and the last any wait is an error
        calls.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(calls) < 5 else "default")
        return torch.cos(h)

    try:
        iterate(f, torch.ones(3, 6, device="cuda"), steps=5, damping=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_residual_equal_to_the_tolerance_is_converged():
    found = iterate(lambda h: h, torch.ones(2, 3), steps=5, tol=0.0)
    assert len(found.residuals) == 1 and not found.residuals[0].any()


def test_an_example_without_a_gradient_gets_none():
    weight = torch.tensor([[0.3, 0.1], [0.0, 0.4]], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    h = fixed_point(lambda h: h @ weight.T + x, torch.zeros_like(x), steps=200, tol=1e-13)
    h[0].sum().backward()  # nothing is asked of the second example
    assert not x.grad[1].any()
    assert_close(x.grad[0], torch.linalg.inv(torch.eye(2, dtype=x.dtype) - weight.detach()).sum(0))
