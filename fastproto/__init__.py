# SPDX-License-Identifier: Apache-2.0
from fastproto._version import __version__
