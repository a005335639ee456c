"""What the recipes about killed processes and failing disks share; Linux on x86-64 or aarch64."""
