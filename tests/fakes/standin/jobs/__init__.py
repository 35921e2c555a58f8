"""Stands in front of the real `jobs` in pods of the image vpmoe/standin:dev: its own of each role; the real entrypoint."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
