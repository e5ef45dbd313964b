# SPDX-License-Identifier: Apache-2.0
"""Runs the tests that take minutes each, which `make test` leaves out; writes what they said."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from records import write_campaign

PACKAGES = ("torch", "numpy", "nbclient", "highdicom")


class Outcomes:
    """How each test ended, by its name, and after how many seconds."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for the setup, the call and the teardown of each test."""
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 1)
        if not report.passed:
            test["outcome"] = report.outcome


def main() -> int:
    """Status of pytest; the record is written where all passed."""
    outcomes = Outcomes()
    status = int(pytest.main(["-m", "slow", *sys.argv[1:]], [outcomes]))
    if status == 0 and {test["outcome"] for test in outcomes.tests.values()} == {"passed"}:
        print(write_campaign("slow-tests", PACKAGES, tests=outcomes.tests))
    return status


if __name__ == "__main__":
    sys.exit(main())
