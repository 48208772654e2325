"""`basic verify`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from jobs.cli import lookup
from jobs.cli.lookup import find_job
from jobs.cli.options import FAILED, AsJson, JobId, print_json
from jobs.cli.output_files import refuse_unwritable, writing
from jobs.client import Client
from jobs.client.results import Verification
from jobs.control_characters import safe
from jobs.verification.signature import SignatureInvalid, check_signature

NOT_COMPARABLE: Final = 3  # exit status: nothing differs, and something could not be compared
_POLL_S = 1.0
_SHOWN = 10  # requests that are printed


def verify(
    job: JobId = None,
    sample: Annotated[str, typer.Option(help="How many of the outputs: a share such as 1%, or a number.")] = "1%",
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the signed report into this file.")
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", exists=True, dir_okay=False, help="Check the signature of a report instead."),
    ] = None,
    public_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="With --check: the key that must have signed, in base64.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute a random sample of a job's outputs again, without drafts and in another batch, and compare the texts.

    Exit status: 0 if all are equal, 1 if any is different, 3 if none is different and some can't be compared, such as
    those of another kind of device.

    Example: basic verify --sample 5% --report proof.json

    Example: basic verify --check proof.json
    """
    if check is not None:
        raise typer.Exit(_check(check, public_key, as_json))
    if public_key is not None:
        raise typer.BadParameter("it goes with --check", param_hint="--public-key")
    if report is not None:
        refuse_unwritable(report, "--report")
    with lookup.connect() as client:
        found = find_job(client, job)
        verification = client.run(lambda client: client.verify(found.id, sample))
        if not as_json:
            count = verification.request_counts.total
            typer.echo(f"Computing {count:,} outputs of {found.id} again ({verification.id})", err=True)
        verification = _wait(client, verification)
        content = client.run(lambda client: client.verification_report(verification.id))
    if report is not None:
        with writing(report, "--report"):
            report.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(content)
    else:
        _print(content)
        if report is not None:
            typer.echo(f"Wrote {report}, signed by {content['signature']['public_key']}")
    raise typer.Exit(exit_status(content["counts"]))


def exit_status(counts: dict[str, int]) -> int:
    """Return the exit status of a report's counts."""
    if counts["different"]:
        return FAILED
    return NOT_COMPARABLE if counts["not_comparable"] or not counts["equal"] else 0


def _wait(client: Client, verification: Verification) -> Verification:
    """Wait until a verification ends; cancel it if the user does."""
    identity = verification.id
    try:
        while not verification.status.final:
            time.sleep(_POLL_S)
            verification = client.run(lambda client: client.verification(identity))
    except KeyboardInterrupt:
        client.run(lambda client: client.cancel(identity))
        typer.echo("Cancelled", err=True)
        raise typer.Exit(FAILED) from None
    return verification


def _print(report: dict[str, Any]) -> None:
    counts = report["counts"]
    typer.echo(
        f"{counts['equal']:,} equal, {counts['different']:,} different, {counts['not_comparable']:,} not comparable"
    )
    odd = [request for request in report["requests"] if request["result"] != "equal"]
    for request in odd[:_SHOWN]:
        result = request["result"].replace("_", " ")
        typer.echo(safe(f"  {request['index']} {request['custom_id']}: {result}: {request['reason']}"))
    if len(odd) > _SHOWN:
        typer.echo(f"  and {len(odd) - _SHOWN:,} more; --report or --json names them all")


def _check(file: Path, public_key: str | None, as_json: bool) -> int:
    """Check the signature of a report and return the exit status: that of its counts, or FAILED."""
    try:
        content = json.loads(file.read_bytes())
        counts = {name: int(content["counts"][name]) for name in ("equal", "different", "not_comparable")}
        key = check_signature(content, public_key)
    except (OSError, ValueError, LookupError, TypeError, SignatureInvalid) as exc:
        reason = exc if isinstance(exc, SignatureInvalid) else "it is no report of basic verify"
        print_json({"valid": False, "reason": str(reason)}) if as_json else typer.echo(f"{file}: {reason}", err=True)
        return FAILED
    if as_json:
        print_json({"valid": True, "public_key": key, "counts": counts})
        return exit_status(counts)
    typer.echo(f"The signature is valid; the key is {key}")
    if public_key is None:
        typer.echo("Compare the key with the service's: GET /v1/verifications/signing-key, or pass --public-key")
    _print(content)
    return exit_status(counts)
