"""Fused ops; each file reads top to bottom: literal reference, launchers, registration, public function."""
