"""Other libraries' interfaces, translated into sftx."""
