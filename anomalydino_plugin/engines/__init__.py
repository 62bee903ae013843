"""What runs a backbone: torch, or OpenVINO on the CPU; one interface, chosen by name."""
