"""Tests of every part against the real thing, the development cluster that they run on, and the
demonstration."""
