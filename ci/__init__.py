"""What a CI runs: `verify.sh` for any export, `matrix` for the releases that this project supports."""
