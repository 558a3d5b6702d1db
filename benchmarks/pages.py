"""
The tables of docs/performance.md and docs/scaling.md, from what `benchmarks/results` holds; measures nothing.

    python benchmarks/pages.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cost_model
import profile_step
import scaling
import scoring_pass
import split_at_scale
from bench.marked import ROOT, markdown, put_between, table_marks

RESULTS = ROOT / "benchmarks" / "results"
Tables = dict[str, Callable[[], str]]


def read(name: str) -> Any:
    """The results of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def whereof(*names: str) -> str:
    """What results were measured on, and how to measure them again."""
    lines = []
    for name in names:
        result = read(name)
        device = "a CPU" if result["device"] == "cpu" else result["device"]
        threads = result.get("threads_of_a_process", result.get("threads"))  # older results do not say
        counted = f", {threads} thread{'s' * (threads > 1)}" if threads else ""
        versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
        lines.append(f"Measured on {device}{counted}; {versions}. Again: `{result['command']}`.\n")
    return "".join(lines)


def step_costs() -> str:
    """What a step of each trainer costs against another."""
    result = read("step_cost")
    anew = read("step_cost_roclip")  # by CPU time, in more rounds
    ratios = result["ratios"] | anew["ratios"]
    times = result["milliseconds_per_step"]
    titles = {
        "stock_trainer_over_bare_loop": ("the stock `Trainer`", "a bare loop", "stock_trainer"),
        "clip_over_bare_loop": ("CLIP", "a bare loop", "clip"),
        "clip_over_stock_trainer": ("CLIP", "the stock `Trainer`", "clip"),
        "cleanclip_over_clip": ("CleanCLIP", "CLIP", "cleanclip"),
        "roclip_matching_over_plain": ("RoCLIP, a matching step", "a step that does not match", "roclip_matching"),
        "safeclip_over_clip": ("SafeCLIP, unimodal", "CLIP", "safeclip"),
    }
    rows = [
        (
            title,
            other,
            f"{ratios[name]:.2f}",
            "" if name in anew["ratios"] else f"{statistics.median(times[contender]):.0f}",
        )
        for name, (title, other, contender) in titles.items()
    ]
    epoch = f"{ratios['safeclip_epoch_over_clip_epoch']:.2f}"
    rows.append(("SafeCLIP, an epoch with its scoring pass", "an epoch of CLIP on two views", epoch, ""))
    return markdown(("a step of", "against", "times", "ms"), rows) + "\n" + whereof("step_cost", "step_cost_roclip")


def peers() -> str:
    """What one would take in this package's place, beside it."""
    result = read("peers")
    rows = [
        (
            name,
            f"{one['step_cpu_milliseconds']:.0f}",
            f"{one['pair_cpu_milliseconds']:.1f}",
            f"{one['peak_mib']:.0f}",
            f"{one['first_step_cpu_seconds']:.1f}",
        )
        for name, one in result["contenders"].items()
    ]
    ratios = result["ratios"]["update_clock"].items()
    clock = ", ".join(f"{value:.2f} times that of {other}" for other, value in ratios)
    heads = ("", "a step, CPU ms", "JPEG to update, CPU ms a pair", "peak, MiB", "to the end of the first step, CPU s")
    text = f"From JPEG to update, the time by the clock was {clock}, with {result['workers']} workers.\n"
    return markdown(heads, rows) + "\n" + text + "\n" + whereof("peers")


def misses() -> str:
    """What is slower than it was to be, in the results as they are."""
    path, pool = read("data_path")["ratios"], read("pool_lookup")["results"]
    steps = read("step_cost")["ratios"] | read("step_cost_roclip")["ratios"]
    phases = read("profile_step")["phases"]
    clip, matching = phases["clip"], phases["roclip_matching"]
    own = (clip["parts"]["transfer"] + clip["parts"]["logging"]) / clip["step"]
    looking = (matching["parts"]["look_up"] + matching["parts"]["enqueue"]) / matching["step"]
    noise = f"the stock `Trainer` itself measures {steps['stock_trainer_over_bare_loop']:.2f} of a bare loop"
    asked = (
        (
            "a step of CLIP over the stock `Trainer`'s",
            steps["clip_over_stock_trainer"],
            1.02,
            f"conversion to floats and sums for the log are {own:.1%} of the step in the profile above; {noise}",
        ),
        (
            "a step of CLIP over a bare loop's",
            steps["clip_over_bare_loop"],
            1.05,
            f"conversion to floats and sums for the log are {own:.1%} of the step in the profile above; {noise}",
        ),
        (
            "a matching step of RoCLIP over one that does not match",
            steps["roclip_matching_over_plain"],
            1.03,
            f"look-up and pools are {looking:.1%} of the step in the profile above; {noise}",
        ),
        (
            "image augmentation on a CPU over PIL's",
            path["augment_on_cpu_over_pil"],
            1.0,
            "most of it the blur; it was 0.72 to 1.05 in four runs beside other work",
        ),
    )
    rows = [(name, f"{found:.2f}", str(most), why) for name, found, most, why in asked if found > most]
    slow = max(pool, key=lambda row: row["ratio"])
    shape = f"{slow['batch']} queries in {slow['size']:,} entries of {slow['dim']}, {slow['dtype']}"
    rows.append(
        (
            f"a look-up over its bare product, at worst ({shape})",
            f"{slow['ratio']:.2f}",
            "1.3",
            "small pools pay for finding the largest product, and a CPU converts bfloat16 first",
        )
    )
    return markdown(("cost", "measured", "asked", "why"), rows)


