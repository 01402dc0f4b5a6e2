"""Which language is chosen, and that messages come in it."""

import gettext

import pytest

from afina import language

VARIABLES = ("AFINA_LANG", "LC_ALL", "LC_MESSAGES", "LANG", "LANGUAGE")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "en"),
        ({"LANG": "es_ES.UTF-8"}, "es"),
        ({"LANG": "es"}, "es"),
        ({"LANG": "es-419"}, "es"),
        ({"LANG": "ES_mx.iso88591"}, "es"),
        ({"LANG": "es_AR@euro"}, "es"),
        ({"LANG": "Spanish_Spain.1252"}, "es"),
        ({"LANG": "en_US.UTF-8"}, "en"),
        ({"LANG": "et_EE.UTF-8"}, "en"),
        ({"LANG": "est"}, "en"),
        ({"LANG": "eo"}, "en"),
        ({"LANG": "C"}, "en"),
        ({"LANG": ""}, "en"),
        ({"LANG": "es_ES.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "es_ES.UTF-8", "LC_ALL": ""}, "es"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "es_ES.UTF-8"}, "es"),
        ({"LANG": "es_ES.UTF-8", "LC_MESSAGES": "de_DE.UTF-8"}, "en"),
        ({"LC_MESSAGES": "es_ES.UTF-8", "LC_ALL": "fr_FR.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "es:en"}, "es"),
        ({"LANG": "es_ES.UTF-8", "LANGUAGE": "en"}, "en"),
        ({"LANG": "es_ES.UTF-8", "LANGUAGE": ""}, "es"),
        ({"LANG": "C.UTF-8", "LANGUAGE": "es"}, "en"),
        ({"LANG": "en_US.UTF-8", "AFINA_LANG": "es"}, "es"),
        ({"LANG": "es_ES.UTF-8", "AFINA_LANG": "en"}, "en"),
        ({"LANG": "es_ES.UTF-8", "AFINA_LANG": ""}, "es"),
    ],
)
def test_the_language_is_the_users(environment, expected, monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert language.chosen() == expected


def test_messages_come_in_the_language_of_the_moment(monkeypatch):
    monkeypatch.setenv("AFINA_LANG", "en")
    assert language._("{path} exists already.") == "{path} exists already."
    monkeypatch.setenv("AFINA_LANG", "es")
    assert language._("{path} exists already.").format(path="x") == "x ya existe."
    assert language._("Nobody wrote this.") == "Nobody wrote this."


def test_without_catalogues_everything_is_english(monkeypatch, tmp_path):
    """A package stripped of its catalogues still speaks."""
    monkeypatch.setattr(language, "CATALOGUES", tmp_path)
    language._catalogue.cache_clear()
    monkeypatch.setenv("AFINA_LANG", "es")
    try:
        assert language._("{path} exists already.") == "{path} exists already."
        assert type(language._catalogue("es")) is gettext.NullTranslations
    finally:
        language._catalogue.cache_clear()
