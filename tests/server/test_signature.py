"""The operator's signature: what is signed, by whom, and what is not accepted as such."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from privacy.refused import Refused
from server import outcome, provenance, report, signature, verify

AUDIT = {
    "claimed_epsilon": 8.0,
    "estimate": 7.2,
    "lower_bound": 2.5,
    "confidence": 0.95,
    "verdict": "pass",
    "canaries": 500,
    "seed": 1,
    "method": "canaries in ghost coordinates",
    "histogram": {"edges": [-1.0, 0.0, 1.0], "in": [3, 7], "out": [8, 2]},
    "membership": {"auc": 0.51},
    "inversion": {"mse": 0.4},
}


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """(private, public) file of an operator's key."""
    monkeypatch.delenv(signature.VARIABLE, raising=False)
    private, public = tmp_path / "operator.key", tmp_path / "operator.pem"
    public.write_text(signature.new_key(private))
    return private, public


def test_a_new_key_is_the_owners_alone_and_nothing_is_overwritten(keys):
    private, public = keys
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert "PRIVATE" not in public.read_text()
    before = private.read_bytes()
    with pytest.raises(Refused, match="not overwritten"):
        signature.new_key(private)
    assert private.read_bytes() == before


def test_a_signed_report_is_accepted_from_its_key_alone(own_run, keys, tmp_path):
    folder, (private, public) = own_run("example"), keys
    report.write(folder, str(private))
    assert verify.check(folder, public).wrong == []
    assert "signature" in verify.check(folder, public).held
    signed = json.loads((folder / "report.json").read_text())["statement"]["reproduction"]["signed_by"]
    assert signed == signature.public_key(public)
    other = tmp_path / "other.pem"
    other.write_text(signature.new_key(tmp_path / "other.key"))
    assert verify.check(folder, other).wrong == ["signature: it is by another key than the one that was given"]


@pytest.mark.parametrize("missing", [True, False])
def test_a_signature_that_is_missing_or_of_other_bytes_is_not_accepted(own_run, keys, missing):
    folder, (private, public) = own_run("example"), keys
    report.write(folder, str(private))
    if missing:
        (folder / "report.json.sig").unlink()
        assert "is missing" in verify.check(folder, public).wrong[0]
        assert "report.json.sig is missing" in verify.check(folder).wrong[0]
    else:
        content = (folder / "report.json").read_bytes()
        (folder / "report.json").write_bytes(content.replace(b"\n", b"\n ", 1))  # the same JSON, other bytes
        assert verify.check(folder, public).wrong == ["signature: it is not of these bytes"]
        assert verify.check(folder).wrong == ["signature: it is not of these bytes"]


def test_a_forger_with_a_key_of_his_own_is_found_by_the_operators(own_run, keys, tmp_path):
    folder, (private, public) = own_run("example"), keys
    report.write(folder, str(private))
    signature.new_key(tmp_path / "forger.key")
    report.write(folder, str(tmp_path / "forger.key"))
    assert verify.check(folder).wrong == []
    assert "another key" in verify.check(folder, public).wrong[0]


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"algorithm": "none"}', '{"algorithm": "Ed25519", "public_key": "", "signature": "!"}']
)
def test_a_damaged_signature_is_one_line(own_run, content):
    folder = own_run("none")
    (folder / "report.json.sig").write_text(content)
    (line,) = verify.check(folder).wrong
    assert "no signature of this program" in line


def test_an_audit_joins_the_report_and_the_signature_is_made_again_or_taken_away(own_run, keys):
    folder, (private, public) = own_run("example"), keys
    report.write(folder, str(private))
    before = json.loads((folder / "report.json").read_text())
    assert before["statement"]["audit"]["reason"].startswith("not audited")
    (folder / "audit.json").write_text(json.dumps(AUDIT | {"more": 1}))
    assert "audit.json says otherwise" in verify.check(folder).wrong[0]
    report.write(folder, str(private))
    after = json.loads((folder / "report.json").read_text())
    assert {key: after["statement"]["audit"][key] for key in AUDIT} == AUDIT
    assert after["digest"] == provenance.digest(after) != before["digest"]
    assert verify.check(folder, public).wrong == []
    states = {one["hazard"]: one["state"] for one in after["statement"]["interpretation"]["hazards"]}
    assert states["code that differs from the proof"] == "pass"
    assert "canaries that took part" in (folder / "report.html").read_text().lower()
    (folder / "audit.json").write_text(json.dumps(AUDIT | {"verdict": "fail"}))
    report.write(folder)  # no key at hand
    assert not (folder / "report.json.sig").exists()
    assert verify.check(folder).wrong == []
    assert verify.check(folder, public).wrong


def test_drawing_again_changes_nothing_in_a_report(own_run):
    folder = own_run("client")
    before = (folder / "report.json").read_bytes()
    report.write(folder)
    assert (folder / "report.json").read_bytes() == before


def test_a_report_that_was_edited_is_not_signed(own_run, keys):
    folder, (private, _) = own_run("example"), keys
    report.write(folder)
    content = (folder / "report.json").read_text().replace('"guarantee": true', '"guarantee": false')
    (folder / "report.json").write_text(content)
    with pytest.raises(Refused, match="was changed after it was written"):
        report.write(folder, str(private))
    assert not (folder / "report.json.sig").exists()
    assert (folder / "report.json").read_text() == content


def test_a_report_of_an_older_umbel_is_drawn_and_signed_as_it_is(write_run, keys):
    folder, (private, _) = write_run(), keys
    before = (folder / "report.json").read_bytes()
    report.write(folder, str(private))
    assert (folder / "report.json").read_bytes() == before
    signed = signature.read(folder / "report.json.sig")
    assert signed is not None
    assert signature.verified(before, signed)


def test_a_damaged_audit_is_said_and_not_believed(tmp_path):
    for text in ("{", "[]", "3"):
        (tmp_path / "audit.json").write_text(text)
        found = outcome.audit(tmp_path)
        assert found["verdict"] is None
        assert "damaged" in found["reason"]


def pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, password: bytes | None = None) -> bytes:
    protection = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not a key", "no private key"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "another kind"),
        (pem(ed25519.Ed25519PrivateKey.generate(), b"word"), "password"),
    ],
)
def test_a_key_that_cannot_sign_is_refused_before_the_run_without_quoting_it(tmp_path, run_real, content, said):
    (tmp_path / "bad.key").write_bytes(content)
    with pytest.raises(Refused, match=said) as refused:
        run_real(tmp_path / "run", f"report.key={tmp_path / 'bad.key'}")
    assert content.decode().splitlines()[-1] not in str(refused.value)
    assert not (tmp_path / "run").exists()


def umbel(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **env})


def test_the_commands_make_a_key_sign_by_the_environment_and_check(own_run, tmp_path):
    folder, private, public = own_run("example"), tmp_path / "a.key", tmp_path / "a.pem"
    made = umbel("key", "new", private)
    public.write_text(made.stdout)
    assert made.returncode == 0
    assert umbel("report", folder, "--quiet", UMBEL_KEY=str(private)).returncode == 0
    assert verify.check(folder, public).wrong == []
    (folder / "report.json").write_text((folder / "report.json").read_text().replace('"rounds": 3', '"rounds": 4', 1))
    bad = umbel("report", "--check", folder, "--verify-key", public)
    assert bad.returncode == 2
    assert [line.split(":")[0] for line in bad.stdout.splitlines()] == ["digest", "sums over rounds.jsonl", "signature"]
