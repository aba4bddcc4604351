"""Load the settings with pydantic-settings: from flags, the environment, ``.env.local``, then ``.env``.

A secret may also be read from a file that ``<NAME>_FILE`` names, as container platforms mount them; the file
has the precedence of that variable. A separate module, so that ``--help`` does not import pydantic.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, get_type_hints

from dotenv import dotenv_values
from pydantic import BeforeValidator, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from text2img.errors import ConfigurationError, PromptFailed
from text2img.prompts import SMALLEST_SIZE
from text2img.prompts.parameters import RequestedParameters, resolve_parameters
from text2img.settings import DEFAULTS, Settings, options

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pydantic.fields import FieldInfo

    from text2img.settings import Option


_ALIASES = (
    frozenset({"mongo_uri", "database_url"}),
    frozenset({"gcs_bucket", "s3_bucket", "output_url"}),
    frozenset({"rabbitmq_url", "rabbitmq_host"}),
)
"""Sets of variables for one thing: a source is ignored for a set that a higher source has a variable of."""
_COMBINED = ("output_dir", (_ALIASES[0], _ALIASES[1]))
"""A variable that replaces both sets: it overrides them, and is overridden if a higher source has both."""


class _Source(PydanticBaseSettingsSource):
    """Variables of one source and its ``<NAME>_FILE`` files, unless a higher source set them."""

    def __init__(self, settings_cls: type[BaseSettings], source: EnvSettingsSource, name: str) -> None:
        super().__init__(settings_cls)
        self._source, self._name = source, name

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return nothing: ``__call__`` reads all fields at once."""
        del field
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        assigned = set(self.current_state)
        assigned = assigned.union(*(aliases for aliases in _ALIASES if aliases & assigned))
        combined, sets = _COMBINED
        if combined in assigned:
            assigned = assigned.union(*sets)
        elif all(aliases & assigned for aliases in sets):
            assigned.add(combined)
        found = self._source()
        self._note_ignored(name for name in found if name in assigned and name not in self.current_state)
        values = {name: value for name, value in found.items() if name not in assigned}
        secrets = self.settings_cls.secrets if issubclass(self.settings_cls, _Environment) else {}
        for name in secrets.keys() - assigned - values.keys():
            if value := self._secret((name, *secrets[name])):
                values[name] = value
        if issubclass(self.settings_cls, _Environment):
            self.settings_cls.origins.update(dict.fromkeys(values, self._name))
        return values

    def _note_ignored(self, names: Iterable[str]) -> None:
        """Note each variable that has no effect because of one of another name in a higher source.

        A flag that replaces it needs no note.
        """
        if not issubclass(self.settings_cls, _Environment):
            return
        origins = self.settings_cls.origins
        for name in names:
            combined, sets = _COMBINED
            others = {*sets[0], *sets[1]} if name == combined else {combined}
            others = others.union(*(aliases for aliases in _ALIASES if name in aliases))
            by = sorted(others & self.current_state.keys())
            if by and all(other in origins for other in by):
                higher = " and ".join(f"{other.upper()} of {origins[other]}" for other in by)
                self.settings_cls.notes.append(
                    f"{name.upper()} of {self._name} has no effect: {higher} replaces it"
                )

    def _secret(self, names: Sequence[str]) -> str | None:
        """Return the value of the first of these variables that is set, itself or by its file."""
        for name in names:
            if value := self._source.env_vars.get(name):
                return value
            if path := self._source.env_vars.get(f"{name}_file"):
                return _first_line(name, path)
        return None


