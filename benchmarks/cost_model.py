"""
What training costs on many GPUs and on many pairs: computed, not measured, from the shapes of ViT-B/32 and from the
inputs below; and how far the same model is from what `scaling.py` measured on this machine.

    python benchmarks/cost_model.py [--json FILE]

The model takes from other results what it does not compute: bytes a row of the split and of the scoring pass
(`split_at_scale.json`, `scoring_pass.json`), the mixture's time (`mixture_fit.json`), and what a pair costs a loading
process (`data_path.json`). `pages.py` puts the tables into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.flops import PairFlops, pair_flops
from bench.marked import ROOT, markdown
from bench.output import write_result
from bench.phases import PHASES, small_clip
from bench.traffic import contrastive_traffic, gradient_traffic
from transformers import CLIPConfig

RESULTS = ROOT / "benchmarks" / "results"
GPUS = (1, 8, 64, 256)
DATASETS = {"1M": 1_000_000, "12M (CC12M)": 12_000_000, "400M (LAION-400M)": 400_000_000}
#: Bytes of a parameter that AdamW in float32 moves (weight, gradient, two moments read; all but the gradient
#: written), and that clipping does (gradient read for its norm, then read and written).
UPDATE_BYTES = (4 + 3 + 3) * 4


@dataclass(frozen=True)
class Machine:
    """
    The named inputs. The defaults are of H100 SXM GPUs, eight to a node.

    Args:
        product_flops: FLOP a second of the towers: the data sheet's dense bf16 peak of 989 TFLOP/s, at 40%, an
            assumption.
        float32_flops: FLOP a second of losses and look-ups: the data sheet's 67 TFLOP/s, at 50%, an assumption.
        memory_bytes: Bytes a second of the optimizer: the data sheet's 3.35 TB/s, at 80%, an assumption.
        node_bytes: Bytes a second that a GPU sends within its node: NVLink's 450 GB/s each way, at 80%, an assumption.
        network_bytes: Bytes a second that a GPU sends beyond: one 400 Gb/s adapter a GPU, 50 GB/s, an assumption.
        gpus_of_a_node: How many GPUs make a node.
    """

    product_flops: float = 0.4 * 989e12
    float32_flops: float = 0.5 * 67e12
    memory_bytes: float = 0.8 * 3.35e12
    node_bytes: float = 0.8 * 450e9
    network_bytes: float = 50e9
    gpus_of_a_node: int = 8

    def sending(self, world: int) -> float:
        """Bytes a second that a process sends: a ring is as fast as its slowest link."""
        return self.node_bytes if world <= self.gpus_of_a_node else self.network_bytes


@dataclass(frozen=True)
class Training:
    """
    What is trained. The defaults are ViT-B/32 at 224 pixels, as of `CLIPConfig()`.

    Args:
        flops ([`PairFlops`]): Of one view of a pair.
        parameters (`int`): Of the model.
        dim (`int`): Of the embeddings.
        batch (`int`): Pairs of a process in a step.
        pool_size (`int`): Pairs in the pools.
    """

    flops: PairFlops
    parameters: int
    dim: int = 512
    batch: int = 256
    pool_size: int = 20_000


@dataclass(frozen=True)
class Step:
    """Seconds of a step, part by part, one after the other: nothing is taken to overlap. Bytes sent by a process."""

    towers: float
    loss: float
    look_up: float
    optimizer: float
    embeddings: float
    gradients: float
    embedding_bytes: float
    gradient_bytes: float

    @property
    def seconds(self) -> float:
        return self.towers + self.loss + self.look_up + self.optimizer + self.embeddings + self.gradients


#: Of each phase: views, rows of logits against the keys of all processes (each once forward, twice backward), and
#: look-ups in a pool.
SHAPES: dict[str, tuple[int, int, int]] = {
    "clip": (1, 2, 0),
    "cleanclip": (2, 4, 0),
    "roclip_plain": (1, 2, 0),
    "roclip_matching": (1, 2, 1),
    "safeclip_unimodal": (2, 2, 2),
    "safeclip_cross": (2, 2, 0),
    "safeclip_safe": (2, 2, 0),
}


def vit_b_32() -> Training:
    """ViT-B/32 at 224 pixels, captions padded to 77 tokens, which is the most."""
    config = CLIPConfig()
    return Training(pair_flops(config, text_tokens=77), parameters=151_277_313, dim=config.projection_dim)


def step_of(phase: str, training: Training, machine: Machine, world: int) -> Step:
    """A step of a phase on so many processes."""
    views, logits, look_ups = SHAPES[phase]
    batch, dim = training.batch, training.dim
    embeddings = contrastive_traffic(phase, batch, dim, world).sent(world)
    gradients = gradient_traffic(training.parameters, world).sent(world)
    # The model computes logits of its own, of all its views, which no loss here uses.
    products = logits * 3 * 2 * batch * world * batch * dim + 2 * (views * batch) ** 2 * dim
    return Step(
        towers=views * batch * training.flops.training / machine.product_flops,
        loss=products / machine.float32_flops,
        look_up=look_ups * look_up_seconds(training, machine),
        optimizer=UPDATE_BYTES * training.parameters / machine.memory_bytes,
        embeddings=embeddings / machine.sending(world),
        gradients=gradients / machine.sending(world),
        embedding_bytes=embeddings,
        gradient_bytes=gradients,
    )


def look_up_seconds(training: Training, machine: Machine) -> float:
    """Of a batch's look-up in one pool: its product, or reading the pool where that takes longer."""
    products = 2 * training.batch * training.pool_size * training.dim / machine.float32_flops
    return max(products, training.pool_size * training.dim * 4 / machine.memory_bytes)


