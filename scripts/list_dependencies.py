# SPDX-License-Identifier: Apache-2.0
"""Prints the dependencies of the package and of the named extras, one a line, for pip.

Lets the Makefile install them once and the package itself again after every change.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
wanted = list(project["dependencies"])
for extra in sys.argv[2:]:
    wanted += project["optional-dependencies"][extra]
print("\n".join(re.sub(r"\s+", "", requirement) for requirement in dict.fromkeys(wanted)))
