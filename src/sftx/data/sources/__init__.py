"""From files, folders and Python rows to rows that were checked."""