def pool_bytes(pairs: int, dim: int, itemsize: int = 4) -> int:
    """Of both pools, on every process: features, and 20 bytes an entry in addition."""
    return 2 * pairs * (dim * itemsize + 20)


def scoring_seconds(rows: int, training: Training, machine: Machine, world: int) -> float:
    """Of a scoring pass: every pair forward once. Its gathering at the end is a few bytes a row."""
    return rows / world * training.flops.forward / machine.product_flops


def checkpoint_bytes(training: Training, pool_pairs: int, split_bytes: float) -> float:
    """Weights and both moments in float32, both pools, and the split's state."""
    return 3 * 4 * training.parameters + pool_bytes(pool_pairs, training.dim) + split_bytes


def check(scaling: dict[str, Any]) -> list[dict[str, Any]]:
    """
    The model against the points of `scaling.json`: bytes counted and computed, and milliseconds measured and computed
    from the rates that the processes reached at that point.
    """
    model, _ = small_clip(scaling["image_size"])
    found = []
    for point in scaling["points"]:
        world, rates = point["processes"], point["rates"]
        # An all-reduce sends 2 (n - 1) / n of its bytes, and its bandwidth was measured over its bytes.
        sending = rates.get("all_reduce_bandwidth", 1.0) * 2 * (world - 1) / world if world > 1 else 1.0
        machine = Machine(
            *(rates["matmul_flops"], rates["matmul_flops"], rates["copy_bandwidth"], sending, sending),
            gpus_of_a_node=world,
        )
        training = Training(
            pair_flops(model.config, point["text_tokens"]),
            *(point["parameters"], model.config.projection_dim, scaling["batch"], scaling["pool_size"]),
        )
        for phase in PHASES:
            measured = point["phases"][phase]
            own = contrastive_traffic(phase, training.batch, training.dim, world)
            gradients = gradient_traffic(training.parameters, world)
            computed = {"gathered": own.gathered, "reduced": own.reduced, "of_ddp": gradients.reduced}
            seconds = statistics.median(measured["seconds"])
            step = step_of(phase, training, machine, world)
            found.append(
                {
                    "phase": phase,
                    "processes": world,
                    "bytes_agree": measured["counted_bytes"] == computed,
                    "measured_milliseconds": 1e3 * seconds,
                    "computed_milliseconds": 1e3 * step.seconds,
                    "factor": seconds / step.seconds,
                    "more_processes_than_cores": point["more_processes_than_cores"],
                }
            )
    return found


