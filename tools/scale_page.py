# SPDX-License-Identifier: Apache-2.0
"""What an export and its check cost for models of real size: the arithmetic of docs/scale.md.

    python tools/scale_page.py

Rates and memory are medians of `benchmarks/results/real.json`; models, machines and prices are the
tables below. `tools/make_docs.py` renders the page with it.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "real.json"
NVFP4 = 0.5 + 1 / 16
"""Bytes of a quantized weight: four bits, and a scale of one byte for 16."""
BF16 = 2.0
THREADS = 4
"""Threads that make the digests of an export, by default."""
MAX_WORKERS = 64
"""The most workers of a process."""
CORE_HOUR = 0.05
"""US dollars for an hour of one processor core, as public clouds charge on demand."""
GPU_MACHINE_HOUR = 25.0
"""US dollars for an hour of a machine with 8 GPUs; no step uses the GPUs."""


FAULTS = {
    "faults": "files that cannot be read, full disks, quotas, few descriptors, little memory, "
    "signals once and repeated, two commands into one OUT, a source that changes; the same bytes "
    "with 1 to 8 workers, other hash seeds, umask, directory, locale and time zone",
    "ray": "export, merge, check and score on Ray; a killed node, a killed driver, signals",
    "slurm": "the same as arrays on Slurm; a killed task, a cancelled one, a killed node; arrays "
    "submitted again",
}
"""Folders of tests, and what they do."""


@dataclass(frozen=True)
class Model:
    """A model by its parameters: in routed experts, which are quantized, and all."""

    name: str
    experts: float
    parameters: float

    @property
    def source(self) -> float:
        """Bytes in BF16."""
        return self.parameters * BF16

    @property
    def export(self) -> float:
        """Bytes with the experts in NVFP4."""
        return self.experts * NVFP4 + (self.parameters - self.experts) * BF16


@dataclass(frozen=True)
class Setup:
    """Machines; rates in bytes per second, of all nodes together where they share storage.

    Attributes:
        name: what it is called.
        nodes: how many machines.
        cores: cores of each.
        read: of the source.
        write: of the output, and of reading it again.
        network: of each node; None where nothing is read over one.
        hour: US dollars for an hour of all nodes.
    """

    name: str
    nodes: int
    cores: int
    read: float
    write: float
    network: float | None
    hour: float


MODELS = (
    Model("MiniMax-M3, 428B", 57 * 128 * 3 * 3072 * 6144, 427e9),
    Model("Kimi K2, 1T", 60 * 384 * 3 * 2048 * 7168, 1.026e12),
)
SETUPS = (
    Setup("one machine", 1, 16, 3e9, 2e9, None, 16 * CORE_HOUR),
    Setup("one machine with 8 GPUs", 1, 128, 12e9, 8e9, None, GPU_MACHINE_HOUR),
    Setup("16 nodes, shared storage", 16, 16, 20e9, 10e9, 3e9, 256 * CORE_HOUR),
    Setup("16 nodes, object store", 16, 16, 16 * 1.2e9, 10e9, 1.2e9, 256 * CORE_HOUR),
)
EXPLAINED = (
    "16 cores; a disk of 3 GB/s read, 2 GB/s written",
    "128 cores; disks of 12 and 8 GB/s; no rate of a GPU is measured, so the processor encodes",
    "16 cores and a network of 3 GB/s each; storage of 20 and 10 GB/s for all",
    "the source from a bucket of the same region at 1.2 GB/s for each node; OUT as above",
)


@dataclass(frozen=True)
class Rates:
    """What `benchmarks/real.py` measured: bytes of source per second and core, of SHA-256 on one
    core, and megabytes that a command allocates.
    """

    export: float
    check: float
    sha256: float
    export_mb: float
    check_mb: float


@dataclass(frozen=True)
class Cost:
    """Seconds of one step and the resource that takes them."""

    seconds: float
    limit: str


def rates(results: dict[str, Any]) -> Rates:
    """Return the rates of the checkout that was measured."""
    steps, nbytes = results["rounds"]["after"], results["bytes"]

    def middle(step: str, key: str) -> float:
        return statistics.median(one[key] for one in steps[step])

    return Rates(
        export=nbytes["source"] / middle("export_max", "cpu_s"),
        check=nbytes["source"] / middle("check_base", "cpu_s"),
        sha256=nbytes["export"] / middle("sha256", "cpu_s"),
        export_mb=middle("export_max", "allocated_mb"),
        check_mb=middle("check_base", "allocated_mb"),
    )


def export_cost(model: Model, setup: Setup, rate: Rates) -> Cost:
    """Return the cost of writing an export. With several nodes, the one that completes it reads it
    again for the digests.
    """
    cores = setup.nodes * min(setup.cores, MAX_WORKERS)
    disk = max(model.source / setup.read, model.export / setup.write)
    cost = _slowest(model.source / (rate.export * cores), disk, model, setup)
    if setup.nodes == 1:
        return cost
    again = model.export / min(THREADS * rate.sha256, setup.network or setup.write, setup.write)
    return Cost(cost.seconds + again, cost.limit if cost.seconds > again else "digests")


def check_cost(model: Model, setup: Setup, rate: Rates) -> Cost:
    """Return the cost of a check at depth payload with its base."""
    cores = setup.nodes * min(setup.cores, MAX_WORKERS)
    disk = (model.source + model.export) / setup.read
    return _slowest(model.source / (rate.check * cores), disk, model, setup)


def _slowest(codec: float, disk: float, model: Model, setup: Setup) -> Cost:
    seconds = {"codec": codec, "disk": disk}
    if setup.network is not None:
        seconds["network"] = (model.source + model.export) / (setup.nodes * setup.network)
    limit = max(seconds, key=lambda name: seconds[name])
    return Cost(seconds[limit], limit)


def scale_lines(results: dict[str, Any]) -> list[str]:
    """Return the section of docs/scale.md."""
    rate, arguments = rates(results), results["arguments"]
    lines = [
        f"Measured (`{results['command']} --experts {arguments['experts']}`, "
        f"[performance](performance.md)): a core exports {rate.export / 1e9:.2f} GB of source a",
        f"second (`max`) and checks {rate.check / 1e9:.2f} GB of base; SHA-256 takes "
        f"{rate.sha256 / 1e9:.1f} GB/s. With {arguments['workers']} workers an export holds",
        f"{rate.export_mb:,.0f} MB of memory, a check {rate.check_mb:,.0f} MB, whatever "
        "the size of the model. Computed from that, for",
        "sources in BF16 and experts in NVFP4. It assumes that the rates grow with `--workers`, "
        f"set to the number of cores, at most {MAX_WORKERS};",
        f"that was measured with {arguments['workers']} only. Nothing below was run at this size.",
        "",
        "| model | machines | export | limit | check | limit | read | written | cost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in MODELS:
        for setup in SETUPS:
            lines.append(_row(model, setup, rate))
    lines += [
        "",
        "Assumed:",
        "",
        *(f"* {s.name}: {text}" for s, text in zip(SETUPS, EXPLAINED, strict=True)),
        "",
        f"Prices: {CORE_HOUR} US dollars for a core and hour, {GPU_MACHINE_HOUR:.0f} for an hour "
        "with 8 GPUs; traffic within a region is free.",
        "*Read* and *written* are those of export and check together. *Digests*: the node that "
        "completes an export reads it",
        f"again, in {THREADS} threads. What a limit says: *codec*, more cores help; *disk* and "
        "*network*, only faster storage does. For other",
        "machines change the tables in `tools/scale_page.py` and run it.",
        "",
    ]
    return lines


def faults_lines() -> list[str]:
    """Return the table of docs/scale.md on faults, from the results of their tests."""
    kill, soak = _results("kill/results.json"), _results("faults/soak.json")
    lines = ["| what was done | how often | ended otherwise than it must |", "| --- | --- | --- |"]
    kills = ", ".join(f"{name} {count}" for name, count in kill["kills"].items())
    lines.append(
        f"| `kill -9` at a random moment, then the same command again ({kills}) "
        f"| {sum(kill['kills'].values())} kills, {kill['seeds']} seeds | {len(kill['wrong'])} |"
    )
    for folder, what in FAULTS.items():
        outcomes = _results(f"{folder}/results.json")["tests"].values()
        failed = sum(outcome == "failed" for outcome in outcomes)
        lines.append(
            f"| {what} | {sum(o != 'skipped' for o in outcomes)} tests, `{folder}` | {failed} |"
        )
    first, last = (soak["after"][number] for number in (*soak["after"],)[-2:])
    lines.append(
        f"| exports and checks in one process; memory {first['allocated_kb'] / 1000:.0f} MB "
        f"after {(*soak['after'],)[-2]} and {last['allocated_kb'] / 1000:.0f} MB at the end "
        f"| {(*soak['after'],)[-1]} | {len(soak['grown'])} |"
    )
    return [*lines, ""]


def _results(name: str) -> Any:
    return json.loads((ROOT / "tests" / name).read_text(encoding="utf-8"))


def _row(model: Model, setup: Setup, rate: Rates) -> str:
    export, check = export_cost(model, setup, rate), check_cost(model, setup, rate)
    again = model.export if setup.nodes > 1 else 0
    read = 2 * model.source + model.export + again
    dollars = (export.seconds + check.seconds) / 3600 * setup.hour
    cells = (
        *(model.name, setup.name, _minutes(export.seconds), export.limit),
        *(_minutes(check.seconds), check.limit),
        *(f"{read / 1e12:.2f} TB", f"{model.export / 1e12:.2f} TB", f"${dollars:.2f}"),
    )
    return f"| {' | '.join(cells)} |"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    print("\n".join(scale_lines(json.loads(RESULTS.read_text(encoding="utf-8")))))
