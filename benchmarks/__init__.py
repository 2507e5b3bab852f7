"""Speed beside what users would pick instead; see ``python -m benchmarks --help``."""

# SPDX-License-Identifier: BSD-3-Clause
