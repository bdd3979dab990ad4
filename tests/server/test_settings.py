import math

import pytest

from models.errors import ConfigError
from server.settings import Settings, load_settings


def message() -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "\n" not in caught.value.message
    return caught.value.message


def test_defaults_leave_every_decision_as_trained() -> None:
    settings = load_settings()
    assert settings.defaults.categories == {}
    assert settings.defaults.decision is None
    assert settings.max_body_bytes == 4_194_304


def test_values_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "RHEOSTAT_DEFAULTS",
        '{"decision": "sample", "report": true, "categories": {"safety": "never", "x": 0.75}}',
    )
    monkeypatch.setenv("RHEOSTAT_MAX_BODY_BYTES", "4096")
    settings = load_settings()
    assert settings.defaults.decision == "sample"
    assert settings.defaults.report is True
    biases = {name: target.bias for name, target in settings.defaults.categories.items()}
    assert biases == pytest.approx({"safety": -math.inf, "x": math.log(3)})
    assert settings.max_body_bytes == 4096


@pytest.mark.parametrize("name", ["RHEOSTAT_DEFUALTS", "rheostat_defualts", "RHEOSTAT_"])
def test_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "{}")
    known = ", ".join(sorted(f"RHEOSTAT_{field.upper()}" for field in Settings.model_fields))
    assert message() == (f"the environment variable {name} means nothing here; known are {known}")


def test_other_programs_variables_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHEOSTATS_DEFAULTS", "x")
    monkeypatch.setenv("DEFAULTS", "x")
    assert load_settings() == Settings()


@pytest.mark.parametrize("value", ["nope", "{", "{'report': true}", ""])
def test_value_that_is_no_json_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("RHEOSTAT_DEFAULTS", value)
    assert message().startswith("RHEOSTAT_DEFAULTS: it must hold a JSON object: Expecting")


@pytest.mark.parametrize(
    ("name", "value", "start"),
    [
        ("RHEOSTAT_MAX_BODY_BYTES", "many", "RHEOSTAT_MAX_BODY_BYTES: "),
        ("RHEOSTAT_MAX_BODY_BYTES", "1023", "RHEOSTAT_MAX_BODY_BYTES: "),
        ("RHEOSTAT_MAX_BODY_BYTES", "", "RHEOSTAT_MAX_BODY_BYTES: "),
        ("RHEOSTAT_BODY_TIMEOUT_S", "0", "RHEOSTAT_BODY_TIMEOUT_S: "),
        ("RHEOSTAT_HEAD_TIMEOUT_S", "inf", "RHEOSTAT_HEAD_TIMEOUT_S: "),
        ("RHEOSTAT_IDLE_TIMEOUT_S", "nan", "RHEOSTAT_IDLE_TIMEOUT_S: "),
        ("RHEOSTAT_POLICY_FILE", "", "RHEOSTAT_POLICY_FILE: is empty"),
        ("RHEOSTAT_DEFAULTS", "5", "RHEOSTAT_DEFAULTS: must be an object, got int"),
        ("RHEOSTAT_DEFAULTS", "[]", "RHEOSTAT_DEFAULTS: must be an object, got list"),
        ("RHEOSTAT_DEFAULTS", '{"x": 1}', "RHEOSTAT_DEFAULTS.x: "),
        ("RHEOSTAT_DEFAULTS", '{"decision": "x"}', "RHEOSTAT_DEFAULTS.decision: "),
        (
            "RHEOSTAT_DEFAULTS",
            '{"categories": {"safety": 1.2}}',
            "RHEOSTAT_DEFAULTS.categories.safety: a sensitivity lies between 0 and 1, got 1.2",
        ),
    ],
)
def test_wrong_value_names_the_variable_and_the_field(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, start: str
) -> None:
    monkeypatch.setenv(name, value)
    assert message().startswith(start)


@pytest.mark.parametrize(
    ("share", "file", "said"),
    [
        ("0.1", None, "RHEOSTAT_RECORD_SHARE needs RHEOSTAT_RECORD_FILE to say where"),
        (None, "margins.json", "RHEOSTAT_RECORD_FILE needs RHEOSTAT_RECORD_SHARE to say how much"),
        ("1.1", "margins.json", "RHEOSTAT_RECORD_SHARE: "),
        ("-0.1", "margins.json", "RHEOSTAT_RECORD_SHARE: "),
        ("nan", "margins.json", "RHEOSTAT_RECORD_SHARE: "),
        ("some", "margins.json", "RHEOSTAT_RECORD_SHARE: "),
    ],
)
def test_recording_needs_both_a_share_and_a_file(
    monkeypatch: pytest.MonkeyPatch, share: str | None, file: str | None, said: str
) -> None:
    if share is not None:
        monkeypatch.setenv("RHEOSTAT_RECORD_SHARE", share)
    if file is not None:
        monkeypatch.setenv("RHEOSTAT_RECORD_FILE", file)
    assert message().startswith(said)


def test_defaults_stand_in_the_policy_file_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RHEOSTAT_POLICY_FILE", "policies.yaml")
    monkeypatch.setenv("RHEOSTAT_DEFAULTS", "{}")
    assert message().startswith("RHEOSTAT_DEFAULTS: the policies of RHEOSTAT_POLICY_FILE hold")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().max_body_bytes = 5  # type: ignore[misc]
