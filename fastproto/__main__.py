# SPDX-License-Identifier: Apache-2.0
"""``python -m fastproto``: the program where its script is not on the path."""

from __future__ import annotations

import sys

from fastproto.cli import main

sys.exit(main())
