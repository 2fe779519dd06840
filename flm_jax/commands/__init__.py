"""The commands of `flm`: one module each, all started by `front`."""
