"""Writes the report of the campaign after its last test."""

from helpers import hostile


def pytest_sessionfinish():
    hostile.write_report()
