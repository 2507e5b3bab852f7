"""CoPE's tasks: what contextual positions buy, on small models of one minute each."""

# SPDX-License-Identifier: BSD-3-Clause
