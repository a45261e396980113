# SPDX-License-Identifier: Apache-2.0
"""What explains how a weight differs: factors, a rotation, a permutation, and what does not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from verifier.reconstruction.transforms import (
    Rotation,
    far_rows,
    fit_scaling,
    is_intact,
    is_rotation,
    permuted,
    rotation_matrix,
)

Array = npt.NDArray[np.float32]
OUT, IN = 192, 128


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def orthogonal(size: int) -> Array:
    return np.linalg.qr(normal(9, size, size))[0].astype(np.float32)


@pytest.fixture
def base() -> Array:
    return normal(0, OUT, IN)


def noisy(values: Array) -> Array:
    """Add a tenth of noise, as four bits leave it."""
    return values + 0.1 * np.abs(values).mean() * normal(1, *values.shape)


def test_factors_of_rows_and_columns_are_found(base: Array) -> None:
    rows, columns = np.exp2(normal(2, OUT)), np.exp2(normal(3, IN))
    fit = fit_scaling(noisy(base * rows[:, None] * columns), base)
    assert fit is not None
    assert fit.intact
    assert fit.error < 0.15
    product = fit.rows[:, None] * fit.columns / (rows[:, None] * columns)
    assert np.abs(product - 1).mean() < 0.05


@pytest.mark.parametrize("defect", ["rows swapped", "noise", "a row zero", "a sign turned"])
def test_factors_do_not_explain_damage(base: Array, defect: str) -> None:
    values = noisy(base * np.exp2(normal(3, IN)))
    if defect == "rows swapped":
        values[[4, 7]] = values[[7, 4]]
    elif defect == "noise":
        values = normal(5, OUT, IN)
    elif defect == "a row zero":
        values[3] = 0
    else:
        values[3] *= -1
    fit = fit_scaling(values, base)
    assert fit is None or not fit.intact or fit.error > 0.5


@pytest.mark.parametrize("values", [np.zeros((4, 8), np.float32), np.full((4, 8), np.nan)])
def test_nothing_is_fitted_to_zeros_and_nan(values: Array) -> None:
    assert fit_scaling(np.asarray(values, np.float32), np.ones((4, 8), np.float32)) is None
    assert fit_scaling(np.ones((4, 8), np.float32), np.asarray(values, np.float32)) is None


def test_a_block_of_a_different_weight_is_not_intact(base: Array) -> None:
    values = noisy(base)
    assert is_intact(values, base)
    values[5, 32:64] = normal(6, 32)
    assert not is_intact(values, base)
    assert not far_rows(values, base).any()


def test_one_rotation_explains_inputs_and_outputs(base: Array) -> None:
    turn = orthogonal(IN)
    table = normal(4, 2 * IN, IN)
    assert is_rotation(table[:64], table[:64] @ turn)
    assert not is_rotation(table[:64], normal(5, 64, IN))
    matrix = rotation_matrix([(table, table @ turn)])
    assert matrix is not None
    assert np.abs(matrix - turn).max() < 1e-3
    rotation = Rotation(table[:64], table[:64] @ turn, matrix)
    turned = noisy(base @ turn)
    assert rotation.input_error(turned, base)[0] < 0.15
    assert rotation.input_error(turned, base)[1]
    writer = normal(6, IN, OUT)
    assert rotation.output_error(noisy(turn.T @ writer), writer)[1]
    swapped = turn.T @ writer
    swapped[[1, 2]] = swapped[[2, 1]]
    assert not rotation.output_error(swapped, writer)[1]
    assert rotation.input_error(normal(7, OUT, IN), base)[0] > 1


def test_too_few_rows_give_no_rotation() -> None:
    table = normal(4, IN, IN)
    assert rotation_matrix([(table, table)]) is None


def test_values_and_outputs_that_turn_alike(base: Array) -> None:
    turn, inner = orthogonal(IN), orthogonal(32)
    table = normal(4, 2 * IN, IN)
    rotation = Rotation(table[:64], table[:64] @ turn, turn)
    first, second = normal(5, 32, IN), normal(6, IN, 32)
    pair = inner.T @ first @ turn, turn.T @ second @ inner
    assert rotation.composed_error(pair, (first, second)) == (pytest.approx(0, abs=1e-4), True)
    wrong = pair[0][::-1], pair[1]
    assert rotation.composed_error(wrong, (first, second))[0] > 1


def test_permutations_are_named(base: Array) -> None:
    order = np.random.default_rng(8).permutation
    assert permuted(noisy(base[order(OUT)]), base) == "rows"
    assert permuted(noisy(base[:, order(IN)]), base) == "columns"
    assert permuted(noisy(base), base) == ""
    assert permuted(normal(5, OUT, IN), base) == ""
