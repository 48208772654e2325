"""`basic plan`: where models fit on a node, how fast each layout should be, and how to start the best one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from jobs.errors import InvalidValue
from worker.terminal import FAILED, say, sentences

if TYPE_CHECKING:
    from worker.planning.plan import Placement, Wish

_LOG_WIDTH = 120  # columns of a table that goes to a file


def plan(
    target: Annotated[
        str, typer.Option(help="Packaged name, directory with a config.json, or hub id; no weights are read.")
    ] = "DeepSeek-R1-Distill-Qwen-32B",
    draft: Annotated[str, typer.Option(help="The same for the draft model; none: plan without one.")] = (
        "DeepSeek-R1-Distill-Qwen-1.5B"
    ),
    gpus: Annotated[int, typer.Option(min=1, max=64, help="GPUs of the node.")] = 8,
    device: Annotated[str, typer.Option(help="h100, h200 or a100.")] = "h100",
    memory_gib: Annotated[float | None, typer.Option(min=1, help="Memory of a GPU, if not the device's own.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    context: Annotated[int, typer.Option(min=2, help="Tokens of prompt and completion.")] = 4096,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences a replica decodes together at most.")] = 256,
    kv_tokens: Annotated[int, typer.Option(min=0, help="KV tokens of a replica; 0: as the worker decides.")] = 0,
    acceptance: Annotated[
        float, typer.Option(min=0, max=0.99, help="Probability that a draft token is taken; an assumption.")
    ] = 0.6,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Print the placements that fit, with weights, KV room and predicted tokens/s, and pick one. Reads no weights.

    Example: basic plan --gpus 8 --context 8192 --acceptance 0.7
    """
    from worker.planning.devices import DEVICES
    from worker.planning.forecast import NUMBER_BYTES, Machine
    from worker.planning.plan import Wish, pick, placements
    from worker.planning.shapes import shape_of

    _one_of(device, list(DEVICES), "--device")
    _one_of(dtype, list(NUMBER_BYTES), "--dtype")
    with sentences():
        wish = Wish(
            target=shape_of(target),
            draft=None if draft == "none" else shape_of(draft),
            machine=Machine(DEVICES[device].with_memory(memory_gib), dtype),
            gpus=gpus,
            sequences=sequences,
            context=context,
            kv_tokens=kv_tokens,
            acceptance=acceptance,
        )
    choices = placements(wish)
    chosen = pick(choices)
    if as_json:
        print(json.dumps(_as_json(wish, choices, chosen)))
    else:
        _show(wish, choices, chosen)
    if chosen is None:
        raise typer.Exit(FAILED)


def _one_of(value: str, known: list[str], option: str) -> None:
    if value not in known:
        raise InvalidValue(f"must be one of {', '.join(known)}", param=option)


def _as_json(wish: Wish, choices: list[Placement], chosen: Placement | None) -> dict[str, object]:
    from worker.planning.plan import command

    return {
        "target": asdict(wish.target) | {"parameters": wish.target.parameters},
        "draft": None if wish.draft is None else asdict(wish.draft) | {"parameters": wish.draft.parameters},
        "device": asdict(wish.machine.device),
        "dtype": wish.machine.dtype,
        "gpus": wish.gpus,
        "acceptance": wish.acceptance,
        "placements": [choice.as_json() for choice in choices],
        "pick": None if chosen is None else chosen.as_json(),
        "command": None if chosen is None else command(wish, chosen),
    }


def _show(wish: Wish, choices: list[Placement], chosen: Placement | None) -> None:
    from worker.planning.plan import command

    console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH, highlight=False)
    console.print(_table(wish, choices, chosen))
    for choice in choices:
        if choice.refusal is not None:
            console.print(f"{choice.name} does not fit: {choice.refusal}")
    if chosen is None:
        say(_fallback(wish))
        return
    taken = f" if a draft token is taken with probability {wish.acceptance:g}" if wish.draft else ""
    console.print(
        f"Predicted from data sheets and what our kernels get of them on one H100{taken}; steps of several GPUs were "
        "never measured. Formulas and sources: docs/scale.md"
    )
    console.print(f"Pick: {chosen.name}. Start it with:")
    print(f"  {command(wish, chosen)}")


def _table(wish: Wish, choices: list[Placement], chosen: Placement | None) -> Table:
    device = wish.machine.device
    names = wish.target.name + (f" with {wish.draft.name}" if wish.draft else "")
    table = Table(title=f"{names}, {wish.machine.dtype}, on {wish.gpus} x {device.name}")
    table.add_column("placement")
    for title in ("weights/GPU", "KV tokens/replica", "sequences", "context", "step ms", "tokens/s", "with draft"):
        table.add_column(title, justify="right")
    for choice in choices:
        name = f"{'> ' if choice is chosen else '  '}{choice.name}"
        weights = f"{choice.weights_bytes / (1 << 30):.1f} GiB"
        if choice.step is None:
            table.add_row(name, weights, "-", "-", "-", "-", "-", "-")
            continue
        drafted = choice.drafted
        with_draft = f"{choice.drafted_tokens_per_s:,.0f} (depth {drafted.depth})" if drafted else "-"
        table.add_row(
            name,
            weights,
            f"{choice.kv_tokens:,}",
            str(choice.sequences),
            str(choice.context),
            f"{choice.step.step_ms:.1f}",
            f"{choice.tokens_per_s:,.0f}",
            with_draft,
        )
    return table


def _fallback(wish: Wish) -> str:
    return (
        f"{wish.target.name} does not fit on {wish.gpus} x {wish.machine.device.name} in {wish.machine.dtype}. "
        "Take more GPUs or a smaller context, or lay its layers over GPUs, memory and disk: "
        f"BASIC_DEVICE_MAP=auto basic worker --target {wish.target.name} works, slowly"
    )
