"""What this machine can do, measured in seconds."""
