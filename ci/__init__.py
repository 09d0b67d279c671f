"""CI entry points: `verify.sh` verifies any export, `matrix` the supported releases of dependencies."""
