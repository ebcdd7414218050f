"""What the promise says, measured on a user's own model and rows."""
