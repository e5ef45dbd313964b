# SPDX-License-Identifier: Apache-2.0
"""The op as Triton kernels, for any GPU that Triton knows; see docs/kernels/triton.md.

Only ``support`` and ``configs`` can be imported where triton is not installed.
"""
