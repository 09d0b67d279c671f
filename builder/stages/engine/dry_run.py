"""Estimate the disk, memory and time of a build, and whether this machine has them.

No weight is read or fetched; only a config and an index are written, to the hub's cache.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from builder.checkpoint import hub
from builder.checkpoint.config import read_architecture
from builder.checkpoint.files import CONFIG
from builder.checkpoint.safetensors import ITEM_BYTES, Tensor
from builder.checkpoint.tensors import EXACT_IN, expected_tensors
from builder.quantization.rules import resolve
from builder.stages.engine.estimate import Facts, GraphBytes, StageCost, Stored, graph_bytes, stage_cost
from builder.util import machine
from builder.util.errors import ResourceError
from builder.util.json_files import read_json
from builder.util.units import size
from builder.verify.memory_budget import Mode, verify_mode

if TYPE_CHECKING:
    from builder.checkpoint.load import Checkpoint
    from builder.stages.engine.build import Build
    from builder.stages.engine.execute import Step

Use = Literal["output", "download"]

NOTHING = StageCost(0, 0, 0.0)
ELSEWHERE: Mapping[Use, str] = {
    "output": "give another --output",
    "download": "set HF_HUB_CACHE to a folder on another disk",
}
MORE_MEMORY = "raise the container's limit, or use a machine with more memory"


@dataclass(frozen=True)
class Disk:
    """A disk that a build writes to.

    Args:
        folder: a folder on it.
        uses: use → bytes.
        free: bytes available, counting leftovers of an interrupted build that this build removes.
    """

    folder: Path
    uses: Mapping[Use, int]
    free: int

    @property
    def needed(self) -> int:
        """Total bytes of all uses."""
        return sum(self.uses.values())

    @property
    def short(self) -> bool:
        return self.needed > self.free


@dataclass(frozen=True)
class Estimate:
    """Estimated costs of a build.

    Args:
        steps: every stage with its cost (`NOTHING` if cached).
        graphs: graphs whose weights would be written.
        download: file → bytes to fetch from the hub.
        disks: disks that are written to.
        memory: bytes that this process may use.
        mode: how `verify` would run.
        command: command that builds the same checkpoint.
    """

    steps: tuple[tuple[Step, StageCost], ...]
    graphs: tuple[GraphBytes, ...]
    download: Mapping[str, int]
    disks: tuple[Disk, ...]
    memory: int
    mode: Mode
    command: str

    @property
    def largest(self) -> tuple[Step, StageCost]:
        """The stage with the largest memory use."""
        return max(self.steps, key=lambda step: step[1].memory)

    @property
    def seconds(self) -> float:
        """Total of all stages, without the download."""
        return sum(cost.seconds for _, cost in self.steps)

    @property
    def fits(self) -> bool:
        """Whether this machine has enough memory and disk."""
        return self.largest[1].memory <= self.memory and not any(disk.short for disk in self.disks)

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate for JSON, in bytes and seconds."""
        stages = [
            {"stage": step.stage.name, "state": step.state, "why": step.why, **asdict(cost)}
            for step, cost in self.steps
        ]
        disks = [
            {"folder": str(disk.folder), "needed": disk.needed, "free": disk.free, **disk.uses} for disk in self.disks
        ]
        return {
            "fits": self.fits,
            "stages": stages,
            "graphs": [asdict(row) for row in self.graphs],
            "data_bytes": sum(row.data_bytes for row in self.graphs),
            "download": {"files": dict(self.download), "bytes": sum(self.download.values())},
            "disks": disks,
            "memory": {"needed": self.largest[1].memory, "limit": self.memory, "verify": self.mode},
            "seconds": round(self.seconds),
        }

    def refuse(self) -> None:
        """Raise unless the build fits.

        Raises:
            ResourceError: with what is needed, what is available, and the estimate.
        """
        if self.fits:
            return
        short = [disk for disk in self.disks if disk.short]
        needed = [f"{size(disk.needed)} of disk under {disk.folder}" for disk in short]
        found = [f"{size(disk.free)} of disk" for disk in short]
        advice = [" or ".join(ELSEWHERE[use] for use in disk.uses) for disk in short]
        step, cost = self.largest
        if cost.memory > self.memory:
            needed.append(f"{size(cost.memory)} of memory for the stage {step.stage.name}")
            found.append(f"{size(self.memory)} of memory")
            advice.append(self._with_less_memory())
        raise ResourceError(
            "this build needs more memory or disk than this machine has, and was not started",
            expected=", ".join(needed),
            found=", ".join(found),
            next="; ".join(advice),
            estimate=self.as_dict(),
        )

    def _with_less_memory(self) -> str:
        large = [step.stage.name for step, cost in self.steps if cost.memory > self.memory]
        if large != ["verify"]:
            return MORE_MEMORY
        return f"{MORE_MEMORY}; or build without verifying: {self.command} --until configure"


