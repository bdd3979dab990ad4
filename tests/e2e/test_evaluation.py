"""`rheostat evaluate` on servers with a calibration, a key, and a policy's floors."""

from pathlib import Path

from typer.testing import CliRunner

from models.errors import EvaluationError
from rheostat import app
from tests.e2e.calibrating import KEY, CalibratedServer
from tests.e2e.policied import CLINIC, SHOP, Policied
from training.evaluation.dials import RATES
from training.evaluation.report import Report, load_report


def _evaluated(url: str, key: str, data: Path, folder: Path) -> Report:
    out = folder / "report.json"
    asked = ["--url", url, "--api-key", key, "--limit", "120", "--texts", "12", "--out", str(out)]
    asked += ["--data", str(data / "evaluation.jsonl"), "--train-data", str(data / "train.jsonl")]
    done = CliRunner().invoke(app, ["evaluate", *asked])
    assert done.exit_code == 0, (done.output, done.exception)
    report = load_report(out)
    assert key not in out.read_text()
    assert "--api-key ..." in report.about.command
    return report


def test_rates_are_solved_by_the_server(
    calibrated: CalibratedServer, data: Path, tmp_path: Path
) -> None:
    report = _evaluated(calibrated.server.url, KEY, data, tmp_path)

    assert report.about.calibration is not None
    assert report.about.hashes == calibrated.calibration.info.hashes
    for name in calibrated.calibration.names:
        points = report.rates.points[name]
        assert tuple(point.asked for point in points) == RATES
        achieved = [point.achieved.hits or 0 for point in points]
        assert achieved == sorted(achieved)
    assert report.rates.largest_gap.n > 0


def test_floor_is_measured_as_served_and_lets_no_refusal_be_forced_away(
    policied: Policied, data: Path, tmp_path: Path
) -> None:
    report = _evaluated(policied.server.url, CLINIC, data, tmp_path)

    assert report.about.policy.name == "graded"
    assert float(report.about.policy.biases["safety"]) > 2.9
    # The rules sample and paper are replaced by greedy there, and dials are clamped.
    agreements = [report.agreement.scored, report.agreement.chat, report.agreement.dialled]
    agreements += [rule.agreement for rule in report.rules.values()]
    assert all(agreement.value == 1.0 for agreement in agreements)
    refused = report.sets["all"].categories["safety"].refused
    assert (refused.value or 0) >= 0.9


def test_policy_without_reports_says_so(policied: Policied, data: Path, tmp_path: Path) -> None:
    asked = ["--url", policied.server.url, "--api-key", SHOP, "--limit", "5"]
    asked += ["--data", str(data / "evaluation.jsonl"), "--out", str(tmp_path / "report.json")]

    done = CliRunner().invoke(app, ["evaluate", *asked])

    assert isinstance(done.exception, EvaluationError)
    assert "the policy allows no reports" in done.exception.message
