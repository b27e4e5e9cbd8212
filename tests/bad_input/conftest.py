"""Writes the table of the campaign when its last test is over."""

from helpers import hostile


def pytest_sessionfinish():
    hostile.write_report()
