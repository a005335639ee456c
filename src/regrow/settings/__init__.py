"""The settings of each command, declared once: options, help, checks, ``run.json`` and command lines follow."""
