"""`basic plan`: placements of models on a node, their predicted speed, and the command that starts the best one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from jobs.errors import InvalidValue
from worker.settings import WorkerSettings
from worker.terminal import FAILED, print_message, readable_errors

if TYPE_CHECKING:
    from worker.planning.plan import Placement, PlanRequest

_LOG_WIDTH = 120  # columns of a table that is not printed on a terminal


def plan(
    target: Annotated[
        str,
        typer.Option(help="Packaged name, directory of a model or LoRA adapter, or hub id; no weights are read."),
    ] = "DeepSeek-R1-Distill-Qwen-32B",
    draft: Annotated[str, typer.Option(help="Draft model, named like the target; none: plan without a draft.")] = (
        "DeepSeek-R1-Distill-Qwen-1.5B"
    ),
    gpus: Annotated[int, typer.Option(min=1, max=64, help="GPUs of the node.")] = 8,
    device: Annotated[str, typer.Option(help="h100, h200 or a100.")] = "h100",
    memory_gib: Annotated[float | None, typer.Option(min=1, help="GiB per GPU. Default: the data sheet's.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    quantization: Annotated[
        str, typer.Option(help="auto: weights as the checkpoint has them; fp8: rounded to FP8 at load.")
    ] = "auto",
    kv_dtype: Annotated[
        str, typer.Option(help="auto: keys and values in --dtype; fp8: rounded to FP8 when they are stored.")
    ] = "auto",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a usual prompt.")] = 300,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a usual answer.")] = 1000,
    context: Annotated[
        int, typer.Option(min=0, help="Maximum tokens of prompt and completion together; 0: the model's own.")
    ] = 0,
    sequences: Annotated[int, typer.Option(min=0, help="Maximum sequences per replica; 0: as many as fit.")] = 0,
    kv_tokens: Annotated[int, typer.Option(min=0, help="KV tokens per replica; 0: as many as fit.")] = 0,
    acceptance: Annotated[
        float, typer.Option(min=0, max=0.99, help="Assumed probability that a draft token is accepted.")
    ] = 0.6,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Print the placements that fit, with weights, KV tokens and predicted tokens/s, and pick one. Reads no weights.

    Example: basic plan --gpus 8 --prompt-tokens 300 --output-tokens 7000 --acceptance 0.7
    """
    from worker.planning.devices import DEVICES
    from worker.planning.forecast import DTYPE_BYTES, Machine
    from worker.planning.plan import PlanRequest, pick, placements
    from worker.planning.shapes import shape_of

    _one_of(device, list(DEVICES), "--device")
    _one_of(dtype, list(DTYPE_BYTES), "--dtype")
    _one_of(quantization, ["auto", "fp8"], "--quantization")
    _one_of(kv_dtype, ["auto", "fp8"], "--kv-dtype")
    with readable_errors():
        request = PlanRequest(
            target=shape_of(target, WorkerSettings().base_model),
            draft=None if draft == "none" else shape_of(draft),
            machine=Machine(
                DEVICES[device].with_memory(memory_gib), dtype, fp8=quantization == "fp8", fp8_kv=kv_dtype == "fp8"
            ),
            gpus=gpus,
            sequences=sequences,
            context=context,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            kv_tokens=kv_tokens,
            acceptance=acceptance,
        )
    choices = placements(request)
    chosen = pick(choices)
    if as_json:
        print(json.dumps(_as_json(request, choices, chosen)))
    else:
        _show(request, choices, chosen)
    if chosen is None:
        raise typer.Exit(FAILED)


def _one_of(value: str, known: list[str], option: str) -> None:
    if value not in known:
        raise InvalidValue(f"must be one of {', '.join(known)}", param=option)


def _as_json(request: PlanRequest, choices: list[Placement], chosen: Placement | None) -> dict[str, object]:
    from worker.planning.plan import command

    return {
        "target": asdict(request.target) | {"parameters": request.target.parameters},
        "draft": None if request.draft is None else asdict(request.draft) | {"parameters": request.draft.parameters},
        "device": asdict(request.machine.device),
        "dtype": request.machine.dtype,
        "fp8": _has_fp8(request),
        "fp8_kv": request.machine.fp8_kv,
        "gpus": request.gpus,
        "acceptance": request.acceptance,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": request.output_tokens,
        "placements": [choice.as_json() for choice in choices],
        "pick": None if chosen is None else chosen.as_json(),
        "command": None if chosen is None else command(request, chosen),
    }


def _show(request: PlanRequest, choices: list[Placement], chosen: Placement | None) -> None:
    from worker.loading.tensor_parallel import NOT_EXACT
    from worker.planning.plan import command

    console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH, highlight=False)
    console.print(_table(request, choices, chosen))
    if not all(choice.exact for choice in choices):
        console.print(f"* {NOT_EXACT}")
    for choice in choices:
        if choice.refusal is not None:
            console.print(f"{choice.name} does not fit: {choice.refusal}")
    if chosen is None:
        print_message(_fallback(request))
        return
    assumption = f" if a draft token is accepted with probability {request.acceptance:g}" if request.draft else ""
    console.print(
        f"Sequences: those that fit at once, with {request.prompt_tokens:,} tokens of prompt and "
        f"{request.output_tokens:,} of answer. Context: the most tokens that one may have."
    )
    console.print(
        f"Predicted from data sheets and the efficiency of the kernels on one H100{assumption}. Measured: whether "
        "steps of this kind were compared with their prediction. Formulas and sources: docs/scale.md"
    )
    if _has_fp8(request) or request.machine.fp8_kv:
        console.print("The bytes of FP8 weights and KV are counted; no step with them was measured.")
    console.print(f"Best: {chosen.name}. Start it with:")
    print(f"  {command(request, chosen)}")


def _table(request: PlanRequest, choices: list[Placement], chosen: Placement | None) -> Table:
    device = request.machine.device
    merged = f" (merged into {request.target.base})" if request.target.base else ""
    names = request.target.name + merged + (f" with {request.draft.name}" if request.draft else "")
    parts = [name for name, used in (("weights", _has_fp8(request)), ("KV", request.machine.fp8_kv)) if used]
    dtype = request.machine.dtype + (f" with FP8 {' and '.join(parts)}" if parts else "")
    table = Table(title=f"{names}, {dtype}, on {request.gpus} x {device.name}")
    table.add_column("placement")
    for title in (
        "weights/GPU",
        "KV tokens/replica",
        "sequences",
        "context",
        "step ms",
        "tokens/s",
        "with draft",
        "measured",
    ):
        table.add_column(title, justify="right")
    for choice in choices:
        name = f"{'> ' if choice is chosen else '  '}{choice.name}{'' if choice.exact else ' *'}"
        weights = f"{choice.weights_bytes / (1 << 30):.1f} GiB"
        if choice.step is None:
            table.add_row(name, weights, "-", "-", "-", "-", "-", "-", "-")
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
            "yes" if choice.measured else "no",
        )
    return table


def _has_fp8(request: PlanRequest) -> bool:
    return request.machine.fp8 or request.target.has_fp8_weights


def _fallback(request: PlanRequest) -> str:
    return (
        f"{request.target.name} does not fit on {request.gpus} x {request.machine.device.name} in "
        f"{request.machine.dtype}. Use more GPUs or a smaller context, or offload layers to memory and disk: "
        f"BASIC_DEVICE_MAP=auto basic worker --target {request.target.name} works, but is slow"
    )
