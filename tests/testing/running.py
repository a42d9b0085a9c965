"""A suite in a pytest session of its own, as a third party would run it."""

import imaml.testing  # noqa: F401  (here, so that a session of pytester does not import it anew)


def run_suite(pytester, kind, arguments, imports, only=""):
    """The names of the tests that failed and of those that passed, without parameters; of all, or of one test."""
    pytester.makepyfile(
        f"from imaml.testing import {kind}_conformance\n{imports}\nTestIt = {kind}_conformance({arguments})\n"
    )
    passed, skipped, failed = pytester.inline_run("-q", "-p", "no:cacheprovider", "-k", only).listoutcomes()
    assert (passed or failed) and not skipped
    return ({report.nodeid.split("::")[-1].partition("[")[0] for report in reports} for reports in (failed, passed))
