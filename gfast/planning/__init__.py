# SPDX-License-Identifier: Apache-2.0
"""What a training and its measurements will take: memory as it is allocated, time from flops and bytes."""
