"""What the operator sets through ``RHEOSTAT_*`` variables; vLLM's own flags stay vLLM's."""

import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator
from pydantic import model_validator as validates_model
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from models.errors import ConfigError
from server.dials.protocol import DialOptions
from server.policies.credentials import KeyHash

PREFIX = "RHEOSTAT_"


class Settings(BaseSettings):
    """Settings of one server process.

    Attributes:
        defaults: The dials and the rule of requests that bring none, as a ``refusal`` object.
        max_waiting: How many answers may wait for the engine beside those that it works on; a
            request beyond is answered with 429. None: three times as many as it works on.
        max_body_bytes: Largest request body that is read; a larger one is answered with 413.
        head_timeout_s: How long a request's address and headers may take to come.
        body_timeout_s: How long its body may take.
        send_timeout_s: How long a client may take nothing of its answer.
        idle_timeout_s: How long a connection stays open between two requests.
        max_url_bytes: Longest address, its query included.
        max_headers: Most headers of a request.
        max_header_bytes: Their names and values together.
        max_body_depth: How deep objects and lists of a body may stand in each other.
        max_body_strings: Most strings of a body, the names of its fields included; as many lists
            and objects.
        max_body_values: Most values of a body, of any kind; commas of its texts count as well.
        max_messages: Most messages or input items of a conversation, with their parts.
        max_inputs: Most prompts, conversations or documents of a request.
        max_tools: Most tool definitions of a request.
        max_grammar_bytes: Longest grammar of a request, as text.
        max_grammar_s: What following a request's grammar may take of the engine's time, beyond
            what each step has free.
        max_grammar_count: What the counts of a request's grammar may come to: those of items
            together, times its choices, and those of one pattern, multiplied where they may stand
            in each other.
        max_stops: Most stop strings or bad words of a request.
        max_choices: Most choices of a request: ``n`` times its prompts.
        max_repeated_bytes: Most bytes of fields, the conversation's not counted, times the choices,
            where a request has several.
        max_logprobs: Most log-probabilities of an answer, those of its prompts included; each step
            of an answer that is streamed holds an eighth of them.
        metrics_port: Where metrics and probes are answered without a key; None: nowhere.
        metrics_host: The address of that listener.
        page: Whether the page at ``/`` is served.
        operator_key_hash: ``sha256:`` and the hexadecimal SHA-256 of the key that the operator's
            routes need; none: those routes are off.
        record_share: Share of the requests whose margins are counted in ``record_file``, 0..1.
        record_file: Where the counts of margins are kept; no text.
        check_every_s: Pause between two tests of the recorded margins against the calibrations.
        policy_file: Policies, tenants and their keys, as YAML; then ``defaults`` are the file's.
        trace_file: Where each decision is written as a line of JSON, without any text; ``-`` for
            the standard output.
        trace_max_bytes: Size at which ``trace_file`` is renamed and begun anew; 0: never.
        trace_files: How many renamed ones are kept: ``.1`` is the newest.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    defaults: DialOptions = Field(default_factory=DialOptions)
    max_waiting: int | None = Field(default=None, ge=0)
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    head_timeout_s: float = Field(default=15, gt=0, allow_inf_nan=False)
    body_timeout_s: float = Field(default=60, gt=0, allow_inf_nan=False)
    send_timeout_s: float = Field(default=60, gt=0, allow_inf_nan=False)
    idle_timeout_s: float = Field(default=75, gt=0, allow_inf_nan=False)
    max_url_bytes: int = Field(default=8 * 2**10, ge=256)
    max_headers: int = Field(default=100, ge=16)
    max_header_bytes: int = Field(default=32 * 2**10, ge=1024)
    max_body_depth: int = Field(default=64, ge=8)
    max_body_strings: int = Field(default=2**14, ge=64)
    max_body_values: int = Field(default=2**17, ge=64)
    max_messages: int = Field(default=1024, ge=1)
    max_inputs: int = Field(default=1024, ge=1)
    max_tools: int = Field(default=256, ge=1)
    max_grammar_bytes: int = Field(default=64 * 2**10, ge=256)
    max_grammar_s: float = Field(default=1.0, gt=0.0)
    max_grammar_count: int = Field(default=2**12, ge=1)
    max_stops: int = Field(default=128, ge=1)
    max_choices: int = Field(default=128, ge=1)
    max_repeated_bytes: int = Field(default=2**17, ge=1024)
    max_logprobs: int = Field(default=2**13, ge=1)
    metrics_port: int | None = Field(default=None, ge=1, le=65_535)
    metrics_host: str = Field(default="127.0.0.1", min_length=1)
    page: bool = True
    operator_key_hash: KeyHash | None = None
    record_share: float = Field(default=0.0, ge=0.0, le=1.0)
    record_file: Path | None = None
    check_every_s: float = Field(default=300, gt=0, allow_inf_nan=False)
    policy_file: Path | None = None
    trace_file: Path | None = None
    trace_max_bytes: int = Field(default=0, ge=0)
    trace_files: int = Field(default=5, ge=1, le=1000)

    @field_validator("record_file", "policy_file", "trace_file", mode="before")
    @classmethod
    def _is_no_empty_path(cls, value: object) -> object:
        if value == "":
            raise ValueError("is empty: name a file, or leave the variable out")
        return value

    @validates_model(mode="after")
    def _records_somewhere(self) -> "Settings":
        if self.record_share > 0 and self.record_file is None:
            raise ValueError("RHEOSTAT_RECORD_SHARE needs RHEOSTAT_RECORD_FILE to say where")
        if self.record_file is not None and self.record_share == 0:
            raise ValueError("RHEOSTAT_RECORD_FILE needs RHEOSTAT_RECORD_SHARE to say how much")
        return self

    @validates_model(mode="after")
    def _defaults_stand_in_one_place(self) -> "Settings":
        if self.policy_file is not None and "defaults" in self.model_fields_set:
            raise ValueError(
                "RHEOSTAT_DEFAULTS: the policies of RHEOSTAT_POLICY_FILE hold the defaults; put "
                "them there"
            )
        return self


def load_settings(**flags: Any) -> Settings:
    """Reads the environment.

    Args:
        flags: Settings from the command line, which go first; None where a flag was not given.

    Raises:
        ConfigError: A value is wrong, or a variable with our prefix means nothing.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    ours = [name for name in os.environ if name.upper().startswith(PREFIX)]
    unknown = sorted(name for name in ours if name.upper() not in known)
    if unknown:
        raise ConfigError(
            f"the environment variable {unknown[0]} means nothing here; known are "
            f"{', '.join(sorted(known))}"
        )
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(_first_problem(error.errors()[0])) from error
    except SettingsError as error:  # it names the field in quotes; the cause is a JSONDecodeError
        field = next(name for name in Settings.model_fields if f'"{name}"' in str(error))
        raise ConfigError(
            f"{PREFIX}{field.upper()}: it must hold a JSON object: {error.__cause__}"
        ) from error


def _first_problem(error: Any) -> str:
    message: str = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # about several variables; it names them
        return message
    name, *path = (str(part) for part in error["loc"])
    where = ".".join([PREFIX + name.upper(), *path])
    return f"{where}: {message}"
