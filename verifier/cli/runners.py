# SPDX-License-Identifier: Apache-2.0
"""Who does the units of a command's job: a share of a job array, or Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from verifier.cli.options import LOCAL_RAY
from verifier.cli.progress import progress_bar
from verifier.errors import UsageError

if TYPE_CHECKING:
    from verifier.units import Runner


def runner_given(
    units: str | None,
    ray: str | None,
    *,
    label: str,
    workers: int | None,
    default: int = 1,
    gpus: int = 0,
) -> AbstractContextManager[Runner] | None:
    """Return what enters the runner that ``--units`` or ``--ray`` names, None without both.

    Args:
        units: K/N.
        ray: HOST:PORT, or `LOCAL_RAY`.
        label: what the progress of Ray says, as a participle.
        workers: threads or processes of each unit.
        default: the same on Ray, where the user gives no number.
        gpus: GPUs of each unit on Ray.

    Raises:
        UsageError: both; no such share; Ray is missing.
    """
    if units is not None and ray is not None:
        raise UsageError("--units and --ray exclude each other")
    if units is not None:
        from verifier.units import share_of  # noqa: PLC0415  (few commands are divided)

        return nullcontext(replace(share_of(units), workers=workers))
    if ray is None:
        return None
    from verifier.ray_runner import require_ray  # noqa: PLC0415  (as above)

    require_ray()
    return _on_ray(None if ray == LOCAL_RAY else ray, label, workers or default, gpus)


@contextmanager
def _on_ray(address: str | None, label: str, workers: int, gpus: int) -> Iterator[Runner]:
    from verifier.ray_runner import on_ray  # noqa: PLC0415  (as above)

    with (
        progress_bar(label, unit="part") as progress,
        on_ray(address, workers, progress, gpus=gpus) as runner,
    ):
        yield runner
