"""The page of the benchmarks, and their part of the README."""

from collections.abc import Sequence

from result_pages import NOTE, joined
from tables import Row, facts, grouped, number, table


def setting(row: Row) -> str:
    """Model, batch and precision of a benchmark row."""
    precision = row.get("precision")
    return f"{row.get('model')}, batch {row.get('batch')}" + (f", {precision}" if precision else "")


def benchmark_page(
    benchmarks: Row,
    control: Row | None = None,
    ccl: Row | None = None,
    wavefront: Row | None = None,
    evolution: Row | None = None,
    settling: Sequence[Row] = (),
    floors: Row | None = None,
) -> str:
    """The page, of what results.json, control.json and so on in benchmarks/ hold; all may be empty."""
    parts = [
        NOTE,
        "# Benchmarks",
        "Time and memory of one training step relative to backpropagation, all rules interleaved in one run so that they "
        "see the same machine. `make bench` measures these tables on your machine and writes them here.",
    ]
    rows = benchmarks.get("rows") or []
    if not rows and not (control or {}).get("rows"):
        return joined([*parts, "No measurement is kept here yet."])
    for (device,), of_device in grouped(rows, "device").items():
        parts.append(f"## {device}" if device else "## CPU")
        for members in grouped(of_device, "model", "batch", "precision").values():
            lines = [
                [
                    f"`{row['rule']}`",
                    number(row.get("ms_per_step"), 3),
                    number(row.get("ratio_to_bp"), 3),
                    number(row.get("peak_memory_ratio"), 3),
                ]
                for row in members
            ]
            header = ("rule", "ms per step", "time / BP", "peak memory / BP")
            parts += [f"### {setting(members[0])}", table(header, lines)]
    environment = benchmarks.get("environment")
    parts += ["## Measured with", facts(environment)] if environment else []
    apart = [*pass_parts(floors or {}), *target_parts(floors or {})]
    apart += [*control_parts(control or {}), *ccl_parts(ccl or {}), *wavefront_parts(wavefront or {})]
    for each in settling:
        apart += settling_parts(each)
    return joined([*parts, *apart, *evolution_parts(evolution or {})])


def pass_parts(floors: Row) -> list[str]:
    """What making feedback weights costs by itself; nothing where nothing was measured."""
    if not floors.get("passes"):
        return []
    rows = [
        [f"`{row['rule']}`", f"`{row['what']}`", number(row.get("us_per_step"), 0), number(100 * row["share_of_bp"], 1)]
        for row in floors["passes"]
    ]
    return [
        "## What feedback cannot avoid",
        "Rules whose feedback weight depends on the forward weight make it anew in every step. This is that pass over "
        "memory alone, in PyTorch's own operations, for the MLP 784-512-512-10 at batch 64. A product that made its factor "
        "as it goes would not need it, but takes compiled code of one's own.",
        table(("rule", "feedback", "µs per step", "% of a step of BP"), rows, numeric_from=2),
    ]


def target_parts(floors: Row) -> list[str]:
    """The table of target propagation; nothing where nothing was measured."""
    if not floors.get("targets"):
        return []
    rows = [
        [
            f"`{row['rule']}`",
            number(row.get("ms_per_step"), 2),
            number(row.get("ratio_to_bp"), 2),
            number(row.get("multiply_adds_to_bp"), 2),
            number(row["ratio_to_bp"] / row["multiply_adds_to_bp"], 2),
        ]
        for row in floors["targets"]
    ]
    first = floors["targets"][0]
    return [
        "## Target propagation",
        f"One training step of `{first['model']}` at batch {first['batch']}, forward weights, feedback weights and "
        "optimiser included, beside the ratio of the counted multiply-adds of matrix products.",
        table(("rule", "ms per step", "time / BP", "products / BP", "time / products"), rows),
        "### Measured with",
        facts(floors["environment"]),
    ]


def settling_parts(settling: Row) -> list[str]:
    """The tables of networks that settle, on one device; nothing where nothing was measured."""
    rows, steps = settling.get("settling") or [], settling.get("training") or []
    if not rows:
        return []
    lines = [
        [
            row["rule"],
            row["phase"],
            number(row.get("ms_per_step"), 3),
            number(row.get("ratio_to_forward"), 2),
            number(row.get("ratio_to_own"), 2),
            *_judged(row),
        ]
        for row in rows
    ]
    trained = [
        [row["rule"], f"`{row['model']}`", number(row.get("ms_per_step"), 2), number(row.get("ratio_to_bp"), 1)]
        for row in steps
    ]
    return [
        f"## Settling: {settling['environment']['processor']}",
        f"One step of all layers, {rows[0]['batch']} samples of 784 inputs and as many rows per sample as there are nudges, "
        "against the matrix products of one forward pass of the whole model on as many rows, and against those that the "
        "step cannot avoid, both run alone. On a GPU steps of this size wait for kernels to be launched.",
        table(
            ("rule", "phase", "ms per step", "time / forward", "time / own products", "target", "verdict"),
            lines,
            numeric_from=2,
        ),
        "A whole training step at the rules' default numbers of steps.",
        table(("rule", "model", "ms per step", "time / BP"), trained, numeric_from=2),
        "### Measured with",
        facts(settling["environment"]),
    ]


