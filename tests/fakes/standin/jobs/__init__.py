"""Shadows the package `jobs` in pods of the image vpmoe/standin:dev: stand-ins of the roles, the real
entrypoint."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
