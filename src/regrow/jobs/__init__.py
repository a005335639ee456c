"""The commands: settings to typed inputs, the work, and its record in a run folder; without printing."""