def memory() -> str:
    """What chunks save."""
    runs = read("memory")["runs"]
    batch = max(run["batch"] for run in runs)
    rows = []
    for name in dict.fromkeys(run["trainer"] for run in runs):
        whole, *chunked = sorted(
            (run for run in runs if run["trainer"] == name and run["batch"] == batch),
            key=lambda run: run["chunk"] is not None,
        )
        rows.append((name, *(f"{run['peak_bytes'] / 2**20:.0f}" for run in (whole, *chunked))))
    chunk = max(run["chunk"] or 0 for run in runs)
    heads = ("trainer", f"a batch of {batch} as a whole, MiB", f"in chunks of {chunk}, MiB")
    return markdown(heads, rows) + "\n" + whereof("memory")


def endurance() -> str:
    """What a long training keeps as it was."""
    result = read("endurance")
    ratios, runs = result["ratios"], result["runs"]
    memory, files, busy, clock = (
        [ratios[f"{run['trainer']}_{figure}"] for run in runs]
        for figure in (
            "memory_end_over_half",
            "open_files_end_over_begin",
            "processor_time_last_over_first_tenth",
            "step_last_over_first_tenth",
        )
    )
    heads = (
        f"{runs[0]['steps']:,} steps of",
        "memory, last tenth over sixth",
        "open files, end over beginning",
        "processor time of a step, last tenth over first",
        "the same by the clock",
    )
    rows = [
        (run["trainer"], f"{memory[i]:.3f}", f"{files[i]:.2f}", f"{busy[i]:.2f}", f"{clock[i]:.2f}")
        for i, run in enumerate(runs)
    ]
    text = (
        f"In the second half memory grew by at most {max(memory) - 1:.1%}. At the end at most {max(files):.2f} times "
        f"as many files were open as at the beginning, and a step took at most {max(busy):.2f} times the processor "
        f"time; by the clock it was {min(clock):.2f} to {max(clock):.2f} times as long.\n"
    )
    return markdown(heads, rows) + "\n" + text + "\n" + whereof("endurance")


def profile() -> str:
    """The parts of a step."""
    result = read("profile_step")
    text = (
        f"A model of {result['parameters'] / 1e6:.0f}M parameters, batches of {result['batch']} at "
        f"{result['image_size']} pixels, pools of {result['pool_size']:,} pairs; "
        f"{result['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s in a large product, "
        f"{result['copy_bytes_per_second'] / 1e9:.1f} GB/s in a large copy. With timers a step takes "
        f"{result['ratios']['timers_over_none']:.2f} times what it takes without.\n"
    )
    return profile_step.table(result) + "\n" + text + "\n" + whereof("profile_step")


def scoring() -> str:
    """The scoring pass."""
    result = read("scoring_pass")
    line = result["peak_bytes_line"]
    text = (
        f"A line through these peaks has {line['per_row']:.0f} bytes a row; the worst point is "
        f"{line['worst_residual']:.0%} off it.\n"
    )
    return scoring_pass.table(result) + "\n" + text + "\n" + whereof("scoring_pass")


def processes() -> str:
    """Steps on several processes."""
    result = read("scaling")
    crowded = [str(point["processes"]) for point in result["points"] if point["more_processes_than_cores"]]
    agree = "are" if result["bytes_are_as_computed"] else "are NOT"
    text = f"The bytes counted {agree} those computed from the shapes, in every kind of step.\n"
    if crowded:
        text += (
            f"With {' and '.join(crowded)} processes there are more than the machine's {result['cores']} cores: that "
            "point is a check of the bytes, and says nothing of speed.\n"
        )
    return scaling.table(result) + "\n" + text + "\n" + whereof("scaling")


def split() -> str:
    """The split and the sampler by rows, and a dataset on disk."""
    result = read("split_at_scale")
    captions = split_at_scale.told_of_captions(result["captions"])
    return split_at_scale.table(result) + f"\nA dataset on disk: {captions}.\n\n" + whereof("split_at_scale")


def computed(name: str) -> Callable[[], str]:
    """One of the cost model's tables."""
    return lambda: cost_model.tables(read("cost_model"))[name]


def loading() -> str:
    """What the loader must keep up with."""
    result = read("cost_model")
    cost = result["inputs"]["measured"]["loading_cpu_seconds_a_pair"]
    return (
        f"At this rate one GPU takes {result['pairs_a_second_of_a_gpu']:,.0f} pairs a second in CLIP. A pair costs a "
        f"loading process {1e3 * cost:.1f} ms of CPU here (`benchmarks/results/data_path.json`: a JPEG of 500 x 375, "
        f"two captions), so that it takes {result['loading_cores_of_a_gpu']:,.0f} cores to keep that GPU busy.\n"
    )


def checked() -> str:
    """The cost model against what was measured."""
    result = read("cost_model")
    ratios = result["ratios"]
    least, most = (ratios[f"measured_over_computed_{end}"] for end in ("least", "most"))
    text = (
        f"Where there is a core for each process, a step takes {least:.2f} to {most:.2f} times what the model says of "
        "this machine.\n"
    )
    return cost_model.tables(result)["check"] + "\n" + text


PAGES: dict[str, Tables] = {
    "performance.md": {
        "step cost": step_costs,
        "peers": peers,
        "profile": profile,
        "missed": misses,
        "memory": memory,
        "scoring": scoring,
        "endurance": endurance,
    },
    "scaling.md": {
        "processes": processes,
        "check": checked,
        "traffic": computed("traffic"),
        "step": computed("step"),
        "epoch": computed("epoch"),
        "loading": loading,
        "rows": computed("rows"),
        "split": split,
    },
}


def main() -> None:
    for page, tables in PAGES.items():
        for name, table in tables.items():
            put_between(ROOT / "docs" / page, table_marks(name, Path(__file__).name), table())


if __name__ == "__main__":
    main()
