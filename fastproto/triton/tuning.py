# SPDX-License-Identifier: Apache-2.0
"""Plans."""

from __future__ import annotations

import functools

from fastproto.triton.configs import Chip, Plan, Shape, choose


@functools.cache
def plan_for(shape: Shape, chip: Chip) -> Plan:
    return choose(shape, chip)
