"""Verifications: what is drawn, how texts compare, what the report says, and that a change of it is detected."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select
from typer.testing import CliRunner

from jobs.api.app import make_api
from jobs.api.schemas.replies import SigningKeyReply, VerificationReply, VerificationReport
from jobs.cli import app as cli
from jobs.cli import lookup
from jobs.client import Client
from jobs.errors import InvalidValue, SetupError
from jobs.settings import JobsSettings
from jobs.verification.sample import SampleSize
from jobs.verification.signature import SignatureInvalid, check_signature, public_key_of, signed
from storage import numerics, verifications, writes
from storage.erasure import erase_job, hidden_jobs
from storage.models import Request
from storage.numerics import Numerics
from storage.session import Database
from tests.api_client import ApiClient
from tests.factories import a_key
from tests.in_process import InProcess
from tests.unit.jobs.api.test_routes import answer_all, submitted

Run = Callable[..., str]
FINISHED: dict[str, Any] = {"numerics": "fp_1"}


@pytest.fixture
def api(settings: JobsSettings, database: Database) -> TestClient:
    return ApiClient(make_api(settings, database, lambda job_id, model: None))


def verified(api: TestClient, database: Database, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the report of a job of one request, whose text is computed as `first` and then as `second`."""
    job = submitted(api, "Hello")
    answer_all(database, **FINISHED | first)
    started = api.post(f"/v1/jobs/{job['id']}/verifications", json={"sample": "100%"}).json()
    assert VerificationReply.model_validate(started).counts is None
    early = api.get(f"/v1/verifications/{started['id']}/report")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "not_verifiable")
    answer_all(database, **FINISHED | second)
    ended = VerificationReply.model_validate_json(api.get(f"/v1/verifications/{started['id']}").content, strict=True)
    report = api.get(f"/v1/verifications/{started['id']}/report")
    assert VerificationReport.model_validate_json(report.content, strict=True).counts == ended.counts
    return report.json()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("second", "result", "reason"),
    [
        ({}, "equal", None),
        ({"numerics": "fp_2"}, "equal", None),
        ({"token_ids": (1, 3)}, "different", "choice 0 differs from token 1 on"),
        ({"text": "Rome."}, "different", "another text or end"),
        ({"token_ids": (1,), "completion_tokens": 1}, "different", "ends after 1 tokens instead of 2"),
        ({"token_ids": (1,), "finish_reason": "length"}, "not_comparable", "another context length"),
        ({"token_ids": (1, 3), "numerics": "fp_2"}, "not_comparable", "other numerics: fp_1, then fp_2"),
        ({"token_ids": (1, 3), "numerics": None}, "not_comparable", "fp_1, then unknown"),
    ],
)
def test_texts_are_equal_different_or_of_other_numerics(
    api: TestClient, database: Database, second: dict[str, Any], result: str, reason: str | None
) -> None:
    (request,) = verified(api, database, {}, second)["requests"]
    assert request["result"] == result
    assert request["reason"] is None if reason is None else reason in request["reason"]
    assert (request["sha256"] == request["recomputed_sha256"]) == (result == "equal")


def test_texts_whose_bits_may_depend_on_the_batch_or_on_two_devices_are_not_called_different(
    api: TestClient, database: Database
) -> None:
    with database.write() as session:
        numerics.record(session, Numerics("fp_1", {"depends_on_batch": True}))
    other = {"token_ids": (1, 3)}
    report = verified(api, database, {}, other)
    assert report["counts"] == {"equal": 0, "different": 0, "not_comparable": 1}
    assert report["numerics"] == {"fp_1": {"depends_on_batch": True}}
    both = {"numerics": "fp_3,fp_2"}
    (request,) = verified(api, database, both, both | other)["requests"]
    assert (request["result"], request["numerics"]) == ("not_comparable", ["fp_3", "fp_2"])


def test_a_verification_belongs_to_the_owner_of_its_job_and_is_in_no_list(
    settings: JobsSettings, database: Database
) -> None:
    api = ApiClient(make_api(settings, database, lambda job_id, model: None))
    owner, stranger = a_key(database), a_key(database)
    job = api.post("/v1/jobs", json={"model": "tiny", "prompts": ["Hello"]}, headers=owner).json()
    path = f"/v1/jobs/{job['id']}/verifications"
    assert api.post(path, headers=owner).json()["error"]["code"] == "not_verifiable", "it has no output yet"
    answer_all(database)
    assert api.post(path, headers=stranger).status_code == 404
    once = {**owner, "idempotency-key": "once"}
    started = api.post(path, headers=once).json()
    assert api.post(path, headers=once).json() == started
    shown = f"/v1/verifications/{started['id']}"
    assert (api.get(shown, headers=stranger).status_code, api.get(shown, headers=owner).status_code) == (404, 200)
    assert api.get(f"/v1/verifications/{job['id']}", headers=owner).status_code == 404
    again = api.post(f"/v1/jobs/{started['id']}/verifications", headers=owner).json()
    assert job["id"] in again["error"]["message"], "a verification is not verified"
    rows = [row["id"] for row in api.get("/v1/stats/jobs", headers=owner).json()["data"]]
    assert rows == [one["id"] for one in api.get("/v1/jobs", headers=owner).json()["data"]] == [job["id"]]
    assert api.delete(f"/v1/jobs/{job['id']}", headers=owner).status_code == 200
    assert api.get(shown, headers=owner).status_code == 404
    with database.write() as session:
        writes.end_jobs(session)  # the reconciler's part
        hidden = list(hidden_jobs(session))
    assert started["id"] in hidden, "the verification, which holds copies, goes with its job"
    for job_id in hidden:
        list(erase_job(database, job_id))
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Request)) == 0


