"""A suite in a pytest session of its own, as a third party would run it."""

import pytest


class _Outcomes:
    def __init__(self):
        self.reports = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.reports.append(report)

    def names(self, outcome):
        return {report.nodeid.partition("::")[2] for report in self.reports if report.outcome == outcome}


def run_file(folder, text, only=""):
    """The names of the tests of a test file that failed, and of those that passed.

    `folder` is a `tmp_path`; the file has its name too, since a module of a name is loaded once. Not by pytester, which
    forgets the modules that a session imports: torch does not survive a second import.
    """
    file, configuration, outcomes = folder / f"{folder.name}.py", folder / "pytest.ini", _Outcomes()
    file.write_text(text)
    configuration.write_text("[pytest]\naddopts = -q -p no:cacheprovider --import-mode=importlib\n")
    pytest.main(["-c", str(configuration), "-k", only, str(file)], plugins=[outcomes])
    assert outcomes.reports and not outcomes.names("skipped")
    return outcomes.names("failed"), outcomes.names("passed")


def run_suite(folder, kind, arguments, imports, only=""):
    """The same for the tests of a suite, without their parameters; of all, or of one test."""
    text = f"from imaml.testing import {kind}_conformance\n{imports}\nTestIt = {kind}_conformance({arguments})\n"
    outcomes = run_file(folder, text, only)
    return tuple({name.partition("::")[2].partition("[")[0] for name in names} for names in outcomes)