def read(name: str) -> dict[str, Any]:
    """Another benchmark's results."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def inputs_measured() -> dict[str, float]:
    """What the model takes from other results."""
    split, scoring, mixture, path = map(read, ("split_at_scale", "scoring_pass", "mixture_fit", "data_path"))
    largest = mixture["runs"][-1]
    lines = split["lines"]
    return {
        "scoring_bytes_a_row": scoring["peak_bytes_line"]["per_row"],
        "split_peak_bytes_a_row": lines["next_split"]["peak_bytes"]["per_row"],
        "known_split_peak_bytes_a_row": lines["first_split"]["peak_bytes"]["per_row"],
        "split_seconds_a_row": lines["next_split"]["seconds"]["per_row"],
        "sampler_held_bytes_a_row": lines["set_split"]["held_bytes"]["per_row"]
        + lines["epoch_start"]["held_bytes"]["per_row"],
        "sampler_peak_bytes_a_row": lines["epoch_start"]["peak_bytes"]["per_row"],
        "sampler_seconds_a_row": lines["epoch_start"]["seconds"]["per_row"],
        "checkpoint_bytes_a_row": lines["checkpoint"]["bytes"]["per_row"],
        "mixture_fit_seconds": statistics.median(largest["fit_seconds"]),
        "probability_seconds_a_row": statistics.median(largest["probability_seconds"]) / largest["rows"],
        "loading_cpu_seconds_a_pair": statistics.median(path["cpu_milliseconds_per_pair"]["this package's worker"])
        / 1e3,
    }


def compute(training: Training, machine: Machine, measured: dict[str, float]) -> dict[str, Any]:
    """Every table's figures."""
    steps = {
        phase: {str(world): asdict(step) | {"seconds": step.seconds} for world, step in by_world.items()}
        for phase, by_world in (
            (phase, {world: step_of(phase, training, machine, world) for world in GPUS}) for phase in SHAPES
        )
    }
    epochs = {
        name: {
            str(world): {
                **{
                    phase: rows / (world * training.batch) * steps[phase][str(world)]["seconds"]
                    for phase in ("clip", "cleanclip", "roclip_matching", "safeclip_unimodal")
                },
                "scoring": scoring_seconds(rows, training, machine, world),
            }
            for world in GPUS
        }
        for name, rows in DATASETS.items()
    }
    memory = {name: of_rows(rows, training, machine, measured) for name, rows in DATASETS.items()}
    rate = training.batch / steps["clip"]["1"]["seconds"]
    return {
        "steps": steps,
        "epoch_seconds": epochs,
        "by_rows": memory,
        "pairs_a_second_of_a_gpu": rate,
        "loading_cores_of_a_gpu": rate * measured["loading_cpu_seconds_a_pair"],
    }


def of_rows(rows: int, training: Training, machine: Machine, measured: dict[str, float]) -> dict[str, float]:
    """What depends on the number of pairs alone: memory, files, and time on one processor."""
    share = round(0.02 * rows)  # the default of both pool sizes
    shared = Training(training.flops, training.parameters, training.dim, training.batch, share)
    split = measured["checkpoint_bytes_a_row"] * rows
    return {
        "pool_pairs": share,
        "pool_bytes": pool_bytes(share, training.dim),
        "look_up_seconds": look_up_seconds(shared, machine),
        "scoring_bytes": measured["scoring_bytes_a_row"] * rows,
        "split_peak_bytes": measured["split_peak_bytes_a_row"] * rows,
        "known_split_peak_bytes": measured["known_split_peak_bytes_a_row"] * rows,
        "split_seconds": measured["mixture_fit_seconds"] + measured["split_seconds_a_row"] * rows,
        "sampler_held_bytes": measured["sampler_held_bytes_a_row"] * rows,
        "sampler_peak_bytes": measured["sampler_peak_bytes_a_row"] * rows,
        "sampler_seconds": measured["sampler_seconds_a_row"] * rows,
        "split_in_checkpoint_bytes": split,
        "checkpoint_bytes": checkpoint_bytes(training, share, split),
    }


def tables(result: dict[str, Any]) -> dict[str, str]:
    """The tables of the page by name, as Markdown."""
    return {
        "traffic": traffic_table(result["steps"]),
        "step": step_table(result["steps"]),
        "epoch": epoch_table(result["epoch_seconds"]),
        "rows": rows_table(result["by_rows"]),
        "check": check_table(result["check"]),
    }


def traffic_table(steps: dict[str, Any]) -> str:
    """Megabytes that a GPU sends in a step, and all of them together."""
    heads = ("MB a step: embeddings that a GPU sends (all GPUs)", *(f"{world} GPUs" for world in GPUS[1:]))

    def sent(of: dict[str, Any], kind: str) -> tuple[str, ...]:
        each = [(world, of[str(world)][kind] / 1e6) for world in GPUS[1:]]
        return tuple(f"{one:,.1f} ({one * world:,.0f})" for world, one in each)

    rows = [(PHASES[phase].title, *sent(of, "embedding_bytes")) for phase, of in steps.items()]
    gradients = sent(steps["clip"], "gradient_bytes")
    return markdown(heads, [*rows, ("every trainer: gradients of the weights", *gradients)])