@pytest.mark.parametrize("asked", ["0%", "101%", "-1", "0", "a few", True, 1.5, [1], "1e3"])
def test_a_sample_that_is_no_share_and_no_number_is_refused(asked: Any) -> None:
    with pytest.raises(InvalidValue, match="share such as 1%"):
        SampleSize.read(asked)


def test_a_sample_has_a_request_at_least_and_ten_thousand_at_most(api: TestClient, database: Database) -> None:
    assert [SampleSize.read(asked).of(400) for asked in ("1%", "0.1%", "100%", "20", 20, "500")] == [
        4,
        1,
        400,
        20,
        20,
        400,
    ]
    with pytest.raises(InvalidValue, match="at most 10,000"):
        SampleSize.read("100%").of(10_001)
    job = submitted(api, "Hello")
    answer_all(database)
    refused = api.post(f"/v1/jobs/{job['id']}/verifications", json={"sample": "all"}).json()["error"]
    assert refused["param"] == "sample"
    assert api.post(f"/v1/jobs/{job['id']}/verifications", json={"size": 1}).json()["error"]["param"] == "size"


def test_a_sample_is_drawn_from_completed_requests_alone_and_by_its_seed(api: TestClient, database: Database) -> None:
    job = submitted(api, "a", "", "c", "d", "e")
    answer_all(database, limit=3)

    def drawn(count: int, seed: int) -> list[int]:
        with database.read() as session:
            return [one.request_index for one in verifications.draw_sample(session, job["id"], count, seed)]

    assert all(sorted(drawn(10, seed)) == [0, 2, 3] for seed in range(5))
    assert drawn(2, 7) == drawn(2, 7)
    assert len({tuple(drawn(2, seed)) for seed in range(20)}) > 1
    assert sorted(index for group in verifications._shuffled(1201, 3) for index in group) == list(range(1201))


def test_a_changed_report_does_not_verify_and_the_key_is_private(tmp_path: Path) -> None:
    file = tmp_path / "keys" / "signing.key"
    report = signed({"counts": {"equal": 1}, "name": "é"}, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert check_signature(json.loads(json.dumps(report))) == public_key_of(file) == public_key_of(file.read_text())
    for changed in ({"counts": {"equal": 2}}, {"more": 1}, {"signature": report["signature"] | {"value": "AAAA"}}):
        with pytest.raises(SignatureInvalid, match="does not match"):
            check_signature({**report, **changed})
    with pytest.raises(SignatureInvalid, match="has no"):
        check_signature({"counts": {}})
    with pytest.raises(SignatureInvalid, match="another key"):
        check_signature(report, public_key_of(tmp_path / "other.key"))
    file.write_text("no key")
    with pytest.raises(SetupError, match="BASIC_SIGNING_KEY"):
        public_key_of(file)


@pytest.fixture
def run(settings: JobsSettings, database: Database, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command against a service in this process; a pause between two polls lets the worker work."""
    api = make_api(settings, database, notify=lambda job_id, model: True)
    monkeypatch.setattr(lookup, "connect", lambda: Client("http://service", transport=InProcess(api)))
    texts: Iterator[dict[str, Any]] = iter([{}, {"token_ids": (1, 3)}, {"token_ids": (1, 3), "numerics": "fp_2"}])
    monkeypatch.setattr(time, "sleep", lambda _: answer_all(database, **FINISHED | next(texts)))

    def run(*arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == status, (result.output, result.exception)
        return result.output

    return run


def test_the_command_says_what_it_found_by_its_exit_status_and_checks_its_own_report(
    run: Run, database: Database, tmp_path: Path
) -> None:
    prompts, proof = tmp_path / "prompts.txt", tmp_path / "proof.json"
    prompts.write_text("Hello\n")
    run("submit", str(prompts))
    answer_all(database, **FINISHED)
    assert "1 equal, 0 different" in run("verify", "--report", str(proof))
    key = json.loads(proof.read_text())["signature"]["public_key"]
    assert "signature is valid" in run("verify", "--check", str(proof), "--public-key", key)
    assert "differs from token 1" in run("verify", "--sample", "1", status=1)
    report = json.loads(run("verify", "--json", status=3))
    assert report["requests"][0]["result"] == "not_comparable"
    proof.write_text(proof.read_text().replace('"equal": 1', '"equal": 2'))
    assert "changed after it was signed" in run("verify", "--check", str(proof), status=1)
    assert json.loads(run("verify", "--check", str(prompts), "--json", status=1))["valid"] is False
    assert "--check" in run("verify", "--public-key", key, status=2)


def test_the_service_tells_its_public_key(api: TestClient, settings: JobsSettings) -> None:
    told = SigningKeyReply.model_validate_json(api.get("/v1/verifications/signing-key").content, strict=True)
    assert told.public_key == public_key_of(settings.resolved_signing_key)
