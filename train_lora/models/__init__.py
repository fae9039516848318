"""The networks: loading, saving, names, roles on one shared base, text encoding."""
