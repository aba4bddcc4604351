"""Reads options by pydantic-settings: flags, then the environment, then ``.env.local``, then ``.env``.

A secret may also stand in a file that ``<NAME>_FILE`` names, as container platforms mount them; such a file
counts as the place where its name was given. Apart from ``settings`` so that only real work imports pydantic.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import create_model
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic.fields import FieldInfo

    from text2img.settings import Option


class _SecretFiles(PydanticBaseSettingsSource):
    """Secrets from the files that another source's ``<NAME>_FILE`` variables name."""

    def __init__(self, settings_cls: type[BaseSettings], source: PydanticBaseSettingsSource) -> None:
        super().__init__(settings_cls)
        self._variables = source.env_vars if isinstance(source, EnvSettingsSource) else {}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Unused: ``__call__`` reads all fields at once."""
        del field
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        secrets = self.settings_cls.secrets if issubclass(self.settings_cls, _Environment) else ()
        named = {name: self._variables.get(f"{name}_file") for name in secrets}
        return {name: _first_line(name, path) for name, path in named.items() if path}


class _Environment(BaseSettings):
    secrets: ClassVar[tuple[str, ...]] = ()
    flags_alone: ClassVar[bool] = False
    model_config = SettingsConfigDict(
        env_file=(".env", ".env.local"),  # the later beats the earlier
        env_ignore_empty=True,  # compose files pass what is unset as empty
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
        """Add the secrets' files behind the place that names them."""
        del file_secret_settings
        if cls.flags_alone:
            return (init_settings,)
        return (
            init_settings,
            env_settings,
            _SecretFiles(settings_cls, env_settings),
            dotenv_settings,
            _SecretFiles(settings_cls, dotenv_settings),
        )


def read(
    options: Sequence[Option], types: Mapping[str, Any], flags: Mapping[str, str], *, environment: bool
) -> dict[str, Any]:
    """Every option's value by its name, of its declared type; without ``environment`` from flags alone.

    Raises pydantic's ValidationError (its locations are variables in lower case), and ConfigurationError
    for a secret's file or a ``.env`` that cannot be read.
    """
    fields: dict[str, Any] = {
        option.variable.lower(): (types[option.name], option.default) for option in options
    }
    model = create_model("Environment", __base__=_Environment, **fields)
    model.flags_alone = not environment
    model.secrets = tuple(option.variable.lower() for option in options if option.secret)
    given = {option.variable.lower(): flags[option.name] for option in options if option.name in flags}
    try:
        values = model(**given).model_dump()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"the .env file cannot be read: {exc}") from exc
    return {option.name: values[option.variable.lower()] for option in options}


def _first_line(name: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
        raise ConfigurationError(f"{name.upper()}_FILE names {path}, which cannot be read: {reason}") from exc
