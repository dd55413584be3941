# SPDX-License-Identifier: Apache-2.0
"""The commands of `gfast`, one file each; `gfast.cli` loads one when it is called."""
