# SPDX-License-Identifier: Apache-2.0
"""Image file formats: one file each, and the table of them."""