def estimated(build: Build, steps: Sequence[Step]) -> Estimate:
    """Estimate what `builder.stages.engine.execute.execute` would do.

    Raises:
        BuildError: the stage `fetch` would refuse the checkpoint, or the hub cannot be reached.
    """
    facts, memory = known(build, steps), machine.memory_limit()
    mode = verify_mode(facts, memory if build.memory is None else build.memory)
    runtimes = [target.runtime for target in build.recipe.targets]
    stored = Stored(resolve(build.recipe.rules, facts.tensors), build.recipe.precision)
    running = {step.stage.name for step in steps if step.state == "run"}
    costs = tuple(
        (step, stage_cost(step.stage.name, facts, runtimes, mode, stored) if step.stage.name in running else NOTHING)
        for step in steps
    )
    uses: dict[Use, tuple[Path, int]] = {"output": (build.output, sum(cost.written for _, cost in costs))}
    if facts.missing:
        uses["download"] = hub.cache_folder(), sum(facts.missing.values())
    return Estimate(
        steps=costs,
        graphs=graph_bytes(facts, runtimes, stored) if "quantize" in running else (),
        download=facts.missing,
        disks=disks(uses, left_over(build.output)),
        memory=memory,
        mode=mode,
        command=build.source.command,
    )


def known(build: Build, steps: Sequence[Step]) -> Facts:
    """Describe the build's checkpoint without its weights, from the hub's metadata if it is not downloaded."""
    fetched = any(step.stage.name == "fetch" and step.state == "cached" for step in steps)
    if fetched or build.source.folder is not None:
        return described(build.checkpoint)
    folder, remotes = hub.list_needed(build.source)
    here = {file: (folder / file).stat().st_size for file in remotes if (folder / file).is_file()}
    missing = {file: remote.size or 0 for file, remote in remotes.items() if file not in here}
    config = read_json(folder / CONFIG)
    text, vision = read_architecture(config)
    # Published checkpoints are BF16: assumed where the config has no dtype.
    dtype = EXACT_IN.get(str(config.get("dtype") or config.get("torch_dtype")), ("BF16",))[0]
    tensors = {
        name: Tensor(name, "", dtype, shape, 0, math.prod(shape) * ITEM_BYTES[dtype])
        for name, shape in expected_tensors(config, text, vision).items()
    }
    return Facts(text, vision, tensors, {**here, **missing}, missing)


def described(checkpoint: Checkpoint) -> Facts:
    """Describe a local checkpoint."""
    files = {file: count for file, (count, _) in checkpoint.states.items()}
    return Facts(checkpoint.text, checkpoint.vision, checkpoint.tensors, files, {})


def disks(uses: Mapping[Use, tuple[Path, int]], left: int) -> tuple[Disk, ...]:
    """Group the uses by disk; `left` bytes are freed on the output's disk."""
    found: list[Disk] = []
    for use, (folder, count) in uses.items():
        shared = next((disk for disk in found if machine.same_disk(disk.folder, folder)), None)
        if shared is None:
            found.append(Disk(folder, {use: count}, machine.free_disk(folder) + (left if use == "output" else 0)))
        else:
            found[found.index(shared)] = Disk(shared.folder, {**shared.uses, use: count}, shared.free)
    return tuple(found)


def left_over(output: Path) -> int:
    """Count the bytes that an interrupted build left, which the next build removes."""
    freed = 0
    for part in output.glob("*.part"):
        links: defaultdict[tuple[int, int], int] = defaultdict(int)
        for stat in (file.lstat() for file in part.rglob("*") if file.is_file()):
            links[stat.st_dev, stat.st_ino] += 1
            # A file with links elsewhere keeps its space.
            if links[stat.st_dev, stat.st_ino] == stat.st_nlink:
                freed += stat.st_size
    return freed