def step_table(steps: dict[str, Any]) -> str:
    """Milliseconds of a step."""
    heads = ("ms a step: all, of it on the network", *(f"{world} GPU{'s' * (world > 1)}" for world in GPUS))
    rows = []
    for phase, of in steps.items():
        cells = []
        for world in GPUS:
            step = of[str(world)]
            cells.append(f"{1e3 * step['seconds']:.1f}, {1e3 * (step['embeddings'] + step['gradients']):.1f}")
        rows.append((PHASES[phase].title, *cells))
    return markdown(heads, rows)


def epoch_table(epochs: dict[str, Any]) -> str:
    """Minutes of an epoch and of a scoring pass."""
    phases = ("clip", "cleanclip", "roclip_matching", "safeclip_unimodal", "scoring")
    titles = ("CLIP", "CleanCLIP", "RoCLIP, matching", "SafeCLIP, risky", "SafeCLIP's scoring pass")
    heads = ("minutes an epoch", "GPUs", *titles)
    rows = [
        (name, str(world), *(f"{of[str(world)][phase] / 60:,.1f}" for phase in phases))
        for name, of in epochs.items()
        for world in GPUS
    ]
    return markdown(heads, rows)


def rows_table(by_rows: dict[str, Any]) -> str:
    """What depends on the pairs alone."""
    columns = tuple(by_rows)

    def line(title: str, key: str, unit: float, digits: int) -> tuple[str, ...]:
        return (title, *(f"{by_rows[name][key] / unit:,.{digits}f}" for name in columns))

    rows = [
        line("pairs in a pool at the default, 2% of the pairs", "pool_pairs", 1, 0),
        line("both pools, on every GPU, GB", "pool_bytes", 1e9, 2),
        line("a look-up in one of them, ms", "look_up_seconds", 1e-3, 1),
        line("scoring pass on one process, most memory, GB", "scoring_bytes", 1e9, 2),
        line("split, most memory of the first process, GB", "split_peak_bytes", 1e9, 2),
        line("the same with a column `poisoned`, GB", "known_split_peak_bytes", 1e9, 2),
        line("split with the mixture's fit, s", "split_seconds", 1, 0),
        line("sampler within an epoch, of every process, GB", "sampler_held_bytes", 1e9, 2),
        line("sampler as an epoch begins, most memory, GB", "sampler_peak_bytes", 1e9, 2),
        line("sampler as an epoch begins, s", "sampler_seconds", 1, 0),
        line("split in a checkpoint, MB", "split_in_checkpoint_bytes", 1e6, 1),
        line("a checkpoint, with pools of 2%, GB", "checkpoint_bytes", 1e9, 2),
    ]
    return markdown(("pairs", *columns), rows)


def check_table(checks: list[dict[str, Any]]) -> str:
    """Measured and computed."""
    heads = ("step", "processes", "bytes", "measured, ms", "computed, ms", "factor")
    rows = [
        (
            *(PHASES[one["phase"]].title, str(one["processes"]), "as counted" if one["bytes_agree"] else "differ"),
            *(f"{one['measured_milliseconds']:.0f}", f"{one['computed_milliseconds']:.0f}", f"{one['factor']:.2f}"),
        )
        for one in checks
    ]
    return markdown(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()
    training, machine, measured = vit_b_32(), Machine(), inputs_measured()
    checks = check(read("scaling"))
    factors = [one["factor"] for one in checks if not one["more_processes_than_cores"]]
    result = {
        "ratios": {"measured_over_computed_least": min(factors), "measured_over_computed_most": max(factors)},
        "bytes_agree": all(one["bytes_agree"] for one in checks),
        "inputs": {"machine": asdict(machine), "training": asdict(training), "measured": measured},
        **compute(training, machine, measured),
        "check": checks,
        "device": "computed",
    }
    for name, text in tables(result).items():
        print(f"{name}\n{text}")
    print(f"measured over computed: {min(factors):.2f} to {max(factors):.2f}; bytes agree: {result['bytes_agree']}")
    write_result(options.json, result, ("torch", "transformers"))


if __name__ == "__main__":
    main()