def evolution_parts(evolution: Row) -> list[str]:
    """The tables of populations of learners; nothing where nothing was measured."""
    rows, workers = evolution.get("rows") or [], evolution.get("workers") or []
    if not rows:
        return []
    lines = [
        [
            row["what"],
            number(row.get("ms_per_lifetime"), 2),
            number(row.get("speed_up"), 2),
            number(row.get("generations_per_hour"), 0),
            number(row.get("peak_memory_mb"), 0),
        ]
        for row in rows
    ]
    shared = [[row["what"], number(row.get("seconds"), 2), number(row.get("speed_up"), 2)] for row in workers]
    return [
        "## Evolution",
        "Lifetimes of 256 learners under top-down networks of their own, one thread: 40 full-batch steps of Adam on 256 "
        "examples, a 16-24-4 tanh perceptron, a top-down network of 628 weights. The plain loop trains one after the other "
        "with PyTorch's own optimiser and clipping. Memory is what a process needs beyond what it needs for two learners.",
        table(("lifetimes", "ms each", "speed-up", "generations an hour", "memory, MB"), lines),
        table(("workers", "s per generation", "speed-up"), shared),
        "### Measured with",
        facts(evolution["environment"]),
    ]


def ccl_parts(ccl: Row) -> list[str]:
    """The tables of counter-current learning; nothing where nothing was measured."""
    rows = ccl.get("rows") or []
    if not rows:
        return []
    lines = [
        [
            f"{row['model']}, batch {row['batch']}",
            number(row.get("ms_per_step"), 2),
            number(row.get("ratio_to_bp"), 3),
            " to ".join(number(value, 2) for value in row.get("quartiles") or ()),
            *_judged(row),
        ]
        for row in rows
        if row["rule"] == "ccl"
    ]
    return [
        "## Counter-current learning",
        "One training step, gradients and plain SGD included, against backpropagation of the same model in the same run.",
        table(("model", "ms per step", "time / BP", "quartiles", "target", "verdict"), lines),
        "### Measured with",
        facts(ccl["environment"]),
    ]


def wavefront_parts(wavefront: Row) -> list[str]:
    """The table of training without backward locking; nothing where nothing was measured."""
    rows = wavefront.get("rows") or []
    if not rows:
        return []
    lines = [
        [
            f"{row['model']}, batch {row['batch']}",
            number(row.get("ms_sequential"), 2),
            number(row.get("ms_wavefront"), 2),
            number(row.get("speed_up"), 2),
            number(row.get("limit"), 2),
            number(row.get("ms_bp"), 2),
            "yes" if row.get("bit_equal") else "no",
        ]
        for row in rows
    ]
    return [
        "### Without backward locking",
        "Counter-current learning with every tensor clipped by itself, on two processes: one runs the feedback network and "
        "the forward pass of the next batch, layer by layer, while the other updates the layers behind it. Backpropagation "
        "cannot, because the first layer's gradient arrives last. *Limit* is the sequential time over that of the busier "
        "process.",
        table(
            ("model", "one process, ms", "two processes, ms", "speed-up", "limit", "BP, one process, ms", "same bits"), lines
        ),
    ]


def control_parts(control: Row) -> list[str]:
    """The tables of the feedback-control rules; nothing where nothing was measured."""
    rows = control.get("rows") or []
    if not rows:
        return []
    parts = [
        "## Feedback control",
        "One training step, gradients and optimiser included, the same protocol as above. `dfc` here is the closed form, "
        "`dfc-ss` Newton's method, `strong-dfc` its steady state: none of them simulates. *Authors* is the ratio of the "
        "authors' programs, which simulate (all but `dfc-ssa`), to their own backpropagation; we timed these programs "
        "ourselves, on another machine, in float32 with the same network and batch, so compare the ratios and not "
        "milliseconds. The feedback update of the table is the expected one; theirs is simulated noise. *Target* is what we "
        "set ourselves.",
    ]
    for members in grouped(rows, "model", "batch", "precision").values():
        parts += [f"### {setting(members[0])}", _control_table(members)]
    if control.get("simulation"):
        lines = [
            [
                row["simulation"],
                number(row.get("ms_per_controller_step"), 3),
                number(row.get("floor_ms"), 3),
                number(row.get("ratio_to_floor"), 2),
                *_judged(row),
            ]
            for row in control["simulation"]
        ]
        parts += [
            "### Simulating",
            "One step of the controller, of all layers and a whole batch, against the matrix products that it cannot avoid, "
            "run alone (*floor*).",
            table(("simulation", "ms per controller step", "floor, ms", "time / floor", "target", "verdict"), lines),
        ]
    if control.get("solve"):
        lines = [
            [row["solve"], str(row["batch"]), number(row["ms_below"], 1), number(row["ms_dense"], 1)]
            for row in control["solve"]
        ]
        header = ("linear solve", "batch", "through the layer below, ms", "dense, ms")
        parts += ["### Wide outputs", table(header, lines)]
    return [*parts, *(["### Measured with", facts(control["environment"])] if control.get("environment") else [])]


def _control_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        quartiles = " to ".join(number(value, 2) for value in row.get("quartiles") or ())
        lines.append(
            [
                row["rule"] if " " in row["rule"] else f"`{row['rule']}`",
                number(row.get("ms_per_step"), 2),
                number(row.get("ratio_to_bp"), 2),
                quartiles or "-",
                *_judged(row),
                number(row.get("ratio_of_authors"), 1),
                number(row.get("faster_than_authors"), 1),
            ]
        )
    header = (
        "rule",
        "ms per step",
        "time / BP",
        "quartiles",
        "target",
        "verdict",
        "authors: time / BP",
        "authors' over ours",
    )
    return table(header, lines)


def _judged(row: Row) -> tuple[str, str]:
    """The target, and whether it is met."""
    if row.get("target") is None:
        return "-", "-"
    return f"at most {row['target']:g}", "met" if row["within_target"] else "missed"
