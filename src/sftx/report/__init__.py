"""What a run tells: its records, its progress, its model card."""