class _Environment(BaseSettings):
    secrets: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    flags_alone: ClassVar[bool] = False
    origins: ClassVar[dict[str, str]] = {}
    notes: ClassVar[list[str]] = []
    model_config = SettingsConfigDict(
        env_ignore_empty=True,  # compose files pass unset variables as empty
        extra="ignore",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources, the highest first."""
        del env_settings, dotenv_settings, file_secret_settings
        if cls.flags_alone:
            return (init_settings,)
        files = {name: DotEnvSettingsSource(settings_cls, env_file=name) for name in _FILES}
        sources = {"the environment": EnvSettingsSource(settings_cls), **files}
        return (init_settings, *(_Source(settings_cls, source, name) for name, source in sources.items()))


def load(flags: Mapping[str, str], *, environment: bool = True, notes: list[str] | None = None) -> Settings:
    """Load the settings from ``flags`` (option name → text), then the environment, ``.env.local``, ``.env``.

    Without ``environment``, only the flags are read. What the two files hold for libraries is put into the
    environment. ``notes`` gets a line for each variable that has no effect, since another one replaces it.
    Raises ConfigurationError, which names the option.
    """
    try:
        values = _read(
            tuple(options()),
            get_type_hints(Settings, include_extras=True),
            flags,
            environment=environment,
            notes=[] if notes is None else notes,
        )
        if environment:
            _export_library_variables()
    except ValidationError as exc:
        raise ConfigurationError(_error_message(exc.errors()[0])) from None
    settings = Settings(**values)
    if "metrics_port" in flags and settings.is_metrics_port_of_kubernetes:
        raise ConfigurationError(
            f"--metrics-port must be PORT or HOST:PORT; it is {flags['metrics_port'][:60]!r}"
        )
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    _ = (
        settings.batches,
        settings.object_names,
        settings.hosted_model,
        settings.metrics_address,
        settings.folder,
    )
    _check_encoding(settings)
    try:
        resolve_parameters((settings.requested, DEFAULTS, RequestedParameters(width=512, height=512)), seed=0)
    except PromptFailed as exc:
        name, _, rest = str(exc).partition(" ")
        raise ConfigurationError(f"--{name.replace('_', '-')} {rest}") from None
    _check_limits(settings)
    run_id = settings.run_id or "made"
    if len(run_id) > 100 or not all(char.isalnum() or char in "._-" for char in run_id):
        raise ConfigurationError("--run-id must be at most 100 letters, digits, dots, dashes and underscores")


_LOCAL_PATHS: Final = (
    *("input_file", "log_file", "signature_font", "metrics_textfile"),
    *("model_cache", "lora_cache", "compile_cache"),
)
"""Options for files of this machine, which are neither recorded nor sent anywhere."""


def _check_encoding(settings: Settings) -> None:
    """Raise ConfigurationError for a value that is not UTF-8: no database stores it."""
    for option in options():
        value = getattr(settings, option.name)
        if not isinstance(value, str) or option.name in _LOCAL_PATHS:
            continue
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigurationError(f"{option.flag} ({option.variable}) is not UTF-8 text") from None


def _check_limits(settings: Settings) -> None:
    """Raise ConfigurationError if the flags request more than one prompt may, whatever the model is."""
    least = RequestedParameters(num_inference_steps=1, guidance_scale=0)
    try:
        settings.limits.check(resolve_parameters((settings.requested, least, SMALLEST_SIZE), seed=0))
    except PromptFailed as exc:
        raise ConfigurationError(f"the flags request more than one prompt may: {exc}") from None


def _error_message(error: Any) -> str:
    """Return pydantic's error as one line, without the value of a secret."""
    location = str(error["loc"][0])
    option = next((option for option in options() if option.variable.lower() == location), None)
    name = f"{option.flag} ({option.variable})" if option else location
    message = error["msg"].removeprefix("Value error, ")
    message = f"{message[:1].lower()}{message[1:]}"
    shown = "" if option is None or option.secret else f"; it is {str(error['input'])[:60]!r}"
    return f"{name}: {message}{shown}"


def _read(
    options: Sequence[Option],
    types: Mapping[str, Any],
    flags: Mapping[str, str],
    *,
    environment: bool,
    notes: list[str],
) -> dict[str, Any]:
    """Return every option's value by its name, in its declared type.

    Without ``environment``, only the flags are read. Raises pydantic's ValidationError (its locations are
    variables in lower case), and ConfigurationError for a secret's file or a ``.env`` that cannot be read.
    """
    fields: dict[str, Any] = {
        option.variable.lower(): (types[option.name], option.default) for option in options
    }
    level, default = fields["log_level"]
    fields["log_level"] = (Annotated[level, BeforeValidator(_level)], default)
    model = create_model("Environment", __base__=_Environment, **fields)
    model.flags_alone, model.notes = not environment, notes
    model.origins = {}
    model.secrets = {
        option.variable.lower(): tuple(name.lower() for name in option.also)
        for option in options
        if option.in_file
    }
    given = {option.variable.lower(): flags[option.name] for option in options if option.name in flags}
    try:
        values = model(**given).model_dump()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"the .env file cannot be read: {exc}") from exc
    return {option.name: values[option.variable.lower()] for option in options}


def _level(value: object) -> object:
    """Return a level of the log in the form that the option has: ``warn`` means WARNING."""
    level = str(value).strip().upper()
    level = "WARNING" if level == "WARN" else level
    return level if level in logging.getLevelNamesMapping() else value


_FILES: Final = (".env.local", ".env")
_LIBRARY_VARIABLES: Final = re.compile(
    r"(AWS|GOOGLE|HF|OTEL)_\w+|STORAGE_EMULATOR_HOST|(HTTPS?|ALL|NO)_PROXY|(REQUESTS|CURL)_CA_BUNDLE"
    r"|SSL_CERT_(FILE|DIR)|XDG_CACHE_HOME|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS",
    re.ASCII,
)
"""Variables that libraries read from the environment by themselves, such as credentials."""


def _export_library_variables() -> None:
    """Set the variables of ``.env.local`` and ``.env`` that libraries read, unless they are set already."""
    for file in _FILES:
        for name, value in dotenv_values(file).items():
            if value and _LIBRARY_VARIABLES.fullmatch(name) and not os.environ.get(name):
                os.environ[name] = value


def _first_line(name: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
        raise ConfigurationError(f"{name.upper()}_FILE names {path}, which cannot be read: {reason}") from exc
