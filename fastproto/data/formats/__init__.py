# SPDX-License-Identifier: Apache-2.0
"""Image file formats: what of each is checked before SimpleITK reads it, and DICOM series."""
